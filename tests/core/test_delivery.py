"""Deliveries and lanes without a bus."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest

from flarebus.cell import Cell
from flarebus.codec import encode
from flarebus.delivery import Delivery, Lane
from flarebus.errors import DecodeError, SourceLost
from flarebus.message import Buffer, Kind, Manifest, Message
from flarebus.pending import Pending
from flarebus.slab import SlabPool
from tests.core.bus import WAIT_S, wait_for


class FakeCell:
    """What a delivery asks of its cell."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.pulls: list[tuple[Manifest, str, SlabPool | None, bool]] = []
        self.pulled: Pending[Sequence[Buffer]] = Pending()
        self.answered = threading.Event()

    def pull(
        self, manifest: Manifest, target: str, pool: SlabPool | None, tell_done: bool, order: bool
    ) -> Pending[Sequence[Buffer]]:
        self.pulls.append((manifest, target, pool, tell_done))
        return self.pulled

    def reply(self, message: Message, value: Any) -> None:
        self.answers.append((message.id, value))
        self.answered.set()

    def reply_failure(self, message: Message, error: BaseException) -> None:
        self.answers.append((message.id, error))
        self.answered.set()


@pytest.fixture
def cell() -> FakeCell:
    return FakeCell()


@pytest.fixture
def lane() -> Iterator[Lane]:
    """A lane whose thread ends with the test."""
    lane = Lane("test")
    yield lane
    lane.close()
    lane._thread.join(WAIT_S)
    assert not lane._thread.is_alive()


def delivery(cell: FakeCell, number: int = 1, value: Any = None, manifest: Manifest | None = None) -> Delivery:
    message = Message(
        "here", "there", Kind.REQUEST, number, channel="a", topic="b", body=encode(value).body, manifest=manifest
    )
    return Delivery(cast(Cell, cell), message)


def test_a_small_delivery_is_all_there(cell: FakeCell) -> None:
    """Its value needs no pull, and each reading gives a value of its own."""
    small = delivery(cell, value={"a": [1]})

    first, second = small.value(), small.plain()

    assert first == second == {"a": [1]}
    assert first is not second
    assert (small.source, small.nbytes, cell.pulls) == ("there", 0, [])


def test_a_large_delivery_is_pulled_once(cell: FakeCell) -> None:
    """Nothing is brought before it is asked for, then once, for the name the message went to, into the given pool."""
    manifest, pool = Manifest(bytes(16), "holder", (3, 4)), SlabPool()
    large = delivery(cell, manifest=manifest)
    assert large.nbytes == 7
    assert large.plain() is None
    assert cell.pulls == []

    assert large.pull(pool) is large.pull()
    # The answer tells the asker that it is done.
    assert cell.pulls == [(manifest, "here", pool, False)]
    cell.pulled.fail(SourceLost("holder"))

    with pytest.raises(SourceLost):
        large.value()


def test_a_value_that_is_none_is_an_error(cell: FakeCell) -> None:
    """A body that the codec did not make raises where it is read."""
    with pytest.raises(DecodeError):
        Delivery(cast(Cell, cell), Message("a", "b", Kind.EVENT, 1, body=b"\xc1")).value()


def test_a_lane_handles_in_order(cell: FakeCell, lane: Lane) -> None:
    """Deliveries are handled one after the other on one thread, and each is answered with what its handler returns."""
    threads: set[int] = set()

    def handle(delivery: Delivery) -> int:
        threads.add(threading.get_ident())
        return delivery.message.id * 2

    for number in range(50):
        lane.put(handle, delivery(cell, number))
    done = threading.Event()
    lane.put(lambda _: done.set(), delivery(cell, 50))
    wait_for(done)

    assert cell.answers[:50] == [(number, number * 2) for number in range(50)]
    assert len(threads) == 1


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_a_lane_outlives_its_handlers(cell: FakeCell, lane: Lane, error: BaseException) -> None:
    """Whatever a handler raises is the answer, and the next delivery is handled."""

    def fail(_: Delivery) -> None:
        raise error

    lane.put(fail, delivery(cell, 1))
    done = threading.Event()
    lane.put(lambda _: done.set(), delivery(cell, 2))
    wait_for(done)

    assert cell.answers[0] == (1, error)


def test_a_lane_pulls_before_it_handles(cell: FakeCell, lane: Lane) -> None:
    """A large delivery keeps its place: what came after it waits until it is here, and a lost one is answered."""
    seen: list[int] = []
    lane.put(lambda d: seen.append(d.message.id), delivery(cell, 1, manifest=Manifest(bytes(16), "holder", (3,))))
    done = threading.Event()
    lane.put(lambda d: (seen.append(d.message.id), done.set()), delivery(cell, 2))
    assert seen == []

    cell.pulled.fail(SourceLost("holder"))
    wait_for(done)

    assert seen == [2]
    assert isinstance(cell.answers[0][1], SourceLost)


def test_a_closed_lane_ends_after_what_it_has(cell: FakeCell) -> None:
    """What was queued before the end is handled; what waits is counted."""
    lane = Lane("test")
    entered, leave = threading.Event(), threading.Event()
    lane.put(lambda _: (entered.set(), leave.wait(WAIT_S)), delivery(cell, 1))
    wait_for(entered)
    lane.put(lambda _: None, delivery(cell, 2))
    assert len(lane) == 1

    lane.close()
    lane.close()
    leave.set()
    lane._thread.join(WAIT_S)

    assert [number for number, _ in cell.answers] == [1, 2]
    assert not lane._thread.is_alive()
