"""CellPipe: the bus itself as a pipe. Arrays do not pass through the client job: their manifest does.

The trainer is a cell of its own, `<site>.<job>.<rank>.<nonce>`, on the router that its client job uses; the client job
speaks as `<site>.<job>`. What the server offers to a site may be pulled by whoever lives under the site's address, so a
trainer fetches the model from the server; what a trainer offers names the server as a reader, which fetches the result
from the trainer. The nonce keeps two trainers that were started with one configuration apart: the second is refused.

A message is a request on channel `pipe`: the name of the pipe's channel, the head and the body of the message, and its
buffers beside it; it is answered when `receive` returns it. A body that leaves no room for the other two comes as the
first buffer. A trainer begins with a greeting, which has neither head nor body: by that the client job knows it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from flarebus.address import check_name
from flarebus.cell import Cell, Payload
from flarebus.delivery import Delivery
from flarebus.errors import (
    Closed,
    ConfigError,
    DeadlineExceeded,
    DecodeError,
    EncodeError,
    FlarebusError,
    NoRoute,
    UsageError,
)
from flarebus.message import Buffer
from flarebus.pending import Pending
from flarebus.pipes import ExportMode, Message, Mode, Pipe
from flarebus.slab import unbundle
from flarebus.wire import MAX_BODY_BYTES
from flarebus_pipes._bus import BUS_CHANNEL, BUS_TOPIC, Endpoint, dialled, fields_of, hub_of

__all__ = ["CellPipe"]

# How long a trainer greets a client job again that is not there yet, and the shortest and longest time between. Nobody
# tells a cell that a name has come.
GREET_S, PAUSES_S = 10.0, (0.02, 0.5)
# A message comes again right after itself.
MAX_READ = 16
# A body is sent within a body, beside the channel's name and the head.
ROOM_BYTES = 1024


class CellPipe(Pipe):
    """One end of a link over the bus.

    Args:
        mode: ACTIVE for the trainer, PASSIVE for the client job.
        site_name: the site.
        token: id of the job.
        root_url: endpoint of the router, to dial; needed without `cell`.
        secure_mode: whether the connection is encrypted; then whoever dials over TCP needs `keys`.
        workspace_dir: not used; configurations of other systems name it.
        cell: the client job's own cell, to which `<site_name>.<token>` leads; PASSIVE only. Without it the client job's
            end dials, as a trainer's does.
        rank: of the trainer's process; ACTIVE only.
        link: which of the links of this site and job it is: a trainer of an earlier one that is about to end must not
            be taken for that of the next.
        keys: CURVE keys of whoever dials: its ``public`` and ``secret`` one and that of the ``server``.

    Raises:
        ConfigError: an argument is wrong or missing.
    """

    passes_manifests: ClassVar[bool] = True

    def __init__(
        self,
        mode: Mode | str,
        site_name: str,
        token: str,
        root_url: str = "",
        secure_mode: bool = True,
        workspace_dir: str = "",
        *,
        cell: Cell | None = None,
        rank: int = 0,
        link: str = "",
        keys: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(mode)
        self.address = f"{check_name(site_name, 'site_name')}.{check_name(token, 'token')}"
        self._arguments = {
            "site_name": site_name,
            "token": token,
            "root_url": root_url,
            "secure_mode": secure_mode,
            "workspace_dir": workspace_dir,
            "link": check_name(link, "link") if link else "",
        }
        self._given_cell = cell if self.mode is Mode.PASSIVE else None
        if self._given_cell is None and not root_url:
            raise ConfigError("root_url", root_url, "the endpoint of a router, such as ipc:///run/me/bus")
        if self._given_cell is None and secure_mode and root_url.startswith("tcp:") and keys is None:
            raise ConfigError("keys", keys, "an encrypted connection needs keys; the client job writes them down")
        self._rank = rank
        self._keys = keys
        self._cell: Cell | None = None
        self._name = ""
        self._peer = ""
        self._met = threading.Event()
        self._again: threading.Timer | None = None
        # Heads of what waits to be received, in order, and the deliveries: of a message that came again the last one,
        # for only that is still waited for.
        self._incoming: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._waiting: dict[str, Delivery] = {}
        self._read: deque[str] = deque(maxlen=MAX_READ)
        # To whom messages are given as they come, unless `receive` has returned one that is still looked at.
        self._deliver: Callable[[Message], None] | None = None
        self._is_fetched = False
        self._broken = ""
        self._offered: dict[str, Payload] = {}
        self._sending: set[Pending[Delivery]] = set()
        self._last_active = 0.0
        # Guards what `close` takes away from a thread that sends.
        self._lock = threading.Lock()

    def open(self, name: str) -> None:
        """Get ready; connects to the router here, unless there is a cell already.

        Raises:
            UsageError: it is open already, or another end of this process has the channel.
            LinkError: the router cannot be reached.
        """
        if self._cell is not None:
            raise UsageError(f"{self.address}: channel {self._name!r} is open already")
        check_name(name, "channel")
        link = self._arguments["link"]
        self._name, self._broken, self._last_active = f"{name}.{link}" if link else name, "", 0.0
        self._incoming = queue.SimpleQueue()
        self._deliver, self._is_fetched = None, False
        self._met.clear()
        # A trainer knows the name of its peer; the client job learns it from the greeting.
        self._peer = self.address if self.mode is Mode.ACTIVE else ""
        cell = self._given_cell or dialled.get(self._endpoint())
        self._cell = cell
        try:
            hub_of(cell).listen(self._own_address(cell), self._name, self)
        except UsageError:
            self._cell = None
            self._hang_up()
            raise
        if self.mode is Mode.ACTIVE:
            self._greet(PAUSES_S[0], time.monotonic() + GREET_S)

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Hand a message over; see `Pipe.send`.

        Raises:
            EncodeError: body and manifest together are too big for a message.
        """
        self._check_open()
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._met.wait(timeout):
            return False
        return self._begin(message, None if deadline is None else max(0.0, deadline - time.monotonic())).result()

    def begin(self, message: Message, timeout: float | None = None) -> Pending[bool] | None:
        """Hand a message over without waiting, once the peer is known; see `Pipe.begin`."""
        return self._begin(message, timeout) if self._met.is_set() else None

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message; see `Pipe.receive`. What a peer said before it went is still heard."""
        if self._cell is None:
            self._check_open()
        incoming, self._is_fetched = self._incoming, False
        try:
            head = incoming.get(timeout=timeout)
        except queue.Empty:
            return None
        with self._lock:
            delivery = None if head is None else self._waiting.pop(head)
            self._read.extend(() if head is None else (head,))
            self._is_fetched = delivery is not None
        if delivery is None:
            incoming.put(None)  # for whoever comes next
            self._check_open()
            raise BrokenPipeError(f"{self.address}: the other end is gone")
        self._last_active = time.monotonic()
        try:
            message = _CellMessage.of(delivery)
        except DecodeError as error:
            delivery.fail(error)
            raise
        delivery.reply()
        return message

    def pull(self, message: Message) -> Pending[Sequence[Buffer]]:
        """Bring the buffers of a message here, from whoever holds them."""
        if isinstance(message, _CellMessage) and message.manifest is not None:
            return message.delivery.pull(order=True)
        return super().pull(message)

    def deliver(self, to: Callable[[Message], None]) -> bool:
        """Give messages to `to` on the bus thread, but those that have to be fetched."""
        self._deliver = to
        return True

    def clear(self) -> None:
        """Drop what waits to be received."""
        self._refuse("it was cleared")

    def close(self) -> None:
        """Stop listening and withdraw what is still offered; the last end on a cell that was dialled closes it."""
        with self._lock:
            cell, self._cell = self._cell, None
            offered, self._offered = self._offered, {}
            sending, self._sending = self._sending, set()
        if cell is None:
            return
        self._broken = f"{self.address}: channel {self._name!r} is closed"
        hub_of(cell).leave(self._own_address(cell), self._name, self)
        for payload in offered.values():
            cell.withdraw(payload, wait=False)
        for sent in sending:
            sent.fail(Closed(self._broken))
        # Whoever sent what nobody will read hears it now, as does whoever waits here.
        self._refuse(f"channel {self._name!r} was closed")
        self._incoming.put(None)
        if self._again is not None:
            self._again.cancel()
        self._met.set()
        self._hang_up()

    def export(self, side: ExportMode) -> tuple[str, dict[str, Any]]:
        """Class path and arguments; those of a trainer hold no keys, which are handed over apart."""
        other = Mode.PASSIVE if self.mode is Mode.ACTIVE else Mode.ACTIVE
        mode = self.mode if side is ExportMode.SELF else other
        return f"{type(self).__module__}.{type(self).__qualname__}", {"mode": mode.value, **self._arguments}

    def can_resend(self) -> bool:
        """True: whoever gets a message twice knows it by its id."""
        return True

    def release_send_cache(self, message: Message) -> None:
        """Offer the buffers of `message` no longer."""
        with self._lock:
            payload, cell = self._offered.pop(message.msg_id, None), self._cell
        if payload is not None and cell is not None:
            cell.withdraw(payload, wait=False)

    def get_last_peer_active_time(self) -> float:
        """When a message came, or one of ours was taken."""
        return self._last_active

    def moved_bytes(self) -> int:
        """Bytes of buffers that this end's cell has moved; 0 on a cell that was given: others use that, too."""
        cell = self._cell
        return 0 if cell is None or self._given_cell is not None else cell.moved_bytes

    # -- on the bus thread, one call at a time --

    def take(self, delivery: Delivery) -> None:
        """A message for this end has come."""
        if not self._peer and delivery.source.startswith(f"{self.address}."):
            self._peer = delivery.source
            self._met.set()
        if delivery.source != self._peer:
            has = f"has a trainer already ({self._peer})" if self._peer else "waits for its own trainer"
            delivery.fail(UsageError(f"{self.address} {has}"))
            return
        head = fields_of(delivery)[1]
        if not head:
            delivery.reply()
            return
        with self._lock:
            was_read, is_new = head in self._read, head not in self._waiting
            if not was_read:
                self._waiting[head] = delivery
        if was_read:
            delivery.reply()
        elif is_new and not self._deliver_now(head, delivery):
            self._incoming.put(head)

    def _deliver_now(self, head: str, delivery: Delivery) -> bool:
        """Give a message to whoever wants it at once, if it is the only one, and here."""
        body = fields_of(delivery)[2]
        with self._lock:
            deliver = self._deliver
            if deliver is None or self._is_fetched or len(self._waiting) > 1 or body is None:
                return False
            try:
                message = _CellMessage.of(delivery)
            except DecodeError:  # `receive` raises it
                return False
            del self._waiting[head]
            self._read.append(head)
        self._last_active = time.monotonic()
        delivery.reply()
        deliver(message)
        return True

    def _greeted(self, incoming: object, pause_s: float, until: float, answer: Pending[Delivery]) -> None:
        error = answer.error()
        if incoming is not self._incoming or self._cell is None:
            return  # closed, and perhaps opened again
        if error is None:
            self._last_active = time.monotonic()
            self._met.set()
        elif isinstance(error, NoRoute) and time.monotonic() + pause_s < until:
            self._again = threading.Timer(pause_s, self._greet, (min(2 * pause_s, PAUSES_S[1]), until))
            self._again.name, self._again.daemon = "flarebus-pipe-greeting", True
            self._again.start()
        else:
            self.break_off(_in_words(error))

    def break_off(self, reason: str) -> None:
        """Nothing comes or goes any more."""
        self._broken = self._broken or reason
        self._incoming.put(None)
        self._met.set()

    @property
    def peer(self) -> str:
        """Address of the other end; "" while it was not heard of: whoever had that name before may be gone."""
        return self._peer if self._met.is_set() else ""

    @property
    def is_broken(self) -> bool:
        """Whether nothing comes or goes any more."""
        return bool(self._broken)

    def _own_address(self, cell: Cell) -> str:
        return self.address if self.mode is Mode.PASSIVE else str(cell.address)

    def _endpoint(self) -> Endpoint:
        keys = None if self._keys is None else tuple(self._keys[name] for name in ("public", "secret", "server"))
        address = self.address if self.mode is Mode.PASSIVE else f"{self.address}.{self._rank}"
        return str(self._arguments["root_url"]), address, self.mode, keys

    def _refuse(self, reason: str) -> None:
        """Answer all that waits to be received; a sign that there will be no more stays."""
        ended = False
        while True:
            try:
                head = self._incoming.get_nowait()
            except queue.Empty:
                break
            if head is None:
                ended = True
                continue
            with self._lock:
                delivery = self._waiting.pop(head)
            delivery.fail(NoRoute(self.address, reason))
        if ended:
            self._incoming.put(None)

    def _hang_up(self) -> None:
        if self._given_cell is None:
            dialled.release(self._endpoint())

    def _greet(self, pause_s: float, until: float) -> None:
        """Tell the client job who is here; once more after `pause_s` if it is not there."""
        with self._lock:
            cell, incoming = self._cell, self._incoming
            if cell is None or self._broken:
                return
            words = [self._name, "", b""]
            answer = cell.request(self._peer, BUS_CHANNEL, BUS_TOPIC, words, source=self._own_address(cell))
        answer.on_done(lambda done: self._greeted(incoming, pause_s, until, done))

    def _begin(self, message: Message, timeout: float | None) -> Pending[bool]:
        with self._lock:
            self._check_open()
            cell = self._cell
            assert cell is not None
            inside = len(message.body) <= MAX_BODY_BYTES - ROOM_BYTES
            if not inside and message.manifest is not None:
                raise EncodeError(message.topic, f"a body of {len(message.body)} bytes with a manifest")
            payload = self._payload(cell, message, inside)
            if message.msg_id in self._offered:
                for reader in (self._peer, *message.readers):
                    cell.send_ahead(payload, reader)
            words = [self._name, message.head(), message.body if inside else None]
            source = self._own_address(cell)
            try:
                sent = cell.request(
                    self._peer, BUS_CHANNEL, BUS_TOPIC, words, payload=payload, timeout=timeout, source=source
                )
            except Closed as error:
                raise BrokenPipeError(_in_words(error)) from error
            self._sending.add(sent)
        read: Pending[bool] = Pending()
        sent.on_done(lambda done: self._sent(done, read))
        return read

    def _sent(self, sent: Pending[Delivery], read: Pending[bool]) -> None:
        """A message was read, or will not be; on the bus thread, or that of whoever closes."""
        self._sending.discard(sent)
        error = sent.error()
        if error is None:
            self._last_active = time.monotonic()
            read.set(True)
        elif isinstance(error, DeadlineExceeded):
            read.set(False)
        else:
            broken = BrokenPipeError(self._broken or _in_words(error))
            broken.__cause__ = error
            read.fail(broken)

    def _payload(self, cell: Cell, message: Message, body_inside: bool) -> Payload:
        if message.manifest is not None:
            return Payload(b"", None, message.manifest)
        # The same one for a message that is sent again.
        payload = self._offered.get(message.msg_id)
        if payload is None:
            buffers = message.buffers if body_inside else [message.body, *message.buffers]
            payload = cell.share_encoded(b"", buffers, (self._peer, *message.readers))
            if payload.manifest is not None:
                self._offered[message.msg_id] = payload
        return payload

    def _check_open(self) -> None:
        if self._broken:
            raise BrokenPipeError(self._broken)
        if self._cell is None:
            raise BrokenPipeError(f"{self.address}: the pipe is not open")


class _CellMessage(Message):
    """A message that came over the bus: its buffers are with the delivery, or further away."""

    __slots__ = ("delivery",)

    delivery: Delivery

    @classmethod
    def of(cls, delivery: Delivery) -> _CellMessage:
        _, head, body = fields_of(delivery)
        buffers: Sequence[Buffer] = ()
        manifest = delivery.message.manifest
        if delivery.message.bundle is not None:
            buffers = unbundle(delivery.message.bundle)
        if body is None:
            first, *buffers = _pulled(delivery)
            body, manifest = bytes(first), None
        message = cls.from_head(head, body, buffers)
        assert isinstance(message, cls)
        message.delivery, message.manifest = delivery, manifest
        return message


def _pulled(delivery: Delivery) -> Sequence[Buffer]:
    """The buffers of a message, the first of which is its body.

    Raises:
        DecodeError: they cannot be had, or that one is too long.
    """
    manifest = delivery.message.manifest
    assert manifest is not None
    if not manifest.lengths or manifest.lengths[0] > MAX_BODY_BYTES:
        raise DecodeError(f"{delivery.source}: not a message of a pipe")
    try:
        return delivery.pull().result()
    except (FlarebusError, OSError, MemoryError) as error:
        raise DecodeError(f"{delivery.source}: its message could not be fetched: {error}") from error


def _in_words(error: BaseException) -> str:
    return str(getattr(error, "text", "") or error)
