"""Sockets: the one profile that all of ours have, and moving frames through them without blocking.

Every option answers to something that was seen to go wrong without it; `docs/protocol.md` lists them.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import math
import os
import secrets
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zmq

from flarebus.errors import ConfigError, UsageError
from flarebus.link import SILENCE_S
from flarebus.message import Buffer
from flarebus.security.admission import DOMAIN
from flarebus.security.keys import DialKeys, ListenKeys
from flarebus.wire import MAX_FRAME_BYTES

__all__ = [
    "Head",
    "IpcGuard",
    "check_bind",
    "check_dial",
    "dealer",
    "frame_bytes",
    "receive_head",
    "receive_rest",
    "router",
    "send_frames",
]

# A frame sent without a copy costs its sender a message to the collector thread of pyzmq when it is freed, which wakes
# that thread; up to here the copy is cheaper.
COPY_BELOW_BYTES = 256 * 1024
# As numbers: `|` of the enum's members costs more than the send.
_LAST = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
# Without the layer above it, which looks at options that we do not use and takes as long as the send, for every frame.
_send: Callable[..., object] = zmq.backend.Socket.send
# Found here instead of on the socket, whose attributes are options as well and slow to look up.
_receive: Callable[..., Any] = zmq.backend.Socket.recv
# Whole messages in a socket's queue on each side; bulk data is bounded by the receivers' windows long before.
HIGH_WATER_MARK = 4096


def _profile(socket: zmq.Socket[bytes], silence_s: float) -> None:
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = HIGH_WATER_MARK
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    if math.isfinite(silence_s):
        socket.setsockopt(zmq.HEARTBEAT_IVL, int(silence_s * 1000 / 3))
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(silence_s * 1000))
        socket.setsockopt(zmq.HEARTBEAT_TTL, int(silence_s * 1000))
    socket.setsockopt(zmq.HANDSHAKE_IVL, 3000)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)


def router(
    context: zmq.Context[zmq.Socket[bytes]], keys: ListenKeys | None, silence_s: float = SILENCE_S
) -> zmq.Socket[bytes]:
    """A listening socket, not yet bound."""
    socket = context.socket(zmq.ROUTER)
    _profile(socket, silence_s)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    # Ids are random, so the only newcomer with a known id is the same cell, back before its ghost was noticed.
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    socket.setsockopt(zmq.BACKLOG, 1024)
    if keys is not None:
        socket.curve_server = True
        socket.curve_secretkey = keys.own.secret
        socket.curve_publickey = keys.own.public
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    return socket


def dealer(
    context: zmq.Context[zmq.Socket[bytes]], keys: DialKeys | None, silence_s: float = SILENCE_S
) -> zmq.Socket[bytes]:
    """A dialling socket, not yet connected, with a routing id that nobody can guess or hold twice."""
    socket = context.socket(zmq.DEALER)
    _profile(socket, silence_s)
    # 1 would throw away what has come in and was not read yet when a connection ends, a goodbye among it.
    socket.setsockopt(zmq.IMMEDIATE, 0)
    socket.setsockopt(zmq.RECONNECT_IVL, 250)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 30_000)
    socket.setsockopt(zmq.ROUTING_ID, b"f" + secrets.token_bytes(16))
    if keys is not None:
        socket.curve_secretkey = keys.own.secret
        socket.curve_publickey = keys.own.public
        socket.curve_serverkey = keys.server
    return socket


def check_bind(endpoint: str, keys: ListenKeys | None) -> None:
    """Refuse to listen where strangers can reach without keys.

    Raises:
        ConfigError: the endpoint is not one of ours, or is beyond loopback and there are no keys.
    """
    _check("bind", endpoint, keys is not None, any_port=True)


def check_dial(endpoint: str, keys: DialKeys | None) -> None:
    """Refuse to talk to strangers without keys.

    Raises:
        ConfigError: the endpoint is not one of ours, or is beyond loopback and there are no keys.
    """
    _check("endpoint", endpoint, keys is not None, any_port=False)


def _check(parameter: str, endpoint: str, has_keys: bool, *, any_port: bool) -> None:
    scheme, _, rest = endpoint.partition("://")
    host, colon, port = rest.rpartition(":")
    if scheme == "ipc":
        # Names without a file (`@`) are open to every user of the machine; relative ones mean something else elsewhere.
        if not rest.startswith("/"):
            raise ConfigError(parameter, endpoint, "an absolute path, such as ipc:///run/me/bus")
        if len(rest.encode()) > zmq.IPC_PATH_MAX_LEN:
            limit = f"a socket's path may have {zmq.IPC_PATH_MAX_LEN} bytes; use a shorter folder"
            raise ConfigError(parameter, endpoint, limit)
    elif scheme != "tcp" or not colon or not _is_port(port, any_port):
        raise ConfigError(parameter, endpoint, "an endpoint such as tcp://127.0.0.1:8002 or ipc:///run/me/bus")
    elif not has_keys and not _is_loopback(host):
        raise ConfigError(parameter, endpoint, "beyond loopback only with keys; give them, or use tcp://127.0.0.1:PORT")


def _is_port(text: str, any_port: bool) -> bool:
    # ZeroMQ would take any number, modulo 65536.
    return (any_port and text == "*") or (text.isascii() and text.isdigit() and 0 < int(text) < 65536)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class IpcGuard:
    """The lock beside an `ipc://` socket file: without it a second bind would silently take the first one's peers.

    Raises:
        UsageError: a live process listens there.
        ConfigError: the folder is missing, or belongs to somebody else, or a file that is no socket is in the way.
    """

    def __init__(self, endpoint: str) -> None:
        self.path = Path(endpoint.removeprefix("ipc://"))
        self._lock_path = self.path.with_name(self.path.name + ".lock")
        try:
            folder = self.path.parent.stat()
            if folder.st_uid != os.geteuid() and stat.S_IMODE(folder.st_mode) & 0o022:
                raise ConfigError("bind", endpoint, "its folder belongs to somebody else")
            # ZeroMQ removes whatever has the name it binds to.
            if self.path.exists() and not self.path.is_socket():
                raise ConfigError("bind", endpoint, "a file is in its place")
            self._handle = self._lock(endpoint)
        except OSError as error:
            raise ConfigError("bind", endpoint, f"{error.filename}: {error.strerror}") from error

    def restrict(self) -> None:
        """Let nobody but this user connect. Call it when the socket is bound."""
        self.path.chmod(0o600)

    def release(self) -> None:
        """Remove the socket file and the lock."""
        for path in (self.path, self._lock_path):
            path.unlink(missing_ok=True)
        os.close(self._handle)

    def _lock(self, endpoint: str) -> int:
        while True:
            handle = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise UsageError(f"{endpoint}: another live process listens here") from None
            # Whoever held it may have removed the file between our two calls; the lock would then protect nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), self._lock_path.stat()):
                    return handle
            os.close(handle)


def frame_bytes(frame: Buffer | zmq.Frame) -> bytes:
    """The content of a frame, however it is held."""
    if type(frame) is bytes:
        return frame
    return frame.bytes if isinstance(frame, zmq.Frame) else bytes(frame)


def send_frames(socket: zmq.Socket[bytes], frames: Sequence[Buffer | zmq.Frame]) -> None:
    """Send one message now or not at all.

    Raises:
        zmq.Again: the queue to that peer is full; nothing was sent.
        zmq.ZMQError: EHOSTUNREACH, a listening socket does not know the peer; nothing was sent.
    """
    last = len(frames) - 1
    for index, frame in enumerate(frames):
        _send(socket, frame, _LAST if index == last else _MORE, len(frame) < COPY_BELOW_BYTES)


class Head(NamedTuple):
    """The four frames that every message begins with, and whether more follow on the socket."""

    target: bytes
    source: bytes
    header: bytes
    body: bytes
    more: bool
    last: zmq.Frame


def receive_head(socket: zmq.Socket[bytes]) -> Head | None:
    """Read the next message up to its body; None (and all of it read) if it ends before.

    What follows stays on the socket, so that a chunk can be received straight into the array that wants it.

    Raises:
        zmq.Again: there is none.
    """
    target = _receive(socket, _LAST, False)
    if not target.more:
        return None
    source = _receive(socket, _LAST, False)
    if not source.more:
        return None
    header = _receive(socket, _LAST, False)
    if not header.more:
        return None
    body = _receive(socket, _LAST, False)
    return Head(target.bytes, source.bytes, header.bytes, body.bytes, body.more, body)


def receive_rest(socket: zmq.Socket[bytes], more: bool) -> list[zmq.Frame]:
    """All frames that are left of the current message."""
    frames = []
    while more:
        frame = _receive(socket, _LAST, False)
        frames.append(frame)
        more = frame.more
    return frames
