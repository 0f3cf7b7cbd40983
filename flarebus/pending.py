"""Pending: an answer that will come. A future cut down to what a bus needs, because one is made for every request."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from flarebus.errors import DeadlineExceeded

__all__ = ["Pending"]

T = TypeVar("T")


class Pending(Generic[T]):
    """A value or an error that another thread will set, once."""

    __slots__ = ("_callbacks", "_done", "_error", "_lock", "_value")

    # Setting and adding a callback must not miss each other; the section is so short that one lock serves all.
    _guard = threading.Lock()

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._done = False
        self._value: T | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Pending[T]], None]] | None = None

    @property
    def is_done(self) -> bool:
        """Whether the value or error is there."""
        return self._done

    def result(self, timeout: float | None = None) -> T:
        """Wait for the value and return it; raise the error if that is what came.

        Args:
            timeout: seconds; None waits until the answer comes, which the deadline of the request bounds.

        Raises:
            DeadlineExceeded: nothing came within `timeout`.
        """
        if not self._done:
            if not self._lock.acquire(timeout=-1 if timeout is None else max(timeout, 0)):
                raise DeadlineExceeded(f"no answer within {timeout} s")
            # Whoever else waits is let through as well.
            self._lock.release()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def error(self) -> BaseException | None:
        """The error, or None; meaningful once `is_done`."""
        return self._error

    def set(self, value: T) -> None:
        """Give the value; a second call, or one after `fail`, does nothing."""
        self._finish(value, None)

    def fail(self, error: BaseException) -> None:
        """Give the error; a second call, or one after `set`, does nothing."""
        self._finish(None, error)

    def on_done(self, callback: Callable[[Pending[T]], None]) -> None:
        """Call `callback(self)` when done, on the thread that sets it, or now if it is. It must not block."""
        with Pending._guard:
            if not self._done:
                self._callbacks = [*(self._callbacks or ()), callback]
                return
        callback(self)

    def _finish(self, value: T | None, error: BaseException | None) -> None:
        with Pending._guard:
            if self._done:
                return
            self._value, self._error = value, error
            self._done = True
            callbacks, self._callbacks = self._callbacks, None
        self._lock.release()
        for callback in callbacks or ():
            callback(self)
