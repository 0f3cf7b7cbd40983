"""A pipe as an outsider would write it: two Unix sockets for a channel, one for each direction. Linux only.

Each end listens for what comes to it and connects to where it sends. The names are abstract: they vanish with whoever
listens, so that nothing is left of a killed process. A message is a line of JSON and its bytes; the receiver answers
each with its id once `receive` returns it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import select
import socket
import threading
import time
from typing import Any

from flarebus.errors import DecodeError, UsageError
from flarebus.pipes import ExportMode, Message, Mode, Pipe
from flarebus.slab import SlabPool

__all__ = ["SocketPipe"]

RETRY_S = 0.01
MAX_HEAD = 1024 * 1024


class SocketPipe(Pipe):
    """One end.

    Args:
        mode: ACTIVE or PASSIVE.
        site_name: part of the names of the sockets.
    """

    def __init__(self, mode: Mode | str, site_name: str) -> None:
        super().__init__(mode)
        self.site_name = site_name
        self.peer_mode = Mode.ACTIVE if self.mode is Mode.PASSIVE else Mode.PASSIVE
        self.pool = SlabPool()
        self.closing: threading.Event | None = None

    def address(self, mode: Mode, name: str) -> str:
        """Where the end of this mode listens."""
        return f"\0flarebus-test/{self.site_name}/{name}/{mode.value}"

    def open(self, name: str) -> None:
        """Listen."""
        if self.closing is not None:
            raise UsageError("open already")
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(self.address(self.mode, name))
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise
            raise UsageError("another end of this mode has this place") from error
        listener.listen()
        self.listener = listener
        self.name = name
        self.incoming: socket.socket | None = None
        self.outgoing: socket.socket | None = None
        self.had_peer = False
        self.wake, self.woken = socket.socketpair()
        self.closing = threading.Event()

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Write the message and wait for its id."""
        deadline = None if timeout is None else time.monotonic() + timeout
        closing = self.is_open()
        while self.outgoing is None:
            if closing.is_set():
                raise BrokenPipeError("closed")
            if deadline is not None and time.monotonic() >= deadline:
                return False
            self.connect(closing)
        try:
            lengths = [memoryview(buffer).nbytes for buffer in message.buffers]
            head = json.dumps([message.head(), len(message.body), lengths]).encode() + b"\n"
            self.outgoing.sendall(head)
            self.write(self.outgoing, [message.body, *message.buffers])
            while self.wait_for(self.outgoing, deadline, closing):
                said = self.read_line(self.outgoing).strip().decode()
                if said == message.msg_id:
                    return True
            return False
        except OSError as error:
            self.outgoing.close()
            self.outgoing = None
            raise BrokenPipeError(f"the other end is gone: {error}") from error

    def write(self, to: socket.socket, parts: list[Any]) -> None:
        """The bytes after the head."""
        for part in parts:
            to.sendall(part)

    def connect(self, closing: threading.Event) -> None:
        """Try to reach the other end."""
        to = socket.socket(socket.AF_UNIX)
        try:
            to.connect(self.address(self.peer_mode, self.name))
        except OSError as error:
            to.close()
            if self.had_peer:
                raise BrokenPipeError("the other end is gone") from error
            closing.wait(RETRY_S)
        else:
            self.outgoing = to
            self.had_peer = True

    def receive(self, timeout: float | None = None) -> Message | None:
        """Read a message and answer with its id."""
        deadline = None if timeout is None else time.monotonic() + timeout
        closing = self.is_open()
        try:
            if self.incoming is None:
                if not self.wait_for(self.listener, deadline, closing):
                    return None
                self.incoming, _ = self.listener.accept()
                self.had_peer = True
            if not self.wait_for(self.incoming, deadline, closing):
                return None
            message = self.read_message(self.incoming)
            self.incoming.sendall(message.msg_id.encode() + b"\n")
        except (OSError, EOFError) as error:
            raise BrokenPipeError(f"the other end is gone: {error}") from error
        return message

    def read_message(self, at: socket.socket) -> Message:
        """What comes next."""
        try:
            head, body_length, lengths = json.loads(self.read_line(at))
            places = self.pool.take([body_length, *lengths])
        except (ValueError, TypeError) as error:
            raise DecodeError("not a message") from error
        for place in places:
            self.fill(at, place)
        return Message.from_head(head, bytes(places[0]), places[1:])

    def fill(self, at: socket.socket, place: memoryview) -> None:
        """Read as much as fits."""
        while place:
            count = at.recv_into(place)
            if not count:
                raise EOFError("in the middle of a message")
            place = place[count:]

    def read_line(self, at: socket.socket) -> bytes:
        """Up to the end of the line."""
        line = bytearray()
        while not line.endswith(b"\n"):
            seen = at.recv(65536, socket.MSG_PEEK)
            if not seen:
                raise ConnectionResetError("closed")
            line += at.recv(seen.find(b"\n") + 1 or len(seen))
            if len(line) > MAX_HEAD:
                raise DecodeError("the head is too long")
        return bytes(line)

    def wait_for(self, at: socket.socket, deadline: float | None, closing: threading.Event) -> bool:
        """Whether something can be read before the deadline."""
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        try:
            ready, _, _ = select.select([at, self.woken], [], [], left)
        except (OSError, ValueError):  # closed under it
            ready = []
        if closing.is_set():
            raise BrokenPipeError("closed")
        return at in ready

    def clear(self) -> None:
        """Take what is there and drop it."""
        with contextlib.suppress(BrokenPipeError):
            while self.receive(0) is not None:
                pass

    def is_open(self) -> threading.Event:
        """The flag of this opening."""
        if self.closing is None:
            raise BrokenPipeError("not open")
        return self.closing

    def close(self) -> None:
        """Wake whoever waits, and close the sockets."""
        closing, self.closing = self.closing, None
        if closing is None:
            return
        closing.set()
        self.wake.send(b"x")
        for each in (self.listener, self.incoming, self.outgoing, self.wake, self.woken):
            if each is not None:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()

    def export(self, side: ExportMode) -> tuple[str, dict[str, Any]]:
        """The same names, seen from one end or the other."""
        mode = self.mode if side is ExportMode.SELF else self.peer_mode
        return f"{type(self).__module__}.{type(self).__qualname__}", {"mode": mode.value, "site_name": self.site_name}

    def can_resend(self) -> bool:
        """Yes; the peer may get it twice."""
        return True
