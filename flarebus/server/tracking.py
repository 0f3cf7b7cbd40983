"""JobTracking: tells the trackers at the server what happens in a job. It hears of it as any listener does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flarebus.job.definition import JobDefinition
from flarebus.tracking.group import Tracking, TrackingPlan
from flarebus.tracking.records import numbers_in
from flarebus.tracking.tracker import JOB

__all__ = ["JobTracking"]

_REPORTS = frozenset({".csv", ".html", ".json", ".md", ".png"})
# Folders that hold something else, trackers' own ones among them.
_NO_REPORTS = frozenset({"models", "mlartifacts", "tb_events", "wandb"})


class JobTracking:
    """The trackers at the server of one job; none, if the job wants none. One thread calls, the job's.

    Args:
        job: what runs.
        folder: the server's folder of the run.
    """

    def __init__(self, job: JobDefinition, folder: Path) -> None:
        self._plan = TrackingPlan.at_server(job)
        self._folder = folder
        self._tracking: Tracking | None = None
        # Metrics that came with results, which the controller may still refuse.
        self._of_results: dict[str, dict[str, float]] = {}

    def tell(self, event: str, fields: Mapping[str, Any]) -> None:
        """Something happened; returns at once."""
        if event == "job_started" and self._plan.refs:
            self._tracking = Tracking(self._plan, self._folder)
        if self._tracking is None:
            return
        if event == "site_metrics":
            self._tracking.records(fields["site"], fields["records"])
        elif event == "round_started":
            self._of_results.clear()
        elif event == "result_accepted":
            self._of_results[fields["site"]] = dict(numbers_in(fields["metrics"]))
        elif event == "result_refused":
            self._of_results.pop(fields["site"], None)
        elif event == "round_committed":
            for site, metrics in self._of_results.items():
                self._tracking.round_metrics(site, fields["round"], metrics)
            self._of_results.clear()
            self._tracking.round_metrics(JOB, fields["round"], dict(numbers_in(fields["metrics"])))

    def end(self, state: str) -> None:
        """The job has ended, and all files are written: track them, and give the trackers some time.

        Args:
            state: `completed`, `failed` or `aborted`.
        """
        if self._tracking is None:
            return
        for path, kind in _artefacts(self._folder):
            self._tracking.artefact(path, kind)
        self._tracking.end(state)


def _artefacts(folder: Path) -> Iterator[tuple[Path, str]]:
    """What is worth keeping in the folder of a run, with what it is."""
    for path in sorted((folder / "models").glob("*")):
        yield path, "model"
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in _NO_REPORTS]
    for place in (folder, *folders):
        for path in sorted(place.iterdir()):
            if path.is_file() and (path.suffix in _REPORTS or path.name == "metrics.jsonl"):
                yield path, "report"
