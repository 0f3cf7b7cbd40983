"""CellPipe: the bus itself as a pipe. Arrays do not pass through the client job: their manifest does.

The trainer is a cell of its own, `<site>.<job>.<rank>.<nonce>`, on the router that its client job uses; the client job
speaks as `<site>.<job>`. What the server offers to a site may be pulled by whoever lives under the site's address, so a
trainer fetches the model from the server; what a trainer offers names the server as a reader, which fetches the result
from the trainer. The nonce keeps two trainers that were started with one configuration apart: the second is refused.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from flarebus.address import check_name
from flarebus.cell import Cell, Payload
from flarebus.delivery import Delivery
from flarebus.errors import ConfigError, DeadlineExceeded, DecodeError, FlarebusError, LinkError, NoRoute, UsageError
from flarebus.link import SILENCE_S
from flarebus.message import Buffer
from flarebus.pending import Pending
from flarebus.pipes import ExportMode, Message, Mode, Pipe
from flarebus.security.keys import DialKeys, KeyPair
from flarebus.slab import unbundle

__all__ = ["CellPipe"]

_CHANNEL, _TOPIC = "pipe", "message"
CONNECT_S = 30.0
# Words for channels that are not open yet.
MAX_EARLY = 256


class CellPipe(Pipe):
    """One end of a link over the bus.

    Args:
        mode: ACTIVE for the trainer, PASSIVE for the client job.
        site_name: the site.
        token: id of the job.
        root_url: endpoint of the router; a trainer dials it.
        secure_mode: whether the connection is encrypted; then a trainer needs `keys`.
        workspace_dir: not used; configurations of other systems name it.
        cell: the client job's own cell, to which `<site_name>.<token>` leads; PASSIVE only.
        rank: of the trainer's process; ACTIVE only.
        keys: CURVE keys of a trainer: its ``public`` and ``secret`` one and that of the ``server``.

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
        }
        if self.mode is Mode.PASSIVE and cell is None:
            raise ConfigError("cell", cell, "the passive end of a CellPipe needs the cell of its client job")
        if self.mode is Mode.ACTIVE and not root_url:
            raise ConfigError("root_url", root_url, "the endpoint of a router, such as ipc:///run/me/bus")
        if self.mode is Mode.ACTIVE and secure_mode and root_url.startswith("tcp:") and keys is None:
            raise ConfigError("keys", keys, "an encrypted connection needs keys; the client job writes them down")
        self._given_cell = cell
        self._rank = rank
        self._keys = keys
        self._cell: Cell | None = None
        self._name = ""
        self._peer = ""
        self._met = threading.Event()
        self._incoming: queue.SimpleQueue[Delivery | None] = queue.SimpleQueue()
        self._broken = ""
        self._offered: dict[str, Payload] = {}
        self._last_active = 0.0
        self._lock = threading.Lock()

    def open(self, name: str) -> None:
        """Get ready; a trainer connects to the router here.

        Raises:
            UsageError: it is open already.
            LinkError: the router cannot be reached.
        """
        if self._cell is not None:
            raise UsageError(f"{self.address}: channel {self._name!r} is open already")
        check_name(name, "channel")
        self._name, self._broken, self._incoming = name, "", queue.SimpleQueue()
        self._met.clear()
        if self.mode is Mode.PASSIVE:
            assert self._given_cell is not None
            self._peer, self._cell = "", self._given_cell
        else:
            self._peer, self._cell = self.address, _dialled.get(self._endpoint())
            self._met.set()
        try:
            _hub_of(self._cell).listen(self._own_address(), name, self)
        except UsageError:
            self._cell = None
            if self.mode is Mode.ACTIVE:
                _dialled.release(self._endpoint())
            raise

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Hand a message over; see `Pipe.send`."""
        cell = self._open_cell()
        deadline = None if timeout is None else time.monotonic() + timeout
        # The first word is the trainer's: before it nobody is known here.
        if not self._met.wait(timeout):
            return False
        self._check_open()
        peer, left = self._peer, None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            sent = cell.request(
                peer,
                _CHANNEL,
                _TOPIC,
                [self._name, message.head(), message.body],
                payload=self._payload(cell, peer, message),
                timeout=left,
                source=self._own_address(),
            )
            sent.result()
        except DeadlineExceeded:
            return False
        except FlarebusError as error:
            self._check_open()
            raise BrokenPipeError(_in_words(error)) from error
        self._last_active = time.monotonic()
        return True

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message; see `Pipe.receive`."""
        self._open_cell()
        try:
            delivery = self._incoming.get(timeout=timeout)
        except queue.Empty:
            return None
        if delivery is None:
            self._incoming.put(None)  # for whoever comes next
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
        if isinstance(message, _CellMessage):
            return message.delivery.pull()
        return super().pull(message)

    def clear(self) -> None:
        """Drop what waits to be received."""
        while True:
            try:
                delivery = self._incoming.get_nowait()
            except queue.Empty:
                return
            if delivery is None:
                self._incoming.put(None)
                return
            delivery.fail(NoRoute(self.address, "it was cleared"))

    def close(self) -> None:
        """Stop listening and withdraw what is still offered; the last pipe of a trainer takes its cell with it."""
        with self._lock:
            cell, self._cell = self._cell, None
            offered, self._offered = self._offered, {}
        if cell is None:
            return
        self._broken = f"{self.address}: channel {self._name!r} is closed"
        _hub_of(cell).leave(self._own_address(cell), self._name, self)
        for payload in offered.values():
            cell.withdraw(payload, wait=False)
        self._incoming.put(None)
        self._met.set()
        if self.mode is Mode.ACTIVE:
            _dialled.release(self._endpoint())

    def export(self, side: ExportMode) -> tuple[str, dict[str, Any]]:
        """Class path and arguments; those of a trainer hold no keys, which are handed over apart."""
        other = Mode.PASSIVE if self.mode is Mode.ACTIVE else Mode.ACTIVE
        mode = self.mode if side is ExportMode.SELF else other
        return f"{__name__}.{type(self).__name__}", {"mode": mode.value, **self._arguments}

    def can_resend(self) -> bool:
        """True: whoever gets a message twice knows it by its id."""
        return True

    def release_send_cache(self, message: Message) -> None:
        """Offer the buffers of `message` no longer."""
        payload, cell = self._offered.pop(message.msg_id, None), self._cell
        if payload is not None and cell is not None:
            cell.withdraw(payload, wait=False)

    def get_last_peer_active_time(self) -> float:
        """When a message came, or one of ours was taken."""
        return self._last_active

    def moved_bytes(self) -> int:
        """Bytes of buffers that this end's cell has moved."""
        cell = self._cell
        return 0 if cell is None else cell.moved_bytes

    # -- on the bus thread --

    def take(self, delivery: Delivery) -> None:
        """A message for this end has come."""
        if not self._peer and self.mode is Mode.PASSIVE:
            self._peer = delivery.source
            self._met.set()
        if delivery.source != self._peer:
            delivery.fail(UsageError(f"{self.address} has a trainer already ({self._peer})"))
            return
        self._incoming.put(delivery)

    def break_off(self, reason: str) -> None:
        """Nothing comes or goes any more."""
        self._broken = self._broken or reason
        self._incoming.put(None)
        self._met.set()

    @property
    def peer(self) -> str:
        """Address of the other end; "" while it is not known."""
        return self._peer

    def _own_address(self, cell: Cell | None = None) -> str:
        if self.mode is Mode.PASSIVE:
            return self.address
        cell = cell or self._cell
        return "" if cell is None else str(cell.address)

    def _endpoint(self) -> _Endpoint:
        keys = None if self._keys is None else tuple(self._keys[name] for name in ("public", "secret", "server"))
        return str(self._arguments["root_url"]), f"{self.address}.{self._rank}", keys

    def _payload(self, cell: Cell, peer: str, message: Message) -> Payload:
        if message.manifest is not None:
            return Payload(b"", None, message.manifest)
        # The same one for a message that is sent again.
        payload = self._offered.get(message.msg_id)
        if payload is None:
            payload = cell.share_encoded(b"", message.buffers, (peer, *message.readers))
            if payload.manifest is not None:
                self._offered[message.msg_id] = payload
        return payload

    def _open_cell(self) -> Cell:
        self._check_open()
        cell = self._cell
        if cell is None:
            raise BrokenPipeError(f"{self.address}: the pipe is not open")
        return cell

    def _check_open(self) -> None:
        if self._broken:
            raise BrokenPipeError(self._broken)


class _CellMessage(Message):
    """A message that came over the bus: its buffers are with the delivery, or further away."""

    __slots__ = ("delivery",)

    delivery: Delivery

    @classmethod
    def of(cls, delivery: Delivery) -> _CellMessage:
        _, head, body = _fields(delivery)
        message = cls.from_head(head, body)
        assert isinstance(message, cls)
        message.delivery = delivery
        message.manifest = delivery.message.manifest
        if delivery.message.bundle is not None:
            message.buffers = unbundle(delivery.message.bundle)
        return message


def _fields(delivery: Delivery) -> tuple[str, str, bytes]:
    """Channel, head and body of a message of a pipe."""
    fields = delivery.plain()
    if type(fields) is not list or [type(field) for field in fields] != [str, str, bytes]:
        raise DecodeError(f"{delivery.source}: not a message of a pipe")
    name, head, body = fields
    return name, head, body


class _Hub:
    """All pipe ends of one cell.

    The channel of a trainer's second rank is opened when the first one has said that there are more. A word that comes
    for it before that waits, as long as some channel of its address is open.
    """

    def __init__(self, cell: Cell) -> None:
        self._ends: dict[tuple[str, str], CellPipe] = {}
        self._early: deque[Delivery] = deque()
        self._lock = threading.Lock()
        cell.inbox(_CHANNEL, _TOPIC, self._put)
        cell.on_gone(self._gone)
        cell.on_link_lost(self._lost)

    def listen(self, address: str, name: str, end: CellPipe) -> None:
        with self._lock:
            if (address, name) in self._ends:
                raise UsageError(f"{address}: channel {name!r} is open already")
            self._ends[address, name] = end
            early, self._early = self._early, deque()
        for delivery in early:
            self._put(delivery)

    def leave(self, address: str, name: str, end: CellPipe) -> None:
        with self._lock:
            if self._ends.get((address, name)) is end:
                del self._ends[address, name]
            early, self._early = self._early, deque()
        for delivery in early:
            self._put(delivery)

    def _put(self, delivery: Delivery) -> None:
        target = delivery.message.target
        try:
            name = _fields(delivery)[0]
        except DecodeError as error:
            delivery.fail(error)
            return
        with self._lock:
            end = self._ends.get((target, name))
            if end is None and len(self._early) < MAX_EARLY and any(address == target for address, _ in self._ends):
                self._early.append(delivery)
                return
        if end is None:
            delivery.fail(NoRoute(target, f"nobody listens on channel {name!r}"))
        else:
            end.take(delivery)

    def _gone(self, names: Sequence[str]) -> None:
        for end in list(self._ends.values()):
            if end.peer in names:
                end.break_off(f"{end.peer} is gone")

    def _lost(self, error: LinkError) -> None:
        for end in list(self._ends.values()):
            end.break_off(f"the bus is gone: {error}")


_hubs: weakref.WeakKeyDictionary[Cell, _Hub] = weakref.WeakKeyDictionary()
_hubs_lock = threading.Lock()


def _hub_of(cell: Cell) -> _Hub:
    with _hubs_lock:
        hub = _hubs.get(cell)
        if hub is None:
            hub = _hubs[cell] = _Hub(cell)
        return hub


_Endpoint = tuple[str, str, tuple[str, ...] | None]
"""Endpoint of the router, address without the nonce, keys."""


class _Dialled:
    """The cells of this process's trainers: one for all channels to one client job."""

    def __init__(self) -> None:
        self._cells: dict[_Endpoint, tuple[Cell, int]] = {}
        self._lock = threading.Lock()

    def get(self, endpoint: _Endpoint) -> Cell:
        with self._lock:
            cell, users = self._cells.get(endpoint, (None, 0))
            cell = cell or _dial(*endpoint)
            self._cells[endpoint] = cell, users + 1
            return cell

    def release(self, endpoint: _Endpoint) -> None:
        with self._lock:
            cell, users = self._cells.pop(endpoint)
            if users > 1:
                self._cells[endpoint] = cell, users - 1
                return
        cell.close()


def _dial(root_url: str, address: str, keys: tuple[str, ...] | None) -> Cell:
    dial_keys = None
    if keys is not None:
        public, secret, server = (key.encode() for key in keys)
        dial_keys = DialKeys(KeyPair(public, secret), server)
    # On one machine a closed connection says that the other end is dead, and nothing else does: a script may keep
    # Python from answering for long.
    silence_s = float("inf") if root_url.startswith("ipc://") else SILENCE_S
    cell = Cell.dial(f"{address}.{secrets.token_hex(8)}", root_url, dial_keys, silence_s=silence_s)
    try:
        cell.wait_until_up(CONNECT_S)
    except LinkError as error:
        cell.close()
        raise LinkError(f"{root_url}: the router of the client job cannot be reached: {error}") from error
    except BaseException:
        cell.close()
        raise
    return cell


_dialled = _Dialled()


def _in_words(error: FlarebusError) -> str:
    return str(getattr(error, "text", "") or error)
