"""SiteEngine: what the Client API of one site's script talks to inside a host. Tasks come in, answers go out."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flarebus.cell import Cell
from flarebus.client.engine import Assignment
from flarebus.codec import decode
from flarebus.delivery import Delivery
from flarebus.errors import FlarebusError
from flarebus.message import Buffer
from flarebus.metric import AnalyticsDataType
from flarebus.model import FLModel
from flarebus.pending import Pending

__all__ = ["MetricOutbox", "SharedModel", "SiteEngine"]

log = logging.getLogger(__name__)

# Metric records that may wait for the bus; more are dropped and counted, for training must not wait for them.
MAX_WAITING_RECORDS = 100_000
# Records of one message: the body of a message is bounded.
BATCH_RECORDS = 500


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
        self._takers = takers
        self._lock = threading.Lock()

    def take(self) -> FLModel:
        """A model of the caller's own."""
        with self._lock:
            self._takers -= 1
            last = self._takers == 0
            buffers = self._buffers
            if last:
                self._buffers = ()
        model = decode(self._body, buffers, copy=not last)
        assert isinstance(model, FLModel)
        return model

    def drop(self) -> None:
        """One site less will take it."""
        with self._lock:
            self._takers -= 1
            if self._takers == 0:
                self._buffers = ()


class MetricOutbox:
    """Metric records of all sites of a host on their way to the server: batched, in order, never in the way.

    Args:
        cell: the host's.
        server: address of the server job.
    """

    def __init__(self, cell: Cell, server: str) -> None:
        self._cell = cell
        self._server = server
        self._waiting: deque[dict[str, Any]] = deque()
        self._sending: Pending[Delivery] | None = None
        self._lock = threading.Lock()
        self.dropped = 0

    def put(self, record: dict[str, Any]) -> None:
        """Take one record; returns at once."""
        with self._lock:
            if len(self._waiting) >= MAX_WAITING_RECORDS:
                self.dropped += 1
                return
            self._waiting.append(record)
        self._send()

    def flush(self, timeout: float) -> None:
        """Wait until the server has everything that was put so far, for at most `timeout` seconds each message."""
        while (sending := self._sending) is not None:
            try:
                sending.result(timeout)
            except FlarebusError:
                return

    def _send(self) -> None:
        with self._lock:
            if self._sending is not None or not self._waiting:
                return
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), BATCH_RECORDS))]
            dropped, self.dropped = self.dropped, 0
            try:
                # One batch at a time: the next one is whatever came up meanwhile.
                self._sending = self._cell.request(
                    self._server, "metric", "records", {"records": batch, "dropped": dropped}
                )
            except FlarebusError as error:
                log.warning("metric records dropped: %s", error)
                return
        self._sending.on_done(self._sent)

    def _sent(self, _: Pending[Delivery]) -> None:
        self._sending = None
        self._send()


class SiteEngine:
    """One site inside a host; an `Engine` to its script.

    Args:
        site: its name.
        job_id: the job it works for.
        config: client configuration without secrets.
        cell: the host's cell.
        server: address of the server job.
        metrics: where metric records go.
        note: writes a line about the site into its log.
    """

    def __init__(
        self,
        site: str,
        job_id: str,
        config: Mapping[str, Any],
        cell: Cell,
        server: str,
        metrics: MetricOutbox,
        note: Callable[[str], None],
    ) -> None:
        self.site_name = site
        self.job_id = job_id
        self.config = config
        self.ended: str | None = None
        self._cell = cell
        self._server = server
        self._metrics = metrics
        self._log_note = note
        self._tasks: queue.SimpleQueue[tuple[Assignment, SharedModel] | None] = queue.SimpleQueue()
        self._open: Assignment | None = None
        self._number = -1

    # -- the Engine protocol --

    def next_task(self, timeout: float | None) -> Assignment | None:
        """Wait for the next task; see `Engine`."""
        if self._open is not None:
            self.fail_open("the script asked for its next task without answering this one")
        while self.ended is None:
            try:
                entry = self._tasks.get(timeout=timeout)
            except queue.Empty:
                return None
            if entry is None:
                self._tasks.put(None)  # for the next thread that looks
                return None
            assignment, model = entry
            if int(assignment.task_id) == self._number:
                self._open = assignment
                return assignment
            model.drop()
        return None

    def answer(self, assignment: Assignment, result: FLModel) -> None:
        """Send the result; returns when the server holds it, or at once if all of it fits into the message."""
        payload = self._cell.share(result, (self._server,))
        fields = {"site": self.site_name, "number": int(assignment.task_id), "error": None, "model": payload.body}
        try:
            sent = self._cell.request(self._server, "task", "result", fields, payload=payload)
            self._open = None
            if payload.manifest is None:
                # It was copied into the message; what becomes of it is for the log.
                sent.on_done(self._note)
            else:
                self._note_reply(sent.result())
        finally:
            self._cell.withdraw(payload)

    def log(self, key: str, value: Any, data_type: AnalyticsDataType, **kwargs: Any) -> None:
        """Hand over one metric record."""
        open_task = self._open
        record = {
            "site": self.site_name,
            "round": None if open_task is None else open_task.round,
            "key": key,
            "value": value,
            "type": data_type.value,
            **kwargs,
        }
        self._metrics.put(record)

    # -- the host's side --

    @property
    def has_task(self) -> bool:
        """Whether a task waits for the script."""
        return self._number >= 0 and not self._tasks.empty() and self.ended is None

    def assign(self, assignment: Assignment, model: SharedModel) -> None:
        """A task came. It replaces any that was not fetched yet."""
        self._number = int(assignment.task_id)
        self._tasks.put((assignment, model))

    def cancel(self, number: int) -> None:
        """Task `number` is not wanted any more: if the script has not fetched it, it never will."""
        if self._number == number and self._open is None:
            self._number = -1

    def end(self, reason: str) -> None:
        """No more tasks: a script that waits hears it now."""
        self.ended = self.ended or reason
        self._tasks.put(None)

    def fail_open(self, reason: str) -> None:
        """Tell the server that the task at hand, or the one that waits, will not be answered."""
        number = int(self._open.task_id) if self._open is not None else self._number
        self._open = None
        if number < 0 or self.ended is not None:
            return
        self._number = -1
        fields = {"site": self.site_name, "number": number, "error": reason, "model": b""}
        try:
            self._cell.request(self._server, "task", "result", fields)
        except FlarebusError as error:
            self._log_note(f"failure not reported: {error}")

    def _note(self, sent: Pending[Delivery]) -> None:
        if sent.error() is None:
            self._note_reply(sent.result())
        else:
            self._log_note(f"result not delivered: {sent.error()}")

    def _note_reply(self, reply: Delivery) -> None:
        answer = reply.plain()
        if not answer["accepted"]:
            self._log_note(f"the server did not use the result: {answer['reason']}")
