"""Carrier: moves the buffers of transfers in and out of one cell; the shell around `transfer`.

`offer` and `pull` from any thread; everything else on the loop's. What to ask for and whom to serve is decided in
`transfer`; here bytes go from the socket straight into the arrays that want them, and from arrays to the socket.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
from collections.abc import Callable, Iterable, Sequence

import zmq

from flarebus.errors import FlarebusError, LinkError, SourceLost, UsageError
from flarebus.loop import Loop
from flarebus.message import Buffer, Manifest
from flarebus.pending import Pending
from flarebus.slab import SlabPool
from flarebus.sockets import Head, frame_bytes, receive_rest
from flarebus.transfer import Offers, Pull
from flarebus.wire import CHUNK, DONE, NOT_OFFERED, PLACE, PULL, REQUEST

__all__ = ["Carrier"]

# More than any model; a header that claims more is a mistake or an attack.
MAX_PULL_BYTES = 1 << 40

Frames = Sequence[Buffer | zmq.Frame]


class _ActivePull:
    """A pull and what waits for it."""

    __slots__ = ("memory", "outcome", "pull", "target")

    def __init__(
        self, pull: Pull, memory: Sequence[memoryview], outcome: Pending[Sequence[Buffer]], target: str
    ) -> None:
        self.pull = pull
        self.memory = memory
        self.outcome = outcome
        self.target = target


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
        self._pool = SlabPool()

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

    def pull(self, manifest: Manifest, target: str, pool: SlabPool | None = None) -> Pending[Sequence[Buffer]]:
        """Bring what `manifest` offers to `target` (this cell, or an alias of it) into slabs; see `Delivery.pull`."""
        outcome: Pending[Sequence[Buffer]] = Pending()
        try:
            if manifest.nbytes > MAX_PULL_BYTES:
                raise UsageError(f"{manifest.holder} offers {manifest.nbytes} bytes: at most {MAX_PULL_BYTES}")
            memory = (pool or self._pool).take(manifest.lengths)
        except (FlarebusError, OSError, MemoryError, ValueError) as error:
            outcome.fail(error)
            return outcome
        self._loop.post(self._start, manifest, memory, outcome, target)
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
        if header not in (PULL, CHUNK, DONE):
            return False
        source, body = frame_bytes(frames[1]).decode("ascii", "replace"), frame_bytes(frames[3])
        if header == CHUNK:
            self._take_chunk(source, body, frames[4:])
        elif header == PULL:
            self._serve(frame_bytes(frames[0]), source, body)
        else:
            self._offers.done(source, body)
        return True

    def read_chunk(self, head: Head, socket: zmq.Socket[bytes]) -> None:
        """Take a chunk whose bytes are still on `socket`."""
        place = self._chunk_place(head.source.decode("ascii", "replace"), head.body)
        if place is None:
            receive_rest(socket, head.more)
            return
        active, first, slices, joined = place
        more = head.more
        if joined:
            self._fill(active, first, slices, receive_rest(socket, more))
            return
        for view in slices:
            # Straight from the socket into the array that wants it. A frame of another length is the peer's lie.
            if not more or socket.recv_into(view, flags=zmq.NOBLOCK) != view.nbytes:
                receive_rest(socket, bool(more and socket.getsockopt(zmq.RCVMORE)))
                self._end(active, SourceLost(active.pull.manifest.holder, "sent a chunk of a wrong length"))
                return
            more = bool(socket.getsockopt(zmq.RCVMORE))
        receive_rest(socket, more)
        self._arrived(active, first, sum(view.nbytes for view in slices))

    def resume(self) -> None:
        """The connection is new: ask again for what was on its way."""
        now = self._loop.clock()
        for active in list(self._pulls.values()):
            self._ask(active, active.pull.resume(now))

    def lost(self, gone: set[str]) -> None:
        """Cells went away."""
        for active in list(self._pulls.values()):
            if active.pull.manifest.holder in gone:
                self._end(active, SourceLost(active.pull.manifest.holder))
        self._offers.lost(gone)

    def fail(self, error: FlarebusError) -> None:
        """Nothing more will come."""
        for active in list(self._pulls.values()):
            self._end(active, error)

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

    def _start(
        self, manifest: Manifest, memory: Sequence[memoryview], outcome: Pending[Sequence[Buffer]], target: str
    ) -> None:
        if manifest.transfer in self._pulls:
            outcome.fail(UsageError("this transfer is being pulled already"))
            return
        pull = Pull(manifest, memory, self._loop.clock())
        active = _ActivePull(pull, memory, outcome, target)
        self._pulls[manifest.transfer] = active
        if pull.is_complete:
            self._finish(active)
            return
        self._loop.wake_by(pull.next_event())
        self._ask(active, pull.requests())

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
            self._end(active, SourceLost(source, "it is not offered, or not any more"))
            return None
        place = active.pull.place(first)
        return None if place is None else (active, first, *place)

    def _take_chunk(self, source: str, body: bytes, frames: Sequence[Buffer | zmq.Frame]) -> None:
        place = self._chunk_place(source, body)
        if place is not None:
            active, first, slices, _ = place
            self._fill(active, first, slices, frames)

    def _fill(
        self, active: _ActivePull, first: int, slices: list[memoryview], frames: Sequence[Buffer | zmq.Frame]
    ) -> None:
        """Copy a chunk that came as whole frames to where it belongs."""
        wanted = sum(view.nbytes for view in slices)
        if sum(len(frame) for frame in frames) != wanted:
            self._end(active, SourceLost(active.pull.manifest.holder, "sent a chunk of a wrong length"))
            return
        data = memoryview(b"".join(frame_bytes(frame) for frame in frames))
        for view, end in zip(slices, itertools.accumulate(view.nbytes for view in slices), strict=True):
            view[:] = data[end - view.nbytes : end]
        self._arrived(active, first, wanted)

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
            self._send((manifest.holder.encode(), active.target.encode(), DONE, manifest.transfer))
        active.outcome.set(active.memory)

    def _end(self, active: _ActivePull, error: FlarebusError) -> None:
        if self._pulls.pop(active.pull.manifest.transfer, None) is not None:
            active.outcome.fail(error)
