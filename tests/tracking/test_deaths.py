"""Jobs whose trackers raise, hang or are not there: all of them end as they would without."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flarebus.errors import ConfigError
from flarebus.recipe import FedAvgRecipe, add_experiment_tracking
from flarebus.tracking import group
from tests.tracking.conftest import FAKE, Jobs
from tests.tracking.fake_tracker import MadeTrackers
from tests.tracking.test_loading import hide

LIMIT_S = 60.0


def warnings_in(text: str) -> list[str]:
    """The warnings of trackers in a log."""
    return [line.partition(": ")[2] for line in text.splitlines() if " WARNING flarebus.tracking" in line]


def tracked(jobs: Jobs, config: dict[str, Any] | None = None, **sides: bool) -> FedAvgRecipe:
    recipe = jobs.recipe()
    add_experiment_tracking(recipe, FAKE, config, **sides)
    return recipe


def has_ended_well(run_dir: Path) -> bool:
    """Whether the job did all it has to do: both rounds, the model, the records of both sites."""
    lines = (run_dir / "server/site_metrics.jsonl").read_text().splitlines()
    return (
        (run_dir / "server/models/FL_global_model.safetensors").exists()
        and len((run_dir / "server/metrics.jsonl").read_text().splitlines()) == 2
        and len(lines) == 36
    )


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine that nobody listens on, and that nobody else can get."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_everything_goes_to_the_tracker(jobs: Jobs, made: MadeTrackers) -> None:
    """Parameters, records of both sites, metrics of rounds, files, and the end, in this order."""
    run_dir = jobs.run(tracked(jobs))

    (tracker,) = made.all
    assert has_ended_well(run_dir)
    assert tracker.run is not None
    assert (tracker.run.job_name, tracker.run.site, tracker.run.folder) == ("tracked", "", run_dir / "server")
    assert [call[0] for call in tracker.calls[:2]] == ["open", "params"]
    assert [call[0] for call in tracker.calls[-4:]] == ["artefact", "artefact", "artefact", "close"]
    assert {series for series, _ in tracker.of("scalars")} == {"", "site-1", "site-2"}
    assert tracker.of("close") == [("completed",)]


@pytest.mark.parametrize("sides", [{}, {"client_side": True, "server_side": False}])
@pytest.mark.parametrize("method", ["open", "params", "scalars", "text", "image", "tags", "close"])
def test_a_tracker_that_raises_costs_nothing_else(
    jobs: Jobs, made: MadeTrackers, method: str, sides: dict[str, bool]
) -> None:
    """Whatever it fails in, at the server or at a site: the job is complete, and its log says what failed."""

    def fail() -> None:
        raise ZeroDivisionError("the tracker is broken")

    made.faults[method] = fail

    run_dir = jobs.run(tracked(jobs, **sides))

    assert has_ended_well(run_dir)
    assert "ZeroDivisionError: the tracker is broken" in warnings_in(jobs.log(run_dir))[0]


@pytest.mark.parametrize("sides", [{}, {"client_side": True, "server_side": False}])
@pytest.mark.parametrize("method", ["open", "scalars", "close"])
def test_a_tracker_that_hangs_keeps_nobody(
    jobs: Jobs, made: MadeTrackers, monkeypatch: pytest.MonkeyPatch, method: str, sides: dict[str, bool]
) -> None:
    """All rounds are done while it hangs, and at the end it gets its time and no more."""
    go_on, hung = threading.Event(), threading.Event()

    def hang() -> None:
        hung.set()
        assert go_on.wait(LIMIT_S)

    made.faults[method] = hang
    monkeypatch.setattr(group, "FLUSH_S", 0.2)
    try:
        run_dir = jobs.run(tracked(jobs, **sides))
        assert not go_on.is_set()
    finally:
        go_on.set()

    assert hung.is_set()
    assert has_ended_well(run_dir)
    assert "given up, it did not finish in time" in "".join(warnings_in(jobs.log(run_dir)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"), [("mlflow", "MLFLOW_TRACKING_PASSWORD"), ("wandb", "WANDB_API_KEY")])
def test_a_server_that_cannot_be_reached_is_said_once(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, closed_port: int, name: str, key: str
) -> None:
    """The log has one line with the reason, one with what was lost, and no password."""
    pytest.importorskip(name)
    secret = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv(key, secret)
    url = f"http://127.0.0.1:{closed_port}"
    config: dict[str, Any] = {"tracking_uri": f"http://ada:${{{key}}}@127.0.0.1:{closed_port}"}
    if name == "wandb":
        monkeypatch.setenv("WANDB_BASE_URL", url)
        config = {"mode": "online"}
    recipe = jobs.recipe()
    add_experiment_tracking(recipe, name, config)

    run_dir = jobs.run(recipe)

    assert has_ended_well(run_dir)
    reason, lost = warnings_in(jobs.log(run_dir))
    assert f"127.0.0.1:{closed_port} cannot be reached: Connection refused" in reason
    assert "not delivered" in lost
    assert secret not in jobs.log(run_dir)


def test_secrets_of_errors_are_hidden(jobs: Jobs, made: MadeTrackers, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a library says may hold what it was called with: variables of the settings, logins in URLs, known keys."""
    monkeypatch.setenv("DATABASE", "correct-horse")
    monkeypatch.setenv("WANDB_API_KEY", "battery-staple")

    def fail() -> None:
        raise OSError("cannot open pg://ada:pass@host/x?token=abc with correct-horse, battery-staple")

    made.faults["open"] = fail

    run_dir = jobs.run(tracked(jobs, {"uri": "${DATABASE}"}))

    assert made.all[0].config == {"uri": "correct-horse"}
    (reason, _) = warnings_in(jobs.log(run_dir))
    assert reason.endswith("OSError: cannot open pg://***@host/x?token=*** with ***, ***")


def test_a_variable_that_is_not_set_is_said_in_the_log(jobs: Jobs, made: MadeTrackers) -> None:
    """It may be set elsewhere than where the recipe is made, so that is nothing to stop the job for."""
    run_dir = jobs.run(tracked(jobs, {"uri": "${FLAREBUS_NOT_SET}"}))

    assert has_ended_well(run_dir)
    assert "${FLAREBUS_NOT_SET}='not set'" in warnings_in(jobs.log(run_dir))[0]


def test_a_library_that_is_gone_by_the_start_stops_it(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A job that was made elsewhere says before it starts what is missing here."""
    pytest.importorskip("tensorboard")
    recipe = jobs.recipe()
    add_experiment_tracking(recipe, "tensorboard")
    folder = recipe.export(tmp_path / "job")
    hide(monkeypatch, "tensorboard")

    with pytest.raises(ConfigError, match="pip install 'flarebus\\[tensorboard\\]'"):
        jobs.run(FedAvgRecipe.load(folder))

    assert not jobs.events
