"""JobTracking: from the events of a job to its trackers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flarebus.job.tracking_ref import TrackingRef
from flarebus.server.tracking import JobTracking
from tests.server.played import a_job
from tests.tracking.conftest import FAKE
from tests.tracking.fake_tracker import FakeTracker, MadeTrackers


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> MadeTrackers:
    found = MadeTrackers()
    monkeypatch.setattr(FakeTracker, "made", found)
    return found


def tracking(folder: Path, *refs: TrackingRef) -> JobTracking:
    return JobTracking(replace(a_job(), tracking=refs), folder)


def points(tracker: FakeTracker) -> list[tuple[Any, ...]]:
    return [(series, *point) for series, its in tracker.of("scalars") for point in its]


def test_metrics_of_a_round_are_those_that_counted(tmp_path: Path, made: MadeTrackers) -> None:
    """A result that was refused after all, or belongs to a round that was not committed, leaves nothing."""
    job = tracking(tmp_path, TrackingRef(FAKE, {}))
    job.tell("job_started", {})
    job.tell("round_started", {})
    job.tell("result_accepted", {"site": "lost", "metrics": {"loss": 9.0}})
    job.tell("round_started", {})
    for site, loss in (("a", 1.0), ("b", 2.0), ("bad", 3.0)):
        job.tell("result_accepted", {"site": site, "metrics": {"loss": loss, "note": "text"}})
    job.tell("result_refused", {"site": "bad"})
    job.tell("round_committed", {"round": 4, "metrics": {"loss": 1.5}})
    job.end("completed")

    (tracker,) = made.all
    assert points(tracker) == [
        ("a", "round/loss", 1.0, 4, 4),
        ("b", "round/loss", 2.0, 4, 4),
        ("", "round/loss", 1.5, 4, 4),
    ]


def test_models_and_reports_are_kept_and_nothing_else(tmp_path: Path, made: MadeTrackers) -> None:
    """Files of a workflow count as well; databases, logs and what trackers wrote do not."""
    files = ("models/a.pt", "models/a.safetensors", "metrics.jsonl", "cross_site/results.json", "plot.png")
    for name in (*files, "log.txt", "rounds.sqlite", "site_metrics.jsonl", "wandb/x.json", "deep/er/x.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    job = tracking(tmp_path, TrackingRef(FAKE, {}))
    job.tell("job_started", {})
    job.end("completed")

    assert made.all[0].of("artefact") == [
        ("a.pt", "model"),
        ("a.safetensors", "model"),
        ("metrics.jsonl", "report"),
        ("plot.png", "report"),
        ("results.json", "report"),
    ]


def test_without_trackers_at_the_server_nothing_happens(tmp_path: Path, made: MadeTrackers) -> None:
    """Trackers of sites are none of the server's."""
    job = tracking(tmp_path, TrackingRef(FAKE, {}, server_side=False, client_side=True))
    job.tell("job_started", {})
    job.tell("round_committed", {"round": 0, "metrics": {}})
    job.end("completed")

    assert made.all == []


def test_a_job_that_never_started_is_not_tracked(tmp_path: Path, made: MadeTrackers) -> None:
    """There is nothing to say about it."""
    tracking(tmp_path, TrackingRef(FAKE, {})).end("failed")

    assert made.all == []
