"""Tournament over the real bus, in one process: the best model wins, and bad ones do not take part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from flarebus.errors import JobFailed
from flarebus.recipe import SimEnv, WorkflowRecipe

# Each site adds its own number to what it received; site-3 sends nonsense.
SCRIPT = """
import numpy as np

import flarebus.client as flare

flare.init()
number = int(flare.get_site_name()[-1])
while flare.is_running():
    params = flare.receive().params
    flare.send(flare.FLModel(params={"w": np.zeros(9) if number == 3 else params["w"] + number}))
"""
# All sites want the weights to be five.
JUDGE = """
from flarebus_tournament import Scorer


class ToFive(Scorer):
    def loss(self, params, site):
        return abs(params["w"] - 5).sum()
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    tmp_path.joinpath("client.py").write_text(SCRIPT)
    tmp_path.joinpath("judge.py").write_text(JUDGE)
    return tmp_path


def play(code: Path, events: list[Any], rounds: int, min_clients: int) -> Path:
    """Play so many rounds from zeros; the folder of the run."""
    recipe = WorkflowRecipe(
        workflow="tournament",
        settings={"num_rounds": rounds, "min_clients": min_clients},
        model={"w": np.zeros(2)},
        train_script=str(code / "client.py"),
        executors=[({"class_path": "judge.ToFive"}, ["score"])],
    )
    extra = {"on_event": lambda event, fields: events.append((event, fields))}
    env = SimEnv(num_clients=3, debug=True, workspace_root=code / "runs", extra=extra)
    return Path(str(recipe.execute(env).get_result()))


def test_the_best_candidate_goes_on(code: Path) -> None:
    """Site 2 comes nearer to five, site 1 hits it, and then nobody is better than the model that reigns."""
    events: list[tuple[str, dict[str, Any]]] = []
    run_dir = play(code, events, rounds=4, min_clients=2)

    assert [fields["site"] for event, fields in events if event == "candidate_won"] == [
        "site-2",
        "site-2",
        "site-1",
        "",
    ]
    assert [fields["metrics"]["loss"] for event, fields in events if event == "round_committed"] == [10, 6, 2, 0]
    assert load_file(run_dir / "server" / "models" / "FL_global_model.safetensors")["w"].tolist() == [5.0, 5.0]
    refused = {fields["site"] for event, fields in events if event == "result_refused"}
    assert refused == {"site-3"}


def test_too_few_candidates_fail_the_job(code: Path) -> None:
    """A candidate of another shape is none, and says so."""
    with pytest.raises(JobFailed, match=r"site-3.*shape \(9,\)"):
        play(code, [], rounds=1, min_clients=3)
