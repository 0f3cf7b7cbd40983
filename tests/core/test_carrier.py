"""The carrier alone: two of them back to back, with a loop that does what it is told at once and a clock by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from flarebus.carrier import MAX_PULL_BYTES, Carrier
from flarebus.errors import Closed, FlarebusError, NoRoute, SourceLost, UsageError
from flarebus.message import Manifest
from flarebus.pending import Pending
from flarebus.slab import SlabPool
from flarebus.sockets import frame_bytes
from flarebus.transfer import CHUNK_BYTES, LEASE_S, SEPARATE_SLICES, STALL_S, WINDOW_CHUNKS
from flarebus.wire import CHUNK, DONE, NOT_OFFERED, PLACE, PULL, REQUEST

DATA = bytes(range(251)) * 50_000


class StillLoop:
    """A loop without a thread: what is posted runs now, and time stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0
        self.stopped = False

    def clock(self) -> float:
        return self.now

    def is_current(self) -> bool:
        return False

    def post(self, call: Callable[..., None], *args: Any) -> None:
        if self.stopped:
            raise Closed("stopped")
        call(*args)

    def flush(self) -> None:
        """Nothing was deferred."""

    def wake_by(self, when: float | None) -> None:
        assert when is None or when >= self.now


class Line:
    """A holder, a puller, and what each has said to the other and has not been carried yet."""

    def __init__(self) -> None:
        self.loop = StillLoop()
        self.said: list[Sequence[Any]] = []
        self.is_cut = False
        self.holder, self.puller = (Carrier(name, self.loop, self._send) for name in ("holder", "puller"))  # type: ignore[arg-type]

    def _send(self, frames: Sequence[Any]) -> None:
        if self.is_cut:
            raise NoRoute(frame_bytes(frames[0]).decode())
        self.said.append([frame_bytes(frame) for frame in frames])

    def carry(self, limit: int = 10_000) -> int:
        """Deliver until nobody says anything, at most `limit` messages; how many it were."""
        count = 0
        while self.said and count < limit:
            frames = self.said.pop(0)
            carrier = self.holder if frames[0] == b"holder" else self.puller
            assert carrier.take(frames)
            count += 1
        return count

    def offer(self, *buffers: bytes) -> Manifest:
        return self.holder.offer(buffers, ["puller"], LEASE_S)

    def chunk(self, manifest: Manifest, *frames: bytes, source: bytes = b"holder", first: int = 0) -> None:
        """Say something in the holder's place."""
        self.puller.take([b"puller", source, CHUNK, PLACE.pack(manifest.transfer, first), *frames])


@pytest.fixture
def line() -> Line:
    return Line()


def error_of(pending: Pending[Any]) -> FlarebusError:
    assert pending.is_done
    error = pending.error()
    assert isinstance(error, FlarebusError)
    return error


@pytest.mark.parametrize(
    "buffers",
    [
        [DATA],
        [b"", DATA, b"", DATA[:100_000], b""],
        [bytes([n % 256]) * n for n in range(3000)],
        [DATA[: CHUNK_BYTES // SEPARATE_SLICES]] * 9,
        [],
        [b"", b""],
    ],
    ids=["one", "some empty", "many small", "at the limit", "none", "all empty"],
)
def test_buffers_arrive(line: Line, buffers: list[bytes]) -> None:
    """Every buffer arrives in memory of exactly its length, and both ends let go of it."""
    manifest = line.offer(*buffers)
    pull = line.puller.pull(manifest, "puller")
    line.carry()

    assert [bytes(view) for view in pull.result(0)] == [bytes(buffer) for buffer in buffers]
    assert (line.holder.offers_held, line.puller.pulls_running) == (0, 0)
    assert line.puller.bytes_pulled == line.holder.bytes_served == sum(map(len, buffers))


def test_only_a_window_is_asked_for(line: Line) -> None:
    """A receiver never has more under way than its window, whatever the size of the transfer."""
    manifest = line.offer(bytes(40 * CHUNK_BYTES))
    pull = line.puller.pull(manifest, "puller")
    most = 0
    while line.carry(1):
        most = max(most, sum(frames[2] == CHUNK for frames in line.said))

    assert pull.is_done
    assert most <= WINDOW_CHUNKS


@pytest.mark.parametrize("frames", [[], [b"x"], [b"x" * 2000, b"y"], [b"x" * 8000]])
def test_a_joined_chunk_of_a_wrong_length_ends_the_pull(line: Line, frames: list[bytes]) -> None:
    """Many small buffers come in one frame; one that is not as long as all of them is the holder's lie."""
    manifest = Manifest(bytes(16), "holder", (1,) * 2000)
    pull = line.puller.pull(manifest, "puller")

    line.chunk(manifest, *frames)

    error = error_of(pull)
    assert isinstance(error, SourceLost)
    assert "wrong length" in error.reason


def test_chunks_nobody_waits_for_are_dropped(line: Line) -> None:
    """From somebody else, at an odd place, twice, too late or not a chunk at all: none of them does anything."""
    manifest = line.offer(DATA[:2000], DATA[:3000])
    pull = line.puller.pull(manifest, "puller")
    whole = (DATA[:2000], DATA[:3000])

    line.chunk(manifest, *whole, source=b"other")
    line.chunk(manifest, *whole, first=1)
    line.chunk(manifest, *whole, first=CHUNK_BYTES)
    line.chunk(manifest, source=b"other", first=NOT_OFFERED)
    line.puller.take([b"puller", b"holder", CHUNK, b"short", b"x"])
    line.puller.take([b"puller", b"holder", CHUNK, PLACE.pack(b"another transfer", 0), b"x"])
    assert not pull.is_done
    line.carry()
    line.chunk(manifest, b"x" * 2000, b"y" * 3000)
    line.chunk(manifest, first=NOT_OFFERED)

    assert [bytes(view) for view in pull.result(0)] == list(whole)
    assert not line.puller.take([b"puller", b"holder", b"\x95", b"a message of another kind"])


def test_a_pull_that_stalls_asks_again(line: Line) -> None:
    """What was asked for and does not come is asked for again, and given up when a whole lease brought nothing."""
    manifest = line.offer(DATA)
    pull = line.puller.pull(manifest, "puller")
    line.said.clear()

    line.loop.now += STALL_S
    assert line.puller.tick(line.loop.now) == line.loop.now + STALL_S
    line.carry()
    assert pull.is_done

    manifest = line.offer(DATA)
    pull = line.puller.pull(manifest, "puller")
    line.loop.now += LEASE_S
    line.puller.tick(line.loop.now)
    assert "whole lease" in str(error_of(pull))
    assert line.puller.tick(line.loop.now) is None


def test_an_offer_nobody_pulls_is_forgotten(line: Line) -> None:
    """After a lease without progress the holder lets go, and says so to whoever asks then."""
    manifest = line.offer(DATA)
    assert line.holder.tick(line.loop.now) == line.loop.now + LEASE_S

    line.loop.now += LEASE_S
    assert line.holder.tick(line.loop.now) is None
    assert line.holder.offers_held == 0
    pull = line.puller.pull(manifest, "puller")
    line.carry()

    assert "not offered" in str(error_of(pull))


def test_nobody_else_is_served(line: Line) -> None:
    """Who is not named, asks for what is not there or in a way no receiver does, is told the same: not offered."""
    manifest = line.offer(DATA)

    def asked(source: bytes, transfer: bytes, first: int, nbytes: int) -> Any:
        line.said.clear()
        line.holder.take([b"holder", source, PULL, REQUEST.pack(transfer, first, nbytes)])
        return [PLACE.unpack(frames[3])[1] for frames in line.said]

    nothing = [NOT_OFFERED]
    assert asked(b"other", manifest.transfer, 0, CHUNK_BYTES) == nothing
    assert asked(b"puller", bytes(16), 0, CHUNK_BYTES) == nothing
    assert asked(b"puller", manifest.transfer, 1, CHUNK_BYTES) == nothing
    assert asked(b"puller", manifest.transfer, 0, 0xFFFFFFFF) == nothing
    assert asked(b"puller", manifest.transfer, 0, CHUNK_BYTES) == [0]
    line.holder.admit(manifest.transfer, "other")
    assert asked(b"other", manifest.transfer, 0, CHUNK_BYTES) == [0]
    line.holder.take([b"holder", b"puller", PULL, b"short"])
    line.holder.take([b"holder", b"puller", DONE, b"short"])


def test_a_way_that_is_cut_ends_it(line: Line) -> None:
    """Who cannot even ask hears that the source is lost; who cannot serve stops, and goes on when asked again."""
    manifest = line.offer(DATA)
    line.is_cut = True
    assert isinstance(error_of(line.puller.pull(manifest, "puller")), SourceLost)
    line.is_cut = False
    pull = line.puller.pull(manifest, "puller")
    frames = line.said.pop()
    line.is_cut = True
    line.holder.take(frames)
    assert line.holder.bytes_served == 0
    line.is_cut = False

    line.puller.resume()
    line.carry()

    assert pull.is_done
    assert pull.error() is None


def test_a_farewell_that_is_lost_does_no_harm(line: Line) -> None:
    """When the last word does not reach the holder, the puller has everything all the same."""
    manifest = line.offer(DATA[:1000])
    pull = line.puller.pull(manifest, "puller")
    line.carry(1)
    chunk = line.said.pop()
    line.is_cut = True

    line.puller.take(chunk)

    assert pull.error() is None
    assert line.holder.offers_held == 1


def test_a_pull_that_cannot_begin_says_why(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many bytes, no memory, the same transfer twice, a stopped loop: each is an error of the pending pull."""
    manifest = line.offer(DATA)
    too_much = Manifest(bytes(16), "holder", (MAX_PULL_BYTES, 1))
    assert "at most" in str(error_of(line.puller.pull(too_much, "puller")))
    pool = SlabPool()
    monkeypatch.setattr(pool, "take", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    full = line.puller.pull(manifest, "puller", pool)
    assert isinstance(full.error(), OSError)
    line.puller.pull(manifest, "puller")
    assert isinstance(error_of(line.puller.pull(manifest, "puller")), UsageError)
    line.loop.stopped = True
    assert isinstance(error_of(line.puller.pull(line_manifest(), "puller")), Closed)


def line_manifest() -> Manifest:
    return Manifest(b"x" * 16, "holder", (5,))


def test_the_loss_of_a_holder_ends_its_transfers_only(line: Line) -> None:
    """Cells that go away end what they held and what waited for them, and nothing else."""
    from_holder = line.puller.pull(line.offer(DATA), "puller")
    from_other = line.puller.pull(Manifest(b"y" * 16, "other", (5,)), "puller")

    line.puller.lost({"holder", "somebody"})
    line.holder.lost({"puller"})

    assert isinstance(error_of(from_holder), SourceLost)
    assert not from_other.is_done
    assert line.holder.offers_held == 0


def test_a_resumed_pull_asks_those_who_are_back(line: Line) -> None:
    """Only what comes from the cells that are back is asked for again."""
    line.puller.pull(line.offer(DATA), "puller")
    line.puller.pull(Manifest(b"y" * 16, "other", (5,)), "puller")
    line.said.clear()

    line.puller.resume({"other"})
    assert {frames[0] for frames in line.said} == {b"other"}
    line.puller.resume()
    assert {frames[0] for frames in line.said} == {b"holder", b"other"}


def test_patience_ends(line: Line) -> None:
    """After a reconnection a holder that is not there is waited for, but not longer than was said."""
    manifest = line_manifest()
    pull = line.puller.pull(manifest, "puller")
    line.puller.resume(patient_until=line.loop.now + 10)

    line.chunk(manifest, first=NOT_OFFERED)
    assert not pull.is_done
    line.loop.now += 10
    line.chunk(manifest, first=NOT_OFFERED)

    assert isinstance(error_of(pull), SourceLost)


def test_close_ends_everything(line: Line) -> None:
    """A closed carrier's pulls fail, later ones too, and it lets go of what it offered."""
    line.puller.offer([DATA], ["holder"], None)
    running = line.puller.pull(line_manifest(), "puller")

    line.puller.close(Closed("it was closed"))

    assert isinstance(error_of(running), Closed)
    assert isinstance(error_of(line.puller.pull(line_manifest(), "puller")), Closed)
    assert (line.puller.offers_held, line.puller.pulls_running) == (0, 0)


def test_an_alias_pulls_in_its_own_name(line: Line) -> None:
    """What was offered to an alias is asked for, and settled, in that name."""
    manifest = line.holder.offer([DATA], ["site-1"], LEASE_S)
    pull = line.puller.pull(manifest, "site-1")
    assert line.said[0][1] == b"site-1"
    line.carry()

    assert pull.error() is None
    assert line.holder.offers_held == 0
