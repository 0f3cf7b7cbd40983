"""Requests and what answers them: an asker and its answerers back to back, over a network that does its worst."""

from __future__ import annotations

import threading
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from flarebus import channel
from flarebus.channel import Answered, Requests
from flarebus.message import Buffer
from tests.core.halves import RARELY, WHICH, LossyMachine, explore, thorough

ASKER = "server"
TARGETS = ("site-1", "site-2")

targets = st.sampled_from(TARGETS)


class Question(NamedTuple):
    """A request on its way."""

    target: str
    number: int


class Answer(NamedTuple):
    """An answer on its way."""

    source: str
    number: int
    frames: Sequence[Buffer]


class Answerer:
    """One answering cell: counts what its handler was given, and answers when it is told to."""

    def __init__(self, name: str, life: int) -> None:
        self.name = name
        self.life = life
        self.answered = Answered()
        self.effects: Counter[int] = Counter()
        self.open: list[int] = []
        self.said: dict[int, Sequence[Buffer]] = {}

    def take(self, number: int) -> list[Answer]:
        """A request is here, for the first time or again."""
        before = self.answered.seen(ASKER, number)
        if before is None:
            self.effects[number] += 1
            self.open.append(number)
            return []
        assert tuple(before) == tuple(self.said.get(number, ()))
        return [Answer(self.name, number, before)] if before else []

    def handle(self, which: int) -> list[Answer]:
        """The handler is done with one of the open requests."""
        number = self.open.pop(which % len(self.open))
        frames = [f"{self.name} {self.life} {number}".encode(), b"body"]
        self.answered.answered(ASKER, number, frames)
        self.said[number] = frames
        return [Answer(self.name, number, frames)]


class ChannelMachine(LossyMachine):
    """One asker, two answerers, and everything that may go wrong between them."""

    def __init__(self) -> None:
        super().__init__()
        self.lives = 0
        self.answerers = {name: Answerer(name, 0) for name in TARGETS}
        self.waiting: dict[int, tuple[str, float | None]] = {}
        self.resolved: Counter[int] = Counter()

    @initialize(first=st.integers(0, 1 << 62))
    def begin(self, first: int) -> None:
        self.requests: Requests[int] = Requests(first)

    def resolve(self, number: int) -> None:
        """What the shell does with a token: it must happen once for each, and only while it waits."""
        self.resolved[number] += 1
        del self.waiting[number]

    def arrive(self, packet: Question | Answer) -> None:
        if isinstance(packet, Question):
            self.flight += self.answerers[packet.target].take(packet.number)
            return
        token = self.requests.answer(packet.number, packet.source)
        assert token == (packet.number if packet.number in self.waiting else None)
        if token is not None:
            self.resolve(token)

    @rule(to=targets, timeout=st.sampled_from([None, 1, 1, 2, 60]))
    def ask(self, to: str, timeout: int | None) -> None:
        number = self.requests.new_id()
        assert number not in self.resolved
        assert number not in self.waiting
        deadline = None if timeout is None else self.now + timeout
        self.requests.begin(number, to, number, deadline, [b"question"])
        self.waiting[number] = (to, deadline)
        self.flight.append(Question(to, number))

    @precondition(lambda self: any(answerer.open for answerer in self.answerers.values()))
    @rule(which=WHICH)
    def handle(self, which: int) -> None:
        busy = [answerer for answerer in self.answerers.values() if answerer.open]
        self.flight += busy[which % len(busy)].handle(which)

    @rule()
    def reconnect(self) -> None:
        """All that was under way is lost; what was not answered is sent again, oldest first."""
        again = self.requests.waiting()
        assert [waiting.token for waiting in again] == list(self.waiting)
        self.flight = [Question(waiting.target, waiting.token) for waiting in again]

    @rule(name=targets, noticed=st.booleans(), happens=RARELY)
    def answerer_dies(self, name: str, noticed: bool, happens: bool) -> None:
        """It comes back knowing nothing; the asker hears that it was gone, or not."""
        if not happens:
            return
        self.lives += 1
        self.answerers[name] = Answerer(name, self.lives)
        if noticed:
            expected = [number for number, (to, _) in self.waiting.items() if to == name]
            assert [waiting.token for waiting in self.requests.lost({name, "else"})] == expected
            for number in expected:
                self.resolve(number)

    @rule(seconds=st.sampled_from([0.5, 1, 2, 60]))
    def elapse(self, seconds: float) -> None:
        self.now += seconds
        expected = {number for number, (_, due) in self.waiting.items() if due is not None and due <= self.now}
        late = [waiting.token for waiting in self.requests.tick(self.now)]
        assert len(late) == len(expected)
        assert set(late) == expected
        for number in late:
            self.resolve(number)

    @precondition(lambda self: self.waiting)
    @rule(which=WHICH, source=st.sampled_from([*TARGETS, "site-9", ""]))
    def forge(self, which: int, source: str) -> None:
        """An answer counts only from whoever was asked."""
        number = list(self.waiting)[which % len(self.waiting)]
        if source != self.waiting[number][0]:
            assert self.requests.answer(number, source) is None
        assert self.requests.answer(number + 1_000_000, self.waiting[number][0]) is None

    @precondition(lambda self: self.waiting)
    @rule(which=WHICH)
    def cannot_send(self, which: int) -> None:
        """A request that could not even be sent is taken out, once."""
        number = list(self.waiting)[which % len(self.waiting)]
        assert self.requests.fail(number) == number
        assert self.requests.fail(number) is None
        self.resolve(number)

    @invariant()
    def every_request_is_resolved_once(self) -> None:
        assert all(count == 1 for count in self.resolved.values())

    @invariant()
    def effects_happen_once(self) -> None:
        for answerer in self.answerers.values():
            assert all(count == 1 for count in answerer.effects.values())

    @invariant()
    def the_asker_knows_who_waits_and_until_when(self) -> None:
        if hasattr(self, "requests"):
            assert len(self.requests) == len(self.waiting)
            deadlines = [deadline for _, deadline in self.waiting.values() if deadline is not None]
            assert self.requests.next_event() == min(deadlines, default=None)

    def teardown(self) -> None:
        """Once the network heals and handlers end, every request has its answer."""
        if hasattr(self, "requests"):
            self.reconnect()
            self.drain()
            for answerer in self.answerers.values():
                while answerer.open:
                    self.flight += answerer.handle(0)
            self.drain()

            assert not self.waiting
            assert len(self.requests) == 0


def test_requests_survive_any_network() -> None:
    """Whatever is lost, repeated, reordered or killed: one effect in each life, one outcome for each request."""
    explore(ChannelMachine, examples=80, steps=60)


def test_ids_are_given_out_once_on_any_thread() -> None:
    """Threads that ask at once never share an id."""
    requests: Requests[None] = Requests(0)
    found: list[list[int]] = [[] for _ in range(4)]
    start = threading.Barrier(len(found))

    def draw(ids: list[int]) -> None:
        start.wait()
        ids += [requests.new_id() for _ in range(2000)]

    threads = [threading.Thread(target=draw, args=(ids,)) for ids in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(chain(*found)) == list(range(8000))


def test_a_deadline_is_met_to_the_instant() -> None:
    """A request waits right up to its deadline and not at it; an answer that comes later finds nobody."""
    requests: Requests[str] = Requests(7)
    requests.begin(7, "site-1", "token", 10.0, [b"frame"])

    assert requests.tick(9.999) == []
    [late] = requests.tick(10.0)
    assert (late.target, late.deadline, late.token, late.frames) == ("site-1", 10.0, "token", [b"frame"])
    assert requests.answer(7, "site-1") is None
    assert requests.next_event() is None


def test_without_a_deadline_a_request_waits_for_ever() -> None:
    """Time alone never ends it; its target's death does."""
    requests: Requests[str] = Requests(0)
    requests.begin(0, "site-1", "token", None, ())

    assert requests.tick(1e12) == []
    assert requests.next_event() is None
    assert requests.lost(["site-2"]) == []
    assert [waiting.token for waiting in requests.lost(["site-1"])] == ["token"]
    assert requests.lost(["site-1"]) == []
    assert requests.answer(0, "site-1") is None


def test_answered_requests_leave_nothing_behind() -> None:
    """Memory follows what waits, not what was ever asked, however far away the deadlines are."""
    requests: Requests[int] = Requests(0)
    requests.begin(-1, "site-1", -1, 10.0, ())
    tracemalloc.start()
    try:
        for number in range(20_000):
            requests.begin(number, "site-1", number, 3600.0 + number, ())
            requests.answer(number, "site-1")
        grown = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()

    assert grown < 500_000
    assert requests.next_event() == 10.0
    assert [waiting.token for waiting in requests.tick(3600.0)] == [-1]


@given(st.lists(st.integers(0, 100), min_size=3, max_size=60), st.data())
@thorough(100)
def test_sweeping_loses_no_deadline(deadlines: list[int], data: st.DataObject) -> None:
    """Whatever was answered in between, the rest run out in the order of their deadlines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel, "SPARE_DEADLINES", 0)
        requests: Requests[int] = Requests(0)
        for number, deadline in enumerate(deadlines):
            requests.begin(number, "site-1", number, float(deadline), ())
        kept = data.draw(st.sets(st.integers(0, len(deadlines) - 1), max_size=len(deadlines) // 3))
        for number in set(range(len(deadlines))) - kept:
            assert requests.answer(number, "site-1") == number
        # Begun and answered, it makes the sweep happen now.
        requests.begin(-1, "site-1", -1, 1000.0, ())
        requests.answer(-1, "site-1")

        ran_out = []
        while (due := requests.next_event()) is not None:
            ran_out += [(due, waiting.token) for waiting in requests.tick(due)]
        assert ran_out == sorted((float(deadlines[number]), number) for number in kept)


def test_a_request_sent_again_gets_the_same_answer() -> None:
    """The very frames that were sent before; nothing while it is being handled; requests of others are others."""
    answered = Answered()
    frames = [b"answer"]

    assert answered.seen("server", 1) is None
    assert answered.seen("server", 1) == ()
    answered.answered("server", 1, frames)
    assert answered.seen("server", 1) is frames
    assert answered.seen("server", 2) is None
    assert answered.seen("site-1", 1) is None


def test_the_first_answer_stands() -> None:
    """A handler that answers twice does not change what was said, nor what is counted."""
    answered = Answered()
    answered.seen("server", 1)
    answered.answered("server", 1, [b"first"])
    answered.answered("server", 1, [b"second"])

    assert answered.seen("server", 1) == [b"first"]
    assert len(answered) == 1


def test_an_answer_to_nothing_is_not_remembered() -> None:
    """Who never asked, or was forgotten meanwhile, takes no memory."""
    answered = Answered()
    answered.answered("server", 1, [b"x"])

    assert len(answered) == 0
    assert answered.seen("server", 1) is None


def test_memory_for_answers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither many requests nor large answers are remembered beyond the limits; the newest are kept longest."""
    monkeypatch.setattr(channel, "REMEMBERED", 10)
    monkeypatch.setattr(channel, "REMEMBERED_BYTES", 1000)
    answered = Answered()
    for number in range(50):
        answered.seen("server", number)
        answered.answered("server", number, [b"a", b"b"])
    assert len(answered) == 10
    assert [number for number in range(40, 50) if answered.seen("server", number)] == list(range(40, 50))
    for number in range(100, 110):
        answered.seen("server", number)
        answered.answered("server", number, [bytes(200), bytes(200)])
    assert len(answered) == 2
    assert answered.seen("server", 109) == [bytes(200), bytes(200)]
    for number in range(200, 250):
        answered.seen("server", number)

    assert len(answered) == 12
    assert [number for number in range(240, 250) if answered.seen("server", number) == ()] == list(range(240, 250))


def test_an_answer_over_the_limit_is_still_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """One answer is kept whatever its size, or a large one would have its effect twice; it goes with the next."""
    monkeypatch.setattr(channel, "REMEMBERED_BYTES", 10)
    answered = Answered()
    answered.seen("server", 1)
    answered.answered("server", 1, [bytes(100)])
    assert answered.seen("server", 1) == [bytes(100)]
    answered.seen("server", 2)
    answered.answered("server", 2, [b"small"])

    assert answered.seen("server", 2) == [b"small"]
    assert len(answered) == 1


def test_answers_do_not_push_out_open_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that takes hours is not begun again because many small ones were answered meanwhile."""
    monkeypatch.setattr(channel, "REMEMBERED", 10)
    monkeypatch.setattr(channel, "REMEMBERED_BYTES", 100)
    answered = Answered()
    answered.seen("server", 0)
    for number in range(1, 1000):
        answered.seen("server", number)
        answered.answered("server", number, [bytes(30)])

    assert answered.seen("server", 0) == ()
    answered.answered("server", 0, [b"done at last"])
    assert answered.seen("server", 0) == [b"done at last"]
