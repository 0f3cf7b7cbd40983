"""ServerJob: what a task may be: one for each site, for newcomers, with results that stay where they were made."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from flarebus.errors import FilterFailed, QuorumNotReached, UsageError
from flarebus.job.class_ref import ClassRef
from flarebus.job.executor_ref import ExecutorRef
from flarebus.job.filter_ref import FilterRef
from flarebus.model import FLModel
from flarebus.workflow.controller import Report, Task
from flarebus.workflow.filter import Filter, FilterTask
from flarebus.workflow.held import HeldModel
from tests.pipes.links import wait_until
from tests.server.played import BIG, LIMIT_S, Bus, PlayedHost, a_job, task, told, update


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


# --- a task for each site


@pytest.mark.parametrize("size", [4, BIG], ids=["inline", "transfer"])
def test_each_site_gets_its_own(bus: Bus, size: int) -> None:
    """Sites of one host may be given different models; those that share one share its message."""
    host, other = bus.host("worker-1", "a", "b", "c"), bus.host("worker-2", "d")
    same, own = task(1, size), task(2, size)
    running = bus.start(lambda: {r.site: weight(r.model) for r in bus.job.broadcast({"a": same, "c": same, "b": own})})
    works = [host.take(), host.take()]

    assert sorted((work.sites, weight(work.model)) for work in works) == [(["a", "c"], 1.0), (["b"], 2.0)]
    assert len({work.number for work in works}) == 1
    for work in works:
        for site in work.sites:
            host.answer(site, work.number, update(weight(work.model) + 10, size))
    assert running.result(LIMIT_S) == {"a": 11.0, "b": 12.0, "c": 11.0}
    assert other.work.empty()


def test_some_of_those_that_have_a_task_may_be_asked(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """`sites` picks among the tasks."""
    running = bus.start(lambda: [r.site for r in bus.job.broadcast({s: task() for s in "abc"}, sites=["b"])])
    hosts["b"].answer("b", hosts["b"].take().number, update(1))

    assert running.result(LIMIT_S) == ["b"]
    assert hosts["a"].work.empty()


def test_a_site_that_comes_back_gets_its_own_again(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """Who joins again in the middle gets the task that was meant for it."""
    tasks = {"a": task(1), "b": task(2)}
    running = bus.start(lambda: {r.site: weight(r.model) for r in bus.job.broadcast(tasks)})
    hosts["b"].take()
    hosts["b"].die()
    back = bus.back("worker-b2", "b")
    for host in (hosts["a"], back):
        work = host.take()
        host.answer(host.sites[0], work.number, work.model)

    assert running.result(LIMIT_S) == {"a": 1.0, "b": 2.0}


# --- newcomers


def test_newcomers_get_the_task(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """A site that joins meanwhile, known before or not, gets what all got; only leaving the loop is the end."""

    def run() -> list[str]:
        found = []
        for result in bus.job.broadcast(task(7), sites=["a", "e"], newcomers=True):
            found.append(result.site)
            if len(found) == 3:
                return found
        return found

    running = bus.start(run)
    hosts["a"].answer("a", hosts["a"].take().number, update(1))
    for name in "de":
        host = bus.back(f"worker-{name}", name)
        work = host.take()
        assert (work.sites, weight(work.model)) == ([name], 7.0)
        host.answer(name, work.number, update(1))

    assert running.result(LIMIT_S) == ["a", "d", "e"]
    assert hosts["b"].work.empty()


def test_a_task_for_newcomers_may_begin_with_nobody_and_ends_in_time(bus: Bus) -> None:
    """Without a quorum its timeout is a good end, with one it is the usual one."""
    running = bus.collect(newcomers=True, timeout=30)
    host = bus.back("worker-1", "a")
    host.answer("a", host.take().number, update(1))
    bus.pass_time(30)
    assert running.result(LIMIT_S) == ["a"]

    running = bus.collect(newcomers=True, timeout=30, min_responses=2)
    host.answer("a", host.take().number, update(1))
    bus.pass_time(30)
    with pytest.raises(QuorumNotReached):
        running.result(LIMIT_S)


def test_nobody_knows_the_own_task_of_a_newcomer(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """A task for each site and newcomers do not go together."""
    running = bus.start(lambda: list(bus.job.broadcast({"a": task()}, newcomers=True)))

    with pytest.raises(UsageError, match="one task for all"):
        running.result(LIMIT_S)


# --- results that stay where they were made


class Keeper:
    """A controller whose results stay with their sites."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.held: dict[str, HeldModel] = {}
        self.metrics: dict[str, Any] = {}

    def gather(self) -> None:
        for result in self.bus.job.broadcast(task(0, BIG), sites=["a"], fetch=False):
            assert result.held is not None
            assert result.model.params is None
            self.held[result.site] = result.held
            self.metrics[result.site] = result.model.metrics

    def pass_on(self, sites: str, **how: Any) -> dict[str, float]:
        """Give a's model to `sites`; the weights of their answers."""
        passed = Task("validate", self.held["a"], 1, 3, {"of": "a"})
        return {r.site: weight(r.model) for r in self.bus.job.broadcast(passed, sites=list(sites), **how)}


@pytest.fixture
def keeper(bus: Bus, hosts: dict[str, PlayedHost]) -> Keeper:
    """What a has made is held there."""
    made = Keeper(bus)
    running = bus.start(made.gather)
    work = hosts["a"].take()
    hosts["a"].sent = hosts["a"].send("a", work.number, update(3, BIG, loss=0.5), readers=work.readers)  # type: ignore[attr-defined]
    running.result(LIMIT_S)
    return made


def test_a_held_result_goes_from_site_to_site(bus: Bus, hosts: dict[str, PlayedHost], keeper: Keeper) -> None:
    """Its arrays go straight from their holder to whoever is given them; the server sees what is around them."""
    assert keeper.metrics == {"a": {"loss": 0.5}}
    assert keeper.held["a"].nbytes == BIG * 4
    running = bus.start(lambda: keeper.pass_on("bc", min_responses=2))
    for site in "bc":
        work = hosts[site].take()
        assert (work.task, work.round, weight(work.model)) == ("validate", 1, 3.0)
        assert (work.model.metrics, work.model.meta["of"], work.model.current_round) == ({"loss": 0.5}, "a", 1)
        hosts[site].answer(site, work.number, update(weight(work.model)))

    assert running.result(LIMIT_S) == {"b": 3.0, "c": 3.0}
    assert bus.cell.statistics().bytes_pulled == 0
    assert hosts["a"].cell.statistics().bytes_served == 2 * BIG * 4


def test_a_held_result_is_answered_when_it_is_released(bus: Bus, hosts: dict[str, PlayedHost], keeper: Keeper) -> None:
    """Its site keeps it until then; a second release changes nothing."""
    sent = hosts["a"].sent  # type: ignore[attr-defined]
    assert not sent.is_done
    keeper.held["a"].release()
    keeper.held["a"].release()

    assert told(sent) == (True, "")


def test_a_small_result_is_held_in_its_message(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """What came along can be passed on though its site has died since."""
    keeper = Keeper(bus)
    running = bus.start(keeper.gather)
    hosts["a"].send("a", hosts["a"].take().number, update(3))
    running.result(LIMIT_S)
    bus.lose(hosts["a"])
    running = bus.start(lambda: keeper.pass_on("b"))
    work = hosts["b"].take()
    hosts["b"].answer("b", work.number, work.model)

    assert running.result(LIMIT_S) == {"b": 3.0}


def test_who_is_given_what_a_dead_site_held_hears_so(bus: Bus, hosts: dict[str, PlayedHost], keeper: Keeper) -> None:
    """The source is lost: that is the reason why the task failed, at once."""
    bus.lose(hosts["a"])
    running = bus.start(lambda: keeper.pass_on("b"))

    with pytest.raises(QuorumNotReached, match=r"b: could not take the task: .*worker-a"):
        running.result(LIMIT_S)


def test_a_held_result_that_is_refused_is_let_go(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """Its site hears why, and need not keep it."""

    def run() -> list[str]:
        found = []
        for result in bus.job.broadcast(task(0, BIG), sites=["a", "b"], min_responses=1, fetch=False, in_order=True):
            found.append(result.site)
            if result.site == "a":
                result.refuse("no metrics")
        return found

    running = bus.start(run)
    works = [hosts[site].take() for site in "ab"]
    refused, kept = (
        hosts[site].send(site, work.number, update(1, BIG), readers=work.readers)
        for site, work in zip("ab", works, strict=True)
    )

    assert running.result(LIMIT_S) == ["a", "b"]
    assert told(refused) == (False, "no metrics")
    assert not kept.is_done


def test_send_may_leave_its_result_too(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """The answer to `send` stays where it is and is passed on like any other."""
    keeper = Keeper(bus)

    def run() -> None:
        result = bus.job.send(task(0, BIG), ["a"], fetch=False)
        assert result.held is not None
        keeper.held["a"] = result.held

    running = bus.start(run)
    work = hosts["a"].take()
    hosts["a"].send("a", work.number, update(4, BIG), readers=work.readers)
    running.result(LIMIT_S)
    passed = bus.start(lambda: keeper.pass_on("b"))
    work = hosts["b"].take()
    hosts["b"].answer("b", work.number, work.model)

    assert passed.result(LIMIT_S) == {"b": 4.0}


@pytest.mark.parametrize("where", ["meta", "metrics"])
def test_what_cannot_be_read_without_its_arrays_is_not_held(bus: Bus, hosts: dict[str, PlayedHost], where: str) -> None:
    """Arrays in metrics or meta would have to be fetched: such a result fails its site."""
    running = bus.start(lambda: list(bus.job.broadcast(task(0, BIG), sites=["a"], fetch=False)))
    work = hosts["a"].take()
    model = FLModel(params={"w": np.zeros(BIG, np.float32)}, **{where: {"x": np.zeros(3)}})
    hosts["a"].send("a", work.number, model, readers=work.readers)

    with pytest.raises(QuorumNotReached, match="its metrics or meta hold arrays"):
        running.result(LIMIT_S)


@pytest.mark.parametrize("most", [1, 2])
def test_no_more_are_fetched_at_once_than_was_said(bus: Bus, most: int) -> None:
    """`most_staged` bounds the results that are fetched and not yet used, the one in use left out; small ones, which
    come along with their messages, do not count."""
    host = bus.host("worker-1", *"abcd")
    seen: list[int] = []

    def run() -> None:
        for _ in bus.job.broadcast(task(0, 4 * BIG), most_staged=most):
            bus.job._agenda.take_waiting()
            open_task = bus.job._desk._open
            assert open_task is not None
            seen.append(len(open_task._staged))

    running = bus.start(run)
    number = host.take().number
    sent = [host.send(site, number, update(1, 4 * BIG)) for site in "abcd"]
    assert [told(each) for each in sent] == [(True, "")] * 4
    running.result(LIMIT_S)

    assert len(seen) == 4
    assert max(seen) < most


# --- filters of the server


class Double(Filter):
    """Doubles weights."""

    def process(self, model: FLModel, task: FilterTask) -> FLModel:
        assert model.params is not None
        return FLModel(params={"w": model.params["w"] * 2}, metrics=model.metrics, meta={**model.meta, "by": task.site})


class Stamp(Filter):
    """Notes whose model it is; needs no values."""

    needs_values = False

    def process(self, model: FLModel, task: FilterTask) -> FLModel:
        return FLModel(metrics={**(model.metrics or {}), "n": len(task.name)}, meta={**model.meta, "stamp": task.site})


def ref(kind: type, *tasks: str) -> FilterRef:
    return FilterRef(ClassRef(f"{kind.__module__}.{kind.__name__}", {}), tasks or None)


@pytest.fixture
def filtered(request: pytest.FixtureRequest) -> Iterator[tuple[Bus, dict[str, PlayedHost]]]:
    """A job with filters at its server."""
    made = Bus(**request.param)
    yield made, {site: made.host(f"worker-{site}", site) for site in "ab"}
    made.close()


BOTH = {"output_filters": (ref(Double, "train"), ref(Stamp)), "input_filters": (ref(Double, "train"),)}


@pytest.mark.parametrize("filtered", [BOTH], indirect=True)
def test_models_go_through_the_servers_filters(filtered: tuple[Bus, dict[str, PlayedHost]]) -> None:
    """Out once for all sites, in for each result, tasks of other names past them."""
    bus, hosts = filtered
    found: list[tuple[float, str]] = []

    def run(name: str) -> None:
        model = task(5).model
        for result in bus.job.broadcast(Task(name, model), sites=["a"]):
            found.append((weight(result.model), result.model.meta.get("by", "")))

    running = bus.start(lambda: run("train"))
    work = hosts["a"].take()
    assert (weight(work.model), work.model.meta["by"], work.model.meta["stamp"]) == (10.0, "server", "server")
    hosts["a"].answer("a", work.number, update(1))
    running.result(LIMIT_S)
    running = bus.start(lambda: run("validate"))
    work = hosts["a"].take()
    assert (weight(work.model), work.model.meta["stamp"]) == (5.0, "server")
    hosts["a"].answer("a", work.number, update(1))
    running.result(LIMIT_S)

    assert found == [(2.0, "a"), (1.0, "")]


@pytest.mark.parametrize("filtered", [{"input_filters": (ref(Double),)}], indirect=True)
def test_a_filter_that_fails_on_a_result_fails_its_site(filtered: tuple[Bus, dict[str, PlayedHost]]) -> None:
    """Nothing of it reaches the controller, and the site hears why."""
    bus, hosts = filtered
    running = bus.collect(min_responses=1)
    numbers = {site: hosts[site].take().number for site in "ab"}
    accepted, reason = hosts["a"].answer("a", numbers["a"], FLModel(metrics={"loss": 1.0}))
    hosts["b"].answer("b", numbers["b"], update(1))

    assert not accepted
    assert "Double" in reason
    assert running.result(LIMIT_S) == ["b"]


@pytest.mark.parametrize("filtered", [{"output_filters": (ref(Stamp),), "input_filters": (ref(Stamp),)}], indirect=True)
def test_what_is_around_a_held_result_is_filtered(filtered: tuple[Bus, dict[str, PlayedHost]]) -> None:
    """Filters that need no values see a held result on its way in and out again."""
    bus, hosts = filtered
    keeper = Keeper(bus)
    running = bus.start(keeper.gather)
    work = hosts["a"].take()
    hosts["a"].send("a", work.number, update(3, BIG, loss=0.5), readers=work.readers)
    running.result(LIMIT_S)
    assert keeper.metrics == {"a": {"loss": 0.5, "n": 5}}
    running = bus.start(lambda: keeper.pass_on("b"))
    work = hosts["b"].take()
    hosts["b"].answer("b", work.number, update(weight(work.model)))

    assert running.result(LIMIT_S) == {"b": 3.0}
    assert (work.model.metrics, work.model.meta["stamp"]) == ({"loss": 0.5, "n": 8}, "server")


@pytest.mark.parametrize("filtered", [{"input_filters": (ref(Double),)}], indirect=True)
def test_a_result_that_a_filter_must_see_is_not_held(filtered: tuple[Bus, dict[str, PlayedHost]]) -> None:
    """A filter that needs values would be passed over: the result is refused."""
    bus, hosts = filtered
    running = bus.start(Keeper(bus).gather)
    work = hosts["a"].take()
    hosts["a"].send("a", work.number, update(3, BIG), readers=work.readers)

    with pytest.raises(QuorumNotReached, match="needs the parameters, which stay where they were made"):
        running.result(LIMIT_S)


@pytest.mark.parametrize("filtered", [{"output_filters": (ref(Double, "validate"),)}], indirect=True)
def test_a_held_model_that_a_filter_must_see_is_not_passed_on(
    filtered: tuple[Bus, dict[str, PlayedHost]],
) -> None:
    """Nothing gets past a filter of the server by being held elsewhere."""
    bus, hosts = filtered
    keeper = Keeper(bus)
    running = bus.start(keeper.gather)
    work = hosts["a"].take()
    hosts["a"].send("a", work.number, update(3, BIG), readers=work.readers)
    running.result(LIMIT_S)
    running = bus.start(lambda: keeper.pass_on("b"))

    with pytest.raises(FilterFailed, match="needs the parameters"):
        running.result(LIMIT_S)
    assert hosts["b"].work.empty()


# --- what is heard of sites


def test_sites_that_come_and_go_are_told(bus: Bus, hosts: dict[str, PlayedHost]) -> None:
    """Whoever listens hears once of each site that joined, was lost, came back, or died."""
    bus.lose(hosts["a"])
    running = bus.collect(sites=["b"])
    bus.back("worker-a2", "a")
    bus.bury(hosts["a"])
    hosts["b"].answer("b", hosts["b"].take().number, update(1))
    running.result(LIMIT_S)
    bus.start(lambda: bus.job.end("completed")).result(LIMIT_S)

    told_of_a = [(event, its.get("reason")) for event, its in bus.events if its.get("site") == "a"]
    assert told_of_a == [
        ("site_joined", None),
        ("site_lost", "its connection was lost"),
        ("site_joined", None),
        ("site_dead", "its worker was killed"),
    ]


def test_a_controller_that_watches_hears_of_sites_and_from_them() -> None:
    """Reports come in order, only from the host of the site; silence ends the wait."""
    steers = ExecutorRef(ClassRef("mine.Steering", {}), ("swarm",), steers=True)
    bus = Bus(site_defaults=a_job().site_defaults.with_executor(steers))
    host = bus.host("worker-1", "a")
    other = bus.host("worker-2", "b")

    def listen() -> list[Report]:
        return list(bus.job.reports(timeout=30))

    running = bus.start(listen)
    told_by = {"site": "a", "event": "ready", "fields": {"round": 3}}
    other.cell.notify("server.job", "task", "report", told_by)
    other.cell.notify("server.job", "task", "report", {"site": "b", "event": 3, "fields": {}})
    other.cell.notify("server.job", "task", "report", {"site": "b", "event": "ready"})
    other.cell.notify("server.job", "task", "report", {"site": "b", "event": "done", "fields": {}})
    host.cell.notify("server.job", "task", "report", told_by)
    for each in (host, other):
        with pytest.raises(Exception, match="cannot be read"):
            each.ask("join", {}).result(LIMIT_S)
    bus.pass_time(30)
    found = running.result(LIMIT_S)

    assert sorted((each.site, each.event, each.fields.get("round")) for each in found) == [
        ("a", "ready", 3),
        ("a", "site_joined", None),
        ("b", "done", None),
        ("b", "site_joined", None),
    ]
    bus.close()


def test_a_newcomer_is_told_first_who_else_is_there() -> None:
    """Before anybody who steers hears of a host and gives it tasks, that host knows from whom to take them."""
    steers = ExecutorRef(ClassRef("mine.Steering", {}), ("swarm",), steers=True)
    bus = Bus(site_defaults=a_job().site_defaults.with_executor(steers))
    hosts = [bus.host(f"worker-{number}", site) for number, site in enumerate("abc")]
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    for host in hosts:
        host.cell.inbox("task", "directory", lambda _, name=host.address: told.put(name))  # type: ignore[misc]

    running = bus.start(lambda: list(bus.job.reports(timeout=30)))
    hosts[1].join()
    assert [told.get(timeout=LIMIT_S) for _ in hosts] == ["worker-1", "worker-0", "worker-2"]

    bus.pass_time(30)
    running.result(LIMIT_S)
    bus.close()


def test_nothing_is_reported_where_no_site_steers(bus: Bus) -> None:
    """Asking for reports is then a mistake of the controller, and said to be one."""
    running = bus.start(lambda: next(iter(bus.job.reports())))

    with pytest.raises(UsageError, match="do not steer"):
        running.result(LIMIT_S)


def test_a_result_waits_for_its_place_no_longer_than_was_said(bus: Bus) -> None:
    """While another one is fetched for so long, it is dropped with a reason, and its site is told."""
    slow, host = bus.host("worker-1", "a"), bus.host("worker-2", "b")
    slow.mute()
    running = bus.start(lambda: list(bus.job.broadcast(task(0, 4 * BIG), most_staged=1, staging_timeout=5.0)))
    number = slow.take().number
    assert host.take().number == number
    stuck = slow.send("a", number, update(1, 4 * BIG))
    slow_arrived = lambda: bus.job._desk._open is not None and bus.job._desk._open.is_staging  # noqa: E731
    wait_until(slow_arrived, "the first is being fetched")
    waiting = host.send("b", number, update(1, 4 * BIG))
    wait_until(lambda: bus.job._desk._open is not None and "b" in bus.job._desk._open.arrived, "the second is here")
    bus.pass_time(4.0)
    assert not waiting.is_done
    bus.pass_time(2.0)

    accepted, reason = told(waiting)
    assert not accepted
    assert "was not waited for" in reason
    assert not stuck.is_done
    assert not running.done()
