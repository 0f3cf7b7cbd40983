"""ShmLink: the thread of an open `ShmPipe` that owns its socket, and what other threads may ask of it.

The PASSIVE end listens, the ACTIVE end connects, again and again until somebody is there. Frames are sent by whoever
has them, as far as the socket takes them at once, and the rest by this thread; nobody blocks on the other end. That the
other end is gone is heard from the socket, or, when children of a killed process still hold the socket, from its
process.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from flarebus.errors import DecodeError
from flarebus.pipes import Message, Mode
from flarebus_pipes._frames import DISCARD, MESSAGE, READ, RELEASE, WITHDRAW, WITHDRAWN, Frame, FrameSocket
from flarebus_pipes._inotify import IN_ARRIVED, IN_MADE, Inotify
from flarebus_pipes._owner import BEAT_S
from flarebus_pipes._record import unpack
from flarebus_pipes._segments import Mappings, SegmentPool
from flarebus_pipes._socket_place import SocketPlace

__all__ = ["ShmLink"]

# Between two attempts to connect where nothing tells that the socket is there.
_RETRY_S = 0.1
# Where inotify tells.
_LOOK_S = 1.0
# So many messages wait unread; an honest sender waits for each.
_MAX_WAITING = 64
# A peer that lives answers a withdrawal at once.
_WITHDRAW_S = 1.0
# What was promised to the peer gets this long to leave when this end closes.
_GOODBYE_S = 1.0
_END_S = 5.0
_CREDENTIALS = struct.Struct("3i")


class _Waiting(NamedTuple):
    """What came in and was not received yet."""

    connection: int
    number: int
    message: Message | DecodeError


class _Sent:
    """A message that is not settled."""

    __slots__ = ("is_out", "outcome", "segment")

    def __init__(self, segment: int) -> None:
        self.segment = segment
        self.is_out = False
        self.outcome = 0
        """READ or WITHDRAWN once that is known; -1 when it never will be."""


class ShmLink:
    """Made and started by an end that has its place.

    Args:
        place: where the socket is.
        pool: the segments of this end.

    Raises:
        OSError: the socket cannot be made.
    """

    def __init__(self, place: SocketPlace, pool: SegmentPool) -> None:
        self.last_active = 0.0
        """When the peer gave a sign of life, in monotonic seconds; 0.0 if it never did."""
        self._place = place
        self._pool = pool
        lock = threading.RLock()
        # Under one lock: something may be received; a message that was sent is settled.
        self._arrival, self._settling, self._lock = threading.Condition(lock), threading.Condition(lock), lock
        self._end = self._lost = ""
        self._waiting: deque[_Waiting] = deque()
        # To whom messages are given as they come, unless `receive` has returned one that is still looked at.
        self._deliver: Callable[[Message], None] | None = None
        self._is_fetched = False
        self._outbox: deque[Frame] = deque()
        # Appended to by the garbage collector on threads that hold the lock: no lock for this one.
        self._released: deque[tuple[int, int]] = deque()
        self._sent: dict[int, _Sent] = {}
        self._number = 0
        self._connection: FrameSocket | None = None
        self._connections = 0
        self._mappings = self._new_mappings()
        self._peer_process: int | None = None
        self._beat_at = time.monotonic() + BEAT_S
        self._listener = self._listen() if place.mode is Mode.PASSIVE else None
        self._inotify = Inotify.start() if place.mode is Mode.ACTIVE else None
        if self._inotify is not None:
            self._inotify.watch(place.path, IN_ARRIVED | IN_MADE)
        self._woken, self._waker = socket.socketpair()
        for each in (self._woken, self._waker):
            each.setblocking(False)
        if self._listener is None:
            self._connect()  # now, so that an end which is open has been seen by the other, if that was there
        self._thread = threading.Thread(target=self._run, name=f"flarebus-pipe-{place.name}", daemon=True)
        self._thread.start()

    # -- for senders and receivers --

    def check(self) -> None:
        """Raise BrokenPipeError if there is nobody to send to, and will be nobody."""
        if self._end or self._lost:
            raise BrokenPipeError(self._end or self._lost)

    def send(self, head: str, record: bytes, segment: int, deadline: float | None) -> bool:
        """Send a message; whether the peer has received it.

        Args:
            head: of the message.
            record: body and buffers, or where they are.
            segment: number of the segment with its buffers; 0 without one.
            deadline: in monotonic seconds.

        Raises:
            BrokenPipeError: this end was closed, or the peer is gone.
        """
        with self._lock:
            self.check()
            self._number += 1
            number = self._number
            sent = self._sent[number] = _Sent(segment)
            self._put(Frame(MESSAGE, number, memoryview(record), head.encode()))
            try:
                if not _wait(self._settling, lambda: sent.outcome, deadline):
                    self._withdraw(number, sent)
                    _wait(self._settling, lambda: sent.outcome, time.monotonic() + _WITHDRAW_S)
            finally:
                del self._sent[number]
                if sent.outcome == 0:
                    self._pool.settle(segment)  # it may be received yet
            if sent.outcome < 0:
                raise BrokenPipeError(self._end or self._lost or "the peer that was there is gone")
            return sent.outcome == READ

    def _withdraw(self, number: int, sent: _Sent) -> None:
        if sent.is_out:
            self._put(Frame(WITHDRAW, number))
            return
        self._outbox = deque(frame for frame in self._outbox if (frame.kind, frame.number) != (MESSAGE, number))
        self._pool.take_back(sent.segment)
        sent.outcome = WITHDRAWN

    def receive(self, deadline: float | None) -> Message | None:
        """The next message; None at the deadline.

        Raises:
            BrokenPipeError: this end was closed, or the peer is gone and nothing waits.
            DecodeError: what came was none.
        """
        with self._lock:
            self._is_fetched = False
            _wait(self._arrival, lambda: self._waiting or self._end or self._lost, deadline)
            if self._end:
                raise BrokenPipeError(self._end)
            if self._waiting:
                self._is_fetched = True
                return self._take()
            if self._lost:
                raise BrokenPipeError(self._lost)
            return None

    def deliver(self, to: Callable[[Message], None]) -> None:
        """Give messages to `to`, on the thread of the link, as they come."""
        self._deliver = to

    def _next_to_deliver(self) -> Message | None:
        with self._lock:
            if (
                self._end
                or not self._waiting
                or not self._is_direct
                or isinstance(self._waiting[0].message, DecodeError)
            ):
                return None
            return self._take()

    @property
    def _is_direct(self) -> bool:
        return self._deliver is not None and not self._is_fetched

    def _take(self) -> Message:
        if len(self._waiting) == _MAX_WAITING:
            self._wake()  # there is room for more
        taken = self._waiting.popleft()
        if taken.connection == self._connections:
            self._put(Frame(READ, taken.number))
        if isinstance(taken.message, DecodeError):
            raise taken.message
        return taken.message

    def clear(self) -> None:
        """Receive all that waits, and drop it."""
        with self._lock:
            while self._waiting and not self._end:
                with contextlib.suppress(DecodeError):
                    self._take()

    def discard(self, number: int) -> None:
        """Tell the peer that this segment will not be used again."""
        with self._lock:
            self._put(Frame(DISCARD, number))

    def stop(self, why: str) -> None:
        """End all waiting, and the thread; what the peer was promised still goes out."""
        with self._lock:
            self._finish(why)
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(_END_S)

    def _put(self, frame: Frame) -> None:
        """Send a frame, now if the socket takes it; under the lock."""
        self._outbox.append(frame)
        connection = self._connection
        if connection is not None and not connection.wants_to_write:
            with contextlib.suppress(OSError):  # the thread hears why
                self._send_out(connection)
                if not connection.wants_to_write:
                    return
        self._wake()

    def _wake(self) -> None:
        # From the garbage collector too. A full socket wakes as well as one more byte, a closed one need not.
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")

    def _release(self, connection: int, number: int) -> None:
        self._released.append((connection, number))
        self._wake()

    def _new_mappings(self) -> Mappings:
        connection = self._connections
        return Mappings(lambda number: self._release(connection, number))

    # -- the thread --

    def _run(self) -> None:
        try:
            while not self._end:
                self._turn()
            self._say_goodbye()
        except OSError as error:
            with self._lock:
                self._finish(f"the socket in {self._place.path} failed: {error}")
        finally:
            with self._lock:
                self._finish("the thread of this pipe has failed")  # unless it has another reason
            self._disconnect("")
            for each in (self._listener, self._inotify, self._woken, self._waker):
                if each is not None:
                    each.close()

    def _turn(self) -> None:
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        connection = self._connection
        timeout = BEAT_S
        if self._listener is not None:
            poll.register(self._listener, select.POLLIN)
        if connection is not None:
            wants_more = select.POLLIN if len(self._waiting) < _MAX_WAITING else 0
            wanted = wants_more | (select.POLLOUT if connection.wants_to_write else 0)
            if wanted:  # an end that hung up is always reported
                poll.register(connection, wanted)
        elif self._listener is None:
            timeout = _RETRY_S if self._inotify is None else _LOOK_S
        if self._inotify is not None and connection is None:
            poll.register(self._inotify, select.POLLIN)
        if self._peer_process is not None:
            poll.register(self._peer_process, select.POLLIN)
        ready = {handle for handle, _ in poll.poll(timeout * 1000)}
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        if self._inotify is not None:
            self._inotify.read()
        now = time.monotonic()
        if now >= self._beat_at:
            self._beat_at = now + BEAT_S
            with contextlib.suppress(OSError):
                os.utime(self._place.record)
        if connection is not None:
            self._exchange(connection, is_dead=self._peer_process in ready)
        if self._listener is not None and self._listener.fileno() in ready:
            self._accept(self._listener)
        elif self._listener is None and connection is None:
            # Not in the turn that lost one: a process that is just dying may still be listening.
            self._connect()

    def _exchange(self, connection: FrameSocket, is_dead: bool) -> None:
        """Take in what came and send what waits, in this order: what a peer sent before it died counts."""
        try:
            while True:
                frames, is_there = connection.read() if len(self._waiting) < _MAX_WAITING else ([], True)
                with self._lock:
                    for frame in frames:
                        self._on_frame(frame)
                while self._deliver is not None and (message := self._next_to_deliver()) is not None:
                    self._deliver(message)
                    del message
                if not is_there:
                    raise ConnectionResetError
                if not is_dead or not frames:
                    break
            if is_dead:
                raise ConnectionResetError
            with self._lock:
                self._send_out(connection)
        except OSError as error:
            why = f"the other end of channel {self._place.name!r} is gone"
            self._disconnect(f"{why}: {error}" if error.args else why)

    def _send_out(self, connection: FrameSocket) -> None:
        """Send what waits, as far as the socket takes it; under the lock."""
        while self._released:
            number_of, segment = self._released.popleft()
            if number_of == self._connections:
                connection.put(Frame(RELEASE, segment))
        while self._outbox:
            frame = self._outbox.popleft()
            if frame.kind == MESSAGE:
                sent = self._sent.get(frame.number)
                if sent is None:  # its sender was interrupted
                    continue
                handle = self._pool.hand_over(sent.segment) if sent.segment else -1
                if handle is None:  # a peer that is gone took it along
                    self._settle(sent, -1)
                    continue
                sent.is_out = True
                frame = frame._replace(handle=handle)
            connection.put(frame)
        connection.flush()

    def _settle(self, sent: _Sent, outcome: int) -> None:
        sent.outcome = sent.outcome or outcome
        self._settling.notify_all()

    def _on_frame(self, frame: Frame) -> None:
        self.last_active = time.monotonic()
        if frame.kind == MESSAGE:
            message = self._message(frame)
            self._waiting.append(_Waiting(self._connections, frame.number, message))
            if not self._is_direct or isinstance(message, DecodeError):
                self._arrival.notify_all()
        elif frame.kind in (READ, WITHDRAWN):
            sent = self._sent.get(frame.number)
            if sent is not None and sent.is_out and not sent.outcome:
                self._settle(sent, frame.kind)
                if frame.kind == READ:
                    self._pool.settle(sent.segment)
        elif frame.kind == WITHDRAW:
            self._forget(frame.number)
        elif frame.kind == RELEASE:
            self._pool.take_back(frame.number)
        else:
            self._mappings.drop(frame.number)

    def _message(self, frame: Frame) -> Message | DecodeError:
        try:
            record = unpack(frame.record)
            buffers = record.buffers
            if record.name:
                if not record.name.isdecimal() or len(record.name) > 18:
                    raise DecodeError("a message names a segment that is none")
                if frame.handle >= 0:
                    self._mappings.add(int(record.name), frame.handle)
                buffers = self._mappings.lease(int(record.name), record.lengths)
            return Message.from_head(str(frame.head, "ascii", "replace"), record.body, buffers)
        except DecodeError as error:
            return error
        except (OSError, ValueError) as error:
            return DecodeError(f"a segment cannot be mapped: {error}")
        finally:
            if frame.handle >= 0:
                os.close(frame.handle)

    def _forget(self, number: int) -> None:
        for waiting in self._waiting:
            if (waiting.connection, waiting.number) == (self._connections, number):
                self._waiting.remove(waiting)
                self._outbox.append(Frame(WITHDRAWN, number))
                return

    # -- coming and going --

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            # Moved into place: whoever sees it can connect.
            listener.bind(f"{self._place.socket}.new")
            listener.listen(8)
            os.rename(f"{self._place.socket}.new", self._place.socket)
        except BaseException:
            listener.close()
            raise
        return listener

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            if self._connection is None:
                self._adopt(connection)
            else:
                connection.close()  # its place is taken, as its own `open` should have found

    def _connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.connect(str(self._place.socket))
        except OSError:
            connection.close()  # nobody is there yet
        else:
            self._adopt(connection)

    def _adopt(self, connection: socket.socket) -> None:
        pid = 0
        if hasattr(socket, "SO_PEERCRED"):
            pid, user, _ = _CREDENTIALS.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            if user != os.geteuid():
                connection.close()
                return
        if pid > 0 and hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self._peer_process = os.pidfd_open(pid)
        with self._lock:
            self._connections += 1
            self._mappings = self._new_mappings()
            self._connection = FrameSocket(connection)
            self._lost = ""
            self.last_active = time.monotonic()
        self._wake()  # something may wait to go out

    def _disconnect(self, why: str) -> None:
        with self._lock:
            connection, self._connection = self._connection, None
            handle, self._peer_process = self._peer_process, None
            if connection is None:
                return
            self._lost = why
            self._outbox.clear()
            for sent in self._sent.values():
                self._settle(sent, -1)
            self._pool.reset()
            # Views that somebody has keep their memory.
            self._mappings = self._new_mappings()
            self._arrival.notify_all()
        connection.close()
        if handle is not None:
            os.close(handle)

    def _finish(self, why: str) -> None:
        self._end = self._end or why
        for sent in self._sent.values():
            self._settle(sent, -1)
        self._arrival.notify_all()

    def _say_goodbye(self) -> None:
        connection = self._connection
        if connection is None:
            return
        with self._lock:
            self._outbox = deque(frame for frame in self._outbox if frame.kind != MESSAGE)
            with contextlib.suppress(OSError):
                self._send_out(connection)
        give_up = time.monotonic() + _GOODBYE_S
        with contextlib.suppress(OSError):
            while connection.wants_to_write and (left := give_up - time.monotonic()) > 0:
                poll = select.poll()
                poll.register(connection, select.POLLOUT)
                poll.poll(left * 1000)
                with self._lock:
                    connection.flush()


def _wait(condition: threading.Condition, is_true: Callable[[], object], deadline: float | None) -> bool:
    left = None if deadline is None else deadline - time.monotonic()
    return bool(condition.wait_for(is_true, left))
