"""Carrier: moves the buffers of transfers in and out of one cell; the shell around `transfer`.

`offer` and `pull` from any thread; everything else on the loop's. What to ask for and whom to serve is decided in
`transfer`; here bytes go from the socket straight into the arrays that want them, and from arrays to the socket.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
from collections.abc import Callable, Collection, Iterable, Sequence

import zmq

from flarebus.ahead import Ahead, Orders
from flarebus.errors import FlarebusError, LinkError, SourceLost, UsageError
from flarebus.loop import Loop
from flarebus.message import Buffer, Manifest
from flarebus.pending import Pending
from flarebus.slab import SlabPool
from flarebus.sockets import Head, frame_bytes, receive_rest
from flarebus.transfer import CHUNK_BYTES, Offers, Pull, slices_of
from flarebus.wire import CHUNK, DONE, NOT_OFFERED, ORDER, PLACE, PULL, REQUEST

__all__ = ["Carrier"]

# More than any model; a header that claims more is a mistake or an attack.
MAX_PULL_BYTES = 1 << 40

Frames = Sequence[Buffer | zmq.Frame]


class _ActivePull:
    """A pull and what waits for it."""

    __slots__ = ("memory", "orders", "outcome", "pull", "target", "tells_done")

    def __init__(
        self,
        pull: Pull,
        memory: Sequence[memoryview],
        outcome: Pending[Sequence[Buffer]],
        target: str,
        tells_done: bool,
        orders: bool,
    ) -> None:
        self.pull = pull
        self.memory = memory
        self.outcome = outcome
        self.target = target
        self.tells_done = tells_done
        self.orders = orders


class Carrier:
    """The transfers of one cell.

    Args:
        address: of the cell.
        loop: the thread it lives on.
        send: sends a whole message; raises `LinkError` when there is no way.
    """

    def __init__(self, address: str, loop: Loop, send: Callable[[Frames], None]) -> None:
        self.bytes_pulled = 0
        self.bytes_served = 0
        self._address = address
        self._loop = loop
        self._send = send
        self._offers = Offers(address)
        self._pulls: dict[bytes, _ActivePull] = {}
        self._orders = Orders()
        self._ahead: Ahead[Sequence[Buffer | zmq.Frame]] = Ahead()
        self._pool = SlabPool()
        self._closed: FlarebusError | None = None
        self._patient_until = 0.0

    # -- from any thread --

    def offer(self, buffers: Sequence[Buffer], receivers: Sequence[str], lease_s: float | None) -> Manifest:
        """Offer `buffers` to `receivers`; see `Offers.add`. They are referenced until the offer is over."""
        transfer = secrets.token_bytes(16)
        lengths = tuple(memoryview(buffer).nbytes for buffer in buffers)

        def add() -> None:
            offer = self._offers.add(transfer, buffers, receivers, self._loop.clock(), lease_s)
            self._loop.wake_by(offer.expires)

        # Posted before the message that announces it, so it is there when the first pull comes.
        self._loop.post(add)
        return Manifest(transfer, self._address, lengths)

    def pull(
        self,
        manifest: Manifest,
        target: str,
        pool: SlabPool | None = None,
        tell_done: bool = True,
        order: bool = False,
    ) -> Pending[Sequence[Buffer]]:
        """Bring what `manifest` offers to `target` (this cell, or an alias of it) into slabs; see `Delivery.pull`.

        Args:
            tell_done: tell the holder when all of it is here; needless where an answer will.
            order: have the holder send the next transfers of one chunk by itself; see `ahead`.
        """
        outcome: Pending[Sequence[Buffer]] = Pending()
        try:
            if manifest.nbytes > MAX_PULL_BYTES:
                raise UsageError(f"{manifest.holder} offers {manifest.nbytes} bytes: at most {MAX_PULL_BYTES}")
            memory = (pool or self._pool).take(manifest.lengths)
            active = _ActivePull(Pull(manifest, memory, self._loop.clock()), memory, outcome, target, tell_done, order)
            if self._loop.is_current():
                self._start(active)
            else:
                self._loop.post(self._start, active)
        except (FlarebusError, OSError, MemoryError, ValueError) as error:
            outcome.fail(error)
        return outcome

    # -- on the loop's thread from here on --

    def withdraw(self, transfer: bytes) -> None:
        """End an offer."""
        self._offers.withdraw(transfer)

    def admit(self, transfer: bytes, receiver: str) -> None:
        """One more receiver for an offer."""
        self._offers.admit(transfer, receiver)

    def take(self, frames: Frames) -> bool:
        """Take a whole message if it belongs to a transfer; whether it did."""
        header = frame_bytes(frames[2])
        if header not in (PULL, CHUNK, DONE, ORDER):
            return False
        source, body = frame_bytes(frames[1]).decode("ascii", "replace"), frame_bytes(frames[3])
        self._orders.heard(source)
        if header == CHUNK:
            self._loop.flush()  # whoever waits for its pull hears the messages first that came before
            self._take_chunk(source, body, frames[4:])
        elif header == PULL:
            self._serve(frame_bytes(frames[0]), source, body)
        elif header == ORDER:
            self._orders.add(source)
        else:
            self._offers.done(source, body)
        return True

    def read_chunk(self, head: Head, socket: zmq.Socket[bytes]) -> None:
        """Take a chunk whose bytes are still on `socket`."""
        self._loop.flush()
        if socket.closed:
            return
        source = head.source.decode("ascii", "replace")
        self._orders.heard(source)
        place = self._chunk_place(source, head.body)
        if place is None:
            self._keep_ahead(source, head.body, receive_rest(socket, head.more))
            return
        active, first, slices, joined = place
        if joined:
            self._fill(active, first, slices, receive_rest(socket, head.more))
        elif _read_into(slices, socket, head.more):
            self._arrived(active, first, sum(view.nbytes for view in slices))
        else:
            self._end(active, SourceLost(active.pull.manifest.holder, "sent a chunk of a wrong length"))

    def send_ahead(self, transfer: bytes, address: str) -> None:
        """Send an offer of one chunk to the cells at and under `address` that have ordered and may have it."""
        offer, chunk = self._offers.get(transfer), self._offers.only_chunk(transfer)
        if offer is None or chunk is None:
            return
        for receiver in self._orders.take(offer, address):
            with contextlib.suppress(LinkError):  # what does not come is pulled
                self._send((receiver.encode(), self._address.encode(), CHUNK, PLACE.pack(transfer, 0), *chunk))
                self.bytes_served += offer.manifest.nbytes

    def only_chunk(self, manifest: Manifest) -> list[Buffer] | None:
        """The frames of a transfer of one chunk that is offered here; see `Offers.only_chunk`."""
        chunk = self._offers.only_chunk(manifest.transfer)
        self.bytes_served += sum(len(frame) for frame in chunk or ())
        return chunk

    def read_carried(
        self, manifest: Manifest, pool: SlabPool, socket: zmq.Socket[bytes], more: bool
    ) -> Sequence[memoryview] | None:
        """Take what a message brings along straight from `socket` into memory of `pool`; None if it is not all that
        `manifest` names. Either way nothing of it is left on the socket."""
        memory = _memory(pool, manifest)
        slices, joined = slices_of(memory or ())
        if memory is None or joined:
            return self._fill_carried(memory, slices, receive_rest(socket, more))
        if not _read_into(slices, socket, more):
            return None
        self.bytes_pulled += manifest.nbytes
        return memory

    def take_carried(
        self, manifest: Manifest, pool: SlabPool, frames: Sequence[Buffer | zmq.Frame]
    ) -> Sequence[memoryview] | None:
        """The same when the frames are here already."""
        memory = _memory(pool, manifest)
        return self._fill_carried(memory, slices_of(memory or ())[0], frames)

    def _fill_carried(
        self,
        memory: Sequence[memoryview] | None,
        slices: Sequence[memoryview],
        frames: Sequence[Buffer | zmq.Frame],
    ) -> Sequence[memoryview] | None:
        if memory is None or not _copy_into(slices, frames):
            return None
        self.bytes_pulled += sum(view.nbytes for view in slices)
        return memory

    def resume(self, back: Collection[str] | None = None, patient_until: float = 0.0) -> None:
        """A connection is new, this cell's or those of `back`: ask again for what was on its way.

        Args:
            patient_until: a holder that is not there may still come back until then.
        """
        now = self._loop.clock()
        self._patient_until = max(self._patient_until, patient_until)
        # Whoever is there now may be another one, who knows of no order.
        self._ahead.forget(back)
        for active in list(self._pulls.values()):
            if back is None or active.pull.manifest.holder in back:
                self._ask(active, active.pull.resume(now))

    def lost(self, gone: set[str]) -> None:
        """Cells went away."""
        for active in list(self._pulls.values()):
            if active.pull.manifest.holder in gone:
                self._end(active, SourceLost(active.pull.manifest.holder))
        self._offers.lost(gone)
        self._orders.lost(gone)
        self._ahead.forget(gone)

    def fail(self, error: FlarebusError) -> None:
        """Nothing that is on its way will come."""
        for active in list(self._pulls.values()):
            self._end(active, error)

    def close(self, error: FlarebusError) -> None:
        """Nothing will ever come or go again."""
        self._closed = error
        self.fail(error)
        self._offers = Offers(self._address)

    def tick(self, now: float) -> float | None:
        """Leases and stalled pulls."""
        self._offers.tick(now)
        due = [self._offers.next_event()]
        for active in list(self._pulls.values()):
            if active.pull.is_lost(now):
                self._end(active, SourceLost(active.pull.manifest.holder, "no byte for a whole lease"))
                continue
            if active.pull.is_stalled(now):
                self._ask(active, active.pull.resume(now))
            due.append(active.pull.next_event())
        return min((when for when in due if when is not None), default=None)

    @property
    def offers_held(self) -> int:
        """Transfers this cell serves."""
        return len(self._offers)

    @property
    def pulls_running(self) -> int:
        """Transfers this cell is receiving."""
        return len(self._pulls)

    def _serve(self, target: bytes, source: str, body: bytes) -> None:
        if len(body) != REQUEST.size:
            return
        transfer, first, nbytes = REQUEST.unpack(body)
        chunks = self._offers.serve(source, transfer, first, nbytes, self._loop.clock())
        if chunks is None:
            chunks = [(NOT_OFFERED, [])]
        for begin, frames in chunks:
            try:
                self._send((source.encode(), target, CHUNK, PLACE.pack(transfer, begin), *frames))
            except LinkError:  # whoever asked is gone; it will ask again if it comes back
                return
            self.bytes_served += sum(len(frame) for frame in frames)

    def _start(self, active: _ActivePull) -> None:
        pull = active.pull
        transfer = pull.manifest.transfer
        if self._closed is not None or transfer in self._pulls:
            active.outcome.fail(self._closed or UsageError("this transfer is being pulled already"))
            return
        self._pulls[transfer] = active
        if pull.is_complete:
            self._finish(active)
            return
        self._loop.wake_by(pull.next_event())
        came = self._ahead.take(pull.manifest.holder, transfer)
        ranges = pull.requests()
        if came is not None:
            self._take_chunk(pull.manifest.holder, PLACE.pack(transfer, 0), came)
            return
        if active.orders and pull.manifest.nbytes <= CHUNK_BYTES and self._ahead.order(pull.manifest.holder):
            self._order(active)
        self._ask(active, ranges)

    def _order(self, active: _ActivePull) -> None:
        with contextlib.suppress(LinkError):  # the pull ends with its source then
            self._send((active.pull.manifest.holder.encode(), active.target.encode(), ORDER, b""))

    def _ask(self, active: _ActivePull, ranges: Iterable[tuple[int, int]]) -> None:
        manifest = active.pull.manifest
        for first, nbytes in ranges:
            body = REQUEST.pack(manifest.transfer, first, nbytes)
            try:
                self._send((manifest.holder.encode(), active.target.encode(), PULL, body))
            except LinkError as error:
                self._end(active, SourceLost(manifest.holder, str(error)))
                return

    def _chunk_place(self, source: str, body: bytes) -> tuple[_ActivePull, int, list[memoryview], bool] | None:
        """Where a chunk belongs, or None for one that nobody waits for."""
        if len(body) != PLACE.size:
            return None
        transfer, first = PLACE.unpack(body)
        active = self._pulls.get(transfer)
        if active is None or active.pull.manifest.holder != source:
            return None
        if first == NOT_OFFERED:
            if self._loop.clock() < self._patient_until:
                return None  # asked for again when the holder is back, or when the pull has stalled
            self._end(active, SourceLost(source, "it is not offered, or not any more"))
            return None
        place = active.pull.place(first)
        return None if place is None else (active, first, *place)

    def _take_chunk(self, source: str, body: bytes, frames: Sequence[Buffer | zmq.Frame]) -> None:
        place = self._chunk_place(source, body)
        if place is None:
            self._keep_ahead(source, body, frames)
            return
        active, first, slices, _ = place
        self._fill(active, first, slices, frames)

    def _keep_ahead(self, source: str, body: bytes, frames: Sequence[Buffer | zmq.Frame]) -> None:
        """A chunk that no pull waits for: one may be about to, if it was ordered."""
        if len(body) == PLACE.size and 0 < sum(len(frame) for frame in frames) <= CHUNK_BYTES:
            transfer, first = PLACE.unpack(body)
            if first == 0 and transfer not in self._pulls:
                self._ahead.put(source, transfer, frames)

    def _fill(
        self, active: _ActivePull, first: int, slices: list[memoryview], frames: Sequence[Buffer | zmq.Frame]
    ) -> None:
        """Copy a chunk that came as whole frames to where it belongs."""
        if _copy_into(slices, frames):
            self._arrived(active, first, sum(view.nbytes for view in slices))
        else:
            self._end(active, SourceLost(active.pull.manifest.holder, "sent a chunk of a wrong length"))

    def _arrived(self, active: _ActivePull, first: int, nbytes: int) -> None:
        active.pull.arrived(first, self._loop.clock())
        self.bytes_pulled += nbytes
        if active.pull.is_complete:
            self._finish(active)
        else:
            self._ask(active, active.pull.requests())

    def _finish(self, active: _ActivePull) -> None:
        manifest = active.pull.manifest
        del self._pulls[manifest.transfer]
        with contextlib.suppress(LinkError):  # the holder's lease ends it then
            if active.tells_done:
                self._send((manifest.holder.encode(), active.target.encode(), DONE, manifest.transfer))
        active.outcome.set(active.memory)

    def _end(self, active: _ActivePull, error: FlarebusError) -> None:
        if self._pulls.pop(active.pull.manifest.transfer, None) is not None:
            active.outcome.fail(error)


def _memory(pool: SlabPool, manifest: Manifest) -> list[memoryview] | None:
    try:
        return pool.take(manifest.lengths)
    except (OSError, MemoryError):  # whoever wants it pulls it, and hears what is wrong
        return None


def _copy_into(slices: Sequence[memoryview], frames: Sequence[Buffer | zmq.Frame]) -> bool:
    """Copy what came as whole frames to where it belongs; whether it had the right length."""
    parts: Sequence[Buffer] = [frame.buffer if isinstance(frame, zmq.Frame) else frame for frame in frames]
    lengths = [view.nbytes for view in slices]
    if [len(part) for part in parts] != lengths:
        if sum(len(part) for part in parts) != sum(lengths):
            return False
        data = memoryview(b"".join(parts))
        parts = [data[end - nbytes : end] for nbytes, end in zip(lengths, itertools.accumulate(lengths), strict=True)]
    for view, part in zip(slices, parts, strict=True):
        view[:] = part
    return True


def _read_into(slices: Sequence[memoryview], socket: zmq.Socket[bytes], more: bool) -> bool:
    """Receive the rest of a message straight into the memory that wants it; whether each frame fitted its slice."""
    for view in slices:
        if not more:
            return False
        nbytes = socket.recv_into(view, flags=zmq.NOBLOCK)
        more = bool(socket.getsockopt(zmq.RCVMORE))
        if nbytes != view.nbytes:
            receive_rest(socket, more)
            return False
    return not receive_rest(socket, more)
