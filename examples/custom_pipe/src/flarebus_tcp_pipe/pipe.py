"""TcpPipe: client job and trainer talk over TCP on this machine.

Each way has a connection of its own: a message is a frame on it, and comes back as one byte once it was received. So
whoever sends reads the answers, too, and there is no queue, no lock and no thread here. How the two ends find each
other stands in `meeting`.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import Any

from flarebus.errors import ConfigError, DecodeError, UsageError
from flarebus.pipes import ExportMode, Message, Mode, Pipe
from flarebus.slab import SlabPool
from flarebus.wire import MAX_BODY_BYTES
from flarebus_tcp_pipe.meeting import Line, dial, listen, read, read_into

__all__ = ["TcpPipe"]

# A peer that stops in the middle of a message for so long does not go on.
STALL_S = 60.0
MAX_HEAD_BYTES = 256
# Far more than any model has; checked before anything is allocated.
MAX_BUFFERS = 256 * 1024
MAX_BYTES = 1 << 40

_FRAME = struct.Struct("<HII")  # bytes of the head, bytes of the body, number of buffers; the length of each follows
_READ, _DROPPED = b"\1", b"\0"
_TIMED_OUT = (TimeoutError, BlockingIOError)
_OTHER = {Mode.ACTIVE: Mode.PASSIVE, Mode.PASSIVE: Mode.ACTIVE}
# Memory for what comes in, used again from round to round.
_POOL = SlabPool()


class TcpPipe(Pipe):
    """A pipe over TCP on loopback.

    Args:
        mode: ACTIVE for the trainer, PASSIVE for the client job.
        port: where the client job's end listens; 0 lets the system choose. A trainer needs it, and
        secret: what both ends know; by default a new one.
        site_name: the site, and
        token: the job: the ends of all channels and ranks of one trainer share a port.

    Raises:
        ConfigError: a trainer's end has no port or no secret.
    """

    def __init__(self, mode: Mode | str, port: int = 0, secret: str = "", site_name: str = "", token: str = "") -> None:
        super().__init__(mode)
        if self.mode is Mode.ACTIVE and not (port and secret):
            raise ConfigError("port", port, "the port and the secret that the client job's end exports")
        self._port, self._secret, self._owner = port, secret, (site_name, token, port)
        # A way is called by the first letter of its sender's mode.
        self._in, self._out = (mode.value[:1].encode() for mode in (_OTHER[self.mode], self.mode))
        self._line: Line | None = None

    def open(self, name: str) -> None:
        """Listen, or connect if the other end is there already.

        Raises:
            UsageError: it is open already, or the place is taken.
            PermissionError: whoever listens on the port does not know the secret.
        """
        if self._line is not None:
            raise UsageError(f"this TcpPipe is open already, on channel {self._line.channel!r}")
        if self.mode is Mode.PASSIVE:
            self._line = listen(self._owner, self._secret, name)
        else:
            self._line = dial(self._port, self._secret, name, (self._in, self._out))

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Write a frame, and wait for the byte that says that it was read; see `Pipe.send`.

        Raises:
            BrokenPipeError: see `Pipe.send`; or time ran out in the middle of the message.
        """
        line, deadline = self._open_line(), _deadline(timeout)
        connection = line.connection(self._out, deadline)
        if connection is None:
            return False
        if message.manifest is not None:
            raise UsageError("TcpPipe carries no manifests: give it the buffers")
        head, views = message.head().encode(), [memoryview(buffer) for buffer in message.buffers]
        sizes = _FRAME.pack(len(head), len(message.body), len(views))
        lengths = struct.pack(f"<{len(views)}Q", *(view.nbytes for view in views))
        frame = memoryview(b"".join((sizes, lengths, head, message.body)))
        with line.breaks():
            try:
                begun = _write(connection, frame, deadline)
            except _TIMED_OUT:
                return False
            # Half a message cannot be taken back: from here on all of it goes, or the pipe is broken.
            for view in (frame[begun:], *(view.cast("B") for view in views if view.nbytes)):
                while view.nbytes:
                    view = view[_write(connection, view, deadline) :]
            line.unanswered += 1
            answer = _DROPPED
            while line.unanswered:  # the answers to messages that were given up come first
                connection.settimeout(_left(deadline))
                try:
                    answer = read(connection, 1)
                except _TIMED_OUT:
                    return False
                line.unanswered -= 1
        return answer == _READ

    def receive(self, timeout: float | None = None) -> Message | None:
        """Read a frame, its buffers into memory of their own, and say that it was read; see `Pipe.receive`."""
        line, deadline = self._open_line(), _deadline(timeout)
        connection = line.connection(self._in, deadline)
        if connection is None:
            return None
        with line.breaks():
            connection.settimeout(_left(deadline))
            try:
                connection.recv(1, socket.MSG_PEEK)
            except _TIMED_OUT:
                return None
            connection.settimeout(STALL_S)
            head, body, buffers = _read_frame(connection)
            try:
                message = Message.from_head(head, body, buffers)
            except DecodeError:
                connection.sendall(_DROPPED)
                raise
            connection.sendall(_READ)
        return message

    def clear(self) -> None:
        """Receive what waits, and forget it."""
        waits = self._line is not None
        while waits:
            try:
                waits = self.receive(0.0) is not None
            except DecodeError:
                continue
            except BrokenPipeError:
                return

    def close(self) -> None:
        """Hang up. The last end of a job at a site stops listening."""
        line, self._line = self._line, None
        if line is not None:
            line.leave()

    def export(self, side: ExportMode) -> tuple[str, dict[str, Any]]:
        """Class path and arguments. They hold the secret; so does the trainer's configuration, for its user's eyes.

        Raises:
            UsageError: the system will choose a port, but only when this end is opened.
        """
        port, secret = (self._port, self._secret) if self._line is None else (self._line.port, self._line.secret)
        if not (port and secret):
            raise UsageError("this TcpPipe has no port yet: open it first")
        mode = self.mode if side is ExportMode.SELF else _OTHER[self.mode]
        return f"{__name__}.{type(self).__name__}", {"mode": mode.value, "port": port, "secret": secret}

    def _open_line(self) -> Line:
        if self._line is None:
            raise BrokenPipeError("this TcpPipe is not open")
        return self._line


def _read_frame(connection: socket.socket) -> tuple[str, bytes, list[memoryview]]:
    """Head, body and buffers of the next message. What claims too much ends all: nobody knows where the next begins."""
    head_bytes, body_bytes, count = _FRAME.unpack(read(connection, _FRAME.size))
    if head_bytes > MAX_HEAD_BYTES or body_bytes > MAX_BODY_BYTES or count > MAX_BUFFERS:
        raise EOFError(f"it sent a head of {head_bytes} bytes, a body of {body_bytes} bytes and {count} buffers")
    lengths = struct.unpack(f"<{count}Q", read(connection, 8 * count))
    if sum(lengths) > MAX_BYTES:
        raise EOFError(f"it sent buffers of {sum(lengths)} bytes")
    head, body = read(connection, head_bytes), read(connection, body_bytes)
    buffers = _POOL.take(lengths) if lengths else []
    for buffer in buffers:
        read_into(connection, buffer)
    return head.decode("ascii", "replace"), body, buffers


def _write(connection: socket.socket, view: memoryview, deadline: float | None) -> int:
    connection.settimeout(_left(deadline))
    return connection.send(view)


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
