"""Router: forwards messages between named cells, and knows nothing of what they say.

It reads the target, checks that the source may be named by the connection it came from, and forwards the frames as they
are. A target that is not there is answered for at once. Routers chain: the names below one are reachable from above it.
Cells of the same process attach without a socket and run on the router's own thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket as sockets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from flarebus.address import Address
from flarebus.dial import BACKLOG_BYTES, BACKLOG_RETRY_S, BATCH, Dial, new_link
from flarebus.errors import Closed, ConfigError, DecodeError, LinkError, NoRoute, UsageError
from flarebus.failure import encode_failure
from flarebus.link import SILENCE_S, Link, Verb, decode_names, encode_names
from flarebus.loop import Loop, has_message
from flarebus.message import Buffer, Kind, Message
from flarebus.routing import Table
from flarebus.security.admission import Admission
from flarebus.security.keys import DialKeys, ListenKeys
from flarebus.sockets import (
    Head,
    IpcGuard,
    check_bind,
    frame_bytes,
    receive_head,
    receive_rest,
    router,
    send_frames,
)
from flarebus.wire import CHUNK, DONE, NOT_OFFERED, ORDER, PLACE, PULL, REQUEST, decode_message, encode_message

__all__ = ["LocalCell", "Router", "RouterStatistics"]

log = logging.getLogger(__name__)

# Names above that cells here talk to, remembered to tell the cells when the way there is lost.
MAX_ABOVE = 100_000
# Names that were asked for in vain, remembered to tell everybody when they come after all.
MAX_MISSED = 10_000
_DOWN = "its connection is down"


@dataclass(frozen=True)
class RouterStatistics:
    """What a router has done since it was made."""

    names: int
    connections: int
    messages: int
    bytes: int
    unroutable: int
    refused: int
    queued_bytes: int


class LocalCell(Protocol):
    """A cell of this process, on the router's thread."""

    def names(self) -> list[str]:
        """The names it answers to."""

    def accept(self, frames: Sequence[Buffer | zmq.Frame]) -> None:
        """Take a whole message."""

    def read(self, head: Head, socket: zmq.Socket[bytes]) -> None:
        """Take a message whose rest is still on `socket`."""

    def peers_gone(self, names: Sequence[str]) -> None:
        """Cells elsewhere went away."""

    def peers_back(self, names: Sequence[str]) -> None:
        """Cells elsewhere have a new connection: what was on its way to or from them may be lost."""


class _Connection:
    """One dialling end, by its routing id."""

    def __init__(self, owner: Router, routing_id: bytes, link: Link) -> None:
        self.routing_id = routing_id
        self.link = link
        self.fd = -1
        self.is_local = False
        self.backlog: deque[Sequence[Buffer | zmq.Frame]] = deque()
        self.backlog_bytes = 0
        self._owner = owner

    def send(self, frames: Sequence[Buffer | zmq.Frame]) -> None:
        self._owner.send_to(self, frames)


class _Local:
    """A cell of this process as a port."""

    def __init__(self, cell: LocalCell, loop: Loop) -> None:
        self.cell = cell
        self._loop = loop

    def send(self, frames: Sequence[Buffer | zmq.Frame]) -> None:
        # Posted, not called: two cells of one process that answer each other would dig into the stack.
        self._loop.post(self.cell.accept, frames)


_Port = _Connection | _Local | Dial


class Router:
    """A router on a loop.

    Args:
        loop: shared with the cells that attach; stopping it ends the router.
        silence_s: a connection is dropped after this long without a sign of life; the same at its other end.
    """

    def __init__(self, loop: Loop, silence_s: float = SILENCE_S) -> None:
        self._loop = loop
        self._silence_s = silence_s
        self._table: Table[_Port] = Table()
        self._connections: dict[bytes, _Connection] = {}
        self._by_fd: dict[int, _Connection] = {}
        self._locals: dict[int, _Local] = {}
        self._closed: list[_Connection] = []
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._guards: list[IpcGuard] = []
        self._keys: ListenKeys | None = None
        self._above: set[str] = set()
        self._missed: dict[str, None] = {}
        self._admission: Admission | None = None
        self._messages = self._bytes = self._unroutable = self._refused = 0
        loop.run(loop.add_actor, self)

    def bind(self, endpoint: str, keys: ListenKeys | None = None) -> str:
        """Listen; return the endpoint as bound (a `:*` port is filled in).

        Raises:
            ConfigError: the endpoint is malformed or not ours to use, or beyond loopback without keys.
            UsageError: somebody listens there already, or an earlier `bind` had other keys.
        """
        check_bind(endpoint, keys)
        return str(self._loop.run(self._bind, endpoint, keys))

    def connect(self, endpoint: str, keys: DialKeys | None = None) -> None:
        """Dial a router above this one.

        Raises:
            ConfigError: the endpoint is malformed, or beyond loopback without keys.
        """
        self._loop.run(self._connect, endpoint, keys)

    def attach(self, cell: LocalCell) -> None:
        """Put a cell of this process behind this router. On the loop's thread."""
        port = _Local(cell, self._loop)
        self._locals[id(cell)] = port
        self._join(port, cell.names())

    def detach(self, cell: LocalCell) -> None:
        """Take it away again. On the loop's thread."""
        port = self._locals.pop(id(cell), None)
        if port is not None:
            self._gone(self._table.leave(port), None)

    def statistics(self) -> RouterStatistics:
        """A snapshot, from any thread."""
        statistics = self._loop.run(self._statistics)
        assert isinstance(statistics, RouterStatistics)
        return statistics

    def close(self) -> None:
        """Say goodbye to everybody, close the sockets and remove their files. The loop goes on. Idempotent."""
        with contextlib.suppress(Closed, UsageError):  # the loop has ended, and the router with it; or we are a fork
            self._loop.run(self.end)

    # -- on the loop's thread from here on --

    def names(self) -> list[str]:
        """All names at or below this router; what it announces upward."""
        return self._table.names()

    def dispatch(self, frames: Sequence[Buffer | zmq.Frame], arrived_from: _Port | None = None) -> None:
        """Forward a whole message to where its target lives, or answer for it."""
        target = frame_bytes(frames[0]).decode("ascii", "replace")
        port = self._table.route(target, arrived_from)
        self._messages += 1
        try:
            self._send_to_port(port, target, frames)
        except LinkError as error:
            head = [frame_bytes(frame) for frame in frames[:4]]
            self._refuse(head[0], head[1], head[2], head[3], error)

    def send_local(self, cell: LocalCell, frames: Sequence[Buffer | zmq.Frame]) -> None:
        """A message from a cell of this process."""
        self.dispatch(frames, self._locals.get(id(cell)))

    def read(self, head: Head, socket: zmq.Socket[bytes]) -> None:
        """A message from the router above."""
        self._route(head, socket, self._table.upstream)

    def link_up(self) -> None:
        """The router above knows our names. Unanswered requests are sent again by their cells."""
        self._tell(Verb.JOIN, sorted(self._above), self._table.upstream)

    def link_lost(self, error: LinkError) -> None:
        """The router above is gone; what lives there cannot be reached until it is back."""
        log.warning("upstream: %s", error)
        above, self._above = self._above, set()
        self._tell(Verb.GONE, sorted(above), self._table.upstream)

    def peers_gone(self, names: Sequence[str]) -> None:
        """Cells above or beside went away."""
        self._above.difference_update(names)
        self._tell(Verb.GONE, [name for name in names if name not in self._table], self._table.upstream)

    def peers_back(self, names: Sequence[str]) -> None:
        """Cells above or beside have a new connection."""
        self._tell(Verb.JOIN, [name for name in names if name not in self._table], self._table.upstream)

    def tick(self, now: float) -> float | None:
        """Heartbeats, silent connections, and what waits to be sent."""
        soonest = None
        for connection in list(self._connections.values()):
            if connection.link.is_silent(now):
                self._drop(connection, f"nothing heard for {connection.link.silence_s} s")
                continue
            if connection.link.should_ping(now):
                self._say(connection, Verb.PING)
                # Also if it could not be said: a connection that is down is not tried again and again until it is dead.
                connection.link.spoke(now)
            if connection.backlog:
                self._flush(connection)
            due = now + BACKLOG_RETRY_S if connection.backlog else connection.link.next_event()
            soonest = due if soonest is None else min(soonest, due)
        return soonest

    def end(self) -> None:
        """Say goodbye and close everything; see `close`."""
        for connection in self._connections.values():
            self._say(connection, Verb.BYE)
        connections, self._connections = self._connections, {}
        self._by_fd.clear()
        for connection in connections.values():
            self._tell(Verb.GONE, self._table.leave(connection), None)
        upstream, self._table.upstream = self._table.upstream, None
        if isinstance(upstream, Dial):
            upstream.close()
            self._tell(Verb.GONE, sorted(self._above), None)
        if self._socket is not None and self._monitor is not None:
            self._socket.disable_monitor()
            self._loop.close_socket(self._monitor)
            self._loop.close_socket(self._socket)
            self._socket = self._monitor = None
        if self._admission is not None:
            self._admission.close()
        guards, self._guards = self._guards, []
        for guard in guards:
            guard.release()
        self._loop.remove_actor(self)

    def _bind(self, endpoint: str, keys: ListenKeys | None) -> str:
        if self._socket is not None and keys != self._keys:
            raise UsageError(f"{endpoint}: all endpoints of a router have the same keys")
        guard = IpcGuard(endpoint) if endpoint.startswith("ipc://") else None
        try:
            socket = self._socket or self._open(keys)
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            if guard is not None:
                guard.release()
            if error.errno == zmq.EADDRINUSE:
                raise UsageError(f"{endpoint}: another process listens here") from error
            raise ConfigError("bind", endpoint, error.strerror) from error
        if guard is not None:
            guard.restrict()
            self._guards.append(guard)
        return socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _open(self, keys: ListenKeys | None) -> zmq.Socket[bytes]:
        self._keys = keys
        if keys is not None:
            # First: a socket without anybody to ask admits everybody.
            self._admission = Admission(self._loop, keys.admitted)
        self._socket = router(self._loop.context, keys, self._silence_s)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        # The monitor comes first, so that a closed connection is known before its descriptor is used again.
        self._loop.add_monitor(self._monitor, self._read_monitor)
        self._loop.add_reader(self._socket, self._read)
        return self._socket

    def _connect(self, endpoint: str, keys: DialKeys | None) -> None:
        if self._table.upstream is not None:
            raise UsageError(f"{endpoint}: this router has one above it already")
        self._table.upstream = Dial(self._loop, endpoint, keys, self, self._silence_s)

    def _read(self) -> None:
        socket = self._socket
        for index in range(BATCH):
            # Whoever was told something may have closed us; and one message alone is what comes most often.
            if socket is None or socket.closed or (index == 1 and not has_message(socket)):
                break
            try:
                routing_id = socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            self._read_message(socket, routing_id)
        else:
            return
        self._drop_closed()

    def _read_message(self, socket: zmq.Socket[bytes], routing_id: zmq.Frame) -> None:
        head = receive_head(socket) if routing_id.more else None
        if head is None:
            return
        connection = self._connections.get(routing_id.bytes)
        if connection is None or not head.target:
            receive_rest(socket, head.more)
            self._hear(routing_id.bytes, connection, head)
        else:
            connection.link.heard(self._loop.clock())
            self._route(head, socket, connection)

    def _route(self, head: Head, socket: zmq.Socket[bytes], arrived_from: _Port | None) -> None:
        self._messages += 1
        source = head.source.decode("ascii", "replace")
        if arrived_from is not None and not self._table.owns(arrived_from, source):
            self._refused += 1
            log.warning("message dropped: its connection may not speak as %.80r", source)
            receive_rest(socket, head.more)
            return
        target = head.target.decode("ascii", "replace")
        port = self._table.route(target, arrived_from)
        if type(port) is _Local:
            port.cell.read(head, socket)
            return
        frames: Sequence[Buffer | zmq.Frame] = head[:4]
        self._bytes += len(head.body)
        if head.more:
            rest = receive_rest(socket, head.more)
            self._bytes += sum(map(len, rest))
            frames = (*frames, *rest)
        try:
            self._send_to_port(port, target, frames)
        except LinkError as error:
            self._refuse(head.target, head.source, head.header, head.body, error)

    def _send_to_port(self, port: _Port | None, target: str, frames: Sequence[Buffer | zmq.Frame]) -> None:
        if port is None:
            self._missed[target] = None
            if len(self._missed) > MAX_MISSED:
                del self._missed[next(iter(self._missed))]
            raise NoRoute(target)
        if port is self._table.upstream and len(self._above) < MAX_ABOVE:
            self._above.add(target)
        port.send(frames)

    def _refuse(self, target: bytes, source: bytes, header: bytes, body: bytes, error: LinkError) -> None:
        """Answer in place of a target that is not there, so that nobody waits for it."""
        self._unroutable += 1
        answer: Sequence[Buffer]
        if header == PULL:
            if isinstance(error, NoRoute) and error.reason == _DOWN:
                return  # the holder will be back, or gone; whoever pulls is told of either
            transfer = REQUEST.unpack(body)[0] if len(body) == REQUEST.size else b""
            answer = (source, target, CHUNK, PLACE.pack(transfer, NOT_OFFERED))
        elif header in (CHUNK, DONE, ORDER):
            return
        else:
            try:
                message = decode_message((target, source, header, body), is_whole=False)
            except DecodeError as why:
                log.warning("unreadable message for %.80r: %s", target, why)
                return
            if message.kind is not Kind.REQUEST:
                return
            if not isinstance(error, NoRoute):
                error = NoRoute(message.target, str(error))
            answer = encode_message(
                Message(message.source, message.target, Kind.ERROR, 0, answers=message.id, body=encode_failure(error))
            )
        port = self._table.route(source.decode("ascii", "replace"))
        if port is not None:
            try:
                port.send(answer)
            except LinkError:  # nobody left to tell
                return

    def _hear(self, routing_id: bytes, connection: _Connection | None, head: Head) -> None:
        verb = head.header
        if connection is None and verb != Verb.HELLO:
            if verb != Verb.BYE:
                self._say_to(routing_id, Verb.WHO)
            return
        if verb == Verb.HELLO:
            self._welcome(routing_id, connection, head)
            return
        assert connection is not None
        connection.link.heard(self._loop.clock())
        try:
            match verb:
                case Verb.JOIN:
                    self._join(connection, _decode_addresses(head.body))
                case Verb.LEAVE:
                    self._gone(self._table.leave(connection, decode_names(head.body)), connection)
                case Verb.PING:
                    self._say(connection, Verb.PONG)
                case Verb.BYE:
                    self._drop(connection, "left")
        except DecodeError as error:
            log.warning("connection dropped: %s", error)
            self._drop(connection, "sent nonsense")

    def _welcome(self, routing_id: bytes, connection: _Connection | None, head: Head) -> None:
        try:
            names = _decode_addresses(head.body)
        except DecodeError as error:
            log.warning("hello refused: %s", error)
            return
        # A descriptor is used again as soon as it is free: settle who left before learning who came.
        while self._monitor is not None and self._monitor.poll(0):
            self._read_monitor()
        link = new_link(self._loop.clock(), self._silence_s)
        if connection is None or self._connections.get(routing_id) is not connection:
            connection = self._connections[routing_id] = _Connection(self, routing_id, link)
        else:
            connection.link = link
            if connection in self._closed:
                self._closed.remove(connection)
            # What it said while it had no connection did not get here.
            left = set(self._table.names(connection)).difference(names)
            self._gone(self._table.leave(connection, left), connection)
        self._learn_descriptor(connection, head.last)
        self._join(connection, names)
        self._say(connection, Verb.WELCOME)
        self._loop.wake_by(link.next_event())

    def _learn_descriptor(self, connection: _Connection, frame: zmq.Frame) -> None:
        try:
            connection.fd = int(frame.get(zmq.SRCFD))
            probe = sockets.socket(fileno=os.dup(connection.fd))
        except (OSError, zmq.ZMQError):  # gone again already, or not a socket we can ask about
            return
        with probe:
            connection.is_local = probe.family == sockets.AF_UNIX
        self._by_fd[connection.fd] = connection

    def _read_monitor(self) -> None:
        assert self._monitor is not None
        connection = self._by_fd.pop(recv_monitor_message(self._monitor)["value"], None)
        # On one machine a closed connection is a dead process. Over a network it may come back; silence decides.
        if connection is not None and connection.is_local:
            # What it said before it went still waits on the socket: hear that first.
            self._closed.append(connection)
            self._loop.post(self._read)

    def _drop_closed(self) -> None:
        closed, self._closed = self._closed, []
        for connection in closed:
            self._drop(connection, "closed its connection")

    def _join(self, port: _Port, names: Sequence[str]) -> None:
        missed = self._missed.keys() & set(names)
        for name in missed:
            del self._missed[name]
        back = missed.union(set(self._table.names(port)).intersection(names))
        taken = self._table.join(port, names)
        if taken:
            # Another process of that name: what the former one was asked, and what it held, died with it.
            log.warning("%s: came back over another connection", taken[:3])
            self._gone(taken, port)
        self._tell(Verb.JOIN, sorted(back), port)
        upstream = self._table.upstream
        if isinstance(upstream, Dial) and upstream is not port:
            upstream.join(names)

    def _drop(self, connection: _Connection, why: str) -> None:
        if self._connections.get(connection.routing_id) is connection:
            del self._connections[connection.routing_id]
        if self._by_fd.get(connection.fd) is connection:
            del self._by_fd[connection.fd]
        names = self._table.leave(connection)
        log.debug("connection of %s dropped: %s", names[:3], why)
        self._gone(names, connection)

    def _gone(self, names: Sequence[str], origin: _Port | None) -> None:
        if names:
            upstream = self._table.upstream
            if isinstance(upstream, Dial):
                upstream.leave(names)
            self._tell(Verb.GONE, names, origin)

    def _tell(self, verb: Verb, names: Sequence[str], origin: _Port | None) -> None:
        """Tell all cells here or below, but not `origin`, that `names` are gone or, with JOIN, that they are back."""
        if not names:
            return
        body = encode_names(names)
        for connection in list(self._connections.values()):
            if connection is not origin:
                self._say(connection, verb, body)
        for port in list(self._locals.values()):
            if port is not origin:
                (port.cell.peers_gone if verb is Verb.GONE else port.cell.peers_back)(names)

    def _say(self, connection: _Connection, verb: Verb, body: bytes = b"") -> None:
        try:
            self.send_to(connection, (b"", b"", verb.value, body))
        except LinkError as error:
            log.debug("%s not said: %s", verb.name, error)

    def _say_to(self, routing_id: bytes, verb: Verb) -> None:
        assert self._socket is not None
        try:
            send_frames(self._socket, (routing_id, b"", b"", verb.value, b""))
        except zmq.ZMQError:  # gone, or does not read: it will ask again
            return

    def send_to(self, connection: _Connection, frames: Sequence[Buffer | zmq.Frame]) -> None:
        """Send to one connection, now or as soon as it reads again."""
        if self._socket is None:
            raise Closed("the router was closed")
        if not connection.backlog:
            try:
                send_frames(self._socket, (connection.routing_id, *frames))
                connection.link.spoke(self._loop.clock())
                return
            except zmq.Again:
                self._loop.wake_by(self._loop.clock() + BACKLOG_RETRY_S)
            except zmq.ZMQError as error:
                raise NoRoute(frame_bytes(frames[0]).decode("ascii", "replace"), _DOWN) from error
        nbytes = sum(len(frame) for frame in frames)
        if connection.backlog_bytes + nbytes > BACKLOG_BYTES:
            self._drop(connection, "does not read")
            raise NoRoute(frame_bytes(frames[0]).decode("ascii", "replace"), "does not read what it is sent")
        connection.backlog.append(frames)
        connection.backlog_bytes += nbytes

    def _flush(self, connection: _Connection) -> None:
        assert self._socket is not None
        while connection.backlog:
            frames = connection.backlog[0]
            try:
                send_frames(self._socket, (connection.routing_id, *frames))
            except zmq.Again:
                return
            except zmq.ZMQError:  # unreachable: nothing of it can be sent any more
                connection.backlog.clear()
                connection.backlog_bytes = 0
                return
            connection.backlog.popleft()
            connection.backlog_bytes -= sum(len(frame) for frame in frames)

    def _statistics(self) -> RouterStatistics:
        return RouterStatistics(
            names=len(self._table),
            connections=len(self._connections),
            messages=self._messages,
            bytes=self._bytes,
            unroutable=self._unroutable,
            refused=self._refused + (self._admission.refused if self._admission else 0),
            queued_bytes=sum(connection.backlog_bytes for connection in self._connections.values()),
        )


def _decode_addresses(body: bytes) -> Sequence[str]:
    """Names that may stand in a table, an error and a log.

    Raises:
        DecodeError: some may not.
    """
    names = decode_names(body)
    try:
        return [Address(name) for name in names]
    except ConfigError as error:
        raise DecodeError("a name that is not an address") from error
