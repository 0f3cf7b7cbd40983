"""Tracking: all trackers of one run at one place, the server or a site. What happens goes to each of them.

`TrackingPlan` is what a worker has to be told to track its sites; it is plain data, without secrets.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flarebus.job.definition import JobDefinition
from flarebus.job.secrets import expand, hide_secrets
from flarebus.job.tracking_ref import TrackingRef
from flarebus.tracking.loading import load_tracker
from flarebus.tracking.params import params_of_job
from flarebus.tracking.records import RecordWriter, size_of
from flarebus.tracking.thread import TrackerThread
from flarebus.tracking.tracker import JOB, Plain, Point, RunInfo, Tracker

__all__ = ["FLUSH_S", "Tracking", "TrackingPlan"]

# How long trackers may take, all at once, to deliver what is left when a job has ended,
FLUSH_S = 30.0
# and when it was aborted.
ABORT_FLUSH_S = 5.0
# Characters of a reason in the log; libraries show all the values that they could not write.
_MAX_REASON = 300


@dataclass(frozen=True, slots=True)
class TrackingPlan:
    """Whom to tell about a job, and what does not change in it.

    Args:
        job_name: name of the job.
        job_id: identity of this run.
        params: its parameters.
        refs: the trackers.
    """

    job_name: str
    job_id: str
    params: Mapping[str, Plain]
    refs: Sequence[TrackingRef]

    @classmethod
    def at_server(cls, job: JobDefinition) -> TrackingPlan:
        """What the server tracks."""
        return cls(job.name, job.job_id, params_of_job(job), [ref for ref in job.tracking if ref.server_side])

    @classmethod
    def at_sites(cls, job: JobDefinition) -> TrackingPlan:
        """What each site tracks."""
        return cls(job.name, job.job_id, params_of_job(job), [ref for ref in job.tracking if ref.client_side])

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a worker."""
        refs = [ref.to_json() for ref in self.refs]
        return {"job_name": self.job_name, "job_id": self.job_id, "params": dict(self.params), "refs": refs}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrackingPlan:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: a tracker is not described as it should be.
        """
        refs = [TrackingRef.from_json(each) for each in data["refs"]]
        return cls(data["job_name"], data["job_id"], data["params"], refs)


class Tracking:
    """The trackers of a plan, each on its thread, from now on. Any thread may call; no call blocks except `end`.

    Args:
        plan: which, and of what.
        folder: absolute; where files go that have no other place.
        site: who tracks: a site, or `JOB` for the server.
    """

    def __init__(self, plan: TrackingPlan, folder: Path, site: str = JOB) -> None:
        self._site = site
        run = RunInfo(plan.job_name, plan.job_id, site, folder)
        self._threads = [_start(ref, run) for ref in plan.refs]
        self._writers = [RecordWriter() for _ in self._threads]
        self._put_all(lambda tracker: tracker.params(site, plan.params))

    def records(self, site: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Metric records of a site, as `decode_batch` makes them; kept as they are until they are written."""
        nbytes = size_of(records)
        for thread, writer in zip(self._threads, self._writers, strict=True):
            thread.put(partial(_write_records, writer, site, records), len(records), nbytes)

    def round_metrics(self, series: str, round: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a round as a whole, of a site or the aggregate."""
        now = time.time()
        points = [Point(f"round/{key}", value, round, round, now) for key, value in metrics.items()]
        if points:
            self._put_all(lambda tracker: tracker.scalars(series, points), len(points))

    def artefact(self, path: Path, kind: str) -> None:
        """A file of the job that is complete."""
        self._put_all(lambda tracker: tracker.artefact(path, kind))

    def end(self, state: str) -> None:
        """The job has ended: let the trackers deliver what is left, for a bounded time.

        Args:
            state: `completed`, `failed` or `aborted`.
        """
        self.end_all([self], state)

    @staticmethod
    def end_all(all_of_them: Sequence[Tracking], state: str) -> None:
        """As `end`, for several at once in the time of one."""
        threads = [thread for each in all_of_them for thread in each._threads]
        limit_s = ABORT_FLUSH_S if state == "aborted" else FLUSH_S
        for thread in threads:
            thread.end(state, limit_s)
        deadline = time.monotonic() + limit_s
        for thread in threads:
            thread.wait(max(0.0, deadline - time.monotonic()))

    def _put_all(self, write: Any, n_records: int = 1) -> None:
        def counted(tracker: Tracker) -> int:
            write(tracker)
            return 0

        for thread in self._threads:
            thread.put(counted, n_records, is_needed=True)


def _write_records(writer: RecordWriter, site: str, records: Sequence[Mapping[str, Any]], tracker: Tracker) -> int:
    return writer.write(tracker, site, records)


def _start(ref: TrackingRef, run: RunInfo) -> TrackerThread:
    def make() -> Tracker:
        tracker = load_tracker(ref.tracker)(expand(ref.config))
        tracker.open(run)
        return tracker

    def in_words(error: BaseException) -> str:
        # Without its traceback: what a library says and was called with may hold what nobody is to read.
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return hide_secrets(text, ref.config)[:_MAX_REASON]

    name = f"{ref.tracker} of {run.site}" if run.site else ref.tracker
    return TrackerThread(name, make, in_words, run.site)
