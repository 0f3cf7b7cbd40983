"""Tally: quorum, grace and deadline of one broadcast, by the clock of the test."""

from __future__ import annotations

import pytest

from flarebus.errors import QuorumNotReached
from flarebus.tasks.tally import Tally

SITES = ("a", "b", "c")


def test_zero_needed_means_a_result_from_every_site() -> None:
    """`min_responses=0` waits for all."""
    tally = Tally(SITES, 0, None, None, now=0.0)
    tally.use("a", 1.0)
    tally.use("b", 1.0)
    assert not tally.is_over(1e9)

    tally.use("c", 2.0)
    assert tally.is_over(2.0)
    tally.close()


def test_without_grace_everybody_alive_is_waited_for() -> None:
    """Reaching the quorum alone ends nothing when no grace is set."""
    tally = Tally(SITES, 1, None, None, now=0.0)
    tally.use("a", 1.0)
    assert not tally.is_over(1e9)
    assert tally.deadline() is None


def test_grace_counts_from_the_quorum() -> None:
    """The others have exactly the grace from the moment the quorum is there."""
    tally = Tally(SITES, 2, 10.0, None, now=0.0)
    tally.use("a", 5.0)
    assert tally.deadline() is None
    tally.use("b", 7.0)
    assert tally.deadline() == 17.0
    assert not tally.is_over(16.9)
    assert tally.is_over(17.0)
    tally.close()
    assert tally.failed == {"c": "no answer in time"}


def test_a_refusal_takes_the_quorum_back() -> None:
    """A result that must not count stops the grace that it had started."""
    tally = Tally(SITES, 2, 10.0, None, now=0.0)
    tally.use("a", 1.0)
    tally.use("b", 1.0)
    tally.fail("b", "NaN")
    assert tally.deadline() is None
    assert not tally.is_over(1e9)
    tally.use("c", 2.0)
    assert tally.is_over(2.0)
    tally.close()


def test_it_is_over_as_soon_as_the_quorum_is_out_of_reach() -> None:
    """Nobody waits for a round that cannot succeed any more, and the error says why for each site."""
    tally = Tally(SITES, 2, None, None, now=0.0)
    tally.fail("a", "died")
    assert not tally.is_over(0.0)
    tally.fail("b", "raised")
    assert tally.is_over(0.0)

    with pytest.raises(QuorumNotReached) as caught:
        tally.close()
    assert caught.value.needed == 2
    assert caught.value.got == 0
    assert caught.value.reasons == {"a": "died", "b": "raised", "c": "no answer"}


def test_the_timeout_bounds_everything() -> None:
    """A round with a timeout ends at it, with what has come by then."""
    tally = Tally(SITES, 1, None, 30.0, now=100.0)
    assert tally.deadline() == 130.0
    tally.use("b", 110.0)
    assert not tally.is_over(129.0)
    assert tally.is_over(130.0)
    tally.close()
    assert tally.failed == {"a": "no answer within 30 s", "c": "no answer within 30 s"}


def test_more_needed_than_there_are_is_over_at_once() -> None:
    """A quorum above the number of sites fails without waiting."""
    tally = Tally(("a",), 2, None, None, now=0.0)
    assert tally.is_over(0.0)
    with pytest.raises(QuorumNotReached, match="0 usable results, 2 needed"):
        tally.close()
