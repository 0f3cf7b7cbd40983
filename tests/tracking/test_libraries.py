"""Real jobs with the real libraries: what scripts log is found again by the libraries' own readers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flarebus.recipe import add_experiment_tracking
from tests.tracking.conftest import Jobs
from tests.tracking.readers import read

CONFIGS: dict[str, dict[str, Any]] = {"tensorboard": {}, "mlflow": {}, "wandb": {"mode": "offline"}}
MODULES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
SITES = ("site-1", "site-2")

pytestmark = [
    pytest.mark.slow,
    # What the libraries are not yet ready for, in themselves and among each other, is their business.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning"),
]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new store of MLflow: making one takes it longer than all the rest."""
    mlflow = pytest.importorskip("mlflow")
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{file}")
    return file


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> Path:
    """A store of this test, in a folder of its own."""
    (tmp_path / "store").mkdir()
    return Path(shutil.copy(empty_store, tmp_path / "store" / "mlflow.db"))


@pytest.fixture(params=sorted(CONFIGS))
def tracker(request: pytest.FixtureRequest) -> str:
    """Each of the trackers whose library is installed."""
    pytest.importorskip(MODULES[request.param])
    return str(request.param)


@pytest.fixture
def folder(tracker: str, jobs: Jobs, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the tracker at the server will write; MLflow is told so by its own variable."""
    if tracker != "mlflow":
        return jobs.folder / "runs/tracked/server"
    store: Path = request.getfixturevalue("store")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    return store.parent


def of_site(site: str) -> dict[str, list[tuple[int, float]]]:
    """The series that the script of a site writes with `flare.log`."""
    offset = 100.0 * int(site[-1])
    return {
        "loss": [(step, offset + step) for step in range(6)],
        "counted": [(0, offset), (1, offset + 1)],
        "f1": [(0, 0.5), (1, 0.5)],
    }


def has(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether all that is expected is there; pytest shows what is not."""
    assert {key: found.get(key) for key in expected} == expected
    return True


def test_the_server_tracks_every_site_and_the_aggregate(jobs: Jobs, tracker: str, folder: Path) -> None:
    """Each site's series stand apart, with step and round; and there are the aggregate, parameters and files."""
    recipe = jobs.recipe(train_args="--api-key abcdef123456")
    add_experiment_tracking(recipe, tracker, CONFIGS[tracker])

    run_dir = jobs.run(recipe)

    found = read(tracker, folder)
    assert set(found.scalars) == {"", *SITES}
    for site in SITES:
        series = found.scalars[site]
        offset = 100.0 * int(site[-1])
        assert has(series, of_site(site))
        assert series["round/accuracy"] == [(0, offset), (1, offset + 1)]
        assert {(0, 0.0), (3, 1.0)} <= set(series["round"])
        assert has(found.params[site], {"lr": "0.1", "layers": "[1, 2]"})
        assert "ada" in found.params[site].values()
        assert f"{site} in round 1" in found.texts[site].values()
        assert found.texts[site]["notes.txt"] == "words"
        assert "picture" in found.images[site]
    assert found.scalars[""]["round/accuracy"] == [(0, 150.0), (1, 151.0)]
    assert (
        found.params[""].items() >= {"num_rounds": "2", "workflow": "fedavg", "train_args": "--api-key '***'"}.items()
    )
    assert {"FL_global_model.safetensors", "best_FL_global_model.safetensors", "metrics.jsonl"} <= set(found.artefacts)
    assert "WARNING" not in jobs.log(run_dir)


def test_each_site_tracks_itself(jobs: Jobs, tracker: str) -> None:
    """On the client side a tracker of a site has what this site's script logs, and nothing of others."""
    recipe = jobs.recipe()
    add_experiment_tracking(recipe, tracker, CONFIGS[tracker], client_side=True, server_side=False)

    run_dir = jobs.run(recipe)

    for site in SITES:
        found = read(tracker, run_dir / site)
        assert set(found.scalars) == {site}
        assert has(found.scalars[site], of_site(site))
        assert has(found.params[site], {"num_rounds": "2", "lr": "0.1"})
        assert not found.artefacts
    assert {path.name for path in (run_dir / "server").iterdir()} == {
        "log.txt",
        "metrics.jsonl",
        "models",
        "rounds.sqlite",
        "site_metrics.jsonl",
    }


def test_sites_with_trainers_track_what_these_log(jobs: Jobs) -> None:
    """Where the script runs in a process of its own its records are looked into on their way; in real workers too."""
    pytest.importorskip("tensorboard")
    recipe = jobs.recipe(per_site_config={"site-1": {"launch_external_process": True}, "site-2": {}})
    add_experiment_tracking(recipe, "tensorboard", client_side=True)

    run_dir = jobs.run(recipe, debug=False)

    for site in SITES:
        for place in ("server", site):
            assert has(read("tensorboard", run_dir / place).scalars[site], of_site(site))


def test_a_failed_job_is_told_as_one(jobs: Jobs, tracker: str, folder: Path) -> None:
    """The tracker hears how the job ended, after what was measured until then."""
    (jobs.folder / "client.py").write_text(
        "import flarebus.client as flare\nflare.init()\nflare.receive()\n"
        "flare.log('loss', 1.5, 'SCALAR', global_step=7)\nraise ValueError('no data')\n"
    )
    recipe = jobs.recipe()
    add_experiment_tracking(recipe, tracker, CONFIGS[tracker])

    with pytest.raises(RuntimeError, match="no data"):
        jobs.run(recipe)

    found = read(tracker, folder)
    assert found.scalars["site-1"]["loss"] == [(7, 1.5)]
    said = {"tensorboard": ("state", "failed"), "mlflow": ("status", "FAILED"), "wandb": ("exit_code", "1")}
    name, value = said[tracker]
    assert found.params[""][name] == value


def test_mlflow_keeps_runs_where_it_is_told(jobs: Jobs, store: Path) -> None:
    """Store, experiment, name and tags are those of the settings, and files lie beside a store that is a file."""
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{store}"
    named = {"experiment_name": "trial", "run_name": "first", "run_tags": {"team": 7}, "experiment_tags": {"by": "ada"}}
    for _ in range(2):
        recipe = jobs.recipe()
        add_experiment_tracking(recipe, "mlflow", {"tracking_uri": uri, "kw_args": named, "log_artifacts": False})
        jobs.run(recipe)

    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("trial")
    runs = client.search_runs([experiment.experiment_id])
    assert experiment.tags["by"] == "ada"
    assert experiment.artifact_location.startswith(store.parent.as_uri())
    assert sorted(run.info.run_name for run in runs) == sorted(2 * ["first", "first/site-1", "first/site-2"])
    of_jobs = [run for run in runs if run.info.run_name == "first"]
    assert [run.data.tags["team"] for run in of_jobs] == ["7", "7"]
    assert [client.list_artifacts(run.info.run_id) for run in of_jobs] == [[], []]


def test_a_job_read_back_is_tracked_as_well(jobs: Jobs, tmp_path: Path) -> None:
    """Trackers are part of the job: an exported one has them in its description, without values of variables."""
    pytest.importorskip("tensorboard")
    recipe = jobs.recipe()
    add_experiment_tracking(recipe, "tensorboard", {"tb_folder": "${PLACE}/events"})
    folder = recipe.export(tmp_path / "job")
    loaded = type(recipe).load(folder)

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PLACE", str(tmp_path / "place"))
        jobs.run(loaded)

    assert loaded == recipe
    assert json.loads((folder / "job.json").read_text())["tracking"] == [
        {
            "tracker": "tensorboard",
            "config": {"tb_folder": "${PLACE}/events"},
            "server_side": True,
            "client_side": False,
        }
    ]
    assert sorted(path.name for path in (tmp_path / "place/events").iterdir()) == ["server", *SITES]
