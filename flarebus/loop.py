"""Loop: the one thread that owns the sockets of a cell or a router.

Everything that touches a socket, a link, a transfer or a table of requests runs here; other threads `post`. A post
wakes the thread through a file descriptor, and only when it sleeps: nothing polls. Nothing that runs here may block.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import logging
import math
import os
import select
import socket as sockets
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import zmq

from flarebus.errors import Closed, UsageError
from flarebus.pending import Pending

__all__ = ["GOODBYE_MS", "Actor", "Loop", "has_message"]

log = logging.getLogger(__name__)

# Nobody asked to be woken sooner: look after heartbeats this often.
IDLE_S = 1.0
# A tick that is later than this: the whole process was held up, and what others said meanwhile is still unread.
HELD_UP_S = 2.0
# How long a goodbye may take to leave before the sockets are closed over it.
GOODBYE_MS = 200
# Freed memory that each process keeps at most; a few windows of chunks.
KEPT_BYTES = 64 * 1024 * 1024
# As plain numbers: they are used for every message, and enums are slow.
_EVENTS, _READABLE = int(zmq.EVENTS), int(zmq.POLLIN)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class Actor(Protocol):
    """What lives on a loop: it is told the time, and the end."""

    def tick(self, now: float) -> float | None:
        """Do what is due; return when to be called next, in monotonic seconds, or None."""

    def end(self) -> None:
        """The loop ends now, and nothing is read or sent after this: release what waits."""


class Loop:
    """One thread, one ZeroMQ context, any number of sockets and actors.

    Args:
        name: of the thread, for people who look at stacks.
        clock: monotonic seconds.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        _keep_freed_memory()
        self.context = zmq.Context()
        self._posted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._deferred: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._poll = select.poll()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        self._readers: dict[zmq.Socket[bytes], Callable[[], None]] = {}
        self._monitors: dict[zmq.Socket[bytes], Callable[[], None]] = {}
        self._actors: list[Actor] = []
        self._wake_at = clock()
        self._was_held_up = False
        self._asleep = False
        self._stopping = False
        self._forked = False
        self._waker = _Waker()
        self._poll.register(self._waker.fileno(), select.POLLIN)
        _LOOPS.add(self)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, call: Callable[..., None], *args: Any) -> None:
        """Run `call(*args)` on the loop's thread, in the order of posting. From any thread.

        Raises:
            Closed: the loop has stopped.
            UsageError: this process was forked from the one that made the loop.
        """
        if self._forked:
            raise UsageError("cells do not survive a fork; make a new one in the child, or use the spawn method")
        if not self._stopping:
            self._posted.append((call, args))
        # Looked at again: what was posted before it was set is still run, later posts may have come too late.
        if self._stopping:
            raise Closed("this end is closed")
        if self._asleep:
            self._asleep = False
            self._waker.wake()

    def defer(self, call: Callable[..., None], *args: Any) -> None:
        """Run `call(*args)` when what has come in is read and what was posted is run. On the loop's thread.

        For what wakes other threads: woken earlier, they would contend with this one for the interpreter at each of the
        messages that are left.
        """
        self._deferred.append((call, args))

    def flush(self) -> None:
        """Run what was deferred, before something that has to come after it. On the loop's thread.

        What runs may close whatever the caller works on, and come back to here.
        """
        while self._deferred:
            call, args = self._deferred.popleft()
            _guarded(call, *args)

    def is_current(self) -> bool:
        """Whether the caller runs on the loop's thread."""
        return threading.current_thread() is self._thread

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        """Run `call(*args)` on the loop's thread and return what it returns, or raise what it raises.

        What came in before it may still be handed over after it.
        """
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
        self.wake_by(self.clock())

    def remove_actor(self, actor: Actor) -> None:
        """Stop ticking `actor`. On the loop's thread."""
        if actor in self._actors:
            self._actors.remove(actor)

    def add_reader(self, socket: zmq.Socket[bytes], read: Callable[[], None]) -> None:
        """Call `read` whenever `socket` may have something; now and then it has nothing after all. On the loop's
        thread."""
        self._readers[socket] = read
        self._register(socket)

    def add_monitor(self, socket: zmq.Socket[bytes], read: Callable[[], None]) -> None:
        """Call `read` for each message on `socket`, before sockets are read that had something at the same time. For
        one that is used for nothing else, and seldom has any: it costs nothing while it is quiet. On the loop's
        thread."""
        self._monitors[socket] = read
        self._register(socket)
        # What came before the descriptor was looked at need not show on it.
        self._posted.append((self._read_monitor, (socket,)))

    def close_socket(self, socket: zmq.Socket[bytes], linger_ms: int = GOODBYE_MS) -> None:
        """Stop reading `socket` and close it; what was said last has this long to leave. On the loop's thread."""
        if self._readers.pop(socket, None) or self._monitors.pop(socket, None):
            descriptor = _descriptor(socket)
            self._poll.unregister(descriptor)
            del self._sockets[descriptor]
        socket.close(linger=linger_ms)

    def wake_by(self, when: float | None) -> None:
        """Tick no later than `when`. On the loop's thread."""
        if when is not None and when < self._wake_at:
            self._wake_at = when

    def stop(self) -> None:
        """End the thread, close every socket and the context; returns when that is done. Idempotent, never hangs."""
        if not self._thread.is_alive():  # nor is it in a forked child
            return
        self._stopping = True
        self._waker.wake()
        if not self.is_current():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._step()
        finally:
            self._stopping = True
            self._end()

    def _end(self) -> None:
        while self._posted:
            self._drain()
        self.flush()
        for actor in list(self._actors):
            _guarded(actor.end)
        for socket in [*self._readers, *self._monitors]:
            self.close_socket(socket)
        # No longer than goodbyes may take, whoever does not read them.
        self.context.destroy(linger=GOODBYE_MS)
        self._waker.close()

    def _step(self) -> None:
        """Sleep until there is something to do, and do it.

        A ZeroMQ socket's descriptor says that its events may have changed, once, and any use of the socket takes that
        back: so events are looked at last thing before sleeping. That costs as much as a message. So of a monitor,
        which nobody else uses, the descriptor alone is believed, and that of every socket after sleeping.
        """
        self._asleep = True
        # Posted between the last drain and the line above, or from now on: either way somebody sees it.
        ready = [socket for socket in self._readers if has_message(socket)]
        is_busy = ready or self._posted or self._deferred
        wait_s = 0.0 if is_busy else max(0.0, self._wake_at - self.clock())
        events = self._poll.poll(math.ceil(wait_s * 1000))
        self._asleep = False
        for descriptor, _ in events:
            socket = self._sockets.get(descriptor)
            if socket is None:
                self._waker.clear()
            elif socket in self._monitors:
                self._read_monitor(socket)
            elif socket not in ready:
                ready.append(socket)
        is_due = self.clock() >= self._wake_at
        if is_due:
            # Nobody must be held to be silent for what came after the sleep: this thread may have waited to go on.
            ready.extend([socket for socket in self._readers if socket not in ready and has_message(socket)])
        for socket in ready:
            # One that was read before it may have closed it.
            if socket in self._readers:
                _guarded(self._readers[socket])
        self._drain()
        self.flush()
        if is_due:
            self._tick(self.clock())

    def _register(self, socket: zmq.Socket[bytes]) -> None:
        descriptor = _descriptor(socket)
        self._sockets[descriptor] = socket
        self._poll.register(descriptor, select.POLLIN)

    def _read_monitor(self, socket: zmq.Socket[bytes]) -> None:
        while socket in self._monitors and has_message(socket):
            _guarded(self._monitors[socket])

    def _drain(self) -> None:
        posted = self._posted
        # Only what is there now: whoever posts without end must not keep the sockets from being read.
        for _ in range(len(posted)):
            call, args = posted.popleft()
            _guarded(call, *args)

    def _tick(self, now: float) -> None:
        # Nobody must be held to be silent for what we have not read: read first, and judge the next time.
        self._was_held_up = now - self._wake_at > HELD_UP_S and not self._was_held_up
        self._wake_at = now + IDLE_S
        if self._was_held_up:
            return
        for actor in list(self._actors):
            try:
                self.wake_by(actor.tick(now))
            except Exception:
                log.exception("tick of %r failed", actor)

    def _after_fork(self) -> None:
        self._forked = True


def has_message(socket: zmq.Socket[bytes]) -> bool:
    """Whether something can be received; cheaper than to try and fail."""
    events: int = socket.getsockopt(_EVENTS)  # type: ignore[assignment]
    return events & _READABLE != 0


def _descriptor(socket: zmq.Socket[bytes]) -> int:
    return int(socket.getsockopt(zmq.FD))


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
        self._lock = threading.Lock()
        self._closed = False

    def fileno(self) -> int:
        return self._read

    def wake(self) -> None:
        # A closed descriptor may be somebody's file by now.
        with self._lock:
            if self._closed:
                return
            try:
                os.write(self._write, b"\x01\0\0\0\0\0\0\0")
            except BlockingIOError:  # full: it is readable already
                return

    def clear(self) -> None:
        try:
            os.read(self._read, 4096)
        except BlockingIOError:
            return

    def close(self) -> None:
        with self._lock:
            self._closed = True
        if self._pair is None:
            os.close(self._read)
        else:
            for end in self._pair:
                end.close()


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc keep what the frames of a round free for the next round: giving it back and touching it anew costs more
    than receiving into it. Elsewhere allocators do that by themselves."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and sys.platform == "linux":
        mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES // 2)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


_LOOPS: weakref.WeakSet[Loop] = weakref.WeakSet()


def _poison_after_fork() -> None:
    """A forked child has the sockets but not the thread: what it sends would vanish without a word."""
    for loop in list(_LOOPS):
        loop._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_poison_after_fork)


def _stop_all() -> None:
    """Say goodbye and remove socket files, also for those who leave without closing anything."""
    for loop in list(_LOOPS):
        loop.stop()


atexit.register(_stop_all)
