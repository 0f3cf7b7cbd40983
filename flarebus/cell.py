"""Cell: a running endpoint with one address, its channels and its transfers.

From any thread: `request`, `notify`, `share`, `on`, `close`. Encoding happens on the caller's thread; sockets,
tables and transfers live on the loop's; handlers run on a thread per channel, in the order of arrival, so that a
slow one holds up nobody else. `cell.py` is the shell: what to ask for, whom to answer and what is late is decided in
`channel` and `transfer`.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from flarebus.address import Address
from flarebus.carrier import Carrier
from flarebus.channel import Answered, Requests
from flarebus.codec import encode
from flarebus.delivery import Delivery, Handler, Lane, resolve
from flarebus.dial import Dial
from flarebus.errors import (
    Closed,
    DeadlineExceeded,
    FlarebusError,
    LinkError,
    NoRoute,
    UsageError,
)
from flarebus.failure import decode_failure, encode_failure
from flarebus.intake import Intake, Room
from flarebus.link import SILENCE_S
from flarebus.loop import Loop
from flarebus.message import Buffer, Bundle, Kind, Manifest, Message, Payload
from flarebus.pending import Pending
from flarebus.router import Router
from flarebus.security.keys import DialKeys
from flarebus.slab import SlabPool
from flarebus.sockets import Head, receive_rest
from flarebus.transfer import LEASE_S
from flarebus.wire import (
    CHUNK,
    DONE,
    MAX_BODY_BYTES,
    ORDER,
    PULL,
    bundle,
    carry,
    encode_message,
)

__all__ = ["Cell", "CellStatistics", "Payload"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CellStatistics:
    """What a cell has done since it was made, and what it is doing."""

    messages_sent: int
    messages_received: int
    bytes_pulled: int
    bytes_served: int
    requests_waiting: int
    offers_held: int
    pulls_running: int
    queued: dict[str, int]
    """Channel -> deliveries that wait for its thread."""


class Cell:
    """One endpoint on the bus. Make it with `Cell.dial` or `Cell.attach`.

    Args:
        address: its name.
        loop: the thread it lives on.
        aliases: more names that lead here, such as the sites of a simulation's worker.
    """

    def __init__(self, address: str, loop: Loop, aliases: Iterable[str] = ()) -> None:
        self.address = Address(address)
        self._names = [str(self.address), *(str(Address(alias)) for alias in aliases)]
        self._own = frozenset(name.encode() for name in self._names)
        self._loop = loop
        self._owns_loop = False
        self._dial: Dial | None = None
        self._router: Router | None = None
        # Random, so that a cell that came back does not repeat the ids of the one it replaces.
        self._requests: Requests[Pending[Delivery]] = Requests(secrets.randbits(62))
        self._answered = Answered()
        self._carrier = Carrier(str(self.address), loop, self._send)
        self._intake = Intake(str(self.address), self._carrier, loop.flush)
        self._lanes: dict[str, Lane] = {}
        self._handlers: dict[tuple[str, str], tuple[Callable[[Handler, Delivery], None], Handler]] = {}
        self._gone_watchers: list[Callable[[Sequence[str]], None]] = []
        self._lost_watchers: list[Callable[[LinkError], None]] = []
        self._up: Pending[None] = Pending()
        self._closed = False
        # After a reconnection: requests below this number wait until then for targets that are not there.
        self._patient_before = 0
        self._patient_until = 0.0
        self._missing: set[str] = set()
        self._silence_s = SILENCE_S
        self._sent = self._received = 0

    @classmethod
    def dial(
        cls,
        address: str,
        endpoint: str,
        keys: DialKeys | None = None,
        aliases: Iterable[str] = (),
        *,
        silence_s: float = SILENCE_S,
    ) -> Cell:
        """A cell with a thread and a connection of its own, up to the router at `endpoint`.

        Args:
            silence_s: the router is lost after this long without a sign of life; the same as the router's own.

        Raises:
            ConfigError: a name is no address, or the endpoint none that may be dialled so.
        """
        loop = Loop(f"flarebus bus {address}")
        try:
            cell = cls(address, loop, aliases)
            cell._owns_loop = True
            loop.run(cell._connect, endpoint, keys, silence_s)
        except BaseException:
            loop.stop()
            raise
        return cell

    @classmethod
    def attach(cls, address: str, router: Router, loop: Loop, aliases: Iterable[str] = ()) -> Cell:
        """A cell of the router's own process, on the router's loop, with no socket between them."""
        cell = cls(address, loop, aliases)
        cell._router = router

        def join() -> None:
            loop.add_actor(cell)
            router.attach(cell)
            cell._up.set(None)

        loop.run(join)
        return cell

    # -- from any thread --

    def wait_until_up(self, timeout: float | None = None) -> None:
        """Return when the router knows this cell.

        Raises:
            LinkError: it refused, left, or could not be reached within `timeout` seconds.
        """
        self._up.result(timeout)

    def request(
        self,
        target: str,
        channel: str,
        topic: str,
        value: Any = None,
        *,
        payload: Payload | None = None,
        timeout: float | None = None,
        source: str = "",
        bring: bool = False,
    ) -> Pending[Delivery]:
        """Ask `target` something; the pending delivery is its reply.

        Args:
            value: anything the codec takes. Large arrays in it are offered, not copied, until the answer is there.
            payload: shared buffers to go with it instead; `value` holds `payload.body` where the receiver looks for it,
                and no arrays of its own. Also how a message is passed on: with a manifest the buffers stay with their
                holder, and `target` pulls them from there.
            timeout: seconds until `DeadlineExceeded`; None leaves it to the target's life and to the link.
            source: an alias of this cell to speak as.
            bring: send the arrays of `payload` along, if they are offered here and fit into one chunk: `target` has
                granted credit for that. It pulls them all the same if it has no room for them then.

        Raises:
            EncodeError: `value` may not travel.
            UsageError: `source` is no name of this cell; the router would drop the message.
            Closed: this cell was closed before. All other errors come through the pending delivery.
        """
        if source and source not in self._names:
            raise UsageError(f"{self.address} cannot speak as {source!r}")
        pending: Pending[Delivery] = Pending()
        number = self._requests.new_id()
        message = self._message(target, Kind.REQUEST, number, channel, topic, value, payload, timeout, source)
        brought = message.manifest if bring else None
        self._loop.post(self._begin, number, target, pending, timeout, encode_message(message), brought)
        if payload is None and message.manifest is not None:
            # The answer settles it: nobody needs the arrays after that.
            transfer = message.manifest.transfer
            pending.on_done(lambda _: self._post_quietly(self._carrier.withdraw, transfer))
        return pending

    def notify(self, target: str, channel: str, topic: str, value: Any = None) -> None:
        """Tell `target` something; no answer, no promise that it arrives.

        Raises:
            EncodeError: `value` may not travel.
            Closed: this cell was closed before.
        """
        message = self._message(target, Kind.EVENT, self._requests.new_id(), channel, topic, value, None, None)
        self._loop.post(self._send_quietly, encode_message(message))

    def share(self, value: Any, receivers: Iterable[str]) -> Payload:
        """Encode `value` once, for messages to any of `receivers`. Large arrays are offered until `withdraw`.

        Raises:
            EncodeError: `value` may not travel.
        """
        return Payload(*self._encode(value, tuple(receivers), None))

    def share_encoded(self, body: bytes, buffers: Sequence[Buffer], receivers: Iterable[str]) -> Payload:
        """Like `share`, for what is encoded already: `buffers` are byte views of the arrays, in order."""
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        return Payload(body, *self._carry(views, tuple(receivers), None))

    def admit(self, payload: Payload, receiver: str) -> None:
        """Let one more cell, and all that live under its address, pull a shared payload."""
        if payload.manifest is not None:
            self._loop.post(self._carrier.admit, payload.manifest.transfer, receiver)

    def send_ahead(self, payload: Payload, address: str) -> None:
        """Send a shared payload of one chunk to the cells at and under `address` that have ordered from this one (see
        `pull`) and may have it. Before the message about it, or after one that goes to them by another way."""
        if payload.manifest is not None:
            self._post_quietly(self._carrier.send_ahead, payload.manifest.transfer, address)

    def withdraw(self, payload: Payload, wait: bool = True) -> None:
        """End a shared payload: nobody pulls from it any more when this returns, or soon after unless `wait`."""
        if payload.manifest is not None:
            with contextlib.suppress(Closed):  # with the cell ended all it offered
                end = self._loop.run if wait else self._loop.post
                end(self._carrier.withdraw, payload.manifest.transfer)

    def on(self, channel: str, topic: str, handler: Handler) -> None:
        """Handle messages of `topic` on the channel's own thread; what `handler` returns is the reply."""
        if channel not in self._lanes:
            self._lanes[channel] = Lane(f"flarebus {self.address} {channel}")
        self._handlers[channel, topic] = self._lanes[channel].put, handler

    def inbox(
        self,
        channel: str,
        topic: str,
        put: Callable[[Delivery], None],
        room: Room | None = None,
    ) -> None:
        """Hand messages of `topic` to `put`, with nothing pulled. It runs on the bus thread and must not block, as the
        `put` of a queue; whoever takes them out answers with `reply` or `fail`.

        Args:
            room: asked, on the bus thread, where to put so many bytes of arrays that a message brings along; None:
                nowhere, and they are pulled if they are wanted.
        """
        self._handlers[channel, topic] = (lambda _, delivery: put(delivery)), _no_handler
        if room is not None:
            self._intake.set_room(channel, topic, room)

    def on_gone(self, watcher: Callable[[Sequence[str]], None]) -> None:
        """Call `watcher(names)` when cells go away; on the bus thread, so it must not block."""
        self._gone_watchers.append(watcher)

    def on_link_lost(self, watcher: Callable[[LinkError], None]) -> None:
        """Call `watcher(error)` when the router is gone for good; on the bus thread, so it must not block."""
        self._lost_watchers.append(watcher)

    def pull(
        self,
        manifest: Manifest,
        target: str,
        pool: SlabPool | None = None,
        tell_done: bool = True,
        order: bool = False,
    ) -> Pending[Sequence[Buffer]]:
        """Bring what `manifest` offers to `target` (this cell, or an alias of it) into slabs; see `Carrier.pull`."""
        return self._carrier.pull(manifest, target, pool, tell_done, order)

    def reply(self, message: Message, value: Any) -> None:
        """Answer `message`; see `Delivery.reply`."""
        if message.kind is not Kind.REQUEST:
            return
        try:
            frames = encode_message(self._answer(message, value))
        except FlarebusError as error:
            self.reply_failure(message, error)
            return
        self._post_quietly(self._send_answer, message, frames)

    def reply_failure(self, message: Message, error: BaseException) -> None:
        """Answer `message` with an error; see `Delivery.fail`."""
        if message.kind is not Kind.REQUEST:
            log.warning("%s/%s from %s failed: %s", message.channel, message.topic, message.source, error)
            return
        answer = Message(message.source, message.target, Kind.ERROR, 0, answers=message.id, body=encode_failure(error))
        self._post_quietly(self._send_answer, message, encode_message(answer))

    @property
    def moved_bytes(self) -> int:
        """Bytes of buffers that came and went so far; from any thread, and it waits for nobody."""
        return self._carrier.bytes_pulled + self._carrier.bytes_served

    def statistics(self) -> CellStatistics:
        """A snapshot."""
        statistics = self._loop.run(self._statistics)
        assert isinstance(statistics, CellStatistics)
        return statistics

    def close(self) -> None:
        """Say goodbye and fail whatever still waits. Idempotent; never hangs on a peer."""
        with contextlib.suppress(Closed, UsageError):  # the loop has ended, and the cell with it; or we are a fork
            self._loop.run(self.end)
        if self._owns_loop:
            self._loop.stop()

    def _message(
        self,
        target: str,
        kind: Kind,
        number: int,
        channel: str,
        topic: str,
        value: Any,
        payload: Payload | None,
        timeout: float | None,
        source: str = "",
    ) -> Message:
        if self._closed:
            raise Closed(f"{self.address} was closed")
        if payload is None:
            body, carried, manifest = self._encode(value, (target,), None if kind is Kind.REQUEST else LEASE_S)
        else:
            body, extra = encode(value, externalise_from=MAX_BODY_BYTES)
            if extra:
                raise UsageError("a message with a shared payload carries no arrays of its own")
            carried, manifest = payload.bundle, payload.manifest
        return Message(
            target,
            source or str(self.address),
            kind,
            number,
            channel=channel,
            topic=topic,
            ttl_s=timeout or 0.0,
            manifest=manifest,
            body=body,
            bundle=carried,
        )

    def _answer(self, message: Message, value: Any) -> Message:
        body, carried, manifest = self._encode(value, (message.source,), LEASE_S)
        return Message(
            message.source,
            message.target,
            Kind.REPLY,
            0,
            answers=message.id,
            manifest=manifest,
            body=body,
            bundle=carried,
        )

    def _encode(
        self, value: Any, receivers: Sequence[str], lease_s: float | None
    ) -> tuple[bytes, Bundle | None, Manifest | None]:
        body, buffers = encode(value)
        return body, *self._carry(buffers, receivers, lease_s)

    def _carry(
        self, buffers: Sequence[memoryview], receivers: Sequence[str], lease_s: float | None
    ) -> tuple[Bundle | None, Manifest | None]:
        if not buffers:
            return None, None
        # Copied now if they are small: the caller may change its arrays as soon as this returns.
        carried = bundle(buffers)
        return carried, self._carrier.offer(buffers, receivers, lease_s) if carried is None else None

    # -- on the loop's thread from here on --

    def names(self) -> list[str]:
        """The names that lead here."""
        return self._names

    def accept(self, frames: Sequence[Buffer | zmq.Frame]) -> None:
        """Take a whole message."""
        if self._carrier.take(frames):
            return
        self._take_in(self._intake.whole(frames))

    def read(self, head: Head, socket: zmq.Socket[bytes]) -> None:
        """Take a message whose rest is still on `socket`."""
        if head.header == CHUNK:
            self._carrier.read_chunk(head, socket)
        elif head.header in (PULL, DONE, ORDER):
            self.accept((head.target, head.source, head.header, head.body, *receive_rest(socket, head.more)))
        else:
            self._take_in(self._intake.from_socket(head, socket))

    def _take_in(self, came: tuple[Message, Sequence[Buffer] | None] | None) -> None:
        if came is not None:
            self._received += 1
            self._handle(*came)

    def link_up(self) -> None:
        """The router knows us: ask again for whatever a lost connection may have swallowed."""
        if self._up.is_done:
            # The router may be a new one, and whom we ask on the way back to it as well.
            self._missing.clear()
            self._patient_until = self._loop.clock() + self._silence_s
            self._patient_before = self._requests.new_id()
            self._loop.wake_by(self._patient_until)
            for waiting in self._requests.waiting():
                self._send_quietly(waiting.frames)
            self._carrier.resume(patient_until=self._patient_until)
        self._up.set(None)

    def link_lost(self, error: LinkError) -> None:
        """The router is gone: nothing that goes through it will be answered."""
        self._loop.flush()
        self._up.fail(error)
        for waiting in self._requests.lost({waiting.target for waiting in self._requests.waiting()}):
            waiting.token.fail(NoRoute(waiting.target, str(error)))
        self._carrier.fail(error)
        for watcher in self._lost_watchers:
            watcher(error)

    def peers_gone(self, names: Sequence[str]) -> None:
        """Cells went away: whoever waits for them hears it now."""
        # What they said before they went is heard before that.
        self._loop.flush()
        # First, so that whoever sees a pull fail knows already that its holder is gone.
        for watcher in self._gone_watchers:
            watcher(names)
        gone = set(names)
        self._missing -= gone
        for waiting in self._requests.lost(gone):
            waiting.token.fail(NoRoute(waiting.target, "gone"))
        self._carrier.lost(gone)

    def peers_back(self, names: Sequence[str]) -> None:
        """Cells have a new connection: ask again for whatever the old one may have swallowed."""
        back = set(names)
        self._missing -= back
        for waiting in self._requests.waiting():
            if waiting.target in back:
                self._send_quietly(waiting.frames)
        self._carrier.resume(back)

    def tick(self, now: float) -> float | None:
        """Deadlines, leases and stalled pulls."""
        for waiting in self._requests.tick(now):
            waiting.token.fail(DeadlineExceeded(f"{waiting.target} did not answer in time"))
        if self._missing and now >= self._patient_until:
            missing, self._missing = self._missing, set()
            for waiting in self._requests.lost(missing):
                waiting.token.fail(NoRoute(waiting.target))
        due = (self._requests.next_event(), self._carrier.tick(now), self._patient_until if self._missing else None)
        return min((when for when in due if when is not None), default=None)

    def end(self) -> None:
        """Say goodbye, and fail whatever waits; see `close`."""
        self._loop.flush()
        if self._closed:
            return
        self._closed = True
        self._loop.remove_actor(self)
        for lane in list(self._lanes.values()):
            lane.close()
        if self._dial is not None:
            self._dial.close()
        if self._router is not None:
            self._router.detach(self)
        error = Closed(f"{self.address} was closed")
        self._up.fail(error)
        for waiting in self._requests.lost({waiting.target for waiting in self._requests.waiting()}):
            waiting.token.fail(error)
        self._carrier.close(error)

    def _connect(self, endpoint: str, keys: DialKeys | None, silence_s: float) -> None:
        self._silence_s = silence_s
        self._loop.add_actor(self)
        self._dial = Dial(self._loop, endpoint, keys, self, silence_s)

    def _send(self, frames: Sequence[Buffer | zmq.Frame]) -> None:
        if self._closed:
            raise Closed(f"{self.address} was closed")
        self._sent += 1
        if frames[0] in self._own:
            # A site that steers gives tasks to its own script as well. Posted: each chunk of a pull asks for the next.
            self._loop.post(self.accept, frames)
        elif self._router is not None:
            self._router.send_local(self, frames)
        elif self._dial is not None:
            self._dial.send(frames)

    def _send_quietly(self, frames: Sequence[Buffer | zmq.Frame]) -> None:
        try:
            self._send(frames)
        except Closed:
            log.debug("%s: an answer came after the end", self.address)
        except LinkError as error:
            log.warning("%s: not sent: %s", self.address, error)

    def _post_quietly(self, call: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.post(call, *args)
        except Closed:  # nobody is left to be told
            return

    def _begin(
        self,
        number: int,
        target: str,
        pending: Pending[Delivery],
        timeout: float | None,
        frames: Sequence[Buffer],
        brought: Manifest | None,
    ) -> None:
        deadline = None if timeout is None else self._loop.clock() + timeout
        self._requests.begin(number, target, pending, deadline, frames)
        self._loop.wake_by(deadline)
        # Sent again, it goes without: who is asked then may have another one's credit, or the arrays may have changed.
        chunk = None if brought is None else self._carrier.only_chunk(brought)
        try:
            self._send(frames if chunk is None else carry(frames, chunk))
        except LinkError as error:
            self._requests.fail(number)
            pending.fail(error)

    def _handle(self, message: Message, buffers: Sequence[Buffer] | None = None) -> None:
        if message.kind in (Kind.REPLY, Kind.ERROR):
            self._handle_answer(message)
            return
        if message.kind is Kind.REQUEST:
            before = self._answered.seen(message.source, message.id)
            if before is not None:
                if before:
                    self._send_quietly(before)
                return
        entry = self._handlers.get((message.channel, message.topic))
        delivery = Delivery(self, message, buffers)
        if entry is None:
            delivery.fail(NoRoute(message.target, f"no handler for {message.channel}/{message.topic}"))
            return
        put, handler = entry
        self._loop.defer(put, handler, delivery)

    def _handle_answer(self, message: Message) -> None:
        error = decode_failure(message.body, message.source) if message.kind is Kind.ERROR else None
        if error is not None and self._is_awaited(message.answers, error):
            self._missing.add(message.source)
            return
        pending = self._requests.answer(message.answers, message.source)
        if pending is None:
            return
        delivery = Delivery(self, message)
        if error is not None:
            self._loop.defer(pending.fail, error)
        elif delivery.is_here:
            self._loop.defer(pending.set, delivery)
        else:
            self._loop.flush()
            resolve(pending, delivery)

    def _is_awaited(self, number: int, error: FlarebusError) -> bool:
        """Whether `error` only says that whom we asked before the connection was lost is not back yet."""
        if number >= self._patient_before or self._loop.clock() >= self._patient_until:
            return False
        return isinstance(error, NoRoute) and error.reason == NoRoute(error.target).reason

    def _send_answer(self, message: Message, frames: Sequence[Buffer]) -> None:
        self._answered.answered(message.source, message.id, frames)
        self._send_quietly(frames)

    def _statistics(self) -> CellStatistics:
        return CellStatistics(
            messages_sent=self._sent,
            messages_received=self._received,
            bytes_pulled=self._carrier.bytes_pulled,
            bytes_served=self._carrier.bytes_served,
            requests_waiting=len(self._requests),
            offers_held=self._carrier.offers_held,
            pulls_running=self._carrier.pulls_running,
            queued={channel: len(lane) for channel, lane in self._lanes.items()},
        )


def _no_handler(_: Delivery) -> None:
    """Stands in for a handler where an inbox takes the deliveries."""
