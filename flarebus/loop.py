"""Loop: the one thread that owns the sockets of a cell or a router.

Everything that touches a socket, a link, a transfer or a table of requests runs here; other threads `post`. A post
wakes the thread through a file descriptor, and only when it sleeps: nothing polls. Nothing that runs here may block.
"""

from __future__ import annotations

import logging
import os
import socket as sockets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import zmq

from flarebus.errors import Closed, UsageError

__all__ = ["Actor", "Loop"]

log = logging.getLogger(__name__)

# Nobody asked to be woken sooner: look after heartbeats this often.
IDLE_S = 1.0
# How long a goodbye may take to leave before the sockets are closed over it.
GOODBYE_MS = 200


class Actor(Protocol):
    """What lives on a loop: it is told the time."""

    def tick(self, now: float) -> float | None:
        """Do what is due; return when to be called next, in monotonic seconds, or None."""


class Loop:
    """One thread, one ZeroMQ context, any number of sockets and actors.

    Args:
        name: of the thread, for people who look at stacks.
        clock: monotonic seconds.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.context = zmq.Context()
        self._posted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._poller = zmq.Poller()
        self._readers: dict[Any, Callable[[], None]] = {}
        self._actors: list[Actor] = []
        self._wake_at = 0.0
        self._asleep = False
        self._stopping = False
        self._forked = False
        self._waker = _Waker()
        self._poller.register(self._waker.fileno(), zmq.POLLIN)
        _LOOPS.add(self)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, call: Callable[..., None], *args: Any) -> None:
        """Run `call(*args)` on the loop's thread, in the order of posting. From any thread.

        Raises:
            Closed: the loop has stopped.
            UsageError: this process was forked from the one that made the loop.
        """
        if self._stopping:
            raise Closed("this end is closed")
        if self._forked:
            raise UsageError("cells do not survive a fork; make a new one in the child, or use the spawn method")
        self._posted.append((call, args))
        if self._asleep:
            self._asleep = False
            self._waker.wake()

    def is_current(self) -> bool:
        """Whether the caller runs on the loop's thread."""
        return threading.current_thread() is self._thread

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        """Run `call(*args)` on the loop's thread and return what it returns, or raise what it raises."""
        from flarebus.pending import Pending  # only this call needs it

        if self.is_current():
            return call(*args)
        outcome: Pending[Any] = Pending()

        def work() -> None:
            try:
                outcome.set(call(*args))
            except BaseException as error:  # delivered to the caller, whatever it is
                outcome.fail(error)

        self.post(work)
        return outcome.result()

    def add_actor(self, actor: Actor) -> None:
        """Tick `actor` from now on. On the loop's thread."""
        self._actors.append(actor)
        self._wake_at = 0.0

    def remove_actor(self, actor: Actor) -> None:
        """Stop ticking `actor`. On the loop's thread."""
        if actor in self._actors:
            self._actors.remove(actor)

    def add_reader(self, socket: zmq.Socket[bytes], read: Callable[[], None]) -> None:
        """Call `read` whenever `socket` has something. On the loop's thread."""
        self._readers[socket] = read
        self._poller.register(socket, zmq.POLLIN)

    def remove_reader(self, socket: zmq.Socket[bytes]) -> None:
        """Stop reading `socket`. On the loop's thread."""
        if self._readers.pop(socket, None) is not None:
            self._poller.unregister(socket)

    def wake_by(self, when: float | None) -> None:
        """Tick no later than `when`. On the loop's thread."""
        if when is not None and when < self._wake_at:
            self._wake_at = when

    def stop(self) -> None:
        """End the thread, close every socket and the context; returns when that is done. Idempotent, never hangs."""
        if self._forked or not self._thread.is_alive():
            return
        self._stopping = True
        self._waker.wake()
        if not self.is_current():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._step()
            self._drain()
        finally:
            self._stopping = True
            # Goodbyes get their chance; term() then waits no longer than that.
            for socket in list(self._readers):
                socket.close(linger=GOODBYE_MS)
            self._readers.clear()
            self.context.destroy(linger=GOODBYE_MS)
            self._waker.close()

    def _step(self) -> None:
        now = self.clock()
        if now >= self._wake_at:
            self._tick(now)
        self._asleep = True
        # Posted between the last drain and the line above, or from now on: either way somebody sees it.
        timeout_ms = 0 if self._posted else max(0, int((self._wake_at - now) * 1000) + 1)
        ready = self._poller.poll(timeout_ms)
        self._asleep = False
        for source, _ in ready:
            read = self._readers.get(source)
            if read is None:
                self._waker.clear()
            else:
                _guarded(read)
        self._drain()

    def _drain(self) -> None:
        posted = self._posted
        # Only what is there now: whoever posts without end must not keep the sockets from being read.
        for _ in range(len(posted)):
            call, args = posted.popleft()
            _guarded(call, *args)

    def _tick(self, now: float) -> None:
        self._wake_at = now + IDLE_S
        for actor in list(self._actors):
            try:
                self.wake_by(actor.tick(now))
            except Exception:
                log.exception("tick of %r failed", actor)

    def _after_fork(self) -> None:
        self._forked = True


def _guarded(call: Callable[..., None], *args: Any) -> None:
    """The thread outlives any one message: an error here is a bug of ours, and is logged as one."""
    try:
        call(*args)
    except Exception:
        log.exception("%s failed on the bus thread", getattr(call, "__qualname__", call))


class _Waker:
    """A file descriptor that becomes readable: an eventfd where there is one, else a socket pair."""

    def __init__(self) -> None:
        if hasattr(os, "eventfd"):
            self._read = self._write = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._pair: tuple[sockets.socket, sockets.socket] | None = None
        else:
            self._pair = sockets.socketpair()
            for end in self._pair:
                end.setblocking(False)
            self._read, self._write = self._pair[0].fileno(), self._pair[1].fileno()

    def fileno(self) -> int:
        return self._read

    def wake(self) -> None:
        try:
            os.write(self._write, b"\x01\0\0\0\0\0\0\0")
        except (BlockingIOError, OSError):  # full: it is readable already; closed: nobody listens any more
            return

    def clear(self) -> None:
        try:
            os.read(self._read, 4096)
        except BlockingIOError:
            return

    def close(self) -> None:
        if self._pair is None:
            os.close(self._read)
        else:
            for end in self._pair:
                end.close()


_LOOPS: weakref.WeakSet[Loop] = weakref.WeakSet()


def _poison_after_fork() -> None:
    """A forked child has the sockets but not the thread: what it sends would vanish without a word."""
    for loop in list(_LOOPS):
        loop._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_poison_after_fork)
