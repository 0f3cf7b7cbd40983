"""ServerJob: one job at its server; what a controller sees as `Job`.

All state belongs to the thread that runs the controller. Everything else (the bus, the pool of workers, somebody who
aborts) puts an event into its agenda: no locks, no polling. Tasks and results are the desk's; this is about who is
there, what is kept, and how it ends.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flarebus.cell import Cell
from flarebus.client.metric_batch import MAX_BATCH_BYTES
from flarebus.delivery import Delivery
from flarebus.errors import DecodeError, FlarebusError, JobFailed, UsageError
from flarebus.job.definition import JobDefinition
from flarebus.server.archive import Archive
from flarebus.server.pool import HostEnd
from flarebus.server.site_metrics import read_batch
from flarebus.tasks.agenda import Agenda
from flarebus.tasks.desk import Desk
from flarebus.tasks.open_task import OpenTask, named
from flarebus.tasks.parcels import Packer
from flarebus.tasks.roster import Roster
from flarebus.tasks.turns import Turns
from flarebus.workflow.controller import Report, Result, Task
from flarebus.workflow.filter import FilterChain

__all__ = ["ServerJob"]

log = logging.getLogger(__name__)

# A batch of metric records and what goes around it.
RECORDS_BYTES = MAX_BATCH_BYTES + 100_000
# A site that took its worker down this often without an answer in between is given up.
MAX_ATTEMPTS = 3


class ServerJob:
    """A job while it runs.

    Args:
        definition: what to run.
        cell: the job's own cell.
        archive: where models, rounds and metrics go.
        on_event: told everything that happens, on the controller's thread.
        staging: folder for results in files, or None for memory.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        definition: JobDefinition,
        cell: Cell,
        archive: Archive,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
        staging: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.definition = definition
        self.roster = Roster()
        self._cell = cell
        self._archive = archive
        self._on_event = on_event
        self._agenda = Agenda(clock)
        filters = (
            FilterChain.build(definition.output_filters, definition.code_dir, "output_filters"),
            FilterChain.build(definition.input_filters, definition.code_dir, "input_filters"),
        )
        packer = Packer(cell, self.roster, self.job_id, "server", filters)
        self._desk = Desk(cell, self.roster, self._agenda, self, packer, itertools.count(1), staging=staging)
        self._turns = Turns(self._desk, self.roster, self._agenda, self)
        self._attempts: dict[str, int] = {}
        # For a controller that watches; no other one takes them out.
        self._reports: deque[Report] | None = deque() if definition.sites_steer else None
        self._listener_complaint = logging.ERROR
        cell.inbox("task", "join", lambda delivery: self._agenda.post(lambda: self._join(delivery)))
        cell.inbox("task", "result", self._desk.result_came, room=self._desk.room)
        cell.inbox("task", "results", self._desk.results_came)
        cell.inbox("task", "report", lambda delivery: self._agenda.post(lambda: self._reported(delivery)))
        cell.inbox("metric", "records", self._fetch_records)
        cell.on_gone(lambda names: self._agenda.post(lambda: self._gone(names)))

    # -- what a controller calls --

    @property
    def name(self) -> str:
        """Name of the job."""
        return self.definition.name

    @property
    def job_id(self) -> str:
        """Identity of this run."""
        return self.definition.job_id

    @property
    def sites(self) -> Sequence[str]:
        """Sites that are there or coming back, sorted."""
        return self.roster.alive

    def initial_params(self) -> dict[str, Any]:
        """The last committed model, or the one the job came with."""
        return self._archive.current_params()

    def rounds(self, num_rounds: int) -> Iterator[int]:
        """Rounds that are not committed yet."""
        for number in range(self._archive.next_round, num_rounds):
            self._agenda.take_waiting()
            yield number

    def broadcast(self, task: Task | Mapping[str, Task], **how: Any) -> Iterator[Result]:
        """Give a task out and yield results; see `TaskGiver.broadcast`."""
        return self._desk.broadcast(task, **how)

    def send(self, task: Task, sites: Sequence[str], **how: Any) -> Result:
        """Give a task to the first site that is there; see `TaskGiver.send`."""
        return self._turns.send(task, sites, **how)

    def relay(self, task: Task, sites: Sequence[str], **how: Any) -> Iterator[Result]:
        """Give a task to one site after the other; see `TaskGiver.relay`."""
        return self._turns.relay(task, sites, **how)

    def cancel(self, reason: str) -> None:
        """End the broadcast that runs now; see `TaskGiver.cancel`."""
        self._turns.cancel(reason)

    def reports(self, timeout: float | None = None) -> Iterator[Report]:
        """What sites report; see `Job.reports`."""
        if self._reports is None:
            raise UsageError("the sites of this job do not steer: there are no reports")
        while True:
            deadline = None if timeout is None else self._agenda.clock() + timeout
            while not self._reports:
                if not self._agenda.take(deadline):
                    return
            yield self._reports.popleft()

    def models(self) -> dict[str, dict[str, Any]]:
        """The models that are here, by name; see `Job.models`."""
        return self._archive.models()

    def pages(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Writable arrays on the pages of the next model file."""
        return self._archive.pages(params)

    def commit(self, round: int, params: dict[str, Any], metrics: Mapping[str, Any], *, best: bool = False) -> None:
        """End a round; its durable part goes on while the next one begins."""
        self._archive.commit(round, params, metrics, best)
        self.fire("round_committed", round=round, metrics=dict(metrics), **self._archive.last_round_facts)

    def note_round(self, round: int, metrics: Mapping[str, Any], sites: Sequence[str], *, by: str) -> None:
        """Keep the metrics of a round that a site has committed; see `Job.note_round`."""
        self._archive.note_round(round, metrics, sites)
        self.fire("round_committed", round=round, metrics=dict(metrics), by=by, **self._archive.last_round_facts)

    def keep(self, params: dict[str, Any], *, best: bool = False) -> None:
        """Keep a model that sites have made; see `Job.keep`."""
        self._archive.keep(params, best)

    def save_report(self, path: str, report: Mapping[str, Any]) -> None:
        """Write a report into the server's folder."""
        log.info("report written to %s", self._archive.report(path, report))

    def fire(self, event: str, **fields: Any) -> None:
        """Tell the listener."""
        if self._on_event is not None:
            self._on_event(event, fields)

    # -- what others call, from any thread --

    def abort(self, by: str) -> None:
        """End the job as soon as the controller's thread looks up."""
        self._agenda.abort(by)

    def host_died(self, end: HostEnd, restart: Callable[[], None]) -> None:
        """A host's process ended; `restart`, if that is worth trying, is called on the controller's thread."""

        def note() -> None:
            self._host_died(end)
            if end.will_restart and not self._agenda.is_over:
                restart()

        self._agenda.post(note)

    # -- on the controller's thread from here on --

    def wait_for_sites(self, sites: Sequence[str], timeout: float) -> None:
        """Return when every one of `sites` has joined or is known to be dead.

        Raises:
            JobFailed: some did neither within `timeout` seconds, or none is left.
        """
        deadline = self._agenda.clock() + timeout
        while missing := [site for site in sites if self.roster.host_of(site) is None and site not in self.roster.dead]:
            if not self._agenda.take(deadline):
                raise JobFailed(f"{len(missing)} sites did not start within {timeout:g} s: {', '.join(missing[:5])}")
        if not self.roster.alive:
            reasons = sorted(set(self.roster.dead.values()))
            raise JobFailed("no site could be started: " + "; ".join(reasons[:3]))

    def end(self, reason: str, aborted: bool = False) -> list[str]:
        """Tell every host that there is no more work; the hosts that were told, which are those that are there.

        Whoever still has something to say is answered, but nothing counts any more.
        """
        self._desk.close()
        self._agenda.close()
        hosts = self.roster.hosts
        for host in hosts:
            self._cell.notify(host, "task", "end", {"reason": reason, "aborted": aborted})
        return hosts

    def task_closed(self, open_task: OpenTask) -> None:
        """See `DeskOwner`."""
        self._archive.sites_done(open_task.metrics, open_task.tally.failed)

    def site_answered(self, site: str) -> None:
        """See `DeskOwner`."""
        self._attempts.pop(site, None)

    def _join(self, delivery: Delivery) -> None:
        try:
            fields = delivery.plain()
            announced, takes = [named(site) for site in fields["sites"]], fields.get("takes", 0)
            external = [named(site) for site in fields.get("external", ())]
            if type(takes) is not int:
                raise TypeError("takes a number of bytes that is none")
        except (DecodeError, KeyError, TypeError) as problem:
            delivery.fail(DecodeError(f"the sites that join cannot be read: {problem}"))
            return
        # Who took its worker down too often stays dead, or it would do so in every round.
        sites = [site for site in announced if self._attempts.get(site, 0) < MAX_ATTEMPTS]
        if self._agenda.is_over:
            delivery.fail(JobFailed("the job has ended"))
            return
        self.roster.join(delivery.source, sites, [site for site in external if site in sites], takes)
        delivery.reply({"job_id": self.job_id})
        self._tell_directory(delivery.source)
        self._desk.joined(delivery.source, sites)
        self._note_all(sites, "site_joined")

    def _gone(self, names: Sequence[str]) -> None:
        for name in names:
            # Also if its process was seen to end before: the last it said came after that.
            self._host_left(name, "its connection was lost")

    def _host_left(self, host: str, reason: str) -> None:
        was_there = host in self.roster.hosts
        self.roster.leave(host)
        self._desk.lost(host)
        if was_there and not self._agenda.is_over:
            self._note_all(self.roster.sites_of(host), "site_lost", reason=reason)

    def _host_died(self, end: HostEnd) -> None:
        log.warning("%s: %s", end.address, end.reason)
        self._host_left(end.address, end.reason)
        sites = self.roster.sites_of(end.address) or end.sites
        culprit = end.culprit
        if culprit is not None and culprit in sites:
            self._attempts[culprit] = self._attempts.get(culprit, 0) + 1
            if self._attempts[culprit] >= MAX_ATTEMPTS:
                self._bury(culprit, f"{end.reason}, {MAX_ATTEMPTS} times")
        if not end.will_restart:
            for site in sites:
                self._bury(site, end.reason)

    def _bury(self, site: str, reason: str) -> None:
        self._desk.fail(site, reason)
        self.roster.bury(site, reason)
        self._tell_directory()
        self._note_all([site], "site_dead", reason=reason)

    def _tell_directory(self, newcomer: str = "") -> None:
        """Tell hosts whose sites steer who is where."""
        if self.definition.sites_steer:
            directory = self.roster.to_plain()
            # The newcomer first: another one that hears of it gives it tasks at once, and it takes them from hosts that
            # it knows.
            for host in sorted(self.roster.hosts, key=lambda host: host != newcomer):
                self._cell.notify(host, "task", "directory", directory)

    def _reported(self, delivery: Delivery) -> None:
        try:
            fields = delivery.plain()
            report = Report(named(fields["site"]), named(fields["event"]), dict(fields["fields"]))
        except (DecodeError, KeyError, TypeError, ValueError) as problem:
            log.warning("a report of %s cannot be read: %s", delivery.source, problem)
            return
        if self.roster.runs(delivery.source, report.site):
            self.fire("site_report", site=report.site, what=report.event, fields=report.fields)
            self._note(report)

    def _note_all(self, sites: Sequence[str], event: str, **fields: Any) -> None:
        for site in sites:
            self.fire(event, site=site, **fields)
            self._note(Report(site, event, fields))

    def _note(self, report: Report) -> None:
        if self._reports is not None:
            self._reports.append(report)

    def _fetch_records(self, delivery: Delivery) -> None:
        if delivery.nbytes > RECORDS_BYTES:
            delivery.fail(DecodeError(f"{delivery.nbytes} bytes of metric records; at most {RECORDS_BYTES} at once"))
            return
        delivery.pull().on_done(lambda _: self._agenda.post(lambda: self._records(delivery)))

    def _records(self, delivery: Delivery) -> None:
        try:
            records = read_batch(delivery.source, delivery.value(), self.roster.runs)
        except (FlarebusError, OSError, MemoryError) as error:
            log.warning("metrics of %s dropped: %s", delivery.source, error)
            delivery.fail(error)
            return
        self._archive.site_records(records)
        for site, its in itertools.groupby(records, lambda record: record["site"]):
            self._tell_records(site, list(its))
        delivery.reply()

    def _tell_records(self, site: str, records: list[dict[str, Any]]) -> None:
        try:
            self.fire("site_metrics", site=site, records=records)
        except Exception:  # of a listener: it costs nobody his records, let alone the job
            level, self._listener_complaint = self._listener_complaint, logging.DEBUG  # once is enough for the log
            log.log(level, "a listener failed on %d metric records of %s", len(records), site, exc_info=True)
