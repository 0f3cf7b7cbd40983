"""OpenTask: in what order results are staged and used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import pytest

from flarebus.cell import Payload
from flarebus.model import FLModel
from flarebus.pending import Pending
from flarebus.slab import SlabPool
from flarebus.tasks.open_task import Arrived, OpenTask, Parcel
from flarebus.tasks.tally import Tally
from flarebus.workflow.controller import Task

POOL = SlabPool()
SITES = ("a", "b", "c", "d", "e")


class Message:
    """A delivery whose arrays come when the test says so."""

    nbytes = 4

    def __init__(self) -> None:
        self.arrays: Pending[Any] = Pending()

    def pull(self, _: SlabPool) -> Pending[Any]:
        return self.arrays


def opened(in_order: bool = False, sites: Iterable[str] = SITES) -> OpenTask:
    tally = Tally(sites, 0, None, None, 0.0)
    parcel = Parcel(Task("train", FLModel(), 0), Payload(b"", None, None), sorted(sites))
    return OpenTask(1, [parcel], tally, sorted(sites), in_order)


def comes(task: OpenTask, site: str, here: bool = True) -> Arrived:
    message = Message()
    if here:
        message.arrays.set([])
    arrived = Arrived(site, cast(Any, message), b"")
    task.add(arrived, 0.0)
    return arrived


def stage_all(task: OpenTask) -> list[str]:
    """Stage what can be staged; in which order."""
    staged = []
    while (arrived := task.next_unstaged()) is not None:
        task.stage(arrived, POOL)
        staged.append(arrived.site)
    return staged


def use_all(task: OpenTask) -> list[str]:
    """Use what is ready; in which order."""
    used = []
    while (arrived := task.next_ready()) is not None:
        task.remove(arrived.site)
        task.tally.use(arrived.site, 0.0)
        used.append(arrived.site)
    return used


@pytest.mark.parametrize("in_order", [False, True])
def test_results_are_used_as_they_arrive_or_in_the_order_of_names(in_order: bool) -> None:
    """Staged and used is what has arrived; in order, only as far as nobody is missing before it."""
    task = opened(in_order)
    used = []
    for site in ("c", "a", "e", "b"):
        comes(task, site)
        staged = stage_all(task)
        used.append((staged, use_all(task)))

    if in_order:
        assert used == [([], []), (["a"], ["a"]), ([], []), (["b", "c"], ["b", "c"])]
        task.is_closing = True
        assert (stage_all(task), use_all(task)) == (["e"], ["e"])
    else:
        assert used == [([site], [site]) for site in ("c", "a", "e", "b")]
    assert not task.is_staging
    assert not task.arrived


def test_a_result_that_takes_longer_holds_nobody_up() -> None:
    """Out of order, what is here first is used first."""
    task = opened()
    slow = comes(task, "a", here=False)
    comes(task, "b")
    assert stage_all(task) == ["a", "b"]
    assert use_all(task) == ["b"]
    assert task.is_staging

    cast(Any, slow.delivery).arrays.set([])
    assert use_all(task) == ["a"]


def test_a_result_that_was_lost_may_come_again_in_its_place() -> None:
    """In order, everybody waits for the site whose host died while its result was fetched, and it is fetched first."""
    task = opened(in_order=True)
    for site in "abcd":
        comes(task, site, here=site != "b")
    staged = []
    while len(staged) < 3 and (arrived := task.next_unstaged()) is not None:
        task.stage(arrived, POOL)
        staged.append(arrived.site)
    assert staged == ["a", "b", "c"]
    assert use_all(task) == ["a"]
    task.forget("b")
    assert task.next_unstaged() is None
    assert use_all(task) == []

    again = comes(task, "b")
    assert task.next_unstaged() is again
    assert task.is_awaited(again)
    assert not task.is_awaited(task.arrived["c"])
    assert stage_all(task) == ["b", "d"]
    assert use_all(task) == ["b", "c", "d"]


def test_what_was_lost_before_it_was_fetched_is_not_staged() -> None:
    """Out of order too, only the result that came last counts."""
    task = opened()
    comes(task, "a")
    task.forget("a")
    again = comes(task, "a")
    assert task.next_unstaged() is again
    task.remove("a")
    assert task.next_unstaged() is None
