"""Links: two ends of a connection, each with its own clock of signs of life."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flarebus.errors import DecodeError
from flarebus.link import HEARTBEAT_S, MAX_NAMES, SILENCE_S, Link, Verb, decode_names, encode_names
from tests.core.halves import thorough


class End:
    """One end: speaks when its link says so, and is dead from `dies` on."""

    def __init__(self, dies: float, lost: list[bool]) -> None:
        self.link = Link(0.0)
        self.dies = dies
        self.lost = lost
        self.found_silent: float | None = None

    def speaks(self, now: float) -> bool:
        """Whether a sign of life leaves this end now, and arrives."""
        if now >= self.dies or not self.link.should_ping(now):
            return False
        self.link.spoke(now)
        return not (self.lost and self.lost.pop(0))


def run(one: End, other: End, until: float) -> None:
    """Let both ends do what their links ask for, and only when they asked to be woken."""
    now, steps = 0.0, 0
    while now < until:
        now = min(end.link.next_event() for end in (one, other) if end.found_silent is None and now < end.dies)
        steps += 1
        assert steps < 1000, "a link wakes its shell without a cause"
        for end, peer in ((one, other), (other, one)):
            if end.speaks(now):
                peer.link.heard(now)
        for end in (one, other):
            if end.found_silent is None and end.link.is_silent(now):
                end.found_silent = now
                if now < end.dies:
                    return


NEVER = float("inf")
# At most two signs of life in a row are lost; the third would be silence.
few_losses = st.lists(
    st.sampled_from([(False,), (True, False), (True, True, False)]).map(list),
    max_size=40,
).map(lambda runs: [lost for run in runs for lost in run])


@given(few_losses, few_losses)
@thorough(100)
def test_an_idle_pair_lives_for_ever(one: list[bool], other: list[bool]) -> None:
    """With nothing to say, and two beats of three lost, neither end takes the other for dead."""
    ends = End(NEVER, one), End(NEVER, other)
    run(*ends, until=600.0)

    assert [end.found_silent for end in ends] == [None, None]


@given(st.floats(0.0, 300.0), few_losses)
@thorough(100)
def test_death_is_noticed_within_the_silence(dies: float, lost: list[bool]) -> None:
    """Whenever one end stops, the other knows at most one silence later, and not before it could."""
    living, dying = End(NEVER, []), End(dies, lost)
    run(living, dying, until=dies + SILENCE_S)

    assert living.found_silent is not None
    assert dies <= living.found_silent <= dies + SILENCE_S


def test_an_end_that_only_listens_still_beats() -> None:
    """Hearing a lot is no reason not to say something."""
    link = Link(100.0)
    for tenths in range(1, 51):
        link.heard(100.0 + tenths / 10)

    assert link.next_event() == 105.0
    assert not link.should_ping(104.999)
    assert link.should_ping(105.0)


def test_an_end_that_only_talks_still_hears_silence() -> None:
    """Saying a lot is no sign that anybody is there."""
    link = Link(100.0)
    for seconds in range(1, 15):
        link.spoke(100.0 + seconds)

    assert link.next_event() == 115.0
    assert not link.is_silent(114.999)
    assert link.is_silent(115.0)


def test_intervals_are_arguments() -> None:
    """A link beats as often as it is told, and three beats fit into a silence by default."""
    link = Link(0.0, heartbeat_s=0.5, silence_s=2.0)

    assert link.next_event() == 0.5
    assert link.should_ping(0.5)
    assert not link.is_silent(1.999)
    assert link.is_silent(2.0)
    assert SILENCE_S >= 3 * HEARTBEAT_S


def test_verbs_are_one_byte_each() -> None:
    """No two verbs look alike, and the byte from the wire compares equal to its verb."""
    assert len(Verb) == len(Verb.__members__)
    assert all(len(verb.value) == 1 for verb in Verb)
    assert [Verb(verb.value) for verb in Verb] == list(Verb)
    assert Verb.HELLO == b"\xe1"


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}", fullmatch=True)


@given(st.lists(names))
@thorough(100)
def test_names_come_back(names: list[str]) -> None:
    """Names travel as they are, in order, and any number of them."""
    assert decode_names(encode_names(names)) == names
    assert decode_names(encode_names(iter(names))) == names


def test_names_have_limits() -> None:
    """Up to the limits they are names, and beyond them an error."""
    assert decode_names(b"x" * 255) == ["x" * 255]
    assert len(decode_names(b" ".join([b"x"] * MAX_NAMES))) == MAX_NAMES
    with pytest.raises(DecodeError, match="long"):
        decode_names(b"x" * 256)
    with pytest.raises(DecodeError, match=f"{MAX_NAMES}"):
        decode_names(b" ".join([b"x"] * (MAX_NAMES + 1)))


@pytest.mark.parametrize(
    "body", [b" ", b"site-1 ", b" site-1", b"site-1  site-2", b"\xff", "sité-1".encode(), b"a\x80"]
)
def test_anything_else_is_no_list_of_names(body: bytes) -> None:
    """Empty names, and bytes that are no plain letters, are one error."""
    with pytest.raises(DecodeError, match="names"):
        decode_names(body)


def test_endless_names_cost_next_to_nothing() -> None:
    """A frame full of names is refused before it is taken apart."""
    body = b"x " * (2 * 1024 * 1024)
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match="names"):
            decode_names(body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 100_000


@given(st.binary(max_size=60))
@thorough(200)
def test_noise_is_names_or_an_error(body: bytes) -> None:
    """Whatever bytes come, the outcome is a list of names or one kind of error."""
    try:
        names = decode_names(body)
    except DecodeError:
        return
    assert all(type(name) is str and name for name in names)
