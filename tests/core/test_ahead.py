"""Transfers sent ahead: who gets them, how many wait on the way, and what a receiver keeps of them."""

from __future__ import annotations

from flarebus.ahead import MAX_HOLDERS, MAX_ORDERS, Ahead, Orders
from flarebus.transfer import Offer, Offers

ONE, TWO, THREE = (bytes([n]) * 16 for n in (1, 2, 3))


def offer(*receivers: str) -> Offer:
    return Offers("holder").add(ONE, [b"abc"], receivers, 0.0)


def test_a_chunk_goes_to_whoever_has_ordered_and_may_have_it() -> None:
    """Orders of others, of cells elsewhere, and of names that only look alike bring nothing."""
    orders = Orders()
    for name in ("site-1.job.0.x", "site-1.job", "site-1.jobs", "site-2.job.0.y"):
        orders.add(name)

    assert orders.take(offer("site-2"), "site-1.job") == []
    assert orders.take(offer("site-1", "site-2"), "site-1.job") == ["site-1.job.0.x", "site-1.job"]


def test_nothing_more_is_sent_before_the_receiver_was_heard() -> None:
    """Of a receiver that stands still one chunk waits on the way, however many are offered."""
    orders = Orders()
    orders.add("site")
    orders.heard("somebody else")

    assert orders.take(offer("site"), "site") == ["site"]
    assert orders.take(offer("site"), "site") == []
    orders.heard("site")
    assert orders.take(offer("site"), "site") == ["site"]


def test_who_is_gone_gets_nothing_and_orders_are_bounded() -> None:
    """The next one of that name orders anew."""
    orders = Orders()
    for number in range(MAX_ORDERS + 1):
        orders.add(f"site-{number}")
    orders.lost(["site-0"])

    assert orders.take(offer("site-0"), "site-0") == []
    assert orders.take(offer(f"site-{MAX_ORDERS}"), f"site-{MAX_ORDERS}") == []


def test_only_what_was_ordered_is_kept_and_of_each_holder_the_last() -> None:
    """A stranger cannot fill this cell, nor can a holder with what nobody asks for."""
    ahead: Ahead[str] = Ahead()
    assert ahead.order("holder") is True
    assert ahead.order("holder") is False
    ahead.put("stranger", ONE, "foreign")
    ahead.put("holder", ONE, "one")
    ahead.put("holder", TWO, "two")

    assert ahead.take("stranger", ONE) is None
    assert ahead.take("holder", ONE) is None
    assert ahead.take("holder", TWO) == "two"
    assert ahead.take("holder", TWO) is None


def test_a_chunk_that_comes_after_its_pull_is_dropped() -> None:
    """It would lie there until the next one comes."""
    ahead: Ahead[str] = Ahead()
    ahead.order("holder")
    assert ahead.take("holder", ONE) is None
    ahead.put("holder", ONE, "late")

    assert ahead.take("holder", ONE) is None


def test_orders_of_a_receiver_are_few_and_end_with_the_holder() -> None:
    """It keeps so many chunks at most; whoever comes back is ordered from again."""
    ahead: Ahead[str] = Ahead()
    assert [ahead.order(f"holder-{n}") for n in range(MAX_HOLDERS + 1)] == [True] * MAX_HOLDERS + [False]
    ahead.put("holder-0", ONE, "one")
    ahead.put("holder-1", TWO, "two")
    ahead.forget(["holder-0"])

    assert ahead.take("holder-0", ONE) is None
    assert ahead.order("holder-0") is True
    ahead.forget(None)
    assert ahead.take("holder-1", TWO) is None
    assert ahead.order("holder-1") is True
