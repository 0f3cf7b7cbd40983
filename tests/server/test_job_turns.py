"""ServerJob: one site at a time, `send` and `relay`, and what ends them; with hosts that the test plays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from flarebus.errors import JobAborted, QuorumNotReached
from flarebus.model import FLModel
from flarebus.workflow.controller import Result
from tests.server.played import BIG, LIMIT_S, Bus, PlayedHost, task, update


@pytest.fixture
def bus() -> Iterator[Bus]:
    made = Bus()
    yield made
    made.close()


@pytest.fixture
def hosts(bus: Bus) -> dict[str, PlayedHost]:
    """Three sites, each on a host of its own."""
    return {site: bus.host(f"worker-{site}", site) for site in "abc"}


def weight(model: FLModel) -> float:
    assert model.params is not None
    (value,) = set(model.params["w"].tolist())
    return float(value)


def sent(bus: Bus, sites: Sequence[str], **how: Any) -> Future[tuple[str, float]]:
    """Send a task; the future has the site that answered, and its weight."""

    def run() -> tuple[str, float]:
        result = bus.job.send(task(5), sites, **how)
        return result.site, weight(result.model)

    return bus.start(run)


def relayed(bus: Bus, sites: Sequence[str], visit: Any = None, **how: Any) -> Future[list[tuple[str, float]]]:
    """Relay a model; the future has each site that answered, with its weight. `visit` sees each result."""

    def run() -> list[tuple[str, float]]:
        found = []
        for result in bus.job.relay(task(0), sites, **how):
            found.append((result.site, weight(result.model)))
            if visit is not None:
                visit(result)
        return found

    return bus.start(run)


def add_one(host: PlayedHost) -> float:
    """Answer the next task of a host's site with one more; what it had received."""
    work = host.take()
    received = weight(work.model)
    host.answer(host.sites[0], work.number, update(received + 1))
    return received


# --- send


def test_the_first_in_turn_gets_the_task_alone(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """Of several sites that are there the first one named is asked, and nobody else."""
    running = sent(bus, ["b", "a"])

    assert add_one(hosts["b"]) == 5
    assert running.result(LIMIT_S) == ("b", 6.0)
    assert hosts["a"].work.empty()


@pytest.mark.parametrize("any_order", [False, True])
def test_a_turn_lasts_as_long_as_the_assignment_timeout(
    bus: Bus, hosts: dict[str, PlayedHost], any_order: bool
) -> None:
    """Who is not there has so many seconds to come; in any order nobody waits for a turn."""
    bus.lose(hosts["b"])
    running = sent(bus, ["b", "c"], any_order=any_order, assignment_timeout=10)
    if not any_order:
        bus.heard()
        bus.pass_time(9.9)
        bus.heard()
        assert hosts["c"].work.empty()
        bus.pass_time(0.1)
    add_one(hosts["c"])

    assert running.result(LIMIT_S) == ("c", 6.0)


def test_a_site_that_comes_in_its_turn_is_asked(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """A site that is away and comes back within its turn gets the task."""
    bus.lose(hosts["b"])
    running = sent(bus, ["b", "a"], assignment_timeout=10)
    back = bus.back("worker-b2", "b")
    add_one(back)

    assert running.result(LIMIT_S) == ("b", 6.0)


def test_a_site_that_dies_in_its_turn_is_not_waited_for(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """Without an assignment timeout only death ends the turn of a site that is away."""
    bus.lose(hosts["b"])
    running = sent(bus, ["b", "a"])
    bus.bury(hosts["b"])
    add_one(hosts["a"])

    assert running.result(LIMIT_S) == ("a", 6.0)


def test_nobody_there_is_an_error_that_names_each(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """When no turn found its site, the error says what became of each of them."""
    bus.lose(hosts["a"])
    bus.bury(hosts["a"])
    bus.lose(hosts["b"])
    running = sent(bus, ["a", "b", "nobody"], any_order=True, assignment_timeout=10)
    bus.heard()
    bus.pass_time(10)

    with pytest.raises(QuorumNotReached) as caught:
        running.result(LIMIT_S)
    assert caught.value.reasons == {
        "a": "its worker was killed",
        "b": "it was not there in time",
        "nobody": "no such site",
    }


def test_whoever_took_the_task_must_answer_it(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """A site that took the task and fails, or is too slow, is the end of it: nobody else is asked."""
    running = sent(bus, ["a", "b"])
    hosts["a"].answer("a", hosts["a"].take().number, "ValueError: boom")
    with pytest.raises(QuorumNotReached, match="a: ValueError: boom"):
        running.result(LIMIT_S)

    running = sent(bus, ["a", "b"], timeout=30)
    hosts["a"].take()
    bus.pass_time(30)
    with pytest.raises(QuorumNotReached, match="a: no answer within 30 s"):
        running.result(LIMIT_S)
    assert hosts["b"].work.empty()


def test_the_answer_is_the_callers(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """What `send` returned stays as it is, whatever comes after it; refusing it is told."""
    kept: list[Result] = []
    for value in (1, 2):
        running = bus.start(lambda: kept.append(bus.job.send(task(0, BIG), ["a"])))
        hosts["a"].answer("a", hosts["a"].take().number, update(value, BIG))
        running.result(LIMIT_S)

    assert [weight(result.model) for result in kept] == [1.0, 2.0]
    kept[0].refuse("too small")
    assert bus.wait_for("result_refused", site="a") == {"round": 0, "site": "a", "reason": "too small"}


# --- relay


def test_the_model_travels_on(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """Each site receives what the one before it made, in the order that was asked for."""
    running = relayed(bus, ["c", "a", "b"])

    assert [add_one(hosts[site]) for site in "cab"] == [0.0, 1.0, 2.0]
    assert running.result(LIMIT_S) == [("c", 1.0), ("a", 2.0), ("b", 3.0)]


def test_the_loop_decides_what_goes_on(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """What the loop puts in place of a model goes on; what it refuses does not, and its site hears why."""

    def visit(result: Result) -> None:
        if result.site == "a":
            result.model = FLModel(params={"w": np.full(4, 10, np.float32)})
        elif result.site == "b":
            result.refuse("NaN or Inf")

    running = relayed(bus, "abc", visit)
    assert add_one(hosts["a"]) == 0
    work = hosts["b"].take()
    assert weight(work.model) == 10
    assert hosts["b"].answer("b", work.number, update(99)) == (False, "NaN or Inf")
    assert add_one(hosts["c"]) == 10

    assert running.result(LIMIT_S) == [("a", 1.0), ("b", 99.0), ("c", 11.0)]
    assert [failed for _, failed in bus.archive.done] == [{}, {"b": "NaN or Inf"}, {}]  # type: ignore[union-attr]


def test_a_lost_turn_is_passed_over(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """A site that is away too long, fails, is too slow, or is none costs its turn, and the model goes on without it."""
    bus.lose(hosts["a"])
    running = relayed(bus, ["a", "nobody", "b", "c", "b", "c"], assignment_timeout=10, timeout=30)
    bus.heard()
    bus.pass_time(10)
    hosts["b"].answer("b", hosts["b"].take().number, "ValueError: boom")
    add_one(hosts["c"])
    hosts["b"].take()
    bus.pass_time(30)
    assert add_one(hosts["c"]) == 1

    assert running.result(LIMIT_S) == [("c", 1.0), ("c", 2.0)]
    assert [its for event, its in bus.events if event == "turn_lost"] == [
        {"round": 0, "site": "a", "reason": "it was not there in time"},
        {"round": 0, "site": "nobody", "reason": "no such site"},
        {"round": 0, "site": "b", "reason": "ValueError: boom"},
        {"round": 0, "site": "b", "reason": "no answer within 30 s"},
    ]


def test_a_relay_that_nobody_answers_fails(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """When every turn was lost, also those of one site twice, the error says why."""
    running = relayed(bus, ["a", "a", "nobody"])
    for _ in range(2):
        hosts["a"].answer("a", hosts["a"].take().number, "ValueError: boom")

    with pytest.raises(QuorumNotReached) as caught:
        running.result(LIMIT_S)
    assert caught.value.reasons == {"a": "ValueError: boom", "nobody": "no such site"}


def test_leaving_a_relay_asks_nobody_else(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """A loop that is left early ends the relay; the site that has answered hears that it counts."""

    def run() -> str:
        for result in bus.job.relay(task(0), "abc"):
            return result.site
        return ""

    running = bus.start(run)
    assert hosts["a"].answer("a", hosts["a"].take().number, update(1)) == (True, "")

    assert running.result(LIMIT_S) == "a"
    assert hosts["b"].work.empty()


# --- cancel and abort


def test_a_broadcast_is_cancelled_by_another_thread(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """The loop ends with what it had, though the quorum is not there, and the others are told to stop."""
    running = bus.collect(min_responses=3)
    number = hosts["a"].take().number
    hosts["a"].answer("a", number, update(1))
    bus.job.cancel("enough")

    assert running.result(LIMIT_S) == ["a"]
    assert hosts["b"].cancelled.get(timeout=LIMIT_S) == {"number": number, "owner": "", "sites": ["b"]}


def test_a_broadcast_is_cancelled_inside_its_loop(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """What has arrived besides is not used, and its site hears that."""
    here = bus.host("worker-d", "d", "e")

    def run() -> list[str]:
        found = []
        for result in bus.job.broadcast(task()):
            found.append(result.site)
            bus.job.cancel("enough")
        return found

    running = bus.start(run)
    number = here.take().number
    here.send_together(number, {"d": update(1), "e": update(1)}).result(LIMIT_S)

    assert running.result(LIMIT_S) == ["d"]
    assert here.refused.get(timeout=LIMIT_S) == {"site": "e", "number": number, "reason": "the round is closed"}


def test_a_cancelled_task_leaves_the_next_one_alone(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """Cancelling when nothing runs does nothing, to what comes later neither."""
    bus.job.cancel("nothing runs")
    running = sent(bus, ["a"])
    add_one(hosts["a"])

    assert running.result(LIMIT_S) == ("a", 6.0)


def test_a_relay_that_is_cancelled_comes_to_its_end(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """Whether a site has the turn, or one is waited for, or the loop has it."""
    running = relayed(bus, "abc")
    add_one(hosts["a"])
    hosts["b"].take()
    bus.job.cancel("enough")
    assert running.result(LIMIT_S) == [("a", 1.0)]

    running = relayed(bus, "abc", lambda _: bus.job.cancel("enough"))
    add_one(hosts["a"])
    assert running.result(LIMIT_S) == [("a", 1.0)]

    bus.lose(hosts["c"])
    running = relayed(bus, "ca")
    bus.heard()
    bus.job.cancel("enough")
    assert running.result(LIMIT_S) == []
    assert not [event for event, _ in bus.events if event == "turn_lost"]


def test_a_send_that_is_cancelled_says_so(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """There is no answer to return, and no other site is asked."""
    running = sent(bus, "ab")
    hosts["a"].take()
    bus.job.cancel("enough")

    with pytest.raises(QuorumNotReached, match="a: the task was cancelled"):
        running.result(LIMIT_S)
    assert hosts["b"].work.empty()


@pytest.mark.parametrize("kind", ["send", "relay"])
def test_abort_ends_the_wait_for_a_site(bus: Bus, hosts: dict[str, PlayedHost], kind: str) -> None:
    """An abort reaches a controller that waits for a site to come back."""
    bus.lose(hosts["a"])
    running = sent(bus, ["a"]) if kind == "send" else relayed(bus, ["a"])
    bus.job.abort("somebody")

    with pytest.raises(JobAborted, match="somebody"):
        running.result(LIMIT_S)
