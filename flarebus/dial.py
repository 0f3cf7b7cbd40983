"""Dial: a connection up to a router, made again for as long as somebody wants it.

The dialling end says HELLO with the names that live behind it and is up with WELCOME. What is sent before waits;
what was lost with a connection is the business of whoever sent it (`Cell` sends unanswered requests again).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from flarebus.errors import DecodeError, LinkError
from flarebus.link import Link, Verb, decode_names, encode_names
from flarebus.loop import Loop
from flarebus.message import Buffer
from flarebus.security.keys import DialKeys
from flarebus.sockets import Head, dealer, receive_head, receive_rest, send_frames

__all__ = ["Dial", "DialOwner"]

log = logging.getLogger(__name__)

# Messages read before other sockets get their turn.
BATCH = 100
# What may wait for a connection that is down, or a peer that does not read.
BACKLOG_BYTES = 64 * 1024 * 1024
BACKLOG_RETRY_S = 0.002
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH


class DialOwner(Protocol):
    """What stands at the lower end: a cell, or a router with cells below it."""

    def names(self) -> list[str]:
        """The names that live here."""

    def read(self, head: Head, socket: zmq.Socket[bytes]) -> None:
        """A message came; read the rest of it from `socket`."""

    def link_up(self) -> None:
        """The router knows our names: send what was not answered again."""

    def link_lost(self, error: LinkError) -> None:
        """The router left, refused us, or was silent for too long."""

    def peers_gone(self, names: Sequence[str]) -> None:
        """Cells elsewhere went away."""


class Dial:
    """One dialling socket. Everything here happens on the loop's thread.

    Args:
        endpoint: `tcp://host:port` or `ipc://path` of the router.
        keys: for CURVE, or None on a link that does not leave this machine.
    """

    def __init__(self, loop: Loop, endpoint: str, keys: DialKeys | None, owner: DialOwner) -> None:
        self.endpoint = endpoint
        self.is_up = False
        self._loop = loop
        self._owner = owner
        self._link = Link(loop.clock())
        self._backlog: deque[Sequence[Buffer | zmq.Frame]] = deque()
        self._backlog_bytes = 0
        self._told_lost = False
        self._socket = dealer(loop.context, keys)
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        loop.add_reader(self._monitor, self._read_monitor)
        loop.add_reader(self._socket, self._read)
        loop.add_actor(self)
        self._socket.connect(endpoint)

    def send(self, frames: Sequence[Buffer | zmq.Frame]) -> None:
        """Send a message, now or when the link is up.

        Raises:
            LinkError: too much waits already.
        """
        if self.is_up and not self._backlog:
            try:
                send_frames(self._socket, frames)
                return
            except zmq.Again:
                self._loop.wake_by(self._loop.clock() + BACKLOG_RETRY_S)
        nbytes = sum(len(frame) for frame in frames)
        if self._backlog_bytes + nbytes > BACKLOG_BYTES:
            raise LinkError(f"{self.endpoint}: {self._backlog_bytes} bytes wait already")
        self._backlog.append(frames)
        self._backlog_bytes += nbytes

    def join(self, names: Iterable[str]) -> None:
        """More names live here."""
        self._say(Verb.JOIN, encode_names(names))

    def leave(self, names: Iterable[str]) -> None:
        """These names do not live here any more."""
        self._say(Verb.LEAVE, encode_names(names))

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait to be sent."""
        return self._backlog_bytes

    def close(self) -> None:
        """Say goodbye; the loop closes the socket."""
        self._flush()
        self._say(Verb.BYE)
        self.is_up = False

    def tick(self, now: float) -> float | None:
        """Heartbeat, silence, and what waits to be sent."""
        self._flush()
        if self.is_up and self._link.should_ping(now):
            self._say(Verb.PING)
        if self._link.is_silent(now) and not self._told_lost:
            self._lose(LinkError(f"{self.endpoint}: nothing heard for {self._link.silence_s} s"))
        if self._backlog and self.is_up:
            return now + BACKLOG_RETRY_S
        return self._link.next_event() if not self._told_lost else None

    def _read(self) -> None:
        self._link.heard(self._loop.clock())
        socket = self._socket
        for _ in range(BATCH):
            try:
                first = socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            head = receive_head(socket, first)
            if head is None:
                continue
            if head.target:
                self._owner.read(head, socket)
            else:
                receive_rest(socket, head.more)
                self._hear(head.header, head.body)

    def _hear(self, verb: bytes, body: bytes) -> None:
        match verb:
            case Verb.WELCOME:
                self.is_up = True
                self._told_lost = False
                self._owner.link_up()
                self._flush()
            case Verb.WHO:
                self._hello()
            case Verb.GONE:
                try:
                    self._owner.peers_gone(decode_names(body))
                except DecodeError as error:
                    log.warning("%s: %s", self.endpoint, error)
            case Verb.PING:
                self._say(Verb.PONG)
            case Verb.BYE:
                self._lose(LinkError(f"{self.endpoint}: the router has left"))

    def _read_monitor(self) -> None:
        event = recv_monitor_message(self._monitor)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._link = Link(self._loop.clock())
            self._hello()
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._lose(LinkError(f"{self.endpoint}: the router refused our key"))
        else:
            # Down, not lost: libzmq dials again, and silence decides when that has taken too long.
            self.is_up = False

    def _hello(self) -> None:
        self.is_up = False
        self._say(Verb.HELLO, encode_names(self._owner.names()))

    def _say(self, verb: Verb, body: bytes = b"") -> None:
        try:
            send_frames(self._socket, (b"", b"", verb.value, body))
            self._link.spoke(self._loop.clock())
        except zmq.Again:
            log.debug("%s: no room to say %s", self.endpoint, verb.name)

    def _flush(self) -> None:
        while self.is_up and self._backlog:
            try:
                send_frames(self._socket, self._backlog[0])
            except zmq.Again:
                self._loop.wake_by(self._loop.clock() + BACKLOG_RETRY_S)
                return
            self._backlog_bytes -= sum(len(frame) for frame in self._backlog.popleft())

    def _lose(self, error: LinkError) -> None:
        self.is_up = False
        self._told_lost = True
        self._backlog.clear()
        self._backlog_bytes = 0
        self._owner.link_lost(error)
