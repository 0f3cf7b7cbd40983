"""What ends of pipes over the bus share: a hub for each cell, which sorts what comes, and the cells they dialled."""

from __future__ import annotations

import secrets
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from flarebus.cell import Cell
from flarebus.delivery import Delivery
from flarebus.errors import DecodeError, LinkError, NoRoute, UsageError
from flarebus.link import SILENCE_S
from flarebus.pipes import Mode
from flarebus.security.keys import DialKeys, KeyPair

__all__ = ["BUS_CHANNEL", "BUS_TOPIC", "End", "Endpoint", "dialled", "fields_of", "hub_of"]

BUS_CHANNEL, BUS_TOPIC = "pipe", "message"
CONNECT_S = 30.0
# Words for channels that are not open yet.
MAX_EARLY = 256

Endpoint = tuple[str, str, Mode, tuple[str, ...] | None]
"""Endpoint of the router, address without the nonce, who dials, keys."""


class End(Protocol):
    """One end of a pipe, as a hub sees it."""

    mode: Mode

    @property
    def peer(self) -> str:
        """Address of the other end; "" while it was not heard of."""

    @property
    def is_broken(self) -> bool:
        """Whether its peer is gone: what comes now is for the end that will be opened in its place."""

    def take(self, delivery: Delivery) -> None:
        """A message for this end has come."""

    def break_off(self, reason: str) -> None:
        """Nothing comes or goes any more."""


def fields_of(delivery: Delivery) -> tuple[str, str, bytes | None]:
    """Channel, head and body of a message of a pipe; no body if that is the first buffer.

    Raises:
        DecodeError: it is none.
    """
    fields = delivery.plain()
    if type(fields) is not list or len(fields) != 3 or [type(field) for field in fields[:2]] != [str, str]:
        raise DecodeError(f"{delivery.source}: not a message of a pipe")
    name, head, body = fields
    if type(body) is not bytes and (body is not None or delivery.message.manifest is None):
        raise DecodeError(f"{delivery.source}: not a message of a pipe")
    return name, head, body


def _link_of(name: str) -> str:
    return name.partition(".")[2]


class Hub:
    """All pipe ends of one cell.

    The channel of a trainer's second rank is opened when the first one has said that there are more. A word that comes
    for it before that waits, as long as the client job listens on some channel of the same link.
    """

    def __init__(self, cell: Cell) -> None:
        self._ends: dict[tuple[str, str], End] = {}
        self._early: deque[Delivery] = deque()
        # Held while an end takes a delivery: it is given one at a time, in order, whichever thread gives it.
        self._lock = threading.Lock()
        cell.inbox(BUS_CHANNEL, BUS_TOPIC, self._put)
        cell.on_gone(self._gone)
        cell.on_link_lost(self._lost)

    def listen(self, address: str, name: str, end: End) -> None:
        """Give `end` what comes for `address` on channel `name`.

        Raises:
            UsageError: another one gets that.
        """
        with self._lock:
            if (address, name) in self._ends:
                raise UsageError(f"{address}: channel {name!r} is open already")
            self._ends[address, name] = end
            self._put_early()

    def leave(self, address: str, name: str, end: End) -> None:
        """Give it nothing more."""
        with self._lock:
            if self._ends.get((address, name)) is end:
                del self._ends[address, name]
            self._put_early()

    def _put(self, delivery: Delivery) -> None:
        with self._lock:
            self._sort(delivery)

    def _put_early(self) -> None:
        early, self._early = self._early, deque()
        for delivery in early:
            self._sort(delivery)

    def _sort(self, delivery: Delivery) -> None:
        target = delivery.message.target
        try:
            name = fields_of(delivery)[0]
        except DecodeError as error:
            delivery.fail(error)
            return
        end = self._ends.get((target, name))
        if end is not None and not end.is_broken:
            end.take(delivery)
        elif len(self._early) < MAX_EARLY and self._has_client_job(target, _link_of(name)):
            self._early.append(delivery)
        else:
            delivery.fail(NoRoute(target, f"nobody listens on channel {name!r}"))

    def _has_client_job(self, target: str, link: str) -> bool:
        return any(
            (address, _link_of(name), end.mode) == (target, link, Mode.PASSIVE)
            for (address, name), end in self._ends.items()
        )

    def _gone(self, names: Sequence[str]) -> None:
        gone = set(names)
        with self._lock:
            # What was said early by one who is gone would make him the peer of an end that is opened later.
            self._early = deque(delivery for delivery in self._early if delivery.source not in gone)
            for end in self._ends.values():
                if end.peer in gone:
                    end.break_off(f"{end.peer} is gone")

    def _lost(self, error: LinkError) -> None:
        with self._lock:
            for end in self._ends.values():
                end.break_off(f"the bus is gone: {error}")


_hubs: weakref.WeakKeyDictionary[Cell, Hub] = weakref.WeakKeyDictionary()
_hubs_lock = threading.Lock()


def hub_of(cell: Cell) -> Hub:
    with _hubs_lock:
        hub = _hubs.get(cell)
        if hub is None:
            hub = _hubs[cell] = Hub(cell)
        return hub


class Dialled:
    """The cells that ends in this process have dialled: one for all channels to one peer."""

    def __init__(self) -> None:
        self._cells: dict[Endpoint, tuple[Cell, int]] = {}
        self._lock = threading.Lock()

    def get(self, endpoint: Endpoint) -> Cell:
        with self._lock:
            cell, users = self._cells.get(endpoint, (None, 0))
            cell = cell or _dial(*endpoint)
            self._cells[endpoint] = cell, users + 1
            return cell

    def release(self, endpoint: Endpoint) -> None:
        with self._lock:
            cell, users = self._cells.pop(endpoint)
            if users > 1:
                self._cells[endpoint] = cell, users - 1
                return
        cell.close()


def _dial(root_url: str, address: str, mode: Mode, keys: tuple[str, ...] | None) -> Cell:
    dial_keys = None
    if keys is not None:
        public, secret, server = (key.encode() for key in keys)
        dial_keys = DialKeys(KeyPair(public, secret), server)
    # On one machine a closed connection says that the other end is dead, and nothing else does: a script may keep
    # Python from answering for long.
    silence_s = float("inf") if root_url.startswith("ipc://") else SILENCE_S
    name = address if mode is Mode.PASSIVE else f"{address}.{secrets.token_hex(8)}"
    cell = Cell.dial(name, root_url, dial_keys, silence_s=silence_s)
    try:
        cell.wait_until_up(CONNECT_S)
    except LinkError as error:
        cell.close()
        raise LinkError(f"{root_url}: the router of the client job cannot be reached: {error}") from error
    except BaseException:
        cell.close()
        raise
    return cell


dialled = Dialled()
