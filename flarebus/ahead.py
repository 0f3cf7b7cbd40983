"""Ahead: transfers of one chunk that are sent before they are asked for, to whoever has ordered that.

Pure. A message about a transfer may take several hops to its receiver, and a pull takes a round trip more. Whoever
pulls one small transfer after the other from the same holder *orders* from it: from then on the holder sends the only
chunk of a transfer straight to the receiver, while the message about it is still on its way.

An order spares a round trip and promises nothing: what has not come is pulled. The receiver bounds its memory, for it
orders from a few holders and keeps the last chunk of each. The holder bounds what waits on the way: after a chunk it
sends no other until it has heard from the receiver, which any transfer in either direction brings about.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from flarebus.transfer import Offer

__all__ = ["Ahead", "Orders"]

Frames = TypeVar("Frames")

# A receiver keeps this many chunks at most.
MAX_HOLDERS = 32
# Orders cost the holder a name each.
MAX_ORDERS = 10_000


class Orders:
    """Who has ordered from this cell."""

    def __init__(self) -> None:
        # Receiver -> whether it was heard since the last chunk that was sent ahead.
        self._heard: dict[str, bool] = {}

    def add(self, receiver: str) -> None:
        """`receiver` orders."""
        if len(self._heard) < MAX_ORDERS:
            self._heard[receiver] = True

    def heard(self, receiver: str) -> None:
        """A transfer message of `receiver` has come."""
        if receiver in self._heard:
            self._heard[receiver] = True

    def take(self, offer: Offer, address: str) -> list[str]:
        """To whom at and under `address` to send the chunk of `offer`; they get no other one until they are heard."""
        due = [
            receiver
            for receiver, heard in self._heard.items()
            if heard and f"{receiver}.".startswith(f"{address}.") and offer.is_for(receiver)
        ]
        self._heard.update(dict.fromkeys(due, False))
        return due

    def lost(self, gone: Iterable[str]) -> None:
        """Cells went away."""
        for name in gone:
            self._heard.pop(name, None)


class Ahead(Generic[Frames]):
    """What this cell has ordered, and what has come of it."""

    def __init__(self) -> None:
        # Holder -> the transfer that was pulled last: another copy of it is of no use.
        self._pulled: dict[str, bytes] = {}
        self._came: dict[str, tuple[bytes, Frames]] = {}

    def order(self, holder: str) -> bool:
        """Whether to tell `holder` that this cell orders from it: once."""
        if holder in self._pulled or len(self._pulled) >= MAX_HOLDERS:
            return False
        self._pulled[holder] = b""
        return True

    def put(self, holder: str, transfer: bytes, frames: Frames) -> None:
        """A chunk has come that no pull waits for; kept if it was ordered, in place of the one before."""
        if holder in self._pulled and self._pulled[holder] != transfer:
            self._came[holder] = transfer, frames

    def take(self, holder: str, transfer: bytes) -> Frames | None:
        """The chunk of a transfer that is pulled now, if it is here."""
        if holder not in self._pulled:
            return None
        self._pulled[holder] = transfer
        if self._came.get(holder, (b"",))[0] != transfer:
            return None
        return self._came.pop(holder)[1]

    def forget(self, holders: Iterable[str] | None) -> None:
        """These went away, or are others than before; None: that may be true of all."""
        for name in list(self._pulled) if holders is None else holders:
            self._pulled.pop(name, None)
            self._came.pop(name, None)
