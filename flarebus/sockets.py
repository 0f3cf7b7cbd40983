"""Sockets: the one profile that all of ours have, and moving frames through them without blocking.

Every option answers to something that was seen to go wrong without it; `docs/protocol.md` lists them.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import zmq

from flarebus.errors import ConfigError, UsageError
from flarebus.message import Buffer
from flarebus.security.admission import DOMAIN
from flarebus.security.keys import DialKeys, ListenKeys
from flarebus.wire import MAX_FRAME_BYTES

__all__ = [
    "Head",
    "IpcGuard",
    "check_bind",
    "dealer",
    "frame_bytes",
    "receive_head",
    "receive_rest",
    "router",
    "send_frames",
]

# Smaller frames are quicker to copy than to account for (the threshold of pyzmq itself).
COPY_BELOW_BYTES = 64 * 1024
# Whole messages in a socket's queue on each side; bulk data is bounded by the receivers' windows long before.
HIGH_WATER_MARK = 4096
# As plain numbers: joining flags is an enum's business otherwise, for every frame.
_LAST = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)


def _profile(socket: zmq.Socket[bytes]) -> None:
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = HIGH_WATER_MARK
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15000)
    socket.setsockopt(zmq.HEARTBEAT_TTL, 15000)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 3000)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)


def router(context: zmq.Context[zmq.Socket[bytes]], keys: ListenKeys | None) -> zmq.Socket[bytes]:
    """A listening socket, not yet bound."""
    socket = context.socket(zmq.ROUTER)
    _profile(socket)
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


def dealer(context: zmq.Context[zmq.Socket[bytes]], keys: DialKeys | None) -> zmq.Socket[bytes]:
    """A dialling socket, not yet connected, with a routing id that nobody can guess or hold twice."""
    socket = context.socket(zmq.DEALER)
    _profile(socket)
    socket.setsockopt(zmq.IMMEDIATE, 1)
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
    scheme, found, rest = endpoint.partition("://")
    if not found or scheme not in ("tcp", "ipc", "inproc"):
        raise ConfigError("bind", endpoint, "an endpoint such as tcp://127.0.0.1:8002 or ipc:///run/me/bus")
    if scheme == "ipc" and len(rest.encode()) > zmq.IPC_PATH_MAX_LEN:
        raise ConfigError(
            "bind", endpoint, f"a socket's path may have {zmq.IPC_PATH_MAX_LEN} bytes; use a shorter folder"
        )
    if scheme != "tcp" or keys is not None:
        return
    host = rest.rpartition(":")[0].strip("[]")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError("bind", endpoint, "beyond loopback only with keys; give them, or bind tcp://127.0.0.1:PORT")


class IpcGuard:
    """The lock beside an `ipc://` socket file: without it a second bind would silently take the first one's peers.

    Raises:
        UsageError: a live process listens there.
        ConfigError: the folder is missing, or belongs to somebody else.
    """

    def __init__(self, endpoint: str) -> None:
        self.path = Path(endpoint.removeprefix("ipc://"))
        folder = self.path.parent
        try:
            found = folder.stat()
        except OSError as error:
            raise ConfigError("bind", endpoint, f"its folder: {error.strerror}") from error
        if found.st_uid != os.geteuid() and stat.S_IMODE(found.st_mode) & 0o022:
            raise ConfigError("bind", endpoint, "its folder belongs to somebody else")
        self._lock_path = folder / (self.path.name + ".lock")
        self._handle = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._handle)
            raise UsageError(f"{endpoint}: another live process listens here") from None

    def release(self) -> None:
        """Remove the socket file and the lock."""
        for path in (self.path, self._lock_path):
            path.unlink(missing_ok=True)
        os.close(self._handle)


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
        socket.send(frame, _LAST if index == last else _MORE, copy=len(frame) < COPY_BELOW_BYTES)


class Head(NamedTuple):
    """The four frames that every message begins with, and whether more follow on the socket."""

    target: bytes
    source: bytes
    header: bytes
    body: bytes
    more: bool
    last: zmq.Frame


def receive_head(socket: zmq.Socket[bytes], first: zmq.Frame) -> Head | None:
    """Read up to the body of the message that begins with `first`; None (and all of it read) if it ends before.

    What follows stays on the socket, so that a chunk can be received straight into the array that wants it.
    """
    frames = [first]
    while first.more and len(frames) < 4:
        first = socket.recv(zmq.NOBLOCK, copy=False)
        frames.append(first)
    if len(frames) < 4:
        return None
    target, source, header, body = frames
    return Head(target.bytes, source.bytes, header.bytes, body.bytes, body.more, body)


def receive_rest(socket: zmq.Socket[bytes], more: bool) -> list[zmq.Frame]:
    """All frames that are left of the current message."""
    frames = []
    while more:
        frame = socket.recv(zmq.NOBLOCK, copy=False)
        frames.append(frame)
        more = frame.more
    return frames
