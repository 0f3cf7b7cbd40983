"""How the two ends of a TcpPipe find each other: one listens, one connects, and both prove that they know a secret.

The secret itself never travels, and nothing else does before both have proved it: on a shared machine any user may
connect to a port, and may listen on one whose owner has died.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar

from flarebus.errors import UsageError

__all__ = ["Line", "dial", "listen", "read", "read_into"]

HOST = "127.0.0.1"
# Strangers who connect and say nothing keep others waiting for so long.
HANDSHAKE_S = 2.0
# Between two tries to connect while the other end is not there.
RETRY_S = 0.05

_PROOF_BYTES = 32
_HELLO = struct.Struct("<16scB")  # which trainer's end, the way of this connection, length of the channel's name
_WELCOME, _TAKEN, _LATER = b"W", b"T", b"L"


class Line:
    """What an open end has: a connection for each way, as soon as the other end is there."""

    def __init__(self, channel: str, port: int, secret: str, session: bytes = b"") -> None:
        self.channel, self.port, self.secret, self.session = channel, port, secret, session
        self.unanswered = 0
        self._connections: dict[bytes, socket.socket] = {}
        self._broken = ""
        self._changed = threading.Condition()

    def connection(self, way: bytes, deadline: float | None) -> socket.socket | None:
        """The connection of a way; None if it did not come in time.

        Raises:
            BrokenPipeError: the pipe is broken.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._broken or way in self._connections, _left(deadline))
            if self._broken:
                raise BrokenPipeError(self._broken)
            return self._connections.get(way)

    def has(self, way: bytes) -> bool:
        """Whether the connection of a way is there."""
        return way in self._connections

    def attach(self, way: bytes, connection: socket.socket) -> None:
        """Here is the connection of a way; closed with the line."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._changed:
            self._connections[way] = connection
            if self._broken:
                connection.close()
            self._changed.notify_all()

    @contextlib.contextmanager
    def breaks(self) -> Iterator[None]:
        """An error of a connection in here breaks the pipe."""
        try:
            yield
        except (OSError, EOFError) as error:
            self.hang_up(f"the other end of this TcpPipe is gone: {error}")
            raise BrokenPipeError(self._broken) from error

    def hang_up(self, reason: str) -> None:
        """Close the connections; calls that wait return."""
        with self._changed:
            self._broken = self._broken or reason
            for connection in self._connections.values():
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()
            self._changed.notify_all()

    def leave(self) -> None:
        """This end is closed."""
        self.hang_up("this TcpPipe was closed")


class _Dialled(Line):
    """The trainer's: it connects."""

    def connection(self, way: bytes, deadline: float | None) -> socket.socket | None:
        while not self.has(way):
            try:
                self.knock(way)
            except (PermissionError, UsageError) as error:
                self.hang_up(str(error))
            left = _left(deadline)
            with self._changed:
                self._changed.wait_for(
                    lambda: self._broken or self.has(way), RETRY_S if left is None else min(RETRY_S, left)
                )
            if self._broken or left == 0:
                break
        return super().connection(way, deadline)

    def knock(self, way: bytes) -> None:
        """Try to connect, once. That nobody is there, or not yet, is no error."""
        until = time.monotonic() + HANDSHAKE_S
        with contextlib.ExitStack() as undo:
            try:
                connection = undo.enter_context(socket.create_connection((HOST, self.port), HANDSHAKE_S))
                if connection.getsockname() == connection.getpeername():
                    return  # TCP may connect a port that nobody listens on to itself
                _shake(connection, self.secret, b"dials", b"listens", until)
                connection.sendall(_HELLO.pack(self.session, way, len(self.channel)) + self.channel.encode())
                verdict = read(connection, 1, until)
            except PermissionError:
                raise
            except (OSError, EOFError):
                return
            if verdict == _TAKEN:
                raise UsageError(f"another live end has channel {self.channel!r} of the TcpPipe on port {self.port}")
            if verdict == _WELCOME:
                undo.pop_all()
                self.attach(way, connection)


def dial(port: int, secret: str, channel: str, ways: Sequence[bytes]) -> Line:
    """The line of a trainer's end, connected if the other end is there.

    Raises:
        UsageError: another live end has this place.
        PermissionError: whoever listens does not know the secret.
    """
    line = _Dialled(channel, port, secret, secrets.token_bytes(16))
    try:
        for way in ways:
            line.knock(way)
    except BaseException:
        line.leave()
        raise
    return line


class _Heard(Line):
    """The client job's: it is connected to."""

    def __init__(self, channel: str, port: int, secret: str, listener: _Listener) -> None:
        super().__init__(channel, port, secret)
        self._listener = listener

    def leave(self) -> None:
        super().leave()
        self._listener.forget(self)


class _Listener:
    """A port, for all channels of one trainer: a configuration holds one, and a further rank has only its channel."""

    _all: ClassVar[dict[tuple[str, str, int], _Listener]] = {}
    # For all tables; whoever holds it does not wait.
    _lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, owner: tuple[str, str, int], secret: str) -> None:
        try:
            self._socket = socket.create_server((HOST, owner[2]))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UsageError(f"another process listens on port {owner[2]}") from error
            raise
        self._owner = owner
        self._port = self._socket.getsockname()[1]
        self._secret = secret or secrets.token_hex(32)
        self._lines: dict[str, _Heard] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._accept, name="flarebus-tcp-pipe", daemon=True).start()

    def expect(self, channel: str) -> Line:
        """The line of a channel from now on."""
        if channel in self._lines:
            raise UsageError(f"another live end has channel {channel!r} of the TcpPipe on port {self._port}")
        line = self._lines[channel] = _Heard(channel, self._port, self._secret, self)
        return line

    def forget(self, line: Line) -> None:
        """A line was left; with the last one the port is given up."""
        with self._lock:
            if self._lines.get(line.channel) is line:
                del self._lines[line.channel]
            if not self._lines and self._all.get(self._owner) is self:
                del self._all[self._owner]
                self._closed.set()
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
                self._socket.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed; or no file descriptor is free, and then one may be soon
                self._closed.wait(RETRY_S)
                continue
            try:
                is_admitted = self._admit(connection, time.monotonic() + HANDSHAKE_S)
            except (OSError, EOFError, ValueError):
                is_admitted = False
            if not is_admitted:
                connection.close()

    def _admit(self, connection: socket.socket, until: float) -> bool:
        _shake(connection, self._secret, b"listens", b"dials", until)
        session, way, length = _HELLO.unpack(read(connection, _HELLO.size, until))
        channel = read(connection, length, until).decode("ascii")
        with self._lock:
            line = self._lines.get(channel)
            if line is None:
                verdict = _LATER
            else:
                verdict = _TAKEN if line.session not in (b"", session) or line.has(way) else _WELCOME
            connection.sendall(verdict)
            if line is None or verdict != _WELCOME:
                return False
            line.session = session
            line.attach(way, connection)
            return True


def listen(owner: tuple[str, str, int], secret: str, channel: str) -> Line:
    """The line of a client job's end.

    Args:
        owner: site, job, and port or 0 for any.
        secret: what trainers have to know; "" for a new one.
        channel: its name.

    Raises:
        UsageError: another live end has this place.
    """
    with _Listener._lock:
        listener = _Listener._all.get(owner)
        if listener is None:
            listener = _Listener._all[owner] = _Listener(owner, secret)
        return listener.expect(channel)


def read(connection: socket.socket, nbytes: int, until: float | None = None) -> bytes:
    """So many bytes; see `read_into`."""
    data = bytearray(nbytes)
    read_into(connection, memoryview(data), until)
    return bytes(data)


def read_into(connection: socket.socket, view: memoryview, until: float | None = None) -> None:
    """Fill a view. Without `until` the connection's own timeout holds for every piece.

    Raises:
        EOFError: the other end has hung up.
        OSError: the connection is broken, or the time is up.
    """
    while view.nbytes:
        if until is not None:
            connection.settimeout(_left(until))
        n_read = connection.recv_into(view)
        if not n_read:
            raise EOFError("it has hung up")
        view = view[n_read:]


def _shake(connection: socket.socket, secret: str, me: bytes, you: bytes, until: float) -> None:
    """Prove to the other end that this one knows the secret, and have it prove the same.

    Raises:
        PermissionError: it does not know it.
    """
    mine = secrets.token_bytes(_PROOF_BYTES)
    connection.sendall(mine)
    yours = read(connection, _PROOF_BYTES, until)
    connection.sendall(hmac.digest(secret.encode(), me + mine + yours, "sha256"))
    if not hmac.compare_digest(
        read(connection, _PROOF_BYTES, until), hmac.digest(secret.encode(), you + yours + mine, "sha256")
    ):
        raise PermissionError(errno.EACCES, "the other end of this TcpPipe does not know its secret")


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
