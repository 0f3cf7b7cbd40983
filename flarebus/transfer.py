"""Transfers: buffers too big for a message, offered by their holder and pulled in chunks by whoever needs them.

Pure: `now` comes in; what to send comes out; the shell (`cell`) moves the bytes. All buffers of one transfer, end to
end, make one line of bytes, cut into chunks of `CHUNK_BYTES`. The receiver asks for ranges of that line and never
has more than a window outstanding, so that it alone decides how much memory and bandwidth it spends; the holder
answers from the arrays themselves. Chunks may come twice, in any order, or not at all: the receiver knows which it
has and asks again.

Rules that hold here
- A transfer is good only for its named receivers and for whoever lives under their addresses. One with a lease is
  forgotten when all of them are done or lost, or nobody pulled for a whole lease; one without is held until it is
  withdrawn, so that a receiver may come back for it.
- Progress renews a lease; nothing else does. There is no limit on the total time.
- A chunk that touches at most `SEPARATE_SLICES` buffers goes as one frame for each, without a copy; one that touches
  more (many small tensors) goes as a single joined frame. Both ends derive this from the lengths, so nothing needs
  to be said.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence

from flarebus.errors import UsageError
from flarebus.message import Buffer, Manifest

__all__ = ["CHUNK_BYTES", "WINDOW_CHUNKS", "Offer", "Offers", "Pull", "Slices", "slices_of"]

# Measured on a 2-core machine: frames of 1 to 4 MiB move fastest; smaller ones keep control messages from waiting.
CHUNK_BYTES = 1024 * 1024
# Enough to keep both ends busy, and no more than the receiver's share of a router's queue.
WINDOW_CHUNKS = 8
# A frame costs microseconds on every hop; joining a chunk costs a copy of it and, worse, fresh memory for the copy.
SEPARATE_SLICES = 32
# Without progress for this long a receiver asks again for what it misses, and after `LEASE_S` it gives up.
STALL_S = 5.0
LEASE_S = 60.0


class Slices:
    """Buffers end to end as one line of bytes.

    Args:
        buffers: byte views, C-contiguous; kept by reference for as long as this lives.
    """

    __slots__ = ("_ends", "_views", "nbytes")

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        # Empty buffers hold no byte of the line, so they would only make the search for one longer.
        self._views = [view for view in (memoryview(buffer).cast("B") for buffer in buffers) if view.nbytes]
        self._ends = list(itertools.accumulate(view.nbytes for view in self._views))
        self.nbytes = self._ends[-1] if self._ends else 0

    def between(self, first: int, last: int) -> list[memoryview]:
        """The bytes from `first` up to `last`, as views of the buffers that hold them."""
        found = []
        index = bisect.bisect_right(self._ends, first)
        while first < last:
            end = self._ends[index]
            view = self._views[index]
            begin = end - view.nbytes
            stop = min(last, end)
            found.append(view[first - begin : stop - begin])
            first = stop
            index += 1
        return found


class Offer:
    """One transfer at its holder; made by `Offers.add`."""

    __slots__ = ("expires", "lease_s", "manifest", "receivers", "slices")

    def __init__(
        self, manifest: Manifest, buffers: Sequence[Buffer], receivers: Iterable[str], now: float, lease_s: float | None
    ) -> None:
        self.manifest = manifest
        self.slices = Slices(buffers)
        self.receivers = set(receivers)
        self.lease_s = lease_s
        self.expires = None if lease_s is None else now + lease_s

    def is_for(self, receiver: str) -> bool:
        """Whether `receiver`, or a cell above it in the tree of addresses, was named."""
        while receiver and receiver not in self.receivers:
            receiver = receiver.rpartition(".")[0]
        return bool(receiver)


class Offers:
    """All transfers that one cell holds.

    Args:
        holder: address of the cell.
    """

    def __init__(self, holder: str) -> None:
        self.holder = holder
        self._offers: dict[bytes, Offer] = {}

    def __len__(self) -> int:
        return len(self._offers)

    def add(
        self,
        transfer: bytes,
        buffers: Sequence[Buffer],
        receivers: Iterable[str],
        now: float,
        lease_s: float | None = LEASE_S,
    ) -> Offer:
        """Offer `buffers` to `receivers`; they are referenced, not copied, and must not change while they are offered.

        Args:
            transfer: 16 random bytes.
            lease_s: seconds without progress after which it is forgotten; None holds it until `withdraw`.
        """
        lengths = tuple(memoryview(buffer).nbytes for buffer in buffers)
        offer = Offer(Manifest(transfer, self.holder, lengths), buffers, receivers, now, lease_s)
        self._offers[transfer] = offer
        return offer

    def admit(self, transfer: bytes, receiver: str) -> None:
        """One more receiver for a transfer that is still offered."""
        offer = self._offers.get(transfer)
        if offer is not None:
            offer.receivers.add(receiver)

    def serve(
        self, receiver: str, transfer: bytes, first: int, nbytes: int, now: float
    ) -> list[tuple[int, list[Buffer]]] | None:
        """Chunks that answer a PULL: (first byte, frames) each; None when there is nothing for this receiver.

        "Unknown", "over" and "not yours" are one answer on purpose: a guess learns nothing.
        """
        offer = self._offers.get(transfer)
        if offer is None or not offer.is_for(receiver):
            return None
        total = offer.slices.nbytes
        # A receiver asks for whole chunks within its window; anything else would let it queue the transfer many times.
        if first % CHUNK_BYTES or first >= total or not 0 < nbytes <= WINDOW_CHUNKS * CHUNK_BYTES:
            return None
        if offer.lease_s is not None:
            offer.expires = now + offer.lease_s
        last = min(first + nbytes, total)
        return [
            (begin, _frames(offer.slices.between(begin, min(begin + CHUNK_BYTES, total))))
            for begin in range(first, last, CHUNK_BYTES)
        ]

    def get(self, transfer: bytes) -> Offer | None:
        """What is offered under this id."""
        return self._offers.get(transfer)

    def only_chunk(self, transfer: bytes) -> list[Buffer] | None:
        """The frames of a transfer of one chunk, to go with the message that announces it; None if it is bigger, has
        no bytes, or is not offered."""
        offer = self._offers.get(transfer)
        if offer is None or not 0 < offer.slices.nbytes <= CHUNK_BYTES:
            return None
        return _frames(offer.slices.between(0, offer.slices.nbytes))

    def done(self, receiver: str, transfer: bytes) -> None:
        """`receiver` has all it wants; with the last one a leased offer is over."""
        self._leave(transfer, {receiver})

    def lost(self, gone: Iterable[str]) -> None:
        """Cells went away: a leased offer that waited for nobody else is over."""
        names = set(gone)
        for transfer in list(self._offers):
            self._leave(transfer, names)

    def withdraw(self, transfer: bytes) -> None:
        """End an offer now; whoever still pulls hears that it is over."""
        self._offers.pop(transfer, None)

    def tick(self, now: float) -> None:
        """Forget what nobody pulled from for a whole lease."""
        for transfer, offer in list(self._offers.items()):
            if offer.expires is not None and now >= offer.expires:
                del self._offers[transfer]

    def _leave(self, transfer: bytes, names: set[str]) -> None:
        offer = self._offers.get(transfer)
        if offer is not None and offer.lease_s is not None:
            offer.receivers -= names
            if not offer.receivers:
                del self._offers[transfer]

    def next_event(self) -> float | None:
        """When `tick` has something to do next, or None."""
        return min((offer.expires for offer in self._offers.values() if offer.expires is not None), default=None)


def slices_of(memory: Sequence[Buffer]) -> tuple[list[memoryview], bool]:
    """Where the bytes of a transfer of one chunk belong, and whether they come joined in one frame, as `Pull.place`."""
    whole = Slices(memory)
    slices = whole.between(0, whole.nbytes)
    return slices, len(slices) > SEPARATE_SLICES


def _frames(slices: list[memoryview]) -> list[Buffer]:
    """A chunk's frames: the slices themselves, or one joined copy when they are many."""
    if len(slices) <= SEPARATE_SLICES:
        return list(slices)
    return [b"".join(slices)]


class Pull:
    """One transfer at a receiver.

    Args:
        manifest: what the holder offers.
        memory: a writable byte view for each buffer, of exactly its length; filled in place.
        now: monotonic seconds.
    """

    __slots__ = ("_arrived", "_asked", "_lease_s", "_missing", "_progress", "_slices", "_stall_s", "_told", "manifest")

    def __init__(
        self,
        manifest: Manifest,
        memory: Sequence[Buffer],
        now: float,
        *,
        lease_s: float = LEASE_S,
        stall_s: float = STALL_S,
    ) -> None:
        if tuple(memoryview(view).nbytes for view in memory) != manifest.lengths:
            raise UsageError("memory for a pull must have exactly the lengths of its manifest")
        self.manifest = manifest
        self._slices = Slices(memory)
        chunks = -(-self._slices.nbytes // CHUNK_BYTES)
        self._arrived = bytearray(chunks)
        self._missing = chunks
        self._asked = 0
        self._progress = now
        self._told = now
        self._lease_s = lease_s
        self._stall_s = stall_s

    @property
    def is_complete(self) -> bool:
        """Whether every byte has come."""
        return self._missing == 0

    def requests(self) -> list[tuple[int, int]]:
        """Ranges (first byte, bytes) to ask for now: as much as the window has room for, in pieces worth a message."""
        chunks = len(self._arrived)
        outstanding = self._asked - (chunks - self._missing)
        room = min(WINDOW_CHUNKS - outstanding, chunks - self._asked)
        # Half a window at a time: a quarter of the messages, and the holder never runs dry.
        if room <= 0 or (room < WINDOW_CHUNKS // 2 and self._asked + room < chunks):
            return []
        first = self._asked
        self._asked += room
        return [(first * CHUNK_BYTES, room * CHUNK_BYTES)]

    def place(self, first: int) -> tuple[list[memoryview], bool] | None:
        """Where the bytes of the chunk at `first` belong, and whether they come joined in one frame.

        None when it was not asked for or is here already: the shell then drops the frames.
        """
        index, rest = divmod(first, CHUNK_BYTES)
        if rest or index >= self._asked or self._arrived[index]:
            return None
        slices = self._slices.between(first, min(first + CHUNK_BYTES, self._slices.nbytes))
        return slices, len(slices) > SEPARATE_SLICES

    def arrived(self, first: int, now: float) -> None:
        """The bytes of the chunk at `first` are in place."""
        self._arrived[first // CHUNK_BYTES] = 1
        self._missing -= 1
        self._progress = self._told = now

    def resume(self, now: float) -> list[tuple[int, int]]:
        """Ranges to ask for again: everything asked for that has not come. For a new connection, or after a stall."""
        self._told = now
        missing = [index for index in range(self._asked) if not self._arrived[index]]
        return [(index * CHUNK_BYTES, CHUNK_BYTES) for index in missing]

    def is_stalled(self, now: float) -> bool:
        """Whether it is time to ask again."""
        return now - self._told >= self._stall_s

    def is_lost(self, now: float) -> bool:
        """Whether a whole lease passed without a byte."""
        return now - self._progress >= self._lease_s

    def next_event(self) -> float:
        """When to look again, in monotonic seconds."""
        return min(self._told + self._stall_s, self._progress + self._lease_s)
