"""Agenda: what is to be done on a controller's thread. Others put events in; the thread takes them out while it waits.

So all state of a job belongs to one thread, and needs neither locks nor polling.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from flarebus.errors import JobAborted

__all__ = ["Agenda", "Event"]

Event = Callable[[], None]


class Agenda:
    """The events of one controller.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._posting = threading.Lock()
        self._is_over = False
        self._aborted_by: str | None = None

    # -- from any thread --

    def post(self, event: Event) -> None:
        """Have something done on the controller's thread; here and now once that listens no more."""
        with self._posting:
            if not self._is_over:
                self._events.put(event)
                return
        event()

    def abort(self, by: str) -> None:
        """Let the controller's thread end with `JobAborted` as soon as it looks up."""

        def note() -> None:
            self._aborted_by = self._aborted_by or by

        self.post(note)

    @property
    def is_over(self) -> bool:
        """Whether the thread listens no more."""
        return self._is_over

    # -- on the controller's thread --

    def take(self, deadline: float | None) -> bool:
        """Wait for one event and do it; False when `deadline`, in seconds of the clock, came first.

        Raises:
            JobAborted: somebody wants that; so does `take_waiting`.
        """
        try:
            event = self._events.get(timeout=None if deadline is None else max(0.0, deadline - self.clock()))
        except queue.Empty:
            return False
        event()
        self._check_abort()
        return True

    def take_waiting(self) -> None:
        """Do what has come so far."""
        self._take_all()
        self._check_abort()

    def close(self) -> None:
        """Listen no more: what has come so far is done, and what comes later is done by whoever brings it."""
        with self._posting:
            self._is_over = True
        self._take_all()

    def _take_all(self) -> None:
        while not self._events.empty():
            self._events.get()()

    def _check_abort(self) -> None:
        if self._aborted_by is not None:
            raise JobAborted(self._aborted_by)
