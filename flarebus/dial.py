"""Dial: a connection up to a router, made again for as long as somebody wants it.

The dialling end says HELLO with the names that live behind it and is up with WELCOME. What is sent before waits;
what was lost with a connection is the business of whoever sent it (`Cell` sends unanswered requests again).
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from flarebus.errors import ConfigError, DecodeError, LinkError
from flarebus.link import SILENCE_S, Link, Verb, decode_names, encode_names
from flarebus.loop import GOODBYE_MS, Loop, has_message
from flarebus.message import Buffer
from flarebus.security.keys import DialKeys
from flarebus.sockets import (
    Head,
    check_dial,
    dealer,
    receive_head,
    receive_rest,
    send_frames,
)

__all__ = ["Dial", "DialOwner", "new_link"]

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

    def peers_back(self, names: Sequence[str]) -> None:
        """Cells elsewhere have a new connection: what was on its way to or from them may be lost."""


def new_link(now: float, silence_s: float) -> Link:
    """A link whose other end is dead after `silence_s`; three beats fit into that, so that one or two may be lost."""
    return Link(now, silence_s / 3, silence_s)


class Dial:
    """One dialling socket. Everything here happens on the loop's thread.

    Args:
        endpoint: `tcp://host:port` or `ipc://path` of the router.
        keys: for CURVE, or None on a link that does not leave this machine.
        silence_s: the router is lost after this long without a sign of life; the same as the router's own.

    Raises:
        ConfigError: the endpoint is none, or is beyond loopback and there are no keys.
    """

    def __init__(
        self,
        loop: Loop,
        endpoint: str,
        keys: DialKeys | None,
        owner: DialOwner,
        silence_s: float = SILENCE_S,
    ) -> None:
        check_dial(endpoint, keys)
        self.endpoint = endpoint
        self.is_up = False
        self._loop = loop
        self._owner = owner
        self._silence_s = silence_s
        self._link = new_link(loop.clock(), silence_s)
        self._backlog: deque[Sequence[Buffer | zmq.Frame]] = deque()
        self._backlog_bytes = 0
        self._is_lost = False
        self._owes_hello = False
        self._awaits_welcome = False
        self._socket = dealer(loop.context, keys, silence_s)
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ConfigError("endpoint", endpoint, error.strerror) from error
        loop.add_monitor(self._monitor, self._read_monitor)
        loop.add_reader(self._socket, self._read)
        loop.add_actor(self)

    def send(self, frames: Sequence[Buffer | zmq.Frame]) -> None:
        """Send a message, now or when the link is up.

        Raises:
            LinkError: the link is lost or closed, or too much waits already.
        """
        if self._is_lost:
            raise LinkError(f"{self.endpoint}: no connection")
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
        """More names live here, or have a new connection."""
        self._tell(Verb.JOIN, names)

    def leave(self, names: Iterable[str]) -> None:
        """These names do not live here any more."""
        self._tell(Verb.LEAVE, names)

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait to be sent."""
        return self._backlog_bytes

    def close(self) -> None:
        """Say goodbye and close the socket. Idempotent."""
        if self._socket.closed:
            return
        was_up = self.is_up
        if was_up:
            self._flush()
            self._say(Verb.BYE)
        self._fall()
        self._loop.remove_actor(self)
        self._socket.disable_monitor()
        self._loop.close_socket(self._monitor)
        self._loop.close_socket(self._socket, GOODBYE_MS if was_up else 0)

    def end(self) -> None:
        """The loop ends."""
        self.close()

    def tick(self, now: float) -> float | None:
        """Heartbeat, silence, and what waits to be sent."""
        if self._owes_hello:
            self._hello()
        self._flush()
        if self.is_up and self._link.should_ping(now):
            self._say(Verb.PING)
        if self._link.is_silent(now) and not self._is_lost:
            self._lose(LinkError(f"{self.endpoint}: nothing heard for {self._silence_s:g} s"))
        if (self._backlog and self.is_up) or self._owes_hello:
            return now + BACKLOG_RETRY_S
        return None if self._is_lost else self._link.next_event()

    def _read(self) -> None:
        socket = self._socket
        for index in range(BATCH):
            # Whoever was told something may have closed us; and one message alone is what comes most often.
            if socket.closed or (index == 1 and not has_message(socket)):
                return
            try:
                head = receive_head(socket)
            except zmq.Again:
                return
            if index == 0:
                self._link.heard(self._loop.clock())
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
                self._is_lost = self._awaits_welcome = False
                self._owner.link_up()
                self._flush()
            case Verb.GONE | Verb.JOIN:
                self._hear_names(verb, body)
            case Verb.BYE:
                self._lose(LinkError(f"{self.endpoint}: the router has left"))
            case Verb.WHO | Verb.PING if self._awaits_welcome:
                return
            # Held to be lost and heard again, without a new connection: it was only slow, and has to know us anew.
            case _ if verb == Verb.WHO or self._is_lost:
                self._hello()
            case Verb.PING:
                self._say(Verb.PONG)

    def _hear_names(self, verb: bytes, body: bytes) -> None:
        try:
            names = decode_names(body)
        except DecodeError as error:
            log.warning("%s: %s", self.endpoint, error)
            return
        if verb == Verb.GONE:
            self._owner.peers_gone(names)
        else:
            self._owner.peers_back(names)

    def _read_monitor(self) -> None:
        event = recv_monitor_message(self._monitor)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._link = new_link(self._loop.clock(), self._silence_s)
            self._hello()
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._lose(LinkError(f"{self.endpoint}: the router refused our key"))
        else:
            # Down, not lost: libzmq dials again, and silence decides when that has taken too long.
            self.is_up = self._owes_hello = self._awaits_welcome = False

    def _hello(self) -> None:
        self.is_up = False
        # What was sent before the end of the last connection was known may still fill the queue.
        self._awaits_welcome = self._say(Verb.HELLO, encode_names(self._owner.names()))
        self._owes_hello = not self._awaits_welcome
        if self._owes_hello:
            self._loop.wake_by(self._loop.clock() + BACKLOG_RETRY_S)

    def _say(self, verb: Verb, body: bytes = b"") -> bool:
        try:
            send_frames(self._socket, (b"", b"", verb.value, body))
        except zmq.Again:
            log.debug("%s: no room to say %s", self.endpoint, verb.name)
            return False
        self._link.spoke(self._loop.clock())
        return True

    def _tell(self, verb: Verb, names: Iterable[str]) -> None:
        """Say what must not be lost as long as the connection is not: the next HELLO lists all names again."""
        with contextlib.suppress(LinkError):
            self.send((b"", b"", verb.value, encode_names(names)))

    def _flush(self) -> None:
        while self.is_up and self._backlog:
            try:
                send_frames(self._socket, self._backlog[0])
            except zmq.Again:
                self._loop.wake_by(self._loop.clock() + BACKLOG_RETRY_S)
                return
            self._backlog_bytes -= sum(len(frame) for frame in self._backlog.popleft())

    def _lose(self, error: LinkError) -> None:
        self._fall()
        self._owner.link_lost(error)

    def _fall(self) -> None:
        self.is_up = self._owes_hello = self._awaits_welcome = False
        self._is_lost = True
        self._backlog.clear()
        self._backlog_bytes = 0
