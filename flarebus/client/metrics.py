"""MetricOutbox: metric records on their way to the server. In order, in batches, bounded, and never in the way.

What a script logs is appended to a queue, and that is all its own thread does. A thread of the outbox takes what has
come up, sends it as one message, and sleeps until there is more; the next one goes when that is answered. Batches leave
some time apart: every message makes the threads of the process take turns, which costs a busy script as much as
hundreds of records, and whoever looks at metrics does not see the difference.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from flarebus.client.metric_batch import MAX_BATCH_RECORDS, MAX_RECORD_BYTES, Row, encode_batch, is_light, pack_value
from flarebus.errors import Closed, EncodeError
from flarebus.metric import AnalyticsDataType
from flarebus.pending import Pending

__all__ = ["MetricOutbox"]

log = logging.getLogger(__name__)

# What may wait is bounded, for training must not wait for it: in records, at some 250 bytes each,
MAX_WAITING_RECORDS = 100_000
# and in bytes of those that hold more than a number or a few words.
MAX_WAITING_BYTES = 64 << 20
BATCH_RECORDS = MAX_BATCH_RECORDS
BATCH_BYTES = 1 << 20
# Seconds between two batches, unless more than one is waiting.
PACE_S = 0.25
# Complaints about single records; a script that logs nonsense does so in every step.
_MAX_COMPLAINTS = 20


class MetricOutbox:
    """The metric records of one process, whatever the number of its sites. Any thread may call.

    Args:
        send: sends the fields of one message to the server, and returns what will be its answer; an error of the class
            `Closed`, raised or as the answer, ends the outbox. Called by one thread, for one message after the other.
    """

    def __init__(self, send: Callable[[dict[str, Any]], Pending[Any]]) -> None:
        self._send = send
        self._waiting: deque[Row] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        # Whether the thread has to be woken for a record; the one thing that `put` looks at without the lock.
        self._asleep = True
        self._packed_bytes = 0
        self._dropped: Counter[str] = Counter()
        self._sending = False
        self._waits_for_answer = False
        self._failing = False
        self._flushing = 0
        self._closed = False
        self._n_complaints = 0
        _OUTBOXES.add(self)

    def put(
        self,
        site: str,
        round: int | None,
        key: str,
        value: Any,
        data_type: AnalyticsDataType,
        fields: dict[str, Any],
    ) -> None:
        """Take one record; returns at once. Values are taken as they are now: they may be written to afterwards.

        Args:
            fields: ``global_step``, ``writer``, and anything else; emptied.
        """
        # A record costs the training loop what it costs here, so nothing is done that can be done elsewhere.
        step = writer = None
        if fields:
            step = fields.pop("global_step", None)
            if fields:
                writer = fields.pop("writer", None)
        waiting = self._waiting
        if len(waiting) >= MAX_WAITING_RECORDS:
            self._drop((site,))
        elif fields or (type(value) is not float and not is_light(value)):
            self._put_packed(site, round, key, value, data_type, step, writer, fields)
        else:
            waiting.append((time.time(), site, round, key, value, data_type, step, writer, None))
        if self._asleep:
            self._wake()

    def flush(self, timeout: float) -> bool:
        """Wait until the server has everything, for at most `timeout` seconds.

        Returns:
            False if it may not have: the time was up, or something could not be delivered.
        """
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(self._is_idle, timeout) and not self._dropped
            finally:
                self._flushing -= 1

    def close(self, timeout: float) -> bool:
        """As `flush`, and end the thread; records that are put later go nowhere."""
        done = self.flush(timeout)
        with self._changed:
            if not self._closed:
                self._end()
        return done

    def _put_packed(
        self,
        site: str,
        round: int | None,
        key: str,
        value: Any,
        data_type: AnalyticsDataType,
        step: int | None,
        writer: str | None,
        fields: Mapping[str, Any],
    ) -> None:
        try:
            packed = value if is_light(value) else pack_value(value)
            extra = pack_value(fields) if fields else None
        except EncodeError as error:
            self._complain(site, key, str(error))
            return
        nbytes = _packed_bytes(packed, extra)
        if nbytes > MAX_RECORD_BYTES:
            self._complain(site, key, f"{nbytes} bytes; at most {MAX_RECORD_BYTES} are sent")
            return
        with self._changed:
            if self._packed_bytes + nbytes > MAX_WAITING_BYTES:
                self._dropped[site] += 1
                return
            self._packed_bytes += nbytes
            if self._packed_bytes >= BATCH_BYTES:
                self._changed.notify_all()
            self._waiting.append((time.time(), site, round, key, packed, data_type, step, writer, extra))

    def _complain(self, site: str, key: str, reason: str) -> None:
        self._drop((site,))
        self._n_complaints += 1
        if self._n_complaints <= _MAX_COMPLAINTS:
            log.warning("%s: metric %r dropped: %s", site, key, reason)

    def _drop(self, sites: Iterable[str]) -> None:
        with self._changed:
            self._dropped.update(sites)

    def _wake(self) -> None:
        with self._changed:
            if self._closed or not self._asleep:
                return
            self._asleep = False
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="flarebus metrics", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    # -- on the outbox's thread from here on --

    def _run(self) -> None:
        next_at = 0.0
        while self._wait_for_work(next_at):
            next_at = time.monotonic() + PACE_S
            with self._changed:
                rows = self._take()
                dropped, self._dropped = self._dropped, Counter()
            try:
                sent = self._send({"records": encode_batch(rows), "dropped": dict(dropped)})
            except Exception as error:  # whatever the way is made of: it is the answer
                sent = Pending()
                sent.fail(error)
            sent.on_done(partial(self._answered, rows, dropped))

    def _wait_for_work(self, next_at: float) -> bool:
        """Sleep until there is something to send and the time for it has come; False when the outbox was closed."""
        with self._changed:
            while not self._closed and not self._has_work():
                self._asleep = True
                # Looked at again: who put a record before the flag was set has woken nobody.
                if not self._waiting:
                    self._changed.wait()
            self._asleep = False
            self._changed.wait_for(self._is_urgent, max(0.0, next_at - time.monotonic()))
            # However long that takes: what waits is bounded, so this need not be.
            while self._sending and not self._closed:
                self._waits_for_answer = True
                self._changed.wait()
            self._waits_for_answer = False
            self._sending = not self._closed
            return self._sending

    def _is_urgent(self) -> bool:
        is_full = len(self._waiting) >= BATCH_RECORDS or self._packed_bytes >= BATCH_BYTES
        return is_full or self._flushing > 0 or self._closed

    def _has_work(self) -> bool:
        # What was dropped because nothing gets through is told with the next record, not again and again.
        return bool(self._waiting or (self._dropped and not self._failing))

    def _is_idle(self) -> bool:
        return self._closed or not (self._sending or self._has_work())

    def _take(self) -> list[Row]:
        """The next batch, out of the queue."""
        waiting = self._waiting
        rows: list[Row] = []
        n_rows = min(len(waiting), BATCH_RECORDS)
        # The bytes of a record are counted before it is queued: where none are, all rows are light.
        if not self._packed_bytes:
            return [waiting.popleft() for _ in range(n_rows)]
        nbytes = 0
        for _ in range(n_rows):
            nbytes += (size := _packed_bytes(waiting[0][4], waiting[0][8]))
            if nbytes > BATCH_BYTES and rows:
                break
            self._packed_bytes -= size
            rows.append(waiting.popleft())
        return rows

    # -- on the thread that brings the answer --

    def _answered(self, rows: list[Row], dropped: Counter[str], sent: Pending[Any]) -> None:
        error = sent.error()
        with self._changed:
            self._sending = False
            if error is not None:
                if not self._failing:
                    log.warning("metric records could not be delivered: %s", error)
                self._dropped.update(dropped)
                self._dropped.update(row[1] for row in rows)
            self._failing = error is not None
            if isinstance(error, Closed) and not self._closed:  # nothing will ever leave through an end that is closed
                self._end()
            # Nobody is woken who need not be: a thread that only looks costs the script its turn.
            if self._waits_for_answer or self._flushing:
                self._changed.notify_all()

    def _end(self) -> None:
        """Let go of everything and end the thread; with the lock."""
        n_lost = len(self._waiting) + self._dropped.total()
        if n_lost:
            log.warning("%d metric records were not delivered", n_lost)
        self._shut()
        self._changed.notify_all()

    def _shut(self) -> None:
        self._closed = True
        self._dropped.update(row[1] for row in self._waiting)
        self._waiting = deque(maxlen=0)
        self._packed_bytes = 0
        self._asleep = False

    def forked(self) -> None:
        """Called in a process that was forked: it has neither the thread nor anybody to open a lock that this held."""
        self._changed = threading.Condition()
        self._shut()


def _packed_bytes(value: Any, extra: bytes | None) -> int:
    return (len(value) if type(value) is bytes else 0) + (0 if extra is None else len(extra))


_OUTBOXES: weakref.WeakSet[MetricOutbox] = weakref.WeakSet()


def _after_fork() -> None:
    for outbox in list(_OUTBOXES):
        outbox.forked()


os.register_at_fork(after_in_child=_after_fork)
