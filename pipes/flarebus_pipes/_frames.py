"""Frames: what goes over the socket of a `ShmPipe`, and the socket as a queue of them that never blocks.

    kind, bytes of the head, number of descriptors, a zero    one byte each
    bytes of the rest                                         4 bytes
    number                                                    8 bytes: of the message, or of the segment
    record, then the head of the message                      MESSAGE only

Numbers are little-endian. For one thread.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from typing import NamedTuple

from flarebus_pipes._record import MAX_RECORD_BYTES, aligned

__all__ = ["DISCARD", "MESSAGE", "READ", "RELEASE", "WITHDRAW", "WITHDRAWN", "Frame", "FrameSocket"]

MESSAGE = 1
"""A message; the descriptor of its segment comes along the first time."""
READ = 2
"""The message of this number was received."""
WITHDRAW = 3
"""Forget the message of this number, if nobody received it."""
WITHDRAWN = 4
"""It is forgotten."""
RELEASE = 5
"""All views of this segment of yours are dropped."""
DISCARD = 6
"""This segment of mine will not be used again."""

_HEAD = struct.Struct("<BBBxIQ")
_MAX_DESCRIPTORS = 4
# One call reads at most so much, so that other events get their turn.
_MAX_FRAMES_A_TURN = 64


class Frame(NamedTuple):
    """One frame."""

    kind: int
    number: int
    record: memoryview = memoryview(b"")
    head: bytes = b""
    handle: int = -1
    """A descriptor that comes along, or -1. Of a frame that came in it is the receiver's to close."""


class FrameSocket:
    """A connected stream socket, of which it is the owner."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.setblocking(False)
        self._out: deque[tuple[memoryview, int]] = deque()
        self._head = memoryview(bytearray(_HEAD.size))
        self._rest: memoryview | None = None
        self._have = 0
        self._handles: deque[int] = deque()

    def fileno(self) -> int:
        """For a poll."""
        return self._socket.fileno()

    @property
    def wants_to_write(self) -> bool:
        """Whether something waits to go out."""
        return bool(self._out)

    def put(self, frame: Frame) -> None:
        """Queue a frame; `flush` sends it. Its descriptor is copied, so the caller may close its own at once."""
        count = int(frame.handle >= 0)
        head = _HEAD.pack(frame.kind, len(frame.head), count, len(frame.record) + len(frame.head), frame.number)
        handle = os.dup(frame.handle) if count else -1
        self._out.append((memoryview(b"".join((head, frame.record, frame.head))), handle))

    def flush(self) -> None:
        """Send what can be sent now.

        Raises:
            OSError: the other end is gone.
        """
        while self._out:
            data, handle = self._out[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [handle]))] if handle >= 0 else []
            try:
                sent = self._socket.sendmsg([data], rights, getattr(socket, "MSG_NOSIGNAL", 0))
            except BlockingIOError:
                return
            if handle >= 0:
                os.close(handle)
            if sent == len(data):
                self._out.popleft()
            else:
                self._out[0] = (data[sent:], -1)

    def read(self) -> tuple[list[Frame], bool]:
        """What has come in, and whether the other end is still there.

        Raises:
            OSError: the connection is broken, or what came is no frame.
        """
        frames: list[Frame] = []
        while len(frames) < _MAX_FRAMES_A_TURN:
            target = self._head if self._rest is None else self._rest
            try:
                count = self._receive(target[self._have :])
            except BlockingIOError:
                break
            if not count:
                return frames, False
            self._have += count
            if self._have == len(target):
                self._have = 0
                if self._rest is None and self._begin():
                    continue
                frames.append(self._frame())
        return frames, True

    def _receive(self, target: memoryview) -> int:
        room = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
        flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        count, rights, _, _ = self._socket.recvmsg_into([target], room, flags)
        for level, kind, data in rights:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                handles = array.array("i")
                handles.frombytes(data[: len(data) - len(data) % handles.itemsize])
                self._handles.extend(handles)
        if len(self._handles) > _MAX_DESCRIPTORS:
            raise OSError("the other end sends descriptors that belong to nothing")
        return count

    def _begin(self) -> bool:
        """The head is here: whether there is more to come."""
        kind, head_bytes, count, rest_bytes, _ = _HEAD.unpack(self._head)
        is_sound = MESSAGE <= kind <= DISCARD and head_bytes <= rest_bytes <= MAX_RECORD_BYTES + 255
        if not is_sound or count > 1 or (kind != MESSAGE and (rest_bytes or count)):
            raise OSError("what came from the other end is no frame")
        if rest_bytes:
            self._rest = aligned(rest_bytes)
        return bool(rest_bytes)

    def _frame(self) -> Frame:
        kind, head_bytes, count, _, number = _HEAD.unpack(self._head)
        rest, self._rest = self._rest or memoryview(b""), None
        if count and not self._handles:
            raise OSError("the other end claims to send a descriptor and does not")
        split = len(rest) - head_bytes
        return Frame(kind, number, rest[:split], bytes(rest[split:]), self._handles.popleft() if count else -1)

    def close(self) -> None:
        """Close the connection, and the descriptors on their way. Idempotent."""
        self._socket.close()
        for handle in (*(handle for _, handle in self._out), *self._handles):
            if handle >= 0:
                os.close(handle)
        self._out.clear()
        self._handles.clear()
