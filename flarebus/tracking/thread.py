"""TrackerThread: a tracker on a thread of its own. Nobody waits for it, and what it does wrong stays with it.

What is to be written waits in a queue that is bounded in records and bytes; what does not fit is counted. A tracker
that cannot be opened is tried again after a while: until the queue is full nothing is lost by that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from flarebus.tracking.tracker import JOB, Tracker

__all__ = ["TrackerThread"]

log = logging.getLogger(__name__)

MAX_WAITING_RECORDS = 100_000
MAX_WAITING_BYTES = 64 << 20
# Seconds until a tracker that could not be opened is tried again.
RETRY_S = 30.0
# The part of the time at the end that is for records; the rest is for what matters more, and for closing.
_FOR_RECORDS = 2 / 3
# Complaints about single records; a tracker that is down refuses all of them for the same reason.
_MAX_COMPLAINTS = 3
# It is a library of somebody else that is called: whatever it raises, even to exit, the job goes on without it.
_ANY = (Exception, SystemExit)


class _Item(NamedTuple):
    write: Callable[[Tracker], int]
    n_records: int
    nbytes: int
    is_needed: bool


class TrackerThread:
    """One tracker and its thread. Any thread may call; no call blocks except `wait`.

    Args:
        name: of the tracker, for the log.
        make: makes a tracker and opens it, on the thread.
        in_words: an error as a line without secrets.
        series: the series of whoever tracks.
        retry_s: seconds between attempts to open it.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Tracker],
        in_words: Callable[[BaseException], str],
        series: str = JOB,
        retry_s: float = RETRY_S,
    ) -> None:
        self.name = name
        self._make = make
        self._in_words = in_words
        self._series = series
        self._retry_s = retry_s
        self._changed = threading.Condition()
        self._waiting: deque[_Item] = deque()
        self._n_records = self._nbytes = 0
        self._n_dropped = self._n_failed = self._n_unfit = self._n_late = 0
        self._n_complaints = 0
        self._state: str | None = None
        self._skip_at = float("inf")
        self._is_given_up = False
        self._done = threading.Event()
        # A daemon: whoever waits for it has a limit, and a process may leave without it.
        self._thread = threading.Thread(target=self._run, name=f"flarebus tracking {name}", daemon=True)
        self._thread.start()

    def put(
        self, write: Callable[[Tracker], int], n_records: int = 1, nbytes: int = 0, *, is_needed: bool = False
    ) -> bool:
        """Have something written.

        Args:
            write: called on the thread; returns how many of its records could not be shown. What it refers to must not
                change any more.
            is_needed: there are few of these: they find room when there is none for others.

        Returns:
            False if there was no room.
        """
        factor = 2 if is_needed else 1
        with self._changed:
            has_room = (
                self._n_records + n_records <= factor * MAX_WAITING_RECORDS
                and self._nbytes + nbytes <= factor * MAX_WAITING_BYTES
                and self._state is None
                and not self._done.is_set()
            )
            if not has_room:
                self._n_dropped += n_records
                return False
            self._waiting.append(_Item(write, n_records, nbytes, is_needed))
            self._n_records += n_records
            self._nbytes += nbytes
            self._changed.notify_all()
            return True

    def end(self, state: str, limit_s: float) -> None:
        """Nothing more comes: deliver what waits, and close the tracker. Returns at once.

        Args:
            state: how the job ended.
            limit_s: seconds that it may take; before they are over, records are left out for what is needed.
        """
        with self._changed:
            if self._state is None:
                self._state = state
                self._skip_at = time.monotonic() + limit_s * _FOR_RECORDS
            self._changed.notify_all()

    def wait(self, timeout: float) -> bool:
        """Wait for the end, at most `timeout` seconds; what is not delivered by then is given up.

        Returns:
            Whether everything was delivered; if not, the log says what was lost.
        """
        is_done = self._done.wait(timeout)
        with self._changed:
            self._is_given_up = not is_done
            lost = {
                "dropped, for they came faster than it took them": self._n_dropped,
                "not taken": self._n_failed,
                "of a kind that cannot be shown": self._n_unfit,
                "not delivered": self._n_late + self._n_records,
            }
            self._waiting.clear()
            self._n_records = self._nbytes = 0
        if not is_done:
            log.warning("tracking with %s: given up, it did not finish in time", self.name)
        said = ", ".join(f"{count} {what}" for what, count in lost.items() if count)
        if said:
            log.warning("tracking with %s: records lost: %s", self.name, said)
        return is_done and not said

    # -- on the thread from here on --

    def _run(self) -> None:
        try:
            tracker = self._open()
            if tracker is not None:
                while (item := self._next()) is not None:
                    self._write(tracker, item)
                self._close(tracker)
        finally:
            self._done.set()

    def _open(self) -> Tracker | None:
        """The opened tracker; None when the job ended first."""
        level = logging.WARNING
        while True:
            try:
                return self._make()
            except _ANY as error:
                reason = self._in_words(error)
                log.log(level, "tracking with %s is not possible, the job goes on: %s", self.name, reason)
                level = logging.DEBUG  # once is enough
            with self._changed:
                if self._changed.wait_for(lambda: self._state is not None, self._retry_s):
                    return None

    def _next(self) -> _Item | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._state is not None)
            while self._waiting and not self._waiting[0].is_needed and time.monotonic() >= self._skip_at:
                self._n_late += self._take_out().n_records
            return self._waiting[0] if self._waiting else None

    def _take_out(self) -> _Item:
        item = self._waiting.popleft()
        self._n_records -= item.n_records
        self._nbytes -= item.nbytes
        return item

    def _write(self, tracker: Tracker, item: _Item) -> None:
        n_failed = n_unfit = 0
        try:
            n_unfit = item.write(tracker)
        except _ANY as error:
            n_failed = item.n_records
            self._complain(error)
        with self._changed:
            self._n_failed += n_failed
            self._n_unfit += n_unfit
            if self._waiting and self._waiting[0] is item:  # else it was given up meanwhile, and counted
                self._take_out()

    def _close(self, tracker: Tracker) -> None:
        try:
            if self._n_dropped:
                tracker.tags(self._series, {"flarebus.records_dropped": self._n_dropped})
            tracker.close(self._state or "")
        except _ANY as error:
            self._complain(error)

    def _complain(self, error: BaseException) -> None:
        is_news = self._n_complaints < _MAX_COMPLAINTS and not self._is_given_up
        level = logging.WARNING if is_news else logging.DEBUG
        self._n_complaints += 1
        log.log(level, "tracking with %s: %s", self.name, self._in_words(error))
