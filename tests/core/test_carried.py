"""Arrays that ride along: who grants credit for them has them with the message, and everybody else pulls them."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest

from flarebus.cell import Cell
from flarebus.codec import decode
from flarebus.delivery import Delivery
from flarebus.errors import SourceLost
from flarebus.slab import SlabPool
from flarebus.transfer import CHUNK_BYTES
from flarebus.wire import PULL
from tests.core.bus import ARRANGEMENTS, WAIT_S, Bus, error_of

# More than rides in a bundle, in few or in very many pieces.
VALUES = {
    "one": np.arange(100_000, dtype=np.float32),
    "some": {f"layer{n}": np.full(20_000 + n, n, np.float32) for n in range(8)},
    "many": [np.full(n % 7 * 300, n, np.int32) for n in range(100)] + [np.ones(30_000)],
    "chunk": np.ones(CHUNK_BYTES, np.uint8),
}


class Receiver:
    """A cell that takes what rides along, as long as it has room, and counts what it pulls all the same."""

    def __init__(self, cell: Cell) -> None:
        self.pool: SlabPool | None = SlabPool()
        self.came: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.asked: list[int] = []
        self.pulls = 0
        self.cell = cell
        send = cell._carrier._send

        def counted(frames: Any) -> None:
            self.pulls += frames[2] == PULL
            send(frames)

        cell._carrier._send = counted
        cell.inbox("test", "take", self.came.put, room=self._room)

    def _room(self, nbytes: int) -> SlabPool | None:
        self.asked.append(nbytes)
        return self.pool

    def next(self) -> Delivery:
        return self.came.get(timeout=WAIT_S)


@pytest.fixture(params=ARRANGEMENTS)
def bus(request: pytest.FixtureRequest) -> Iterator[Bus]:
    with Bus(request.param) as bus:
        yield bus


@pytest.fixture
def one_bus() -> Iterator[Bus]:
    with Bus() as bus:
        yield bus


def bring(asker: Cell, value: Any, target: str = "answerer") -> Any:
    payload = asker.share(value, [target])
    pending = asker.request(target, "test", "take", {"body": payload.body}, payload=payload, bring=True)
    return payload, pending


def value_in(delivery: Delivery) -> Any:
    return decode(delivery.plain()["body"], delivery.pull().result(WAIT_S))


@pytest.mark.parametrize("name", VALUES)
def test_what_rides_along_is_here_with_its_message(bus: Bus, name: str) -> None:
    """Nothing is pulled; the arrays are equal, writable, and lie in the memory that the receiver chose."""
    asker, receiver = bus.near(), Receiver(bus.far())
    payload, pending = bring(asker, VALUES[name])
    delivery = receiver.next()

    assert delivery.is_here
    assert receiver.asked == [payload.nbytes]
    assert receiver.pool is not None
    assert receiver.pool.leased_bytes >= payload.nbytes
    np.testing.assert_equal(value_in(delivery), VALUES[name])
    assert receiver.pulls == 0
    delivery.reply()
    pending.result(WAIT_S)
    asker.withdraw(payload)
    assert asker.statistics().bytes_served == receiver.cell.statistics().bytes_pulled == payload.nbytes
    assert asker.statistics().offers_held == 0


def test_who_has_no_room_pulls_when_he_has(bus: Bus) -> None:
    """What was not taken in is still offered: it costs bytes, and nothing else."""
    asker, receiver = bus.near(), Receiver(bus.far())
    receiver.pool = None
    bring(asker, VALUES["some"])
    delivery = receiver.next()
    assert not delivery.is_here

    np.testing.assert_equal(value_in(delivery), VALUES["some"])
    assert receiver.pulls == 1
    assert delivery.is_here


def test_who_grants_nothing_is_asked_nothing(bus: Bus) -> None:
    """A handler and an inbox without room get the message, and pull."""
    asker, answerer = bus.near(), bus.far()
    answerer.on("test", "take", lambda delivery: float(value_in(delivery).sum()))

    _, pending = bring(asker, VALUES["one"])
    assert pending.result(WAIT_S).value() == VALUES["one"].sum()


def test_what_is_passed_on_is_pulled_from_its_holder(one_bus: Bus) -> None:
    """Who forwards a message forwards its manifest, whether he kept what rode along or not."""
    asker, middle, last = one_bus.near(), Receiver(one_bus.far("middle")), Receiver(one_bus.far())
    payload = asker.share(VALUES["one"], ["middle", "answerer"])
    for pool in (middle.pool, None):
        middle.pool = pool
        asker.request("middle", "test", "take", {"body": payload.body}, payload=payload, bring=True)
        passed = middle.next().message
        assert passed.manifest == payload.manifest
        middle.cell.request("answerer", "test", "take", {"body": payload.body}, payload=payload, bring=True)

        np.testing.assert_equal(value_in(last.next()), VALUES["one"])
    assert last.asked == []
    assert (middle.pulls, last.pulls) == (0, 2)


def test_more_than_a_chunk_never_rides_along(one_bus: Bus) -> None:
    """Control messages wait for no more than a chunk on any way."""
    asker, receiver = one_bus.near(), Receiver(one_bus.far())
    bring(asker, np.ones(CHUNK_BYTES + 1, np.uint8))
    delivery = receiver.next()

    assert receiver.asked == []
    assert value_in(delivery).nbytes == CHUNK_BYTES + 1


@pytest.mark.parametrize("frames", [[], [b"short"], [bytes(400_001)], [bytes(200_000)] * 2, [bytes(400_000), b"more"]])
def test_what_is_not_what_the_manifest_says_is_left(bus: Bus, frames: list[bytes]) -> None:
    """The receiver then pulls as if nothing had come, and the next message is read as what it is."""
    asker, receiver = bus.near(), Receiver(bus.far())
    good, spoiled = asker._carrier.only_chunk, True

    def only_chunk(manifest: Any) -> Any:
        return frames if spoiled else good(manifest)

    asker._carrier.only_chunk = only_chunk  # type: ignore[method-assign]
    bring(asker, VALUES["one"])
    first = receiver.next()
    spoiled = False
    bring(asker, VALUES["some"])
    second = receiver.next()

    # Pieces that together have the right length may be taken where frames are copied anyway.
    assert not first.is_here or sum(map(len, frames)) == 400_000
    if not first.is_here:
        np.testing.assert_equal(value_in(first), VALUES["one"])
    assert second.is_here
    np.testing.assert_equal(value_in(second), VALUES["some"])


def test_it_does_not_go_along_again(one_bus: Bus) -> None:
    """A request that is sent again, over a new connection, brings nothing: the arrays may have changed since."""
    asker, receiver = one_bus.near(), Receiver(one_bus.far())
    _, pending = bring(asker, VALUES["one"])
    delivery = receiver.next()
    asker._loop.run(asker.link_up)
    receiver.cell._loop.run(lambda: None)
    delivery.reply({"n": 1})

    assert pending.result(WAIT_S).plain() == {"n": 1}
    assert receiver.asked == [400_000]
    assert receiver.came.empty()
    (waiting,) = [*asker._requests.waiting(), None][:1]
    assert waiting is None


def test_a_message_that_cannot_be_read_leaves_nothing_on_the_socket(bus: Bus) -> None:
    """What it brought along is skipped with it."""
    asker, receiver = bus.near(), Receiver(bus.far())
    junk = msgpack.packb([1, 17, 3, 0, "test", "take", 0.0, [b"x", "asker", b"I"], None])
    asker._loop.run(asker._send, [b"answerer", b"asker", junk, b"\xc0", b"a", b"b"])
    bring(asker, VALUES["one"])

    np.testing.assert_equal(value_in(receiver.next()), VALUES["one"])
    assert receiver.asked == [400_000]


def test_what_is_over_rides_nowhere(one_bus: Bus) -> None:
    """A payload that was withdrawn is announced without its bytes, and cannot be pulled either."""
    asker, receiver = one_bus.near(), Receiver(one_bus.far())
    payload = asker.share(VALUES["one"], ["answerer"])
    asker.withdraw(payload)
    asker.request("answerer", "test", "take", {"body": payload.body}, payload=payload, bring=True)

    assert isinstance(error_of(receiver.next().pull()), SourceLost)
    assert receiver.asked == []


@pytest.mark.parametrize("error", [MemoryError, OSError])
def test_no_memory_is_no_room(one_bus: Bus, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """Whoever wants the arrays then hears of it when he pulls them."""
    asker, receiver = one_bus.near(), Receiver(one_bus.far())
    assert receiver.pool is not None

    def take(_: Any) -> Any:
        raise error("full")

    monkeypatch.setattr(receiver.pool, "take", take)
    bring(asker, VALUES["one"])
    delivery = receiver.next()

    assert not delivery.is_here
    assert isinstance(error_of(delivery.pull(receiver.pool)), error)
