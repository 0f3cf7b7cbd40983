"""Transfers: a holder and its receivers wired back to back, over a network that does its worst."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from random import Random
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from flarebus import transfer
from flarebus.errors import UsageError
from flarebus.message import Buffer, Manifest
from flarebus.transfer import WINDOW_CHUNKS, Offers, Pull, Slices
from tests.core.halves import RARELY, LossyMachine, explore, thorough

CHUNK, SEPARATE_SLICES = 64, 4
HOLDER = "server"
TRANSFER = bytes(range(16))
OFFER_LEASE_S, PULL_LEASE_S, STALL_S = 20.0, 30.0, 5.0

names = st.sampled_from(["site-1", "site-2", "site-3"])
# Empty buffers, many that share a chunk, some that span several, and their mixtures.
lengths = st.lists(st.one_of(st.just(0), st.integers(1, 12), st.integers(1, 5 * CHUNK)), max_size=30)


@pytest.fixture(autouse=True, scope="module")
def _small_chunks() -> Iterator[None]:
    """Chunks of a few bytes and slices, so that small buffers make long transfers of all kinds of chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "CHUNK_BYTES", CHUNK)
        patch.setattr(transfer, "SEPARATE_SLICES", SEPARATE_SLICES)
        yield


def filled(sizes: Iterable[int]) -> list[bytes]:
    """Buffers of these sizes; no two stretches of them are alike."""
    random = Random(len(list(sizes := list(sizes))))
    return [random.randbytes(size) for size in sizes]


class Ask(NamedTuple):
    """A PULL on its way."""

    receiver: str
    first: int
    nbytes: int


class Chunk(NamedTuple):
    """A CHUNK on its way; without frames it says that nothing is offered."""

    receiver: str
    first: int
    frames: Sequence[bytes] | None


class Done(NamedTuple):
    """A DONE on its way."""

    receiver: str


class Receiver:
    """A pull, and what the shell around it does, with an eye on every step."""

    def __init__(self, name: str, manifest: Manifest, line: bytes, now: float) -> None:
        self.name = name
        self.line = line
        self.memory = [bytearray(size) for size in manifest.lengths]
        self.pull = Pull(manifest, self.memory, now, lease_s=PULL_LEASE_S, stall_s=STALL_S)
        self.asked: set[int] = set()
        self.arrived: set[int] = set()
        self.progress = now
        self.outcome = ""

    def start(self) -> list[Any]:
        """The first requests, or the farewell of a pull of nothing."""
        return self.goodbye() if self.pull.is_complete else self.go_on()

    def go_on(self) -> list[Any]:
        """Requests that the window has room for; no chunk is asked for twice without a cause."""
        packets = self.requests(self.pull.requests())
        fresh = [index for packet in packets for index in covered(packet)]
        assert self.asked.isdisjoint(fresh)
        self.asked.update(fresh)
        return packets

    def again(self, now: float) -> list[Any]:
        """Requests for what is missing: all of it, and nothing else."""
        packets = self.requests(self.pull.resume(now))
        assert sorted(index for packet in packets for index in covered(packet)) == sorted(self.asked - self.arrived)
        return packets

    def requests(self, ranges: Iterable[tuple[int, int]]) -> list[Any]:
        """Packets for ranges, each of which a holder must be able to serve."""
        packets = [Ask(self.name, first, nbytes) for first, nbytes in ranges]
        for _, first, nbytes in packets:
            assert first % CHUNK == 0
            assert first < len(self.line)
            assert 0 < nbytes <= WINDOW_CHUNKS * CHUNK
        return packets

    def take(self, first: int, frames: Sequence[bytes], now: float) -> list[Any]:
        """A chunk is here: put it where it belongs, and ask for more."""
        place = self.pull.place(first)
        index = first // CHUNK
        assert (place is None) == (index in self.arrived or index not in self.asked)
        if place is None:
            return []
        slices, joined = place
        expected = [sum(len(view) for view in slices)] if joined else [len(view) for view in slices]
        assert [len(frame) for frame in frames] == expected
        data = memoryview(b"".join(frames))
        for view in slices:
            view[:], data = data[: len(view)], data[len(view) :]
        assert not data
        self.pull.arrived(first, now)
        self.arrived.add(index)
        self.progress = now
        return self.goodbye() if self.pull.is_complete else self.go_on()

    def goodbye(self) -> list[Any]:
        """All is here."""
        self.outcome = "complete"
        assert b"".join(self.memory) == self.line
        return [Done(self.name)]


def covered(ask: Ask) -> range:
    """The chunks that a request is for."""
    return range(ask.first // CHUNK, -(-(ask.first + ask.nbytes) // CHUNK))


class TransferMachine(LossyMachine):
    """One offer, three receivers, and everything that may go wrong between them."""

    def __init__(self) -> None:
        super().__init__()
        self.offers = Offers(HOLDER)
        self.receivers: dict[str, Receiver] = {}
        self.allowed: set[str] = set()
        self.offered = False
        self.expires: float | None = None

    @initialize(
        sizes=st.one_of(lengths, lengths.map(lambda sizes: [*sizes, 25 * CHUNK + 1])),
        receivers=st.sets(names, min_size=1),
        lease_s=st.sampled_from([None, OFFER_LEASE_S]),
    )
    def offer(self, sizes: list[int], receivers: set[str], lease_s: float | None) -> None:
        self.buffers = filled(sizes)
        self.line = b"".join(self.buffers)
        self.manifest = self.offers.add(TRANSFER, self.buffers, receivers, self.now, lease_s).manifest
        self.offered, self.allowed, self.lease_s = True, set(receivers), lease_s
        self.renew()
        for name in sorted(receivers):
            self.start(name)

    def renew(self) -> None:
        self.expires = None if self.lease_s is None else self.now + self.lease_s

    def running(self) -> list[Receiver]:
        return [receiver for receiver in self.receivers.values() if not receiver.outcome]

    def leave(self, gone: set[str]) -> None:
        """What the holder is expected to do when receivers are done or dead."""
        if self.lease_s is not None:
            self.allowed -= gone
            self.offered = self.offered and bool(self.allowed)

    def arrive(self, packet: Ask | Chunk | Done) -> None:
        match packet:
            case Ask(name, first, nbytes):
                self.serve(name, first, nbytes)
            case Done(name):
                self.offers.done(name, TRANSFER)
                self.leave({name})
            case Chunk(name, first, frames):
                receiver = self.receivers[name]
                if receiver.outcome:
                    assert not receiver.pull.is_complete or receiver.pull.place(first) is None
                elif frames is None:
                    receiver.outcome = "refused"
                else:
                    self.flight += receiver.take(first, frames, self.now)

    def serve(self, name: str, first: int, nbytes: int) -> None:
        chunks = self.offers.serve(name, TRANSFER, first, nbytes, self.now)
        if not (self.offered and name in self.allowed):
            assert chunks is None
            self.flight.append(Chunk(name, 0, None))
            return
        self.renew()
        assert chunks is not None
        assert [begin for begin, _ in chunks] == list(range(first, min(first + nbytes, len(self.line)), CHUNK))
        for begin, frames in chunks:
            data = [bytes(frame) for frame in frames]
            assert b"".join(data) == self.line[begin : begin + CHUNK]
            assert len(data) <= SEPARATE_SLICES
            self.flight.append(Chunk(name, begin, data))

    @rule(name=names)
    def start(self, name: str) -> None:
        """A receiver begins, or a dead or finished one begins anew, knowing nothing of before."""
        if name not in self.receivers or self.receivers[name].outcome:
            self.receivers[name] = Receiver(name, self.manifest, self.line, self.now)
            self.flight += self.receivers[name].start()

    @rule(name=names)
    def reconnect(self, name: str) -> None:
        """What was under way to or from a receiver is lost with its connection; it asks again at once."""
        self.flight = [packet for packet in self.flight if packet.receiver != name]
        if name in self.receivers and not self.receivers[name].outcome:
            self.flight += self.receivers[name].again(self.now)

    @rule(seconds=st.sampled_from([1, 1, 1, 1, 4, 5, 6, 19, 20, 29, 30]))
    def elapse(self, seconds: int) -> None:
        self.now += seconds
        self.offers.tick(self.now)
        if self.expires is not None and self.now >= self.expires:
            self.offered = False
        for receiver in self.running():
            lost = self.now - receiver.progress >= PULL_LEASE_S
            assert receiver.pull.is_lost(self.now) == lost
            if lost:
                receiver.outcome = "lost"
            elif receiver.pull.is_stalled(self.now):
                self.flight += receiver.again(self.now)

    @rule(name=names, noticed=st.booleans(), happens=RARELY)
    def receiver_dies(self, name: str, noticed: bool, happens: bool) -> None:
        """Its pull is gone; the holder hears of it, or its lease has to find out."""
        if happens and name in self.receivers and not self.receivers[name].outcome:
            self.receivers[name].outcome = "dead"
            if noticed:
                self.offers.lost([name, "somebody-else"])
                self.leave({name})

    @rule(noticed=st.booleans(), happens=RARELY)
    def holder_dies(self, noticed: bool, happens: bool) -> None:
        """It comes back with nothing to offer; receivers hear that it was gone, or are refused when they ask."""
        if not happens:
            return
        self.offers = Offers(HOLDER)
        self.offered = False
        if noticed:
            for receiver in self.running():
                receiver.outcome = "lost"

    @rule(name=names)
    def admit(self, name: str) -> None:
        self.offers.admit(TRANSFER, name)
        if self.offered:
            self.allowed.add(name)

    @rule(happens=RARELY)
    def withdraw(self, happens: bool) -> None:
        if happens:
            self.offers.withdraw(TRANSFER)
            self.offered = False

    @rule(
        name=st.sampled_from(["site-1", "site-9", "", HOLDER]),
        guess=st.sampled_from([TRANSFER, bytes(16), b""]),
        first=st.one_of(st.integers(0, 1 << 64), st.sampled_from([0, 1, CHUNK - 1, CHUNK])),
        nbytes=st.one_of(st.integers(0, 1 << 32), st.sampled_from([0, 1, CHUNK, WINDOW_CHUNKS * CHUNK + 1])),
    )
    def guess(self, name: str, guess: bytes, first: int, nbytes: int) -> None:
        """Whoever is not named, asks for another transfer or for bytes that are no chunks gets nothing."""
        fits = first % CHUNK == 0 and first < len(self.line) and 0 < nbytes <= WINDOW_CHUNKS * CHUNK
        if fits and guess == TRANSFER and name in self.allowed:
            return
        before = self.offers.next_event()

        assert self.offers.serve(name, guess, first, nbytes, self.now) is None
        assert self.offers.next_event() == before

    @invariant()
    def window_is_kept(self) -> None:
        for receiver in self.running():
            outstanding = receiver.asked - receiver.arrived
            assert 0 < len(outstanding) <= WINDOW_CHUNKS

    @invariant()
    def everybody_knows_when_to_look_again(self) -> None:
        assert len(self.offers) == self.offered
        assert self.offers.next_event() == (self.expires if self.offered else None)
        for receiver in self.running():
            due = receiver.pull.next_event()
            assert self.now < due <= receiver.progress + PULL_LEASE_S
            assert receiver.pull.is_stalled(due) or receiver.pull.is_lost(due)

    @invariant()
    def what_arrived_is_exact(self) -> None:
        for receiver in self.receivers.values():
            line = b"".join(receiver.memory)
            for index in receiver.arrived:
                assert line[index * CHUNK :][:CHUNK] == self.line[index * CHUNK :][:CHUNK]

    def teardown(self) -> None:
        """Once the network heals, every pull ends: complete if there is still an offer for it."""
        if not hasattr(self, "manifest"):
            return
        running = self.running()
        hopeful = [receiver for receiver in running if self.offered and receiver.name in self.allowed]
        self.flight = [packet for receiver in running for packet in receiver.again(self.now)]
        self.drain()

        assert all(receiver.outcome == "complete" for receiver in hopeful)
        assert all(receiver.outcome for receiver in running)


def test_transfers_survive_any_network() -> None:
    """Whatever is lost, repeated, reordered or killed: bytes are exact, windows kept, every pull ends."""
    explore(TransferMachine, examples=100, steps=70)


@given(lengths)
@example([])
@example([0, 0, 0])
@example([CHUNK] * 3)
@example([1] * (4 * CHUNK))
@example([16, 16, 16, 16, 0, 13, 13, 13, 13, 12])
@thorough(150)
def test_both_ends_cut_chunks_alike(sizes: list[int]) -> None:
    """From the lengths alone, both ends know which frames a chunk has, and the frames together are the line."""
    buffers = filled(sizes)
    offers = Offers(HOLDER)
    offers.add(TRANSFER, buffers, ["site-1"], 0.0)
    receiver = Receiver("site-1", Manifest(TRANSFER, HOLDER, tuple(sizes)), b"".join(buffers), 0.0)
    packets = receiver.start()
    while packets:
        packet = packets.pop(0)
        if isinstance(packet, Ask):
            for begin, frames in offers.serve("site-1", TRANSFER, packet.first, packet.nbytes, 0.0) or ():
                packets += receiver.take(begin, [bytes(frame) for frame in frames], 0.0)

    assert receiver.outcome == "complete"
    assert [bytes(view) for view in receiver.memory] == buffers


@given(lengths, st.data())
@thorough(100)
def test_slices_are_the_line(sizes: list[int], data: st.DataObject) -> None:
    """Any stretch of the line comes as views of the buffers that hold it, none of them empty, without a copy."""
    buffers = [bytearray(buffer) for buffer in filled(sizes)]
    line = b"".join(buffers)
    slices = Slices(buffers)
    borders = st.sampled_from([0, *accumulate(sizes)])
    first, last = sorted(data.draw(st.tuples(*[borders | st.integers(0, len(line))] * 2)))
    found = slices.between(first, last)

    assert slices.nbytes == len(line)
    assert b"".join(found) == line[first:last]
    assert all(view.nbytes and any(view.obj is buffer for buffer in buffers) for view in found)


def test_slices_see_arrays_as_bytes() -> None:
    """A buffer of wider items counts in bytes, at both ends."""
    wide = memoryview(bytearray(32)).cast("d")

    assert Slices([wide]).nbytes == 32
    assert Offers(HOLDER).add(TRANSFER, [wide], [], 0.0).manifest.lengths == (32,)
    assert Pull(Manifest(TRANSFER, HOLDER, (32,)), [wide], 0.0).requests() == [(0, CHUNK)]


def offered(buffers: Sequence[Buffer], receivers: Sequence[str], lease_s: float | None = OFFER_LEASE_S) -> Offers:
    """A holder with one transfer, offered at 0 s."""
    offers = Offers(HOLDER)
    offers.add(TRANSFER, buffers, receivers, 0.0, lease_s)
    return offers


def test_few_slices_go_as_they_are_and_many_as_one() -> None:
    """A chunk over a few buffers is sent from the buffers themselves; one over many is joined once."""
    few = [bytes([i]) * (CHUNK // SEPARATE_SLICES) for i in range(SEPARATE_SLICES)]
    many = [bytes([i]) for i in range(SEPARATE_SLICES + 1)]
    [(_, separate)] = offered(few, ["site-1"]).serve("site-1", TRANSFER, 0, CHUNK, 0.0) or ()
    [(_, joined)] = offered(many, ["site-1"]).serve("site-1", TRANSFER, 0, CHUNK, 0.0) or ()

    assert [frame.obj for frame in separate if isinstance(frame, memoryview)] == few
    assert joined == [b"".join(many)]


def test_one_encode_serves_many_receivers() -> None:
    """Every receiver is served from the same array, at its own pace, and the last one to finish ends the offer."""
    array = bytes(10 * CHUNK)
    receivers = [f"site-{i}" for i in range(50)]
    offers = offered([array], receivers)
    for name in receivers:
        assert len(offers) == 1
        for _, [frame] in offers.serve(name, TRANSFER, 0, 8 * CHUNK, 0.0) or ():
            assert isinstance(frame, memoryview)
            assert frame.obj is array
        offers.done(name, TRANSFER)

    assert len(offers) == 0
    assert offers.serve(receivers[0], TRANSFER, 0, CHUNK, 0.0) is None


def test_offer_without_lease_waits_for_ever() -> None:
    """Neither time, nor death, nor a receiver that is done ends it; only its owner does."""
    offers = offered([b"x"], ["site-1"], lease_s=None)
    offers.done("site-1", TRANSFER)
    offers.lost(["site-1"])
    offers.tick(1e9)
    assert offers.next_event() is None
    assert offers.serve("site-1", TRANSFER, 0, CHUNK, 1e9) is not None
    offers.withdraw(TRANSFER)
    offers.withdraw(TRANSFER)

    assert offers.serve("site-1", TRANSFER, 0, CHUNK, 1e9) is None


def test_pulling_renews_the_lease_of_an_offer() -> None:
    """A receiver may take any time in all, but not a whole lease between two requests."""
    offers = offered([bytes(CHUNK)], ["site-1"])
    for now in range(0, 1000, 19):
        offers.tick(now)
        assert offers.serve("site-1", TRANSFER, 0, CHUNK, now) is not None
    last = offers.next_event()
    assert last == now + OFFER_LEASE_S
    offers.tick(last - 0.001)
    assert len(offers) == 1
    offers.tick(last)

    assert len(offers) == 0


def test_an_offer_ends_with_its_last_receiver() -> None:
    """Receivers that are done or dead no longer keep it; a stranger's farewell changes nothing."""
    offers = offered([b"x"], ["site-1", "site-2", "site-3"])
    offers.done("site-9", TRANSFER)
    offers.done("site-1", TRANSFER)
    offers.done("site-1", bytes(16))
    offers.lost(["site-2", "site-9"])
    assert offers.serve("site-2", TRANSFER, 0, CHUNK, 0.0) is None
    assert offers.serve("site-3", TRANSFER, 0, CHUNK, 0.0) is not None
    offers.lost(["site-3"])

    assert len(offers) == 0


@pytest.mark.parametrize(
    ("first", "nbytes"),
    [(1, CHUNK), (CHUNK - 1, 1), (0, 0), (0, 8 * CHUNK + 1), (3 * CHUNK, CHUNK), (1 << 63, CHUNK), (0, (1 << 32) - 1)],
)
def test_a_holder_serves_whole_chunks_within_a_window(first: int, nbytes: int) -> None:
    """A request that begins inside a chunk, asks for nothing, for too much or past the end gets nothing."""
    offers = offered([bytes(2 * CHUNK + 1)], ["site-1"])

    assert offers.serve("site-1", TRANSFER, first, nbytes, 1.0) is None
    assert offers.next_event() == OFFER_LEASE_S


@pytest.mark.parametrize(
    ("nbytes", "sizes"), [(1, [CHUNK]), (CHUNK + 1, [CHUNK, CHUNK]), (8 * CHUNK, [CHUNK, CHUNK, 1])]
)
def test_chunks_are_always_cut_at_the_same_places(nbytes: int, sizes: list[int]) -> None:
    """However many bytes are asked for, whole chunks come, and none from behind the end."""
    chunks = offered([bytes(2 * CHUNK + 1)], ["site-1"]).serve("site-1", TRANSFER, 0, nbytes, 1.0) or ()

    assert [(begin, [len(frame) for frame in frames]) for begin, frames in chunks] == [
        (index * CHUNK, [size]) for index, size in enumerate(sizes)
    ]


def test_a_latecomer_may_be_admitted() -> None:
    """An offer takes one more receiver while it lasts; admission to anything else is nothing."""
    offers = offered([b"x"], ["site-1"], lease_s=None)
    assert offers.serve("site-2", TRANSFER, 0, CHUNK, 0.0) is None
    offers.admit(TRANSFER, "site-2")
    offers.admit(bytes(16), "site-2")

    assert offers.serve("site-2", TRANSFER, 0, CHUNK, 0.0) is not None
    assert len(offers) == 1


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_a_pull_of_nothing_is_complete(sizes: list[int]) -> None:
    """Without a byte to wait for, nobody is asked."""
    pull = Pull(Manifest(TRANSFER, HOLDER, tuple(sizes)), [bytearray(0) for _ in sizes], 0.0)

    assert pull.is_complete
    assert pull.requests() == []
    assert pull.resume(0.0) == []


@pytest.mark.parametrize("sizes", [[], [3], [2, 4], [4, 2, 0], [6]])
def test_memory_has_the_lengths_of_the_manifest(sizes: list[int]) -> None:
    """Memory of any other shape is refused, also if it has as many bytes."""
    with pytest.raises(UsageError, match="lengths"):
        Pull(Manifest(TRANSFER, HOLDER, (4, 2)), [bytearray(size) for size in sizes], 0.0)


def test_a_pull_asks_for_half_windows() -> None:
    """A long transfer costs a request for every few chunks, and the window never runs empty."""
    chunks = 100
    pull = Pull(Manifest(TRANSFER, HOLDER, (chunks * CHUNK - 1,)), [bytearray(chunks * CHUNK - 1)], 0.0)
    asked = pull.requests()
    for index in range(chunks):
        pull.arrived(index * CHUNK, 0.0)
        asked += pull.requests()

    assert pull.is_complete
    assert sum(nbytes for _, nbytes in asked) == chunks * CHUNK
    assert len(asked) <= chunks // (WINDOW_CHUNKS // 2) + 1


def test_only_what_was_asked_for_has_a_place() -> None:
    """A chunk that nobody asked for, that begins in between, or that is here already is dropped."""
    pull = Pull(Manifest(TRANSFER, HOLDER, (20 * CHUNK,)), [bytearray(20 * CHUNK)], 0.0)
    pull.requests()
    pull.arrived(0, 0.0)

    assert pull.place(CHUNK) is not None
    for first in (0, 1, CHUNK + 1, WINDOW_CHUNKS * CHUNK, 20 * CHUNK, 1 << 63, (1 << 64) - 1):
        assert pull.place(first) is None


def test_progress_is_all_that_keeps_a_pull_alive() -> None:
    """A chunk each lease is enough for ever; asking again is no progress, and is done once per stall time."""
    pull = Pull(Manifest(TRANSFER, HOLDER, (20 * CHUNK,)), [bytearray(20 * CHUNK)], 0.0, lease_s=30, stall_s=5)
    pull.requests()
    now = 0.0
    for index in range(8):
        now += 29
        assert not pull.is_lost(now)
        pull.arrived(index * CHUNK, now)
        pull.requests()
    for again in range(1, 6):
        assert pull.next_event() == now + 5 * again
        assert not pull.is_stalled(now + 5 * again - 0.001)
        assert pull.is_stalled(now + 5 * again)
        assert pull.resume(now + 5 * again) == [(index * CHUNK, CHUNK) for index in range(8, 16)]

    assert pull.next_event() == now + 30
    assert not pull.is_lost(now + 29.999)
    assert pull.is_lost(now + 30)


@pytest.mark.parametrize(
    ("receiver", "is_served"),
    [
        ("site-1.job", True),
        ("site-1.job.0", True),
        ("site-1.job.0.nonce", True),
        ("site-1", False),
        ("site-1.jobs", False),
        ("site-1.jo", False),
        ("site-1.job2.0", False),
        ("site-11.job", False),
        ("job", False),
        ("x.site-1.job", False),
        ("", False),
        (".", False),
        (".site-1.job", False),
    ],
)
def test_an_offer_is_for_whoever_lives_under_a_named_address(receiver: str, is_served: bool) -> None:
    """A receiver's own subtree may pull; neither its parents, nor its neighbours, nor names that only look alike."""
    offers = Offers(HOLDER)
    offers.add(TRANSFER, filled([CHUNK]), ["site-1.job"], 0.0)

    assert (offers.serve(receiver, TRANSFER, 0, CHUNK, 0.0) is not None) == is_served
