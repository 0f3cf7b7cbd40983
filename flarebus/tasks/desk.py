"""Desk: gives tasks out to sites and takes their results in, for one controller, at a server or at a site.

All state belongs to the thread of the agenda, except where a method says otherwise.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from flarebus.cell import Cell
from flarebus.delivery import Delivery
from flarebus.errors import (
    Closed,
    DecodeError,
    FlarebusError,
    NoRoute,
    PeerError,
    QuorumNotReached,
    SourceLost,
    UsageError,
)
from flarebus.model import FLModel
from flarebus.pending import Pending
from flarebus.slab import SlabPool
from flarebus.tasks.agenda import Agenda
from flarebus.tasks.open_task import Arrived, OpenTask, named, results_in
from flarebus.tasks.parcels import Packer
from flarebus.tasks.roster import Roster
from flarebus.tasks.tally import Tally
from flarebus.wire import MAX_CARRIED_BYTES
from flarebus.workflow.controller import Result, Task

__all__ = ["STAGED_BYTES", "Desk", "DeskOwner"]

log = logging.getLogger(__name__)

# Results staged at once: three of them, so that a mean of two is made from where they lie and a third can be folded in,
# or as many small ones as this.
STAGED_RESULTS = 3
STAGED_BYTES = 64 * 1000 * 1000
# An answer may carry optimiser state and metrics beside the parameters, not ten models.
RESULT_FACTOR = 8
RESULT_SLACK_BYTES = 16 * 1000 * 1000


class DeskOwner(Protocol):
    """What a desk tells whoever it works for; on the agenda's thread."""

    def fire(self, event: str, **fields: Any) -> None:
        """Something happened to a task."""

    def task_closed(self, open_task: OpenTask) -> None:
        """A broadcast is over, one way or the other."""

    def site_answered(self, site: str) -> None:
        """A usable result of `site` is here."""


class Desk:
    """Tasks out, results in.

    Args:
        cell: what they travel through.
        roster: which sites there are, kept by the owner.
        agenda: of the controller's thread.
        owner: told what happens.
        packer: makes messages of tasks.
        numbers: for its tasks; no two tasks of one owner have the same.
        site: whose desk it is; "" for the server's.
        staging: folder for results in files, or None for memory.
    """

    def __init__(
        self,
        cell: Cell,
        roster: Roster,
        agenda: Agenda,
        owner: DeskOwner,
        packer: Packer,
        numbers: Iterator[int],
        site: str = "",
        staging: Path | None = None,
    ) -> None:
        self._cell = cell
        self._roster = roster
        self._agenda = agenda
        self._owner = owner
        self._packer = packer
        self._site = site
        self._pool = SlabPool(folder=staging)
        self._open: OpenTask | None = None
        self._numbers = numbers
        self._results: weakref.ref[Generator[Result, None, None]] | None = None

    # -- what a controller calls; see `flarebus.workflow.controller.Job` --

    def broadcast(
        self,
        task: Task | Mapping[str, Task],
        *,
        sites: Sequence[str] | None = None,
        min_responses: int = 0,
        wait_time_after_min_received: float | None = None,
        timeout: float | None = None,
        in_order: bool = False,
        newcomers: bool = False,
        fetch: bool = True,
        most_staged: int | None = None,
        staging_timeout: float | None = None,
        on_failed: Callable[[str, str], None] | None = None,
        resumes: bool = False,
    ) -> Iterator[Result]:
        """Give a task out and yield results; see `TaskGiver.broadcast`."""
        self.close()
        self._agenda.take_waiting()
        if sites is None:
            sites = self._roster.alive if isinstance(task, Task) else list(task)
        if newcomers and not isinstance(task, Task):
            raise UsageError("newcomers=True needs one task for all: nobody knows which one a newcomer would get")
        # Who is not there yet is a newcomer when it comes.
        targets = sorted({site for site in sites if not newcomers or self._roster.is_alive(site)})
        tally = Tally(targets, min_responses, wait_time_after_min_received, timeout, self._agenda.clock(), newcomers)
        parcels = self._packer.pack(task, targets)
        how = (in_order, fetch, most_staged, staging_timeout, resumes, on_failed)
        open_task = OpenTask(next(self._numbers), parcels, tally, targets, *how)
        for site in targets:
            if not self._roster.is_alive(site):
                open_task.fail(site, self._roster.why_not(site))
        self._open = open_task
        results = self._run(open_task)
        self._results = weakref.ref(results)  # not kept: a controller that breaks out of its loop ends the round
        return results

    def cancel(self, reason: str) -> None:
        """End the broadcast that runs now; from any thread. See `TaskGiver.cancel`."""
        open_task = self._open
        if open_task is not None:
            log.info("%s of round %s cancelled: %s", open_task.name, open_task.round, reason)
            open_task.was_cancelled = True  # at once: what has arrived already is not used either
        self._agenda.post(_nothing)

    def close(self) -> None:
        """End what runs: nobody waits for its results any more."""
        results = None if self._results is None else self._results()
        if results is not None:
            results.close()

    # -- what the owner has heard --

    def joined(self, host: str, sites: Sequence[str]) -> None:
        """`sites` are at `host`, which is in the roster by now, for the first time or again."""
        self.lost(host)
        open_task = self._open
        if open_task is None:
            return
        if open_task.tally.newcomers:
            for site in sites:
                if site not in open_task.targets:
                    open_task.add_target(site)
        self._assign([site for site in sites if open_task.waits_for(site)])

    def lost(self, host: str) -> None:
        """What a dead host offered cannot be pulled any more; what is here already is good."""
        if self._open is None:
            return
        for site in self._roster.sites_of(host):
            arrived = self._open.arrived.get(site)
            if arrived is not None and arrived.delivery.message.manifest is not None and not arrived.is_whole:
                self._open.forget(site)

    def fail(self, site: str, reason: str) -> None:
        """No usable result will come from `site`."""
        if self._open is None or site not in self._open.tally.open or site in self._open.arrived:
            return
        self._open.fail(site, reason)
        log.warning("round %s: %s failed: %s", self._open.round, site, reason)
        self._owner.fire("site_failed", round=self._open.round, site=site, reason=reason)

    # -- results, on the bus thread --

    def result_came(self, delivery: Delivery) -> None:
        """A result was announced. A small one is fetched at once: that saves waking the controller's thread twice."""
        if delivery.nbytes > 0 and not delivery.is_here and self.room(delivery.nbytes) is not None:
            delivery.pull(self._pool, order=True)
        self._agenda.post(lambda: self._result(delivery))

    def waits_for(self, number: object) -> bool:
        """Whether task `number` is the open one."""
        open_task = self._open
        return open_task is not None and open_task.number == number

    def room(self, nbytes: int) -> SlabPool | None:
        """Where to put a result that comes now; None: nowhere yet, or never."""
        open_task = self._open
        room = STAGED_BYTES - self._pool.leased_bytes
        if open_task is None or not open_task.fetch:
            return None
        if open_task.most_staged is not None and nbytes > MAX_CARRIED_BYTES:
            return None  # how many are fetched is counted on the other thread
        return self._pool if nbytes <= min(room, _most_bytes(open_task)) else None

    def results_came(self, delivery: Delivery) -> None:
        """Several results in one message. They are here whole, so their host is answered before they are used."""
        try:
            results = results_in(delivery, self._tell_refused)
        except DecodeError as problem:
            delivery.fail(problem)
            return
        delivery.reply()

        def take() -> None:
            for number, arrived in results:
                self._take_result(arrived, number, None)

        self._agenda.post(take)

    def _tell_refused(self, host: str, site: str, number: int, reason: str) -> None:
        with contextlib.suppress(Closed):  # nobody is left to be told
            self._cell.notify(host, "task", "refused", {"site": site, "number": number, "reason": reason})

    # -- on the controller's thread from here on --

    def _run(self, open_task: OpenTask) -> Generator[Result, None, None]:
        try:
            self._owner.fire("round_started", round=open_task.round, sites=list(open_task.targets))
            self._assign(open_task.targets)
            yield from self._collect(open_task)
            if not open_task.was_cancelled:
                open_task.tally.close()
        except QuorumNotReached as error:
            # Sites that were given up before may be the reason, though nobody asked them.
            raise QuorumNotReached(error.needed, error.got, {**error.reasons, **self._roster.dead}) from None
        finally:
            self._owner.task_closed(open_task)
            self._open = None
            with contextlib.suppress(Closed):  # a controller that failed may be left, with this, after the bus
                self._packer.withdraw(open_task.parcels)
                self._dismiss(open_task)

    def _collect(self, open_task: OpenTask) -> Iterator[Result]:
        tally = open_task.tally
        while not open_task.was_cancelled:
            if open_task.fetch:
                self._stage(open_task)
            arrived = open_task.next_ready()
            if arrived is not None:
                result = self._open_result(open_task, arrived)
                if result is not None:
                    try:
                        yield result
                    finally:
                        result.model = FLModel()
                        if result.held is None:
                            arrived.answer(tally.failed.get(arrived.site))
                        elif arrived.site in tally.failed:
                            result.held.refuse(tally.failed[arrived.site])
                # The controller is done with it: free its memory, which they hold, before the next one is staged.
                del arrived, result
                continue
            was_closing, open_task.is_closing = open_task.is_closing, tally.is_over(self._agenda.clock())
            if open_task.is_closing and not open_task.arrived:
                return
            if open_task.is_closing and not was_closing:
                continue  # nobody waits for those before him in order any more
            # What has arrived by now is still fetched: its holder's life, not the deadline, bounds that.
            ends = (None if open_task.is_closing else tally.deadline()), open_task.staging_deadline()
            self._agenda.take(min((end for end in ends if end is not None), default=None))

    def _assign(self, sites: Sequence[str]) -> None:
        """Send the open task to the hosts of `sites`, one message for each parcel, whatever the number of sites."""
        open_task = self._open
        assert open_task is not None
        wanted = set(sites)
        for parcel in open_task.parcels:
            its = [site for site in parcel.sites if site in wanted]
            for host, its_sites in self._roster.by_host(its).items():
                self._packer.admit(parcel, host, its_sites)
                value = {
                    **self._packer.message(parcel, open_task.fetch),
                    "number": open_task.number,
                    "owner": self._site,
                    "sites": its_sites,
                    "resumes": open_task.resumes,
                    "credit": self._credit(open_task),
                }
                bring = parcel.payload.nbytes <= self._roster.takes(host)
                sent = self._cell.request(host, "task", "assign", value, payload=parcel.payload, bring=bring)
                sent.on_done(partial(self._note_assigned, host, its_sites, open_task))
            # Last: what is said to their hosts goes a longer way.
            self._packer.send_ahead(parcel, its)

    def _credit(self, open_task: OpenTask) -> int:
        """Bytes of results that a host may send along with their messages before they are answered: all those of a host
        together, or, if a site gave the task and they are kept, each one."""
        if not open_task.fetch:
            return 0
        return STAGED_BYTES // (len(open_task.targets) if self._site else len(self._roster.hosts))

    def _note_assigned(self, host: str, sites: Sequence[str], open_task: OpenTask, done: Pending[Delivery]) -> None:
        if done.error() is not None:
            self._agenda.post(lambda: self._assigned(sites, open_task, done))

    def _assigned(self, sites: Sequence[str], open_task: OpenTask, done: Pending[Delivery]) -> None:
        error = done.error()
        # A host that is gone is somebody else's event; anything else means that it cannot work with the task.
        if error is not None and not isinstance(error, NoRoute) and self._open is open_task:
            for site in sites:
                self.fail(site, f"could not take the task: {error}")

    def _result(self, delivery: Delivery) -> None:
        try:
            fields = delivery.plain()
            site, number, error, body = named(fields["site"]), fields["number"], fields["error"], fields["model"]
            if type(body) is not bytes:
                raise TypeError("its model is not encoded")
        except (DecodeError, KeyError, TypeError) as problem:
            delivery.fail(DecodeError(f"result cannot be read: {problem}"))
            return
        if self._roster.runs(delivery.source, site) and not self._may_hold(delivery, site):
            reason = "its arrays are held by somebody else"
            if self._open is not None and number == self._open.number:
                self.fail(site, reason)  # it has answered, and nobody waits for a better answer
            delivery.reply({"accepted": False, "reason": reason})
            return
        self._take_result(Arrived(site, delivery, body), number, error)

    def _take_result(self, arrived: Arrived, number: Any, error: Any) -> None:
        open_task, site = self._open, arrived.site
        if not self._roster.runs(arrived.delivery.source, site):
            log.warning("%s answered for %.80r, which it does not run", arrived.delivery.source, site)
            arrived.answer("not your site")
        elif open_task is None or number != open_task.number:
            arrived.answer("the round is closed")
        elif site in open_task.arrived or site in open_task.tally.usable:
            arrived.answer(None)
        elif not open_task.waits_for(site):
            arrived.answer(open_task.tally.failed.get(site, "the round is closed"))
        elif error is not None:
            self.fail(site, str(error))
            arrived.answer(None)
        else:
            open_task.add(arrived, self._agenda.clock())

    def _may_hold(self, delivery: Delivery, site: str) -> bool:
        """Whether the arrays of a result of `site` are where they belong: at its host, or at its trainer."""
        manifest = delivery.message.manifest
        return manifest is None or manifest.holder == delivery.source or self._is_trainer(manifest.holder, site)

    def _is_trainer(self, holder: str, site: str) -> bool:
        return self._roster.is_external(site) and holder.startswith(f"{self._packer.trainers_of(site)}.")

    def _stage(self, open_task: OpenTask) -> None:
        """Start pulling what has arrived, in the order it will be used, while there is room for it."""
        while (arrived := open_task.next_unstaged()) is not None:
            nbytes = arrived.nbytes
            if nbytes > _most_bytes(open_task):
                self._drop(open_task, arrived, f"result of {nbytes} bytes for a model of {open_task.nbytes}")
                continue
            # One is always under way, whatever the controller keeps: a round must not wait for its own results.
            must = arrived.delivery.is_here or not open_task.is_staging or open_task.is_awaited(arrived)
            room = max(STAGED_RESULTS * nbytes, STAGED_BYTES) - self._pool.leased_bytes
            if not must and (nbytes > room or not open_task.may_stage):
                ends_at = open_task.staging_deadline()
                if ends_at is None or self._agenda.clock() < ends_at:
                    return
                self._drop(open_task, arrived, "others were fetched for so long that it was not waited for")
                continue
            open_task.stage(arrived, self._pool)
            # Only to wake this thread; what was pulled is found where it is.
            if arrived.pulled is not None and not arrived.is_here:
                arrived.pulled.on_done(lambda _: self._agenda.post(_nothing))

    def _drop(self, open_task: OpenTask, arrived: Arrived, reason: str) -> None:
        """A result is not fetched."""
        open_task.remove(arrived.site)
        self.fail(arrived.site, reason)
        arrived.answer(reason)

    def _open_result(self, open_task: OpenTask, arrived: Arrived) -> Result | None:
        """Decode what was pulled; None if there is nothing usable in it."""
        if arrived.lost_its_holder:
            # That its holder is gone was said before the pull failed, but may still wait to be heard.
            self._agenda.take_waiting()
            if open_task.arrived.get(arrived.site) is not arrived:
                return None
        open_task.remove(arrived.site)
        held = None
        try:
            if not open_task.fetch:
                held = arrived.hold()
            model = self._packer.filtered(held or arrived.model(), open_task, arrived.site)
        except (FlarebusError, OSError, MemoryError) as error:
            self._not_usable(open_task, arrived, error)
            return None
        finally:
            arrived.pulled = None
        open_task.tally.use(arrived.site, self._agenda.clock())
        open_task.metrics[arrived.site] = dict(model.metrics or {})
        self._owner.site_answered(arrived.site)
        self._owner.fire(
            "result_accepted",
            round=open_task.round,
            site=arrived.site,
            metrics=dict(model.metrics or {}),
            n_accepted=len(open_task.tally.usable),
            n_expected=len(open_task.targets),
        )
        return Result(arrived.site, open_task.round, model, self._refuse, held)

    def _not_usable(self, open_task: OpenTask, arrived: Arrived, error: Exception) -> None:
        if isinstance(error, SourceLost) and self._is_trainer(error.holder, arrived.site):
            # The task stays open: its host knows how the trainer ended, and whether there will be another one.
            open_task.line_up_again()
            arrived.delivery.fail(error)
        else:
            done = "used" if isinstance(error, PeerError | UsageError) else "fetched"
            self.fail(arrived.site, f"its result could not be {done}: {error}")
            arrived.answer(str(error))

    def _refuse(self, site: str, reason: str) -> None:
        open_task = self._open
        assert open_task is not None
        open_task.metrics.pop(site, None)
        open_task.tally.fail(site, reason)
        log.warning("round %s: result of %s refused: %s", open_task.round, site, reason)
        self._owner.fire("result_refused", round=open_task.round, site=site, reason=reason)

    def _dismiss(self, open_task: OpenTask) -> None:
        """Tell hosts that still work on a closed task to stop, and answer results that came too late."""
        late = [site for site in open_task.targets if site not in open_task.tally.usable]
        for host, sites in self._roster.by_host(late).items():
            value = {"number": open_task.number, "owner": self._site, "sites": sites}
            self._cell.notify(host, "task", "cancel", value)
        for arrived in open_task.arrived.values():
            arrived.answer("the round is closed")


def _most_bytes(open_task: OpenTask) -> int:
    """How big an answer may be."""
    return RESULT_FACTOR * open_task.nbytes + RESULT_SLACK_BYTES


def _nothing() -> None:
    """An event that only wakes."""
