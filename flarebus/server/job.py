"""ServerJob: one job at its server; what a controller sees as `Job`.

All state belongs to the thread that runs the controller. Everything else (the bus, the pool of workers, somebody who
aborts) puts an event into one queue, and the thread takes events out while it waits: no locks, no polling.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flarebus.cell import Cell
from flarebus.client.metric_batch import MAX_BATCH_BYTES
from flarebus.codec import decode
from flarebus.delivery import Delivery
from flarebus.errors import (
    Closed,
    DecodeError,
    FlarebusError,
    JobAborted,
    JobFailed,
    NoRoute,
    QuorumNotReached,
    SourceLost,
)
from flarebus.job.definition import JobDefinition
from flarebus.model import FLModel
from flarebus.pending import Pending
from flarebus.server.archive import Archive
from flarebus.server.open_task import Arrived, OpenTask, named, results_in
from flarebus.server.pool import HostEnd
from flarebus.server.roster import Roster
from flarebus.server.site_metrics import read_batch
from flarebus.server.tally import Tally
from flarebus.slab import SlabPool
from flarebus.workflow.controller import Result, Task

__all__ = ["ServerJob"]

log = logging.getLogger(__name__)

Event = Callable[[], None]

# Results staged at once: three of them, so that a mean of two is made from where they lie and a third can be folded in,
# or as many small ones as this.
STAGED_RESULTS = 3
STAGED_BYTES = 64 * 1000 * 1000
# An answer may carry optimiser state and metrics beside the parameters, not ten models.
RESULT_FACTOR = 8
RESULT_SLACK_BYTES = 16 * 1000 * 1000
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
        self._clock = clock
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._pool = SlabPool(folder=staging)
        self._aborted_by: str | None = None
        self._open: OpenTask | None = None
        self._task_number = 0
        self._attempts: dict[str, int] = {}
        # What hosts take along with a task, in bytes.
        self._takes: dict[str, int] = {}
        self._results: weakref.ref[Generator[Result, None, None]] | None = None
        self._is_over = False
        self._listener_complaint = logging.ERROR
        self._posting = threading.Lock()
        cell.inbox("task", "join", lambda delivery: self._post(lambda: self._join(delivery)))
        cell.inbox("task", "result", self._result_came, room=self._room)
        cell.inbox("task", "results", self._results_came)
        cell.inbox("metric", "records", self._fetch_records)
        cell.on_gone(lambda names: self._post(lambda: self._gone(names)))

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
            self._take_waiting_events()
            yield number

    def broadcast(
        self,
        task: Task,
        *,
        sites: Sequence[str] | None = None,
        min_responses: int = 0,
        wait_time_after_min_received: float | None = None,
        timeout: float | None = None,
        in_order: bool = False,
    ) -> Iterator[Result]:
        """Give a task out and yield results; see `Job.broadcast`."""
        self._close_broadcast()
        self._take_waiting_events()
        targets = sorted(set(self.roster.alive if sites is None else sites))
        tally = Tally(targets, min_responses, wait_time_after_min_received, timeout, self._clock())
        for site in targets:
            if not self.roster.is_alive(site):
                tally.fail(site, self.roster.dead.get(site, "no such site"))
        self._task_number += 1
        payload = self._cell.share(_outgoing(task), self.roster.hosts)
        self._open = open_task = OpenTask(self._task_number, task, tally, payload, targets, in_order)
        results = self._run(open_task)
        self._results = weakref.ref(results)  # not kept: a controller that breaks out of its loop ends the round
        return results

    def _run(self, open_task: OpenTask) -> Generator[Result, None, None]:
        try:
            self.fire("round_started", round=open_task.task.round, sites=open_task.targets)
            self._assign(open_task.targets)
            yield from self._collect(open_task)
            open_task.tally.close()
        except QuorumNotReached as error:
            # Sites that were given up before may be the reason, though nobody asked them.
            raise QuorumNotReached(error.needed, error.got, {**error.reasons, **self.roster.dead}) from None
        finally:
            self._archive.sites_done(open_task.metrics, open_task.tally.failed)
            self._open = None
            with contextlib.suppress(Closed):  # a controller that failed may be left, with this, after the bus
                # Its pages are next written when another round has ended: no need to wait for it.
                self._cell.withdraw(open_task.payload, wait=False)
                self._dismiss(open_task)

    def pages(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Writable arrays on the pages of the next model file."""
        return self._archive.pages(params)

    def commit(self, round: int, params: dict[str, Any], metrics: Mapping[str, Any], *, best: bool = False) -> None:
        """End a round; its durable part goes on while the next one begins."""
        self._archive.commit(round, params, metrics, best)
        self.fire("round_committed", round=round, metrics=dict(metrics), **self._archive.last_round_facts)

    def fire(self, event: str, **fields: Any) -> None:
        """Tell the listener."""
        if self._on_event is not None:
            self._on_event(event, fields)

    # -- what others call, from any thread --

    def abort(self, by: str) -> None:
        """End the job as soon as the controller's thread looks up."""

        def note() -> None:
            self._aborted_by = self._aborted_by or by

        self._post(note)

    def host_died(self, end: HostEnd, restart: Callable[[], None]) -> None:
        """A host's process ended; `restart`, if that is worth trying, is called on the controller's thread."""

        def note() -> None:
            self._host_died(end)
            if end.will_restart and not self._is_over:
                restart()

        self._post(note)

    def _post(self, event: Event) -> None:
        """Have something done on the controller's thread; here and now once that listens no more."""
        with self._posting:
            if not self._is_over:
                self._events.put(event)
                return
        event()

    # -- on the controller's thread from here on --

    def wait_for_sites(self, sites: Sequence[str], timeout: float) -> None:
        """Return when every one of `sites` has joined or is known to be dead.

        Raises:
            JobFailed: some did neither within `timeout` seconds, or none is left.
        """
        deadline = self._clock() + timeout
        while missing := [site for site in sites if self.roster.host_of(site) is None and site not in self.roster.dead]:
            if not self._take_event(deadline):
                raise JobFailed(f"{len(missing)} sites did not start within {timeout:g} s: {', '.join(missing[:5])}")
        if not self.roster.alive:
            reasons = sorted(set(self.roster.dead.values()))
            raise JobFailed("no site could be started: " + "; ".join(reasons[:3]))

    def end(self, reason: str, aborted: bool = False) -> list[str]:
        """Tell every host that there is no more work; the hosts that were told, which are those that are there.

        Whoever still has something to say is answered, but nothing counts any more.
        """
        self._close_broadcast()
        with self._posting:
            self._is_over = True
        while not self._events.empty():
            self._events.get()()
        hosts = self.roster.hosts
        for host in hosts:
            self._cell.notify(host, "task", "end", {"reason": reason, "aborted": aborted})
        return hosts

    def _close_broadcast(self) -> None:
        results = None if self._results is None else self._results()
        if results is not None:
            results.close()

    def _collect(self, open_task: OpenTask) -> Iterator[Result]:
        tally = open_task.tally
        while True:
            self._stage(open_task)
            arrived = open_task.next_ready()
            if arrived is not None:
                result = self._open_result(open_task, arrived)
                if result is not None:
                    try:
                        yield result
                    finally:
                        result.model = FLModel()
                        arrived.answer(tally.failed.get(arrived.site))
                # The controller is done with it: free its memory, which they hold, before the next one is staged.
                del arrived, result
                continue
            was_closing, open_task.is_closing = open_task.is_closing, tally.is_over(self._clock())
            if open_task.is_closing and not open_task.arrived:
                return
            if open_task.is_closing and not was_closing:
                continue  # nobody waits for those before him in order any more
            # What has arrived by now is still fetched: its holder's life, not the deadline, bounds that.
            self._take_event(None if open_task.is_closing else tally.deadline())

    def _take_event(self, deadline: float | None) -> bool:
        """Wait for one event and do it; False when `deadline` came first."""
        try:
            timeout = None if deadline is None else max(0.0, deadline - self._clock())
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            return False
        event()
        self._check_abort()
        return True

    def _take_waiting_events(self) -> None:
        while not self._events.empty():
            self._events.get()()
        self._check_abort()

    def _check_abort(self) -> None:
        if self._aborted_by is not None:
            raise JobAborted(self._aborted_by)

    def _assign(self, sites: Sequence[str]) -> None:
        """Send the open task to the hosts of `sites`, one message each, whatever the number of sites."""
        open_task = self._open
        assert open_task is not None
        for host, its_sites in self.roster.by_host(sites).items():
            self._cell.admit(open_task.payload, host)
            self._cell.send_ahead(open_task.payload, host)
            for site in its_sites:
                if self.roster.is_external(site):
                    # Its trainer lives under this address, and fetches the model itself.
                    self._cell.admit(open_task.payload, f"{site}.{self.job_id}")
            value = {
                "number": open_task.number,
                "task": open_task.task.name,
                "round": open_task.task.round,
                "total_rounds": open_task.task.total_rounds,
                "sites": its_sites,
                "model": open_task.payload.body,
                # Bytes of results that it may send along with their messages, before they are answered.
                "credit": STAGED_BYTES // len(self.roster.hosts),
            }
            bring = open_task.payload.nbytes <= self._takes.get(host, 0)
            sent = self._cell.request(host, "task", "assign", value, payload=open_task.payload, bring=bring)
            sent.on_done(partial(self._note_assigned, host, open_task))
        # Last: what is said to their hosts goes a longer way.
        for trainers in [f"{site}.{self.job_id}" for site in sites if self.roster.is_external(site)]:
            self._cell.send_ahead(open_task.payload, trainers)

    def _note_assigned(self, host: str, open_task: OpenTask, done: Pending[Delivery]) -> None:
        if done.error() is not None:
            self._post(lambda: self._assigned(host, open_task, done))

    def _assigned(self, host: str, open_task: OpenTask, done: Pending[Delivery]) -> None:
        error = done.error()
        # A host that is gone is somebody else's event; anything else means that it cannot work with the task.
        if error is not None and not isinstance(error, NoRoute) and self._open is open_task:
            for site in self.roster.sites_of(host):
                self._fail(site, f"could not take the task: {error}")

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
        if self._is_over:
            delivery.fail(JobFailed("the job has ended"))
            return
        self._forget_arrived(delivery.source)
        self.roster.join(delivery.source, sites, [site for site in external if site in sites])
        self._takes[delivery.source] = takes
        delivery.reply({"job_id": self.job_id})
        if self._open is not None:
            waiting = [site for site in sites if site in self._open.tally.open and site not in self._open.arrived]
            self._assign(waiting)

    def _result_came(self, delivery: Delivery) -> None:
        # On the bus thread. A small result is fetched at once: that saves waking the controller's for it twice.
        if delivery.nbytes > 0 and not delivery.is_here and self._room(delivery.nbytes) is not None:
            delivery.pull(self._pool, order=True)
        self._post(lambda: self._result(delivery))

    def _room(self, nbytes: int) -> SlabPool | None:
        """Where to put a result that comes now; None: nowhere yet, or never."""
        open_task = self._open
        room = STAGED_BYTES - self._pool.leased_bytes
        return self._pool if open_task is not None and nbytes <= min(room, _most_bytes(open_task)) else None

    def _result(self, delivery: Delivery) -> None:
        try:
            fields = delivery.plain()
            site, number, error, body = named(fields["site"]), fields["number"], fields["error"], fields["model"]
            if type(body) is not bytes:
                raise TypeError("its model is not encoded")
        except (DecodeError, KeyError, TypeError) as problem:
            delivery.fail(DecodeError(f"result cannot be read: {problem}"))
            return
        if self.roster.runs(delivery.source, site) and not self._may_hold(delivery, site):
            reason = "its arrays are held by somebody else"
            if self._open is not None and number == self._open.number:
                self._fail(site, reason)  # it has answered, and nobody waits for a better answer
            delivery.reply({"accepted": False, "reason": reason})
            return
        self._take_result(Arrived(site, delivery, body), number, error)

    def _results_came(self, delivery: Delivery) -> None:
        # On the bus thread. They are here whole, so their host is answered before they are used.
        try:
            results = results_in(delivery, self._tell_refused)
        except DecodeError as problem:
            delivery.fail(problem)
            return
        delivery.reply()

        def take() -> None:
            for number, arrived in results:
                self._take_result(arrived, number, None)

        self._post(take)

    def _tell_refused(self, host: str, site: str, number: int, reason: str) -> None:
        with contextlib.suppress(Closed):  # nobody is left to be told
            self._cell.notify(host, "task", "refused", {"site": site, "number": number, "reason": reason})

    def _take_result(self, arrived: Arrived, number: Any, error: Any) -> None:
        open_task, site = self._open, arrived.site
        if not self.roster.runs(arrived.delivery.source, site):
            log.warning("%s answered for %.80r, which it does not run", arrived.delivery.source, site)
            arrived.answer("not your site")
        elif open_task is None or number != open_task.number:
            arrived.answer("the round is closed")
        elif site in open_task.arrived or site in open_task.tally.usable:
            arrived.answer(None)
        elif not open_task.waits_for(site):
            arrived.answer(open_task.tally.failed.get(site, "the round is closed"))
        elif error is not None:
            self._fail(site, str(error))
            arrived.answer(None)
        else:
            open_task.add(arrived)

    def _may_hold(self, delivery: Delivery, site: str) -> bool:
        """Whether the arrays of a result of `site` are where they belong: at its host, or at its trainer."""
        manifest = delivery.message.manifest
        return manifest is None or manifest.holder == delivery.source or self._is_trainer(manifest.holder, site)

    def _is_trainer(self, holder: str, site: str) -> bool:
        return self.roster.is_external(site) and holder.startswith(f"{site}.{self.job_id}.")

    def _stage(self, open_task: OpenTask) -> None:
        """Start pulling what has arrived, in the order it will be used, while there is room for it."""
        while (arrived := open_task.next_unstaged()) is not None:
            nbytes = arrived.nbytes
            if nbytes > _most_bytes(open_task):
                reason = f"result of {nbytes} bytes for a model of {open_task.nbytes}"
                open_task.remove(arrived.site)
                self._fail(arrived.site, reason)
                arrived.answer(reason)
                continue
            # One is always under way, whatever the controller keeps: a round must not wait for its own results.
            must = arrived.delivery.is_here or not open_task.is_staging or open_task.is_awaited(arrived)
            if not must and self._pool.leased_bytes + nbytes > max(STAGED_RESULTS * nbytes, STAGED_BYTES):
                return
            open_task.stage(arrived, self._pool)
            # Only to wake this thread; what was pulled is found where it is.
            if arrived.pulled is not None and not arrived.is_here:
                arrived.pulled.on_done(lambda _: self._post(_nothing))

    def _open_result(self, open_task: OpenTask, arrived: Arrived) -> Result | None:
        """Decode what was pulled; None if there is nothing usable in it."""
        assert arrived.pulled is not None
        if isinstance(arrived.pulled.error(), SourceLost):
            # That its holder is gone was said before the pull failed, but may still wait to be heard.
            self._take_waiting_events()
            if open_task.arrived.get(arrived.site) is not arrived:
                return None
        open_task.remove(arrived.site)
        try:
            model = decode(arrived.body, arrived.pulled.result())
            if type(model) is not FLModel:
                raise DecodeError("it is not an FLModel")
        except (FlarebusError, OSError, MemoryError) as error:
            if isinstance(error, SourceLost) and self._is_trainer(error.holder, arrived.site):
                # The task stays open: its host knows how the trainer ended, and whether there will be another one.
                open_task.line_up_again()
                arrived.delivery.fail(error)
            else:
                self._fail(arrived.site, f"its result could not be fetched: {error}")
                arrived.answer(str(error))
            return None
        finally:
            arrived.pulled = None
        open_task.tally.use(arrived.site, self._clock())
        self._attempts.pop(arrived.site, None)
        open_task.metrics[arrived.site] = dict(model.metrics or {})
        self.fire(
            "result_accepted",
            round=open_task.task.round,
            site=arrived.site,
            metrics=dict(model.metrics or {}),
            n_accepted=len(open_task.tally.usable),
            n_expected=len(open_task.targets),
        )
        return Result(arrived.site, open_task.task.round, model, self._refuse)

    def _refuse(self, site: str, reason: str) -> None:
        assert self._open is not None
        self._open.metrics.pop(site, None)
        self._open.tally.fail(site, reason)
        log.warning("round %s: result of %s refused: %s", self._open.task.round, site, reason)
        self.fire("result_refused", round=self._open.task.round, site=site, reason=reason)

    def _fail(self, site: str, reason: str) -> None:
        if self._open is None or site not in self._open.tally.open or site in self._open.arrived:
            return
        self._open.tally.fail(site, reason)
        log.warning("round %s: %s failed: %s", self._open.task.round, site, reason)
        self.fire("site_failed", round=self._open.task.round, site=site, reason=reason)

    def _gone(self, names: Sequence[str]) -> None:
        for name in names:
            # Also if its process was seen to end before: the last it said came after that.
            self.roster.leave(name)
            self._forget_arrived(name)

    def _forget_arrived(self, host: str) -> None:
        """What a dead host offered cannot be pulled any more; what is here already is good."""
        if self._open is None:
            return
        for site in self.roster.sites_of(host):
            arrived = self._open.arrived.get(site)
            if arrived is not None and arrived.delivery.message.manifest is not None and not arrived.is_whole:
                self._open.forget(site)

    def _host_died(self, end: HostEnd) -> None:
        log.warning("%s: %s", end.address, end.reason)
        self.roster.leave(end.address)
        self._forget_arrived(end.address)
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
        self._fail(site, reason)
        self.roster.bury(site, reason)

    def _fetch_records(self, delivery: Delivery) -> None:
        if delivery.nbytes > RECORDS_BYTES:
            delivery.fail(DecodeError(f"{delivery.nbytes} bytes of metric records; at most {RECORDS_BYTES} at once"))
            return
        delivery.pull().on_done(lambda _: self._post(lambda: self._records(delivery)))

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

    def _dismiss(self, open_task: OpenTask) -> None:
        """Tell hosts that still work on a closed task to stop, and answer results that came too late."""
        late = [site for site in open_task.targets if site not in open_task.tally.usable]
        for host, sites in self.roster.by_host(late).items():
            self._cell.notify(host, "task", "cancel", {"number": open_task.number, "sites": sites})
        for arrived in open_task.arrived.values():
            arrived.answer("the round is closed")


def _most_bytes(open_task: OpenTask) -> int:
    """How big an answer may be."""
    return RESULT_FACTOR * open_task.nbytes + RESULT_SLACK_BYTES


def _outgoing(task: Task) -> FLModel:
    """The model as the scripts get it."""
    model = task.model
    return FLModel(
        params_type=model.params_type,
        params=model.params,
        optimizer_params=model.optimizer_params,
        metrics=model.metrics,
        current_round=task.round,
        total_rounds=task.total_rounds,
        meta={**model.meta, **task.meta},
    )


def _nothing() -> None:
    """An event that only wakes."""
