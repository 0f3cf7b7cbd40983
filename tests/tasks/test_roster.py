"""Roster: which site lives where, and which will not come back."""

from __future__ import annotations

from flarebus.tasks.roster import Roster


def test_sites_are_reached_through_their_host_while_it_is_there() -> None:
    """A site has a host from its join to its host's leaving, and again when it is back."""
    roster = Roster()
    roster.join("worker-1", ["b", "a"])
    assert roster.host_of("a") == "worker-1"

    roster.leave("worker-1")
    assert roster.host_of("a") is None
    assert roster.alive == ["a", "b"]

    roster.join("worker-1", ["a", "b"])
    assert roster.hosts == ["worker-1"]


def test_a_host_speaks_for_its_own_sites_only() -> None:
    """An answer for another host's site is not a host's to give."""
    roster = Roster()
    roster.join("worker-1", ["a"])
    roster.join("worker-2", ["b"])
    assert roster.runs("worker-1", "a")
    assert not roster.runs("worker-1", "b")
    assert not roster.runs("worker-3", "a")


def test_the_buried_are_not_alive_until_they_join_again() -> None:
    """A dead site gets no work; one that joins is alive whatever was said of it."""
    roster = Roster()
    roster.join("worker-1", ["a", "b"])
    roster.bury("a", "killed three times")
    assert roster.alive == ["b"]
    assert roster.dead == {"a": "killed three times"}

    roster.join("worker-1", ["a"])
    assert roster.alive == ["a", "b"]


def test_sites_are_grouped_by_the_hosts_that_are_there() -> None:
    """A broadcast needs one message a host, and none for a host that is away."""
    roster = Roster()
    roster.join("worker-1", ["a", "c"])
    roster.join("worker-2", ["b"])
    roster.join("worker-3", ["d"])
    roster.leave("worker-3")
    assert roster.by_host(["a", "b", "c", "d"]) == {"worker-1": ["a", "c"], "worker-2": ["b"]}
