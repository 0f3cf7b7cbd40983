"""Cross-site evaluation over the real bus: known answers, sites that fail or die, trainers, files to begin with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flarebus.errors import ConfigError
from flarebus.recipe import (
    CrossSiteEvalRecipe,
    CyclicRecipe,
    FedAvgRecipe,
    FrameworkType,
    Recipe,
    SimEnv,
    SwarmRecipe,
    add_cross_site_evaluation,
)

# The model of a site is what it trained last: what it received plus its number. What a site says of a model is the
# model's first weight and its own number. Faults: name of a site -> what goes wrong there.
SCRIPT = """
import json
import os
import signal
import sys
import threading

import numpy as np

import flarebus.client as flare

faults, size = json.loads(sys.argv[1]), int(sys.argv[2])
flare.init()
fault = faults.get(flare.get_site_name(), "")
number = int(flare.get_site_name()[-1])
own = np.full(size, 100.0 * number, np.float32)
while flare.is_running():
    model = flare.receive()
    if flare.is_submit_model():
        if fault == "no model":
            raise FileNotFoundError("best.npy")
        flare.send(flare.FLModel(params={"w": own}))
        own = own + 1e6  # what was submitted must not change
    elif flare.is_evaluate():
        weight = float(model.params["w"][-1])
        assert model.params["w"].shape == (size,)
        if fault == "raise" or (fault == "raise once" and weight == 103.0):
            raise ValueError("no data today")
        if fault == "die" and weight > 200:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang" and weight > 200:
            threading.Event().wait(5)
        metric = float("nan") if fault == "nan" else weight + number / 10
        flare.send(flare.FLModel(metrics={"v": metric, "rate": model.params.get("rate")}))
    else:
        own = model.params["w"] + number
        flare.send(flare.FLModel(params={"w": own.copy()}, metrics={"accuracy": model.current_round}))
"""
SRV, BEST = "SRV_FL_global_model.safetensors", "SRV_best_FL_global_model.safetensors"


def executed(recipe: Recipe, tmp_path: Path, n: int, threads: int = 2) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and gaps of a run."""
    run = recipe.execute(SimEnv(num_clients=n, num_threads=threads, workspace_root=tmp_path / "runs"))
    folder = Path(str(run.get_result())) / "server" / "cross_site_val"
    assert run.get_status() == "completed"
    return (
        json.loads((folder / "cross_val_results.json").read_text()),
        json.loads((folder / "cross_val_gaps.json").read_text()),
    )


def trained(tmp_path: Path, faults: Mapping[str, str], size: int = 4, n: int = 3, **changes: Any) -> FedAvgRecipe:
    """Two rounds from 100: the mean of 1, 2 and 3 more each time, which is 102 and 104."""
    script = tmp_path / "client.py"
    script.write_text(SCRIPT)
    return FedAvgRecipe(
        **{
            "name": "evaluated",
            "model": {"w": np.full(size, 100, np.float32)},
            "min_clients": n,
            "num_rounds": 2,
            "train_script": str(script),
            "train_args": f"'{json.dumps(faults)}' {size}",
            "framework": FrameworkType.NUMPY,
            "hyper_params": {"rate": 0.5},
            **changes,
        }
    )


MODELS = {"site-1": 103.0, "site-2": 104.0, "site-3": 105.0, SRV: 104.0, BEST: 102.0}


def row(site: str, owners: Mapping[str, float]) -> dict[str, Any]:
    """What `site` says of models."""
    return {owner: {"v": pytest.approx(value + int(site[-1]) / 10), "rate": 0.5} for owner, value in owners.items()}


@pytest.mark.parametrize(
    ("size", "external"), [(4, False), (400_000, False), (400_000, True)], ids=["small", "big", "external"]
)
def test_every_model_on_every_site(tmp_path: Path, size: int, external: bool) -> None:
    """Known answers, for models that ride in messages and such that are fetched, and whatever the script does next."""
    recipe = trained(tmp_path, {}, size, launch_external_process=external)
    add_cross_site_evaluation(recipe)
    results, gaps = executed(recipe, tmp_path, 3)

    assert results == {site: row(site, MODELS) for site in ("site-1", "site-2", "site-3")}
    assert gaps == {"models": {}, "evaluations": {}}


@pytest.mark.parametrize("kind", [SwarmRecipe, CyclicRecipe])
def test_after_other_ways_of_learning(tmp_path: Path, kind: type[Recipe]) -> None:
    """Sites that steered, and sites that took turns, are as good as those of federated averaging."""
    script = tmp_path / "client.py"
    script.write_text(SCRIPT)
    recipe = kind(
        model={"w": np.full(4, 100, np.float32)},
        min_clients=3,
        num_rounds=2,
        train_script=str(script),
        train_args="{} 4",
        framework=FrameworkType.NUMPY,
    )
    add_cross_site_evaluation(recipe)
    results, gaps = executed(recipe, tmp_path, 3)

    # Cyclic: each adds its number to what the one before has made of it, in two rounds.
    models = MODELS if kind is SwarmRecipe else {"site-1": 107, "site-2": 109, "site-3": 112, SRV: 112, BEST: 106}
    assert gaps == {"models": {}, "evaluations": {}}
    for site, found in results.items():
        assert {owner: metrics["v"] for owner, metrics in found.items()} == {
            owner: pytest.approx(value + int(site[-1]) / 10) for owner, value in models.items()
        }


def test_sites_that_fail_leave_gaps_with_reasons(tmp_path: Path) -> None:
    """One has no model, one's validator raises for one model, one measures NaN: the job is completed all the same."""
    recipe = trained(tmp_path, {"site-1": "no model", "site-2": "raise", "site-3": "nan"})
    add_cross_site_evaluation(recipe)
    results, gaps = executed(recipe, tmp_path, 3)

    owners = {owner: value for owner, value in MODELS.items() if owner != "site-1"}
    assert results == {
        "site-1": row("site-1", owners),
        "site-3": {owner: {"v": None, "rate": 0.5} for owner in owners},
    }
    assert gaps["models"].keys() == {"site-1"}
    assert "FileNotFoundError: best.npy" in gaps["models"]["site-1"]
    assert gaps["evaluations"].keys() == {"site-2", "site-3"}
    assert all("no data today" in reason for reason in gaps["evaluations"]["site-2"].values())
    assert gaps["evaluations"]["site-3"] == dict.fromkeys(owners, "v is nan")


def test_a_site_that_is_late_holds_nobody_up_twice(tmp_path: Path) -> None:
    """It is asked for no more after that, and its model is evaluated elsewhere."""
    recipe = trained(tmp_path, {"site-2": "hang"}, n=2, model={"w": np.full(4, 200, np.float32)}, num_rounds=1)
    add_cross_site_evaluation(recipe, validation_timeout=3)
    results, gaps = executed(recipe, tmp_path, 2)

    assert results == {"site-1": row("site-1", {"site-1": 201.0, "site-2": 202.0, SRV: 201.5, BEST: 200.0})}
    late = dict.fromkeys(("site-1", SRV, BEST), "it took too long for the model of site-2")
    assert gaps == {"models": {}, "evaluations": {"site-2": {"site-2": "no answer within 3 s", **late}}}


def test_a_site_that_dies_leaves_gaps(tmp_path: Path) -> None:
    """Its process is killed while it evaluates its own model, which is lost with it; the others go on to the end."""
    size = 400_000
    recipe = trained(tmp_path, {"site-3": "die"}, size, model={"w": np.full(size, 198, np.float32)}, num_rounds=1)
    add_cross_site_evaluation(recipe)
    results, gaps = executed(recipe, tmp_path, 3, threads=3)

    others = {"site-1": 199.0, "site-2": 200.0, SRV: 200.0, BEST: 198.0}
    assert {site: row(site, others) for site in ("site-1", "site-2")} == {
        site: {owner: found for owner, found in results[site].items() if owner != "site-3"}
        for site in ("site-1", "site-2")
    }
    assert set(gaps["evaluations"]["site-3"]) | set(results.get("site-3", {})) == {*others, "site-3"}
    reasons = " ".join(reason for site in gaps["evaluations"].values() for reason in site.values())
    assert "lost: it is not offered" in reasons or "was killed by SIGKILL" in reasons


def test_files_at_every_site_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints under names of their own, and the models that the sites have; from a folder that was read back."""
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("evaluate.py").write_text(SCRIPT)
    np.savez(tmp_path / "one.npz", w=np.full(4, 1, np.float32))
    np.savez(tmp_path / "two.npz", w=np.full(4, 2, np.float32))
    recipe = CrossSiteEvalRecipe(
        server_models={"one": "one.npz", "two": "two.npz"},
        eval_script="evaluate.py",
        eval_args="{} 4",
        framework=FrameworkType.NUMPY,
        hyper_params={"rate": 0.5},
        participating_clients=["site-1", "site-3"],
    )
    results, gaps = executed(Recipe.load(recipe.export(tmp_path / "job")), tmp_path, 3)

    models = {"site-1": 100.0, "site-3": 300.0, "SRV_one": 1.0, "SRV_two": 2.0}
    assert results == {site: row(site, models) for site in ("site-1", "site-3")}
    assert gaps == {"models": {}, "evaluations": {}}


def test_arrays_are_validated_without_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And who has no model says so."""
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "one.npy", np.array([3.0, -4.0]))
    recipe = CrossSiteEvalRecipe(server_models="one.npy", framework=FrameworkType.NUMPY)
    results, gaps = executed(recipe, tmp_path, 2)

    expected = {"mean": -0.5, "std": 3.5, "max_abs": 4.0, "l2_norm": 5.0, "not_finite": 0}
    assert results == {site: {"SRV_one.npy": expected} for site in ("site-1", "site-2")}
    assert all("there is no models/best_numpy.npy" in reason for reason in gaps["models"].values())
    assert len(gaps["models"]) == 2


def test_a_file_that_is_gone_is_said_before_anything_starts(tmp_path: Path) -> None:
    """With its name and place."""
    recipe = CrossSiteEvalRecipe(server_models={"old": "/nowhere/old.npy"}, framework=FrameworkType.NUMPY)

    with pytest.raises(ConfigError, match=r"models\['old'\]='/nowhere/old.npy'"):
        executed(recipe, tmp_path, 2)
