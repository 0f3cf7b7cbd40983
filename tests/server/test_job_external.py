"""ServerJob and sites with trainers: who may pull a task, whose arrays a result may name, and trainers that die."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from flarebus.cell import Cell, Payload
from flarebus.codec import decode
from flarebus.errors import SourceLost
from flarebus.model import FLModel
from tests.pipes.links import wait_until
from tests.server.played import BIG, LIMIT_S, SERVER, Bus, PassingHost, task, told, update

JOB = "1" * 32


@pytest.fixture
def bus() -> Iterator[Bus]:
    made = Bus()
    yield made
    made.close()


@pytest.fixture
def host(bus: Bus) -> PassingHost:
    """One host with two sites that have trainers."""
    return bus.passing_host("worker-1", "a", "b")


@pytest.fixture
def trainer(bus: Bus) -> Iterator[Cell]:
    """The trainer of site a."""
    cell = bus.trainer(f"a.{JOB}.0.nonce")
    yield cell
    cell.close()


def trained(cell: Cell, value: float = 1.0) -> Payload:
    return cell.share(update(value, BIG), (SERVER,))


def broadcast(bus: Bus, **how: Any) -> Any:
    """Broadcast a big model; the future has site -> first weight of its result, in the order of use."""

    def run() -> dict[str, float]:
        found = {}
        for result in bus.job.broadcast(task(5, BIG), **how):
            assert result.model.params is not None
            found[result.site] = float(result.model.params["w"][0])
        return found

    return bus.start(run)


def mute(cell: Cell) -> None:
    """Serve nobody who pulls."""
    cell._carrier._serve = lambda *_: None  # type: ignore[method-assign]


def fetching(bus: Bus, n: int) -> None:
    wait_until(lambda: bus.cell.statistics().pulls_running == n, f"{n} pulls at once")


def is_here(bus: Bus, site: str) -> bool:
    arrived = None if bus.job._desk._open is None else bus.job._desk._open.arrived.get(site)
    return arrived is not None and arrived.is_here


def numbered(host: PassingHost) -> tuple[int, Any]:
    delivery = host.deliveries.get(timeout=LIMIT_S)
    delivery.reply()
    return delivery.plain()["number"], delivery


def test_a_trainer_pulls_the_task_itself_and_its_result_is_pulled_from_it(
    bus: Bus, host: PassingHost, trainer: Cell
) -> None:
    """The host passes both manifests on: it moves no byte of either model."""
    running = broadcast(bus, sites=["a"])
    number, delivery = numbered(host)
    manifest = delivery.message.manifest
    model = decode(delivery.plain()["model"], trainer.pull(manifest, str(trainer.address)).result(LIMIT_S))

    assert type(model) is FLModel
    assert model.params is not None
    np.testing.assert_array_equal(model.params["w"], np.full(BIG, 5, np.float32))
    assert told(host.pass_on("a", number, trained(trainer, 2.0))) == (True, "")
    assert running.result(LIMIT_S) == {"a": 2.0}
    statistics = host.cell.statistics()
    assert (statistics.bytes_pulled, statistics.bytes_served) == (0, 0)


def test_small_models_go_ahead_to_a_trainer_that_has_pulled_before_and_its_results_to_the_server(
    bus: Bus, host: PassingHost, trainer: Cell
) -> None:
    """From the second round on nobody pulls: either end has ordered, and what is offered comes by itself."""
    asked = []
    serve, serve_result = bus.cell._carrier._serve, trainer._carrier._serve
    bus.cell._carrier._serve = lambda *args: asked.append("task") or serve(*args)  # type: ignore[func-returns-value,method-assign]
    trainer._carrier._serve = lambda *args: asked.append("result") or serve_result(*args)  # type: ignore[func-returns-value,method-assign]
    for _ in range(3):
        running = broadcast(bus, sites=["a"])
        number, delivery = numbered(host)
        wait_until(lambda: not asked or bool(trainer._carrier._ahead._came), "the model is there")
        trainer.pull(delivery.message.manifest, str(trainer.address), order=True).result(LIMIT_S)
        result = trained(trainer, 2.0)
        trainer.send_ahead(result, SERVER)
        assert told(host.pass_on("a", number, result)) == (True, "")
        assert running.result(LIMIT_S) == {"a": 2.0}

    assert asked == ["task", "result"]


@pytest.mark.parametrize("address", [f"c.{JOB}.0.x", f"a.{'2' * 32}.0.x", f"ab.{JOB}.0.x", "a", f"server.{JOB}.x"])
def test_nobody_elses_trainer_pulls_the_task(bus: Bus, host: PassingHost, address: str) -> None:
    """The trainer of a site that was not asked, of another job, or a cell whose name only looks alike gets nothing."""
    running = broadcast(bus, sites=["a", "b"])
    number, delivery = numbered(host)
    stranger = bus.trainer(address)

    with pytest.raises(SourceLost):
        stranger.pull(delivery.message.manifest, address).result(LIMIT_S)
    stranger.close()
    for site in ("a", "b"):
        host.send(site, number, update(1))
    running.result(LIMIT_S)


def test_sites_without_a_trainer_have_nobody_below_them(bus: Bus) -> None:
    """Only the host of a site that runs inside it may pull."""
    host = bus.host("worker-1", "a")
    running = broadcast(bus)
    work = host.take()
    stranger = bus.trainer(f"a.{JOB}.0.x")
    assert bus.job._desk._open is not None
    manifest = bus.job._desk._open.parcels[0].payload.manifest
    assert manifest is not None

    with pytest.raises(SourceLost):
        stranger.pull(manifest, str(stranger.address)).result(LIMIT_S)
    stranger.close()
    host.answer("a", work.number, update(1))
    running.result(LIMIT_S)


@pytest.mark.parametrize("address", [f"b.{JOB}.0.x", "elsewhere", f"a.{'2' * 32}.0.x", f"a.{JOB}"])
def test_a_result_whose_arrays_somebody_else_holds_is_refused(bus: Bus, host: PassingHost, address: str) -> None:
    """A site answers with its own arrays: others are not fetched, the site has failed, and the round goes on."""
    running = broadcast(bus, min_responses=1)
    number, _ = numbered(host)
    holder = bus.trainer(address)
    foreign = trained(holder)

    assert told(host.pass_on("a", number, foreign)) == (False, "its arrays are held by somebody else")
    assert bus.wait_for("site_failed", site="a")["reason"] == "its arrays are held by somebody else"
    assert told(host.send("b", number, update(3, BIG))) == (True, "")
    assert running.result(LIMIT_S) == {"b": 3.0}
    holder.close()


@pytest.mark.parametrize("in_order", [False, True])
def test_a_result_that_dies_with_its_trainer_leaves_the_task_open(
    bus: Bus, host: PassingHost, trainer: Cell, in_order: bool
) -> None:
    """The host hears that the source is lost, and may answer again: also a task whose results are used in order."""
    running = broadcast(bus, min_responses=2, in_order=in_order)
    number, _ = numbered(host)
    mute(trainer)
    lost = host.pass_on("a", number, trained(trainer))
    fetching(bus, 1)
    other = host.send("b", number, update(3, BIG))
    if in_order:
        wait_until(lambda: is_here(bus, "b"), "b is here, and waits for a")
    else:
        bus.wait_for("result_accepted", site="b")
    trainer.close()

    with pytest.raises(SourceLost) as caught:
        lost.result(LIMIT_S)
    assert caught.value.holder == str(trainer.address)
    assert not [event for event in bus.events if event[0] == "site_failed"]
    again = bus.trainer(f"a.{JOB}.0.other")
    assert told(host.pass_on("a", number, trained(again, 7.0))) == (True, "")
    assert told(other) == (True, "")
    assert running.result(LIMIT_S) == {"a": 7.0, "b": 3.0}
    again.close()


def test_a_result_that_was_withdrawn_by_a_host_is_that_sites_failure(bus: Bus, host: PassingHost) -> None:
    """A host that lives and does not hold what it said is no dead trainer: nobody waits for it."""
    running = broadcast(bus, min_responses=1)
    number, _ = numbered(host)
    payload = host.cell.share(update(1, BIG), (SERVER,))
    host.cell.withdraw(payload)

    accepted, reason = told(host.pass_on("a", number, payload))
    assert not accepted
    assert "not offered" in reason
    assert told(host.send("b", number, update(3))) == (True, "")
    assert running.result(LIMIT_S) == {"b": 3.0}
