"""ServerJob: broadcasts over a real bus, with hosts that the test plays and time that it lets pass."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flarebus.client.metric_batch import Row, encode_batch, pack_value
from flarebus.errors import JobAborted, JobFailed, QuorumNotReached, RemoteError
from flarebus.model import FLModel
from flarebus.server import job
from flarebus.server.pool import HostEnd
from flarebus.slab import SlabPool
from flarebus.tasks import desk
from flarebus.workflow.aggregator import ModelAggregator
from flarebus.workflow.controller import Result
from tests.server.played import BIG, LIMIT_S, Bus, MemoryArchive, PlayedHost, task, told, update
from workflows.fedavg import FedAvg

SITES = ("a", "b", "c")


@pytest.fixture
def bus() -> Iterator[Bus]:
    made = Bus()
    yield made
    made.close()


@pytest.fixture
def host(bus: Bus) -> PlayedHost:
    """One host with three sites."""
    return bus.host("worker-1", *SITES)


def end_of(host: PlayedHost, culprit: str | None = None, will_restart: bool = True) -> HostEnd:
    return HostEnd(host.address, tuple(host.sites), "its worker process was killed", culprit, will_restart)


def fetching(bus: Bus, n: int) -> None:
    """Wait until `n` results are being fetched: each end of a test sees the same state of the job."""
    for _ in range(10_000):
        if bus.cell.statistics().pulls_running == n:
            return
    raise AssertionError(f"never {n} pulls at once")


def record(site: str = "a", key: str = "loss", value: Any = 0.5) -> Row:
    return (1.0, site, 0, key, value, "SCALAR", None, None, None)


def batch_of(*rows: Row) -> dict[str, Any]:
    return {"records": encode_batch(rows), "dropped": {}}


def records_at(bus: Bus) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = bus.archive.records  # type: ignore[union-attr]
    return found


# --- tasks out, results in


@pytest.mark.parametrize("size", [4, BIG], ids=["inline", "transfer"])
def test_results_come_as_they_arrive(bus: Bus, host: PlayedHost, size: int) -> None:
    """Whoever answers first is used first, whether the result rides in the message or is fetched."""
    found: list[tuple[str, int, float]] = []

    def run() -> None:
        for result in bus.job.broadcast(task(5, size)):
            assert result.model.params is not None
            found.append((result.site, result.round, float(result.model.params["w"].sum())))

    running = bus.start(run)
    work = host.take()
    for number, site in enumerate("cab"):
        assert host.answer(site, work.number, update(number, size)) == (True, "")
    running.result(LIMIT_S)

    assert found == [("c", 0, 0.0), ("a", 0, 1.0 * size), ("b", 0, 2.0 * size)]


@pytest.mark.parametrize("size", [4, BIG], ids=["inline", "transfer"])
def test_a_host_gets_one_message_for_all_its_sites(bus: Bus, host: PlayedHost, size: int) -> None:
    """The model goes to a host once, with its round, whatever the number of sites; other hosts get theirs."""
    other = bus.host("worker-2", "d")
    running = bus.start(lambda: [r.site for r in bus.job.broadcast(task(5, size, round=2), sites=["a", "c", "d"])])
    work, theirs = host.take(), other.take()

    assert (work.task, work.round, work.sites, theirs.sites) == ("train", 2, ["a", "c"], ["d"])
    assert work.model.params is not None
    assert work.model.params["w"].tolist() == [5.0] * size
    assert (work.model.current_round, work.model.total_rounds) == (2, 3)
    for player, site in ((host, "a"), (host, "c"), (other, "d")):
        player.answer(site, work.number, update(1))
    assert running.result(LIMIT_S) == ["a", "c", "d"]
    with pytest.raises(queue.Empty):
        host.work.get_nowait()


def test_a_big_result_is_answered_when_it_is_used(bus: Bus, host: PlayedHost) -> None:
    """The site hears that its result counts only when the server has it whole; its memory is its own again then."""
    running = bus.collect(min_responses=1)
    number = host.take().number
    host.mute()
    sent = host.send("a", number, update(1, BIG))
    fetching(bus, 1)

    assert not sent.is_done
    host.die()
    with pytest.raises(Exception, match="closed"):
        sent.result(LIMIT_S)
    assert not running.done()


def test_sites_that_are_not_there_are_an_error_of_the_controller(bus: Bus, host: PlayedHost) -> None:
    """A controller that names a site nobody runs does not wait for it for ever."""
    running = bus.collect(sites=["a", "nobody"], min_responses=2)
    host.take()

    with pytest.raises(QuorumNotReached, match="nobody: no such site"):
        running.result(LIMIT_S)


def test_a_site_named_twice_is_asked_once(bus: Bus, host: PlayedHost) -> None:
    """Naming a site twice changes nothing."""
    running = bus.collect(sites=["a", "b", "a"])
    work = host.take()
    for site in ("a", "b"):
        host.answer(site, work.number, update(1))

    assert (work.sites, running.result(LIMIT_S)) == (["a", "b"], ["a", "b"])


# --- quorum, grace, deadline


def test_the_others_have_the_grace_and_no_longer(bus: Bus, host: PlayedHost) -> None:
    """Once the quorum is there the rest has its seconds; then the round is over, and who comes later is told."""
    running = bus.collect(min_responses=2, wait_time_after_min_received=10)
    number = host.take().number
    for site in ("a", "b"):
        host.answer(site, number, update(1))
    bus.pass_time(9.9)
    assert host.cancelled.empty()
    bus.pass_time(0.1)

    assert running.result(LIMIT_S) == ["a", "b"]
    assert bus.archive.done == [({"a": {}, "b": {}}, {"c": "no answer in time"})]  # type: ignore[union-attr]
    assert host.cancelled.get(timeout=LIMIT_S) == {"number": number, "owner": "", "sites": ["c"]}
    running = bus.collect()
    assert host.answer("c", number, update(1)) == (False, "the round is closed")
    assert not running.done()


def test_a_round_ends_at_its_timeout(bus: Bus, host: PlayedHost) -> None:
    """Too few answers within the timeout fail the round, and the error says what each site did."""
    running = bus.collect(min_responses=2, timeout=30)
    number = host.take().number
    host.answer("b", number, update(1))
    host.answer("c", number, "OSError: disk")
    bus.pass_time(30)

    with pytest.raises(QuorumNotReached) as caught:
        running.result(LIMIT_S)
    assert (caught.value.needed, caught.value.got) == (2, 1)
    assert caught.value.reasons == {"c": "OSError: disk", "a": "no answer within 30 s"}


def test_a_controller_hears_which_sites_fail(bus: Bus, host: PlayedHost) -> None:
    """When they do, with the reason; of one that is dead at once, of one that only takes too long never."""
    bus.start(lambda: bus.job.roster.bury("b", "its worker died")).result(LIMIT_S)
    heard: list[tuple[str, str]] = []
    running = bus.collect(
        sites=SITES, min_responses=1, timeout=30, on_failed=lambda site, why: heard.append((site, why))
    )
    number = host.take().number
    host.answer("c", number, "OSError: disk")
    host.settled()
    bus.pass_time(0)
    assert heard == [("b", "its worker died"), ("c", "OSError: disk")]
    bus.pass_time(30)

    with pytest.raises(QuorumNotReached):
        running.result(LIMIT_S)
    assert len(heard) == 2


def test_what_has_arrived_at_the_deadline_is_still_fetched(bus: Bus, host: PlayedHost) -> None:
    """A big result whose message came in time counts, however long its bytes take."""
    running = bus.collect(min_responses=1, timeout=30)
    number = host.take().number
    serve = host.cell._carrier._serve
    host.mute()
    sent = host.send("a", number, update(1, BIG))
    fetching(bus, 1)
    bus.pass_time(31)
    assert host.answer("b", number, update(1)) == (False, "the round is closed")

    host.cell._carrier._serve = serve  # type: ignore[method-assign]
    host.cell._loop.run(bus.cell._carrier.resume)
    assert told(sent) == (True, "")
    assert running.result(LIMIT_S) == ["a"]


def test_a_round_that_cannot_succeed_ends_at_once(bus: Bus, host: PlayedHost) -> None:
    """When too many have failed nobody waits for the rest."""
    running = bus.collect(min_responses=3)
    number = host.take().number

    assert host.answer("b", number, "ValueError: boom (client.py:3)") == (True, "")
    with pytest.raises(QuorumNotReached, match=r"0 usable results, 3 needed .*b: ValueError: boom \(client.py:3\)"):
        running.result(LIMIT_S)
    assert bus.wait_for("site_failed")["site"] == "b"


# --- order


@pytest.fixture(scope="module")
def crowd() -> Iterator[tuple[Bus, PlayedHost]]:
    """One host with seven sites for many rounds."""
    made = Bus()
    yield made, made.host("worker-1", *(f"s{number}" for number in range(7)))
    made.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(7)), faulty=st.sets(st.integers(0, 6), max_size=6), big=st.sets(st.integers(0, 6)))
def test_in_order_is_the_order_of_names(
    crowd: tuple[Bus, PlayedHost], order: list[int], faulty: set[int], big: set[int]
) -> None:
    """With `in_order` results come in the order of the sites' names, whatever the arrival, the sizes and the faults."""
    bus, host = crowd
    running = bus.collect(in_order=True, min_responses=1)
    number = host.take().number
    sent = [host.send(f"s{i}", number, "boom" if i in faulty else update(i, BIG if i in big else 4), 0) for i in order]
    answers = [told(each) for each in sent]

    assert running.result(LIMIT_S) == [f"s{i}" for i in range(7) if i not in faulty]
    assert all(accepted for accepted, _ in answers)


def test_nobody_is_waited_for_beyond_the_deadline_for_the_sake_of_order(bus: Bus, host: PlayedHost) -> None:
    """When time is up the results that came are used in order, though one before them is missing."""
    running = bus.collect(in_order=True, min_responses=2, timeout=30)
    number = host.take().number
    sent = [host.send(site, number, update(1)) for site in "cb"]
    host.settled()
    assert not running.done()
    bus.pass_time(30)

    assert running.result(LIMIT_S) == ["b", "c"]
    assert [told(each) for each in sent] == [(True, "")] * 2


def federated(order: list[int], archive: MemoryArchive, deterministic: bool = True) -> np.ndarray:
    """Two rounds of FedAvg over 24 sites on three hosts that answer in this order."""
    bus = Bus(archive)
    names = [f"site-{number:02}" for number in range(24)]
    hosts = [bus.host(f"worker-{number}", *names[number::3]) for number in range(3)]
    workflow = FedAvg(num_rounds=2, min_clients=20, deterministic=deterministic, aggregation_weights={names[3]: 0.3})
    running = bus.start(lambda: workflow.run(bus.job))
    for round in range(2):
        number = {host.take().number for host in hosts}.pop()
        shuffled = order if round == 0 else order[::-1]
        sent = []
        for site in shuffled:
            values = np.random.default_rng([round, site]).normal(size=999) * 10.0 ** (site % 7)
            model = FLModel(params={"w": values}, meta={"NUM_STEPS_CURRENT_ROUND": 0.1 + site / 3})
            sent.append(hosts[site % 3].send(names[site], number, model))
        assert all(told(each)[0] for each in sent)
    running.result(LIMIT_S)
    bus.close()
    found: np.ndarray = archive.params["w"]
    return found


def test_two_deterministic_runs_agree_to_the_bit() -> None:
    """With `deterministic=True` the model does not depend on who was faster, not by a bit."""
    found = []
    for seed in range(3):
        order = list(range(24))
        Random(seed).shuffle(order)
        found.append(federated(order, MemoryArchive({"w": np.zeros(999)})).tobytes())

    assert found[0] == found[1] == found[2]


# --- what must not count


def test_a_result_counts_once_and_repetitions_are_answered_alike(bus: Bus, host: PlayedHost) -> None:
    """A result that comes again, before or after it was used, is accepted and not used again."""
    running = bus.collect()
    number = host.take().number
    host.mute()
    first = host.send("a", number, update(1, BIG))
    fetching(bus, 1)

    assert host.answer("a", number, update(2)) == (True, "")
    assert host.answer("b", number, update(1)) == (True, "")
    assert host.answer("b", number, update(2)) == (True, "")
    assert host.answer("b", number, "too late to fail") == (True, "")
    assert host.answer("c", number, "boom") == (True, "")
    assert host.answer("c", number, update(2)) == (False, "boom")
    assert not first.is_done
    assert not running.done()


def test_stale_results_are_told_so(bus: Bus, host: PlayedHost) -> None:
    """An answer to another task than the open one, or to none at all, is not used."""
    running = bus.collect(sites=["a"])
    old = host.take().number
    host.answer("a", old, update(1))
    running.result(LIMIT_S)

    late = host.send("b", old, update(1))
    running = bus.collect(sites=["a", "b"])
    new = host.take().number
    assert told(late) == (False, "the round is closed")
    assert host.answer("b", old, update(1)) == (False, "the round is closed")
    assert host.answer("b", new + 1, update(1)) == (False, "the round is closed")
    assert host.answer("b", new, update(1)) == (True, "")
    assert host.answer("a", new, update(1)) == (True, "")
    assert running.result(LIMIT_S) == ["b", "a"]


def test_nobody_answers_for_sites_of_another_host(bus: Bus, host: PlayedHost) -> None:
    """A result, or a failure, from a host that does not run the site is refused, and the site's own is used."""
    other = bus.host("worker-2", "d")
    running = bus.collect(sites=["a", "d"])
    number = host.take().number

    assert other.answer("a", number, update(9)) == (False, "not your site")
    assert other.answer("a", number, "boom") == (False, "not your site")
    assert host.answer("a", number, update(1)) == (True, "")
    assert other.answer("d", number, update(1)) == (True, "")
    assert running.result(LIMIT_S) == ["a", "d"]


@pytest.mark.parametrize(
    ("topic", "value"),
    [
        ("join", None),
        ("join", {"sites": 3}),
        ("join", {}),
        ("join", {"sites": [], "takes": "much"}),
        ("result", None),
        ("result", {}),
        ("result", {"site": ["a"], "number": 1, "error": None, "model": b""}),
        ("result", {"site": "a", "number": 1, "error": None}),
        ("results", None),
        ("results", {"results": [None]}),
        ("results", {"results": [{"site": "a", "number": 1, "model": b""}]}),
        ("results", {"results": [{"site": "a", "number": 1, "model": b"", "buffers": 1}]}),
        ("results", {"results": [{"site": "a", "number": 1, "model": b"", "buffers": -1}]}),
        ("results", {"results": [{"site": "a", "number": "1", "model": b"", "buffers": 0}]}),
        ("results", {"results": [{"site": "a", "number": 1, "model": "", "buffers": 0}]}),
        ("results", {"results": [], "big": np.zeros(BIG)}),
    ],
    ids=str,
)
def test_messages_that_make_no_sense_are_answered_with_an_error(
    bus: Bus, host: PlayedHost, topic: str, value: Any
) -> None:
    """Whatever a host says, the job goes on."""
    running = bus.collect(min_responses=1, sites=["a"])
    number = host.take().number

    with pytest.raises(RemoteError, match="DecodeError"):
        host.ask(topic, value).result(LIMIT_S)
    host.answer("a", number, update(1))
    assert running.result(LIMIT_S) == ["a"]


@pytest.mark.parametrize("in_order", [False, True])
def test_results_that_come_together_are_each_their_own(bus: Bus, host: PlayedHost, in_order: bool) -> None:
    """One message with several results is answered when it is here; each of them counts, or its site hears why not."""
    found = {}

    def run() -> None:
        for result in bus.job.broadcast(task(size=300), min_responses=2, in_order=in_order):
            assert result.model.params is not None
            if result.site == "b":
                result.refuse("NaN or Inf")
            found[result.site] = result.model.params["w"].tolist()

    other = bus.host("worker-2", "d")
    running = bus.start(run)
    number = host.take().number
    assert host.send_together(number, {"c": update(3, 300), "b": update(2, 3), "d": update(9)}).result(LIMIT_S)
    assert host.refused.get(timeout=LIMIT_S) == {"site": "d", "number": number, "reason": "not your site"}
    host.send_together(number, {"a": update(1, 300), "c": update(9)}).result(LIMIT_S)
    other.send_together(number, {"d": update(4, 300)}).result(LIMIT_S)
    running.result(LIMIT_S)

    assert found == {"a": [1.0] * 300, "b": [2.0] * 3, "c": [3.0] * 300, "d": [4.0] * 300}
    assert list(found) == (sorted(found) if in_order else ["c", "b", "a", "d"])
    assert host.refused.get(timeout=LIMIT_S) == {"site": "b", "number": number, "reason": "NaN or Inf"}
    host.send_together(number, {"a": update(1)}).result(LIMIT_S)
    bus.start(lambda: bus.job.end("completed")).result(LIMIT_S)
    assert host.refused.get(timeout=LIMIT_S) == {"site": "a", "number": number, "reason": "the round is closed"}


@pytest.mark.parametrize("junk", [b"", b"\xc1", "text", 3, None], ids=str)
def test_a_result_that_is_no_model_fails_its_site(bus: Bus, host: PlayedHost, junk: Any) -> None:
    """What cannot be decoded is the site's failure, and the site hears why."""
    running = bus.collect(min_responses=1)
    number = host.take().number

    sent = host.ask("result", {"site": "a", "number": number, "error": None, "model": junk})
    if isinstance(junk, bytes):
        accepted, reason = told(sent)
        assert (accepted, bool(reason)) == (False, True)
    else:
        with pytest.raises(RemoteError, match="DecodeError"):
            sent.result(LIMIT_S)
        host.answer("a", number, "the script failed")
    for site in ("b", "c"):
        host.answer(site, number, update(1))
    assert running.result(LIMIT_S) == ["b", "c"]


def test_a_value_that_is_no_model_fails_its_site(bus: Bus, host: PlayedHost) -> None:
    """A well-formed value of another type is no result."""
    running = bus.collect(min_responses=1, sites=["a"])
    number = host.take().number
    payload = host.cell.share({"w": 1}, ())
    sent = host.ask("result", {"site": "a", "number": number, "error": None, "model": payload.body})

    assert told(sent) == (False, "it is not an FLModel")
    with pytest.raises(QuorumNotReached, match="a: its result could not be used: it is not an FLModel"):
        running.result(LIMIT_S)


def test_a_result_far_bigger_than_the_model_is_refused(
    bus: Bus, host: PlayedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result many times the model's size is not fetched at all; the site hears both sizes."""
    monkeypatch.setattr(desk, "RESULT_SLACK_BYTES", 1000)
    running = bus.collect(min_responses=1, sites=["a", "b"])
    number = host.take().number
    accepted, reason = host.answer("a", number, update(1, BIG))

    assert not accepted
    assert f"result of {4 * BIG} bytes for a model of" in reason
    host.answer("b", number, update(1))
    assert running.result(LIMIT_S) == ["b"]
    assert bus.cell.statistics().bytes_pulled == 0


def test_why_a_result_was_refused_reaches_its_site(bus: Bus, host: PlayedHost) -> None:
    """What the controller refuses does not count, and the site is told the reason."""

    def run() -> list[str]:
        used = []
        for result in bus.job.broadcast(task(), min_responses=2):
            result.refuse("'w': NaN or Inf") if result.site == "b" else used.append(result.site)
        return used

    running = bus.start(run)
    number = host.take().number
    assert host.answer("b", number, update(1, acc=0.5)) == (False, "'w': NaN or Inf")
    assert host.answer("b", number, update(1)) == (False, "'w': NaN or Inf")
    assert host.answer("a", number, update(1, acc=0.5)) == (True, "")
    assert host.answer("c", number, update(1)) == (True, "")

    assert running.result(LIMIT_S) == ["a", "c"]
    assert bus.archive.done == [({"a": {"acc": 0.5}, "c": {}}, {"b": "'w': NaN or Inf"})]  # type: ignore[union-attr]
    assert bus.wait_for("result_refused") == {"round": 0, "site": "b", "reason": "'w': NaN or Inf"}


def test_a_round_without_a_usable_result_keeps_the_model(bus: Bus, host: PlayedHost) -> None:
    """When nothing counts the job fails with the reasons, and the model is the last committed one."""
    assert isinstance(bus.archive, MemoryArchive)
    bus.archive.params = {"w": np.ones(4, np.float32)}
    running = bus.start(lambda: FedAvg(num_rounds=2, min_clients=1).run(bus.job))
    number = host.take().number
    for site in SITES:
        host.answer(site, number, update(7))
    number = host.take().number
    for site, value in zip(SITES, (np.nan, np.inf, 1.0), strict=True):
        accepted, reason = host.answer(site, number, update(value, size=4 if site != "c" else 5))
        assert not accepted
        assert "'w'" in reason

    with pytest.raises(QuorumNotReached, match=r"0 usable results, 1 needed \(a: 'w': NaN or Inf; b: "):
        running.result(LIMIT_S)
    assert [entry[0] for entry in bus.archive.committed] == [0]
    assert bus.archive.params["w"].tolist() == [7.0] * 4


# --- memory


class Keeper(ModelAggregator):
    """An aggregator that keeps every result it was lent, against the rule."""

    def accept_model(self, model: FLModel) -> None:
        self.kept.append(model.params)

    def aggregate_model(self) -> FLModel:
        return FLModel(params={"w": np.median([params["w"] for params in self.kept], axis=0)})

    def reset_stats(self) -> None:
        self.kept: list[Any] = []


def staged_at_most(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that were leased for results each time one more was fetched."""
    monkeypatch.setattr(desk, "STAGED_BYTES", 0)
    leased: list[int] = []
    take = bus.job._desk._pool.take

    def measured(lengths: Any) -> Any:
        memory = take(lengths)
        leased.append(bus.job._desk._pool.leased_bytes)
        return memory

    monkeypatch.setattr(bus.job._desk._pool, "take", measured)
    return leased


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("aggregator", [None, Keeper()], ids=["mean", "keeper"])
def test_results_are_fetched_when_there_is_room(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, deterministic: bool, aggregator: Any
) -> None:
    """However many sites answer at once, three results are in memory; one that keeps them all still gets them all."""
    sites = [f"s{number}" for number in range(8)]
    host = bus.host("worker-1", *sites)
    leased = staged_at_most(bus, monkeypatch)
    assert isinstance(bus.archive, MemoryArchive)
    bus.archive.params = {"w": np.zeros(BIG, np.float32)}
    workflow = FedAvg(num_rounds=2, min_clients=8, deterministic=deterministic, aggregator=aggregator)
    running = bus.start(lambda: workflow.run(bus.job))
    for _ in range(2):
        number = host.take().number
        sent = [host.send(site, number, update(index, BIG)) for index, site in enumerate(sites)]
        assert all(told(each) == (True, "") for each in sent)
    running.result(LIMIT_S)

    assert len(leased) == 16
    assert aggregator is not None or max(leased) <= 3 * 4 * BIG
    assert bus.archive.params["w"].tolist() == [3.5] * BIG


def test_results_ride_along_as_far_as_there_is_room(
    bus: Bus, host: PlayedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes along is taken while the memory for results has room, and pulled later if it has not."""
    monkeypatch.setattr(desk, "STAGED_BYTES", 4 * BIG)
    carrier, pulled = bus.cell._carrier, []
    pull = carrier.pull
    monkeypatch.setattr(carrier, "pull", lambda *args: pulled.append(args[0].nbytes) or pull(*args))
    found = {}

    def run() -> None:
        for result in bus.job.broadcast(task(size=BIG)):
            assert result.model.params is not None
            found[result.site] = float(result.model.params["w"].sum())
            bus.events.append((result.site, {"leased": bus.job._desk._pool.leased_bytes}))

    running = bus.start(run)
    number = host.take().number
    busy = bus.job._desk._pool.take([4 * BIG])
    sent = [host.send(site, number, update(value, BIG), bring=True) for value, site in enumerate("ab", 1)]
    assert all(told(each) == (True, "") for each in sent)
    assert pulled == [4 * BIG] * 2
    del busy
    assert told(host.send("c", number, update(3, BIG), bring=True)) == (True, "")
    running.result(LIMIT_S)

    assert pulled == [4 * BIG] * 2
    assert found == {site: float(value * BIG) for value, site in enumerate("abc", 1)}


def test_a_result_that_rode_along_outlives_its_host(bus: Bus, host: PlayedHost) -> None:
    """It is here whole, though nobody has used it yet: its site need not train again."""
    running = bus.collect(in_order=True)
    number = host.take().number
    host.send("b", number, update(1, BIG), bring=True)
    host.settled()
    host.die()
    again = bus.back("worker-1", *SITES)

    assert again.take().sites == ["a", "c"]
    for site in "ac":
        again.answer(site, number, update(1))
    assert running.result(LIMIT_S) == ["a", "b", "c"]


@pytest.mark.parametrize("takes", [0, 4 * BIG - 1, 4 * BIG])
def test_a_model_rides_along_to_hosts_that_take_it(bus: Bus, takes: int) -> None:
    """A host says when it joins how much it takes with a task, and is told how much the server takes with results."""
    host = bus.host("worker-1", "z")
    pool, asked, credits = SlabPool(), [], queue.SimpleQueue()
    host.cell.inbox(
        "task",
        "assign",
        lambda delivery: credits.put((delivery.plain()["credit"], delivery.is_here)),
        room=lambda nbytes: asked.append(nbytes) or pool,
    )
    heard = bus.start(lambda: bus.job.wait_for_sites(["a"], LIMIT_S))
    host.ask("join", {"sites": ["a"], "takes": takes}).result(LIMIT_S)
    heard.result(LIMIT_S)
    running = bus.start(lambda: [result.site for result in bus.job.broadcast(task(size=BIG), sites=["a"])])

    assert credits.get(timeout=LIMIT_S) == (desk.STAGED_BYTES, takes == 4 * BIG)
    assert asked == ([4 * BIG] if takes == 4 * BIG else [])
    host.answer("a", 1, update(1, BIG))
    assert running.result(LIMIT_S) == ["a"]
    host.die()


# --- hosts that die


def test_a_host_that_dies_while_its_result_is_fetched_gets_the_task_again(bus: Bus, host: PlayedHost) -> None:
    """The sites of a host that died and came back have the task again, and nobody is missing from the round."""
    other = bus.host("worker-2", "d")
    running = bus.collect()
    number = host.take().number
    assert host.answer("b", number, update(1)) == (True, "")
    host.mute()
    host.send("a", number, update(1, BIG))
    fetching(bus, 1)
    host.die()
    assert other.answer("d", number, update(1)) == (True, "")

    again = bus.back("worker-1", *SITES)
    work = again.take()
    assert (work.number, work.sites) == (number, ["a", "c"])
    for site in ("c", "a"):
        assert again.answer(site, number, update(1)) == (True, "")
    assert running.result(LIMIT_S) == ["b", "d", "c", "a"]


def test_a_death_is_heard_before_its_consequences(bus: Bus, host: PlayedHost) -> None:
    """A result lost with its host fails nobody, though the controller was busy while it died."""
    other = bus.host("worker-2", "d")
    busy, go_on = threading.Event(), threading.Event()

    def run() -> list[str]:
        found = []
        for result in bus.job.broadcast(task(), sites=["a", "d"]):
            found.append(result.site)
            busy.set()
            assert go_on.wait(LIMIT_S)
        return found

    running = bus.start(run)
    number = host.take().number
    host.mute()
    host.send("a", number, update(1, BIG))
    fetching(bus, 1)
    sent = other.send("d", number, update(1))
    assert busy.wait(LIMIT_S)
    host.die()
    go_on.set()
    assert told(sent) == (True, "")

    again = bus.back("worker-1", *SITES)
    assert again.take().sites == ["a"]
    assert again.answer("a", number, update(1)) == (True, "")
    assert running.result(LIMIT_S) == ["d", "a"]


def test_a_host_that_joins_again_is_another_one(bus: Bus, host: PlayedHost) -> None:
    """A join tells that what the host offered before is lost, even if nobody saw it die; what is here is not."""
    running = bus.collect(in_order=True)
    number = host.take().number
    host.mute()
    host.send("b", number, update(1, BIG))
    small = host.send("c", number, update(1))
    host.settled()
    host.join()

    assert host.take().sites == ["a", "b"]
    for site in ("b", "a"):
        host.send(site, number, update(1))
    assert running.result(LIMIT_S) == ["a", "b", "c"]
    assert told(small) == (True, "")


@pytest.mark.parametrize("in_order", [False, True])
def test_a_result_that_is_here_outlives_its_host(bus: Bus, host: PlayedHost, in_order: bool) -> None:
    """What was fetched before its host died counts, even if the host never comes back."""
    other = bus.host("worker-2", "0")

    def run() -> list[str]:
        found = []
        for result in bus.job.broadcast(task(), min_responses=2, in_order=in_order):
            found.append(result.site)
        return found

    running = bus.start(run)
    number = host.take().number
    if in_order:
        sent = host.send("a", number, update(1))
        host.settled()  # the result waits for its turn
    else:
        assert host.answer("a", number, update(1)) == (True, "")
    bus.job.host_died(end_of(host, will_restart=False), lambda: None)
    bus.wait_for("site_failed", site="b")
    assert other.answer("0", number, update(1)) == (True, "")

    assert sorted(running.result(LIMIT_S)) == ["0", "a"]
    assert not in_order or told(sent) == (True, "")


def test_a_host_that_will_not_come_back_takes_its_sites_with_it(bus: Bus, host: PlayedHost) -> None:
    """The sites of a host that is gone for good fail with its reason, and get no more work."""
    other = bus.host("worker-2", "d")
    running = bus.collect(min_responses=1)
    host.take()
    host.die()
    bus.job.host_died(end_of(host, will_restart=False), lambda: None)
    bus.wait_for("site_failed", site="c", reason="its worker process was killed")
    other.answer("d", other.take().number, update(1))
    assert running.result(LIMIT_S) == ["d"]

    assert bus.start(lambda: bus.job.sites).result(LIMIT_S) == ["d"]
    running = bus.collect(sites=["a", "d"], min_responses=1)
    other.answer("d", other.take().number, update(1))
    assert running.result(LIMIT_S) == ["d"]
    assert bus.archive.done[-1] == ({"d": {}}, {"a": "its worker process was killed"})  # type: ignore[union-attr]


def test_a_site_that_kills_its_worker_again_and_again_is_given_up(bus: Bus, host: PlayedHost) -> None:
    """The third time a site takes its worker down without an answer it is out; its neighbours go on."""
    restarted: queue.SimpleQueue[int] = queue.SimpleQueue()
    running = bus.collect(min_responses=2)
    players = [host]
    for attempt in range(3):
        number = players[-1].take().number
        players[-1].die()
        bus.job.host_died(end_of(host, culprit="b"), partial(restarted.put, attempt))
        assert restarted.get(timeout=LIMIT_S) == attempt
        players.append(bus.back("worker-1", *SITES))
    work = players[-1].take()

    assert (work.number, work.sites) == (number, ["a", "c"])
    for site in ("a", "c"):
        players[-1].answer(site, number, update(1))
    assert running.result(LIMIT_S) == ["a", "c"]
    assert bus.wait_for("site_failed")["reason"] == "its worker process was killed, 3 times"
    assert bus.start(lambda: bus.job.sites).result(LIMIT_S) == ["a", "c"]


def test_a_site_that_answered_in_between_starts_anew(bus: Bus, host: PlayedHost) -> None:
    """Deaths of long ago do not add up over a long job."""
    player = host
    for _ in range(4):
        running = bus.collect()
        number = player.take().number
        player.die()
        bus.job.host_died(end_of(host, culprit="b"), lambda: None)
        player = bus.back("worker-1", *SITES)
        player.take()
        for site in SITES:
            player.answer(site, number, update(1))
        assert running.result(LIMIT_S) == ["a", "b", "c"]


def test_all_dead_is_said_before_any_work(bus: Bus) -> None:
    """If no host can be started the job fails with the reasons; if some are merely late it says which."""
    running = bus.start(lambda: bus.job.wait_for_sites(SITES, 120))
    bus.job.host_died(HostEnd("worker-1", SITES, "ended with exit code 3", None, False), lambda: None)
    with pytest.raises(JobFailed, match="no site could be started: ended with exit code 3"):
        running.result(LIMIT_S)

    running = bus.start(lambda: bus.job.wait_for_sites([*SITES, "d"], 0))
    with pytest.raises(JobFailed, match="1 sites did not start within 0 s: d"):
        running.result(LIMIT_S)


def test_a_host_that_cannot_take_the_task_fails_its_sites(bus: Bus, host: PlayedHost) -> None:
    """Sites whose host has no room for the model fail with its words; the others go on."""
    other = bus.host("worker-2", "d")

    def refuse(_: Any) -> None:
        raise MemoryError("no room")

    host.cell.on("task", "assign", refuse)
    running = bus.collect(min_responses=1)
    other.answer("d", other.take().number, update(1))

    assert running.result(LIMIT_S) == ["d"]
    reason = bus.wait_for("site_failed", site="a")["reason"]
    assert reason == "could not take the task: worker-1: MemoryError: no room"


def test_a_host_that_was_too_slow_for_one_round_is_not_blamed_in_the_next(bus: Bus, host: PlayedHost) -> None:
    """A task that was withdrawn while a host still fetched it says nothing about the task after it."""
    other = bus.host("worker-2", "d")
    bus.cell._carrier._serve = lambda *_: None  # type: ignore[method-assign]
    serve = type(bus.cell._carrier)._serve.__get__(bus.cell._carrier)
    running = bus.start(
        lambda: [r.site for r in bus.job.broadcast(task(size=BIG), sites=["a", "d"], min_responses=1, timeout=5)]
    )
    bus.wait_for("round_started")
    other.answer("d", 1, update(1))
    bus.pass_time(5)
    assert running.result(LIMIT_S) == ["d"]
    running = bus.start(lambda: [r.site for r in bus.job.broadcast(task(size=BIG, round=1), sites=["a"])])
    bus.wait_for("round_started", round=1)
    bus.cell._carrier._serve = serve  # type: ignore[method-assign]
    for player in (host, other):
        player.cell._loop.run(player.cell._carrier.resume)

    work = host.take()
    assert work.round == 1
    assert host.answer("a", work.number, update(1)) == (True, "")
    assert running.result(LIMIT_S) == ["a"]


# --- the end


def test_abort_ends_a_round(bus: Bus, host: PlayedHost) -> None:
    """An abort reaches a controller that waits; hosts hear that the task is off, and open results are answered."""
    running = bus.collect(in_order=True)
    number = host.take().number
    waiting = host.send("b", number, update(1, BIG))
    host.settled()  # the result waits for its turn
    bus.job.abort("user")
    bus.job.abort("somebody else")

    with pytest.raises(JobAborted, match="aborted by user"):
        running.result(LIMIT_S)
    bus.start(lambda: bus.job.end("aborted")).result(LIMIT_S)
    assert told(waiting) == (False, "the round is closed")
    assert host.cancelled.get(timeout=LIMIT_S) == {"number": number, "owner": "", "sites": list(SITES)}


def test_a_controller_that_fails_keeps_nobody_waiting(bus: Bus, host: PlayedHost) -> None:
    """When the controller raises while it holds a result, its site is answered and what was shared is withdrawn."""
    held: list[Result] = []

    def run() -> None:
        results = bus.job.broadcast(task(size=BIG))
        try:
            for result in results:
                held.append(result)
                raise ValueError("boom")
        finally:
            bus.job.end("failed")

    running = bus.start(run)
    number = host.take().number
    sent = host.send("a", number, update(1, BIG))

    with pytest.raises(ValueError, match="boom"):
        running.result(LIMIT_S)
    assert told(sent)[0] is True
    assert host.ended.get(timeout=LIMIT_S) == "failed"
    assert bus.cell.statistics().offers_held == 0


def test_after_the_end_whoever_comes_late_is_answered(bus: Bus, host: PlayedHost) -> None:
    """Results and metric records that come when the controller is done are answered, so that no script hangs on one."""
    running = bus.collect(min_responses=1)
    number = host.take().number
    host.answer("a", number, update(1))
    host.answer("b", number, update(1))
    host.answer("c", number, update(1))
    running.result(LIMIT_S)
    waiting = host.send("c", number, update(1, BIG))
    bus.start(lambda: bus.job.end("completed")).result(LIMIT_S)

    assert host.ended.get(timeout=LIMIT_S) == "completed"
    assert told(waiting) == (False, "the round is closed")
    assert host.answer("b", number, update(1)) == (False, "the round is closed")
    host.cell.request("server.job", "metric", "records", batch_of(record())).result(LIMIT_S)
    assert [each["key"] for each in records_at(bus)] == ["loss"]
    bus.job.host_died(end_of(host), lambda: pytest.fail("started again for nothing"))
    with pytest.raises(RemoteError, match="the job has ended"):
        host.join()


def test_too_many_bytes_of_metrics_are_not_fetched(bus: Bus, host: PlayedHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metric records far beyond any use are refused before memory is given to them."""
    monkeypatch.setattr(job, "RECORDS_BYTES", 1000)
    batch = {"records": bytes(BIG), "dropped": {}}
    with pytest.raises(RemoteError, match="at most 1000 at once"):
        host.cell.request("server.job", "metric", "records", batch).result(LIMIT_S)

    assert bus.cell.statistics().bytes_pulled == 0


@pytest.mark.parametrize(
    "batch",
    [
        None,
        {"records": 3},
        {"records": b"", "dropped": {}},
        {"records": encode_batch([record()]), "dropped": "x"},
        {"records": encode_batch([record(), record(site="x")]), "dropped": {}},
        {"records": encode_batch([record()]), "dropped": {"x": 1}},
    ],
    ids=["none", "short", "empty", "dropped", "strangers", "strangers' losses"],
)
def test_metric_records_are_kept_and_answered(bus: Bus, host: PlayedHost, batch: Any) -> None:
    """Records reach the archive while a round runs, and their sender hears it; nonsense is refused and does no harm.

    Nothing is kept of a batch with records of a site that its sender does not run.
    """
    running = bus.collect(sites=["a"])
    number = host.take().number
    with pytest.raises(RemoteError, match="metric records"):
        host.cell.request("server.job", "metric", "records", batch).result(LIMIT_S)
    host.cell.request("server.job", "metric", "records", batch_of(record())).result(LIMIT_S)
    host.answer("a", number, update(1))
    running.result(LIMIT_S)

    assert [(each["site"], each["key"], each["value"]) for each in records_at(bus)] == [("a", "loss", 0.5)]


def test_listeners_are_told_of_records_site_by_site(bus: Bus, host: PlayedHost) -> None:
    """Each event carries records of one site, in order, values and all; what was dropped is a record too."""
    rows = [record(), record("b"), record("b", key="image", value=pack_value(np.zeros(4))), record()]
    running = bus.collect(sites=["a"])
    number = host.take().number
    fields = {"records": encode_batch(rows), "dropped": {"c": 7}}
    host.cell.request("server.job", "metric", "records", fields).result(LIMIT_S)
    host.answer("a", number, update(1))
    running.result(LIMIT_S)

    told = [fields for event, fields in bus.events if event == "site_metrics"]
    assert [(each["site"], [its["key"] for its in each["records"]]) for each in told] == [
        ("a", ["loss"]),
        ("b", ["loss", "image"]),
        ("a", ["loss"]),
        ("c", ["records dropped at the site"]),
    ]
    assert told[1]["records"][1]["value"].tolist() == [0.0] * 4
    assert told[3]["records"][0]["value"] == 7
    assert [each for its in told for each in its["records"]] == records_at(bus)


def test_a_listener_that_raises_costs_no_record(bus: Bus, host: PlayedHost, caplog: pytest.LogCaptureFixture) -> None:
    """Its error is logged, with the traceback; the records are kept and answered, and the round goes on."""

    def listener(event: str, _: Any) -> None:
        if event == "site_metrics":
            raise ValueError("no such tracker")

    bus.job._on_event = listener
    running = bus.collect(sites=["a"])
    number = host.take().number
    for _ in range(2):
        host.cell.request("server.job", "metric", "records", batch_of(record(), record("b"))).result(LIMIT_S)
    host.answer("a", number, update(1))

    assert running.result(LIMIT_S) == ["a"]
    assert [each["site"] for each in records_at(bus)] == ["a", "b"] * 2
    assert caplog.text.count("ValueError: no such tracker") == 1
