"""SiteEngine: what the Client API of one site's script talks to inside a host. Tasks come in, answers go out."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from flarebus.cell import Cell, Payload
from flarebus.client.engine import Assignment
from flarebus.client.metrics import MetricOutbox
from flarebus.codec import encode
from flarebus.delivery import Delivery
from flarebus.errors import FlarebusError
from flarebus.message import Buffer
from flarebus.metric import AnalyticsDataType
from flarebus.model import FLModel
from flarebus.pending import Pending
from flarebus.site.outbox import ResultOutbox
from flarebus.site.ticket import Kept, Ticket
from flarebus.site.work import model_of
from flarebus.slab import SlabPool, unbundle
from flarebus.wire import MAX_CARRIED_BYTES, bundle
from flarebus.workflow.filter import FilterChain, FilterTask

__all__ = ["Line", "SharedModel", "SiteEngine"]


_NONE = FilterChain.build((), Path())


class SharedModel:
    """The model of one task, pulled once by the host, for each of its sites to take.

    A site may write into what it takes, so each gets a copy, except the last one: it gets the host's own.

    Args:
        body: the encoded model.
        buffers: its bytes, writable.
        takers: number of sites that will take it.
    """

    def __init__(self, body: bytes, buffers: Sequence[Buffer], takers: int) -> None:
        self._body = body
        self._buffers: Sequence[Buffer] = buffers
        # Many small arrays are copied in one go, which takes a fraction of the time.
        self._bundle = bundle([memoryview(each) for each in buffers]) if takers > 1 and buffers else None
        self._takers = takers
        self._lock = threading.Lock()

    def take(self) -> FLModel:
        """A model of the caller's own.

        Raises:
            FlarebusError: it is none.
        """
        with self._lock:
            self._takers -= 1
            last = self._takers == 0
            buffers = self._buffers
            if last:
                self._buffers = ()
        if not last and self._bundle is not None:
            buffers, last = unbundle(self._bundle), True
        return model_of(self._body, buffers, copy=not last)

    def drop(self) -> None:
        """One site less will take it."""
        with self._lock:
            self._takers -= 1
            if self._takers == 0:
                self._buffers = ()


class Line(Protocol):
    """Where the threads of one script line up for its turn."""

    def line_up(self, gate: threading.Lock) -> None:
        """Open `gate` when the script has the turn. It must not block."""

    def stand_back(self, gate: threading.Lock) -> None:
        """Nobody waits at `gate` any more: give up the turn that it brought, or would bring."""


class SiteEngine:
    """One site inside a host; an `Engine` to its script.

    Args:
        site: its name.
        job_id: the job it works for.
        config: client configuration without secrets.
        cell: the host's cell.
        metrics: where metric records go.
        results: where small results for the server go.
        note: writes a line about the site into its log.
        filters: what tasks go through before the script sees them, and answers before they leave.
    """

    def __init__(
        self,
        site: str,
        job_id: str,
        config: Mapping[str, Any],
        cell: Cell,
        metrics: MetricOutbox,
        results: ResultOutbox,
        note: Callable[[str], None],
        filters: tuple[FilterChain, FilterChain] = (_NONE, _NONE),
    ) -> None:
        self.site_name = site
        self.job_id = job_id
        self.config = config
        self.ended: str | None = None
        self.is_follower = False
        self._cell = cell
        self._metrics = metrics
        self._results = results
        self._log_note = note
        self._input_filters, self._output_filters = filters
        self.line: Line | None = None
        """Where threads of the script line up for its turn; None: they need none."""
        self._lock = threading.Lock()
        self._gates: deque[threading.Lock] = deque()
        self._waiting: tuple[Assignment, SharedModel, Ticket] | None = None
        self._open: Assignment | None = None
        self._ticket = Ticket("", -1)
        """Of the open task; another one may take its place while the script works."""
        self._unwanted: tuple[str, int] | None = None
        self._pool = SlabPool()
        self._kept: Kept | None = None

    # -- the Engine protocol --

    def next_task(self, timeout: float | None) -> Assignment | None:
        """Wait for the next task; see `Engine`."""
        if self._open is not None:
            self._fail(self._ticket, "the script asked for its next task without answering this one")
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                if self._waiting is not None:
                    self._open, _, self._ticket = self._waiting
                    self._waiting = None
                    return self._open
                if self.ended is not None or (deadline is not None and time.monotonic() >= deadline):
                    return None
                gate = threading.Lock()
                gate.acquire()
                self._gates.append(gate)
            self._wait_at(gate, deadline)

    def _wait_at(self, gate: threading.Lock, deadline: float | None) -> None:
        """Return with a task at hand and the turn, or for the time or the end, or for nothing."""
        opened = gate.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic()))
        with self._lock:
            if gate in self._gates:  # the time is up, and nobody will open it
                self._gates.remove(gate)
                return
            in_vain = self._waiting is None and self.ended is None
        # A turn that came for nothing (the task was cancelled meanwhile), or that may come when nobody waits for it.
        if (in_vain or not opened) and self.line is not None:
            self.line.stand_back(gate)

    def still_wanted(self, assignment: Assignment) -> bool:
        """Whether the task was not cancelled; see `Engine`."""
        if self._unwanted is None or self._ticket.key != self._unwanted:
            return True
        self._open = None
        return False

    def answer(self, assignment: Assignment, result: FLModel) -> Callable[[], None] | None:
        """Send the result; there is nothing to wait for if all of it fits into the message, or the site keeps it."""
        filters = self._output_filters.for_task(assignment.task_name)
        if filters:
            result = filters.apply(result, FilterTask(assignment.task_name, assignment.round, self.site_name))
        if self._ticket.readers:
            self._keep(assignment, result)
            return None
        ticket = self._ticket
        payload = self._cell.share(result, (ticket.target,))
        if self._results.takes(payload, ticket):
            # It was copied into the payload; what becomes of it is for the log.
            self._results.put(self.site_name, ticket.number, payload, self._log_note)
            self._open = None
            return None
        credit = self._results.credit
        bring = credit.take(payload.nbytes)

        def settle(wait: bool) -> None:
            if bring:
                credit.give_back(payload.nbytes)
            self._cell.withdraw(payload, wait)

        try:
            sent = self._send(ticket, payload, bring)
        except BaseException:
            settle(wait=True)
            raise

        def wait() -> None:
            try:
                reply = sent.result()
            except BaseException:
                settle(wait=True)
                raise
            # Who has answered has all of it: nobody pulls any more, and there is nothing to wait for.
            settle(wait=False)
            self._note_reply(reply)
            self._open = None

        return wait

    def _keep(self, assignment: Assignment, result: FLModel) -> None:
        """Answer from a copy, which stays here: whoever steers may die with what it has gathered."""
        self._kept = None  # its memory is used again
        kept = Kept((assignment.task_name, assignment.round), *encode(result), self._pool)
        with self._lock:
            ticket, self._open, self._kept = self._ticket, None, kept
        self._send_kept(kept, ticket)

    def _send_kept(self, kept: Kept, ticket: Ticket) -> None:
        payload = self._cell.share_encoded(kept.body, kept.buffers, ticket.readers)

        def settled(sent: Pending[Delivery]) -> None:
            self._cell.withdraw(payload, wait=False)
            if not ticket.owner and self._kept is kept:
                self._kept = None  # the server is done with it, and nobody takes over from the server
            error = sent.error()
            if error is None:
                self._note_reply(sent.result())
            else:
                self._log_note(f"result not delivered to {ticket.owner or 'the server'}: {error}")

        self._send(ticket, payload, bring=payload.nbytes <= min(ticket.credit, MAX_CARRIED_BYTES)).on_done(settled)

    def _send(self, ticket: Ticket, payload: Payload, bring: bool = False) -> Pending[Delivery]:
        fields = ticket.result(self.site_name, payload.body)
        return self._cell.request(ticket.target, "task", "result", fields, payload=payload, bring=bring)

    def log(self, key: str, value: Any, data_type: AnalyticsDataType, fields: dict[str, Any]) -> None:
        """Hand over one metric record."""
        open_task = self._open
        self._metrics.put(self.site_name, None if open_task is None else open_task.round, key, value, data_type, fields)

    # -- the host's side --

    @property
    def has_task(self) -> bool:
        """Whether a task waits for the script."""
        return self._waiting is not None

    def assign(self, assignment: Assignment, model: SharedModel, ticket: Ticket) -> None:
        """A task came. It replaces any that was not fetched yet."""
        filters = self._input_filters.for_task(assignment.task_name)
        if filters:
            task, take = FilterTask(assignment.task_name, assignment.round, self.site_name), assignment.take
            assignment = replace(assignment, take=lambda: filters.apply(take(), task))
        with self._lock:
            self._discard()
            if self.ended is not None:
                model.drop()
                return
            self._waiting = assignment, model, ticket
            gates = [self._gates.popleft()] if self._gates else []
        self._open_gates(gates)

    def resume(self, name: str, round: int, ticket: Ticket) -> bool:
        """Let the answer to a task that came before be that to `ticket`, too; False if there will be none."""
        task = (name, round)
        with self._lock:
            kept = None
            if self._open is not None and (self._open.task_name, self._open.round) == task:
                self._ticket = ticket
            elif self._waiting is not None and (self._waiting[0].task_name, self._waiting[0].round) == task:
                self._waiting = (*self._waiting[:2], ticket)
            elif self._kept is not None and self._kept.task == task:
                kept = self._kept
            else:
                return False
        if kept is not None:
            self._send_kept(kept, ticket)
        return True

    def cancel(self, key: tuple[str, int]) -> None:
        """The task whose ticket has `key` is not wanted any more: if the script has not seen it, it never will."""
        self._unwanted = key
        with self._lock:
            if self._waiting is not None and self._waiting[2].key == key:
                self._discard()

    def end(self, reason: str) -> None:
        """No more tasks: a script that waits hears it now."""
        with self._lock:
            self.ended = self.ended or reason
            self._discard()
            gates, self._gates = self._gates, deque()
        self._open_gates(gates)

    def _open_gates(self, gates: Iterable[threading.Lock]) -> None:
        for gate in gates:
            if self.line is None:
                gate.release()
            else:
                self.line.line_up(gate)

    def script_ended(self, cause: str, has_received: bool) -> None:
        """The script has ended: tell the server if a task will not be answered because of that.

        Args:
            cause: what went wrong, or "".
            has_received: whether it fetched a task. One that waits is then for the next run, whatever became of this.
        """
        if self._open is not None:
            self._fail(self._ticket, cause or "the script ended without answering its task")
        elif cause and not has_received:
            with self._lock:
                unfit = self._waiting
                self._discard()
            if unfit is not None:
                self._fail(unfit[2], cause)

    def _discard(self) -> None:
        if self._waiting is not None:
            self._waiting[1].drop()
            self._waiting = None

    def _fail(self, ticket: Ticket, reason: str) -> None:
        self._open = None
        if self.ended is not None:
            return
        try:
            self._cell.request(ticket.target, "task", "result", ticket.result(self.site_name, b"", reason))
        except FlarebusError as error:
            self._log_note(f"failure not reported: {error}")

    def _note_reply(self, reply: Delivery) -> None:
        answer = reply.plain()
        if not answer["accepted"]:
            self.note_refused(answer["reason"])

    def note_refused(self, reason: str) -> None:
        """A result was not used."""
        self._log_note(f"the server did not use the result: {reason}")
