"""SharedModel and SiteEngine: what stands between a host's cell and a script."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from flarebus.cell import Cell
from flarebus.client.engine import Assignment
from flarebus.client.metric_batch import decode_batch
from flarebus.client.metrics import MetricOutbox
from flarebus.codec import decode, encode
from flarebus.delivery import Delivery
from flarebus.errors import DecodeError, FlarebusError
from flarebus.loop import Loop
from flarebus.metric import AnalyticsDataType
from flarebus.model import FLModel
from flarebus.pending import Pending
from flarebus.router import Router
from flarebus.site.engine import SharedModel, SiteEngine
from flarebus.site.outbox import ResultOutbox
from flarebus.site.ticket import Ticket
from flarebus.slab import SlabPool

LIMIT_S = 30.0
BIG = 100_000


def shared(takers: int, size: int = 1000) -> tuple[SharedModel, Any]:
    """A model as a host has it after a pull, and the memory of its one array."""
    body, buffers = encode(FLModel(params={"w": np.arange(size, dtype=np.float32)}))
    memory = [bytearray(buffer) for buffer in buffers]
    return SharedModel(body, [memoryview(each) for each in memory], takers), memory[0]


def weights(model: FLModel) -> np.ndarray:
    assert model.params is not None
    found: np.ndarray = model.params["w"]
    return found


# --- SharedModel


def test_the_last_taker_gets_the_hosts_own_memory() -> None:
    """Everybody may write into what he takes: the others get copies, the last one the pulled bytes themselves."""
    model, memory = shared(3)
    own = np.frombuffer(memory, np.float32)
    first, second = model.take(), model.take()
    weights(first)[:] = -1
    last = model.take()

    assert not np.shares_memory(weights(first), own)
    assert not np.shares_memory(weights(second), own)
    assert np.shares_memory(weights(last), own)
    assert weights(second).tolist() == weights(last).tolist() == list(range(1000))
    assert all(weights(each).flags.writeable for each in (first, second, last))
    del own, last
    memory.clear()  # raises while anybody holds a view of it


def test_who_drops_out_is_no_taker() -> None:
    """If the others drop out, the one that is left gets the host's own memory; if all do, it is free."""
    model, memory = shared(3)
    model.drop()
    model.drop()
    assert np.shares_memory(weights(model.take()), np.frombuffer(memory, np.float32))

    model, memory = shared(2)
    model.drop()
    model.drop()
    memory.clear()


def test_takers_on_many_threads_share_nothing() -> None:
    """However many take at once, exactly one gets the host's memory."""
    model, memory = shared(16)
    taken: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    threads = [threading.Thread(target=lambda: taken.put(weights(model.take()))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    found = [taken.get_nowait() for _ in threads]

    assert sum(np.shares_memory(each, np.frombuffer(memory, np.float32)) for each in found) == 1
    for each in found:
        assert each.tolist() == list(range(1000))
        each[:] = -1


# --- on a bus


class Server:
    """A server's cell that does as the test says, and a host's cell."""

    def __init__(self) -> None:
        self.loop = Loop("test bus")
        self.router = Router(self.loop)
        self.cell = Cell.attach("server", self.router, self.loop)
        self.host = Cell.attach("host", self.router, self.loop)
        self.results: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.records: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.notes: list[str] = []
        self.batches: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.cell.inbox("task", "result", self.results.put)
        self.cell.inbox("task", "results", self.batches.put)
        self.cell.inbox("metric", "records", self.records.put)
        self.outbox = MetricOutbox(lambda fields: self.host.request("server", "metric", "records", fields))
        results = ResultOutbox(self.host, "server")
        self.engine = SiteEngine("site-1", "job", {}, self.host, self.outbox, results, self.notes.append)

    def assign(self, number: int, model: SharedModel | None = None) -> SharedModel:
        model = shared(1)[0] if model is None else model
        self.engine.assign(Assignment(str(number), "train", number, 9, model.take), model, Ticket("server", number))
        return model

    def result(self, accepted: bool = True, reason: str = "", fetch: bool = False) -> dict[str, Any]:
        """The next result, answered."""
        delivery = self.results.get(timeout=LIMIT_S)
        found: dict[str, Any] = delivery.plain()
        if fetch:
            delivery.pull().result(LIMIT_S)
        delivery.reply({"accepted": accepted, "reason": reason})
        return found

    def batch(self) -> list[dict[str, Any]]:
        """The next batch of metrics, answered."""
        delivery = self.records.get(timeout=LIMIT_S)
        records, dropped = decode_batch(delivery.value(LIMIT_S))
        delivery.reply()
        assert dropped == {}
        return records

    def settled(self) -> None:
        """Return when the host's cell has handled all that was sent to it."""
        self.loop.run(lambda: None)
        self.loop.run(lambda: None)

    def close(self) -> None:
        self.outbox.close(0)
        self.host.close()
        self.cell.close()
        self.router.close()
        self.loop.stop()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def answer(size: int = 4) -> FLModel:
    return FLModel(params={"w": np.ones(size, np.float32)})


def deliver(engine: SiteEngine, task: Assignment, model: FLModel) -> None:
    """Answer, and wait until the server has all of it."""
    wait = engine.answer(task, model)
    assert wait is not None
    wait()


def on_thread(work: Any) -> Pending[Any]:
    """Run `work` on a thread; its outcome."""
    outcome: Pending[Any] = Pending()

    def run() -> None:
        try:
            outcome.set(work())
        except BaseException as error:
            outcome.fail(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


# --- tasks


def test_tasks_come_to_whoever_waits(server: Server) -> None:
    """A thread that waits gets the task that comes; one that does not wait gets nothing."""
    assert server.engine.next_task(0) is None
    waiting = on_thread(lambda: server.engine.next_task(None))
    server.assign(3)

    found = waiting.result(LIMIT_S)
    assert (found.task_id, found.task_name, found.round, found.total_rounds) == ("3", "train", 3, 9)
    assert weights(found.take()).size == 1000
    assert not server.engine.has_task


def test_a_new_task_replaces_one_that_nobody_fetched(server: Server) -> None:
    """Only the last task counts, and the model of the one before is let go at once."""
    model, memory = shared(1)
    server.assign(3, model)
    server.assign(4)

    memory.clear()
    assert server.engine.has_task
    found = server.engine.next_task(0)
    assert found is not None
    assert found.task_id == "4"
    assert server.engine.next_task(0) is None


def test_a_cancelled_task_is_never_fetched(server: Server) -> None:
    """Cancelling a task that waits takes it back, with its model; the number of another one changes nothing."""
    model, memory = shared(1)
    server.assign(3, model)
    server.engine.cancel(("", 2))
    assert server.engine.has_task

    server.engine.cancel(("", 3))
    assert not server.engine.has_task
    assert server.engine.next_task(0) is None
    memory.clear()
    server.assign(4)
    found = server.engine.next_task(0)
    assert found is not None
    assert found.task_id == "4"


def test_a_task_at_work_is_not_taken_away(server: Server) -> None:
    """Cancelling the task that the script works on leaves it alone; its answer is refused by the server."""
    server.assign(3)
    task = server.engine.next_task(0)
    assert task is not None
    server.engine.cancel(("", 3))
    sending = on_thread(lambda: deliver(server.engine, task, answer(BIG)))

    assert server.result(False, "the round is closed")["number"] == 3
    sending.result(LIMIT_S)
    assert server.notes == ["the server did not use the result: the round is closed"]


def test_a_task_cancelled_before_the_script_saw_it_is_taken_back(server: Server) -> None:
    """A task that was fetched, but not seen for want of a turn, goes without a word; the next one comes."""
    server.assign(3)
    task = server.engine.next_task(0)
    assert task is not None
    assert server.engine.still_wanted(task)
    server.engine.cancel(("", 3))
    assert not server.engine.still_wanted(task)
    server.assign(4)
    task = server.engine.next_task(0)

    assert task is not None
    assert task.task_id == "4"
    assert server.engine.still_wanted(task)
    server.settled()
    assert server.results.empty()


class Crowd:
    """A line in which the turn comes when the test says so."""

    def __init__(self) -> None:
        self.gates: queue.SimpleQueue[threading.Lock] = queue.SimpleQueue()
        self.stood_back: queue.SimpleQueue[threading.Lock] = queue.SimpleQueue()

    def line_up(self, gate: threading.Lock) -> None:
        self.gates.put(gate)

    def stand_back(self, gate: threading.Lock) -> None:
        self.stood_back.put(gate)


def waits(engine: SiteEngine) -> None:
    """Return when a thread waits for a task."""
    deadline = time.monotonic() + LIMIT_S
    while not engine._gates:
        assert time.monotonic() < deadline


def test_a_task_wakes_its_script_in_its_turn(server: Server) -> None:
    """Until the turn has come the thread sleeps on; what it finds then is the last task that came."""
    server.engine.line = crowd = Crowd()
    waiting = on_thread(lambda: server.engine.next_task(None))
    waits(server.engine)
    server.assign(3)
    gate = crowd.gates.get(timeout=LIMIT_S)
    server.assign(4)
    assert not waiting.is_done

    gate.release()
    assert waiting.result(LIMIT_S).task_id == "4"
    assert crowd.gates.empty()
    assert crowd.stood_back.empty()


def test_a_turn_that_came_for_nothing_is_given_up(server: Server) -> None:
    """A script whose task was cancelled while it stood in line goes on waiting, without the turn."""
    server.engine.line = crowd = Crowd()
    waiting = on_thread(lambda: server.engine.next_task(None))
    waits(server.engine)
    server.assign(3)
    gate = crowd.gates.get(timeout=LIMIT_S)
    server.engine.cancel(("", 3))
    gate.release()
    assert crowd.stood_back.get(timeout=LIMIT_S) is gate

    waits(server.engine)
    server.assign(4)
    crowd.gates.get(timeout=LIMIT_S).release()
    assert waiting.result(LIMIT_S).task_id == "4"


def test_whose_time_is_up_stands_back(server: Server) -> None:
    """A script that waits no longer leaves the line; a task that came in time is taken all the same."""
    server.engine.line = crowd = Crowd()
    waiting = on_thread(lambda: server.engine.next_task(0.2))
    waits(server.engine)
    server.assign(3)
    assert waiting.result(LIMIT_S).task_id == "3"
    assert crowd.stood_back.get(timeout=LIMIT_S) is crowd.gates.get(timeout=LIMIT_S)

    assert server.engine.next_task(0.01) is None
    server.assign(4)
    assert crowd.gates.empty()
    assert crowd.stood_back.empty()


def test_the_end_wakes_everybody_for_good(server: Server) -> None:
    """All threads that wait for a task hear the end, and later ones do not wait; the first reason stays."""
    waiting = [on_thread(lambda: server.engine.next_task(None)) for _ in range(3)]
    server.engine.end("completed")
    server.engine.end("again")

    assert [each.result(LIMIT_S) for each in waiting] == [None] * 3
    model, memory = shared(1)
    server.assign(3, model)
    memory.clear()
    assert server.engine.next_task(None) is None
    assert (server.engine.ended, server.engine.has_task) == ("completed", False)


# --- answers


def test_a_small_answer_returns_at_once(server: Server) -> None:
    """What fits into the message is copied into it: the script goes on, and may write into its arrays."""
    server.assign(3)
    task = server.engine.next_task(0)
    assert task is not None
    model = answer()
    assert server.engine.answer(task, model) is None
    weights(model)[:] = -1

    delivery = server.batches.get(timeout=LIMIT_S)
    (fields,) = delivery.plain()["results"]
    sent = decode(fields.pop("model"), delivery.pull().result(LIMIT_S))
    assert fields == {"site": "site-1", "number": 3, "buffers": 0}
    assert weights(sent).tolist() == [1.0] * 4


def test_a_big_answer_returns_when_the_server_has_it(server: Server) -> None:
    """Arrays that are fetched are the server's until it answers; then nothing of them is held any more."""
    server.assign(3)
    task = server.engine.next_task(0)
    assert task is not None
    sending = on_thread(lambda: deliver(server.engine, task, answer(BIG)))
    delivery = server.results.get(timeout=LIMIT_S)
    assert delivery.nbytes == 4 * BIG
    delivery.pull().result(LIMIT_S)
    assert not sending.is_done
    delivery.reply({"accepted": True, "reason": ""})

    sending.result(LIMIT_S)
    assert server.host.statistics().offers_held == 0
    assert server.notes == []


def test_an_answer_that_cannot_be_delivered_leaves_the_task_open(server: Server) -> None:
    """The script hears what went wrong, and what it then fails with is told the server for this very task."""
    server.assign(3)
    task = server.engine.next_task(0)
    assert task is not None
    sending = on_thread(lambda: deliver(server.engine, task, answer(BIG)))
    server.results.get(timeout=LIMIT_S).fail(DecodeError("it cannot be read"))
    with pytest.raises(FlarebusError, match="it cannot be read"):
        sending.result(LIMIT_S)
    with pytest.raises(FlarebusError, match="cannot encode"):
        server.engine.answer(task, FLModel(params={"w": object()}))

    server.engine.script_ended("the script failed", True)
    assert server.result()["error"] == "the script failed"
    assert server.host.statistics().offers_held == 0


def test_a_small_answer_that_is_lost_is_noted(server: Server) -> None:
    """Nobody waits for a small answer, so what became of it goes to the site's log."""
    server.assign(3)
    task = server.engine.next_task(0)
    assert task is not None
    server.engine.answer(task, answer())
    server.batches.get(timeout=LIMIT_S).fail(DecodeError("it cannot be read"))
    server.settled()

    assert server.notes == ["result not delivered: server: DecodeError: it cannot be read"]


# --- failures


def test_a_script_that_asks_again_has_given_its_task_up(server: Server) -> None:
    """Asking for the next task without an answer fails the one at hand, with these words."""
    server.assign(3)
    server.engine.next_task(0)
    assert server.engine.next_task(0) is None

    found = server.result()
    assert (found["number"], found["model"]) == (3, b"")
    assert found["error"] == "the script asked for its next task without answering this one"


def test_a_failure_after_the_answer_concerns_nobody(server: Server) -> None:
    """A script that fails when it has answered fails neither that task nor the next one, which waits already."""
    server.assign(3)
    task = server.engine.next_task(0)
    assert task is not None
    server.engine.answer(task, answer())
    server.batches.get(timeout=LIMIT_S).reply()
    server.assign(4)
    server.engine.script_ended("ValueError: boom", True)
    server.settled()

    assert server.results.empty()
    found = server.engine.next_task(0)
    assert found is not None
    assert found.task_id == "4"


def test_a_script_that_never_asked_fails_the_task_that_waits(server: Server) -> None:
    """The task of a script that cannot even start is failed, and its model let go."""
    model, memory = shared(1)
    server.assign(3, model)
    server.engine.script_ended("SyntaxError: invalid syntax (client.py:1)", False)

    found = server.result()
    assert (found["number"], found["error"]) == (3, "SyntaxError: invalid syntax (client.py:1)")
    memory.clear()
    assert not server.engine.has_task
    server.engine.script_ended("again", False)
    server.settled()
    assert server.results.empty()


def test_a_task_that_waits_at_the_end_is_let_go(server: Server) -> None:
    """The end of the job frees a model that nobody fetched."""
    model, memory = shared(1)
    server.assign(3, model)
    server.engine.end("completed")

    memory.clear()
    assert not server.engine.has_task


def test_nothing_is_reported_after_the_end(server: Server) -> None:
    """When the job has ended nobody is told of failures any more."""
    server.assign(3)
    server.engine.next_task(0)
    server.engine.end("completed")
    server.engine.script_ended("boom", True)
    server.engine.script_ended("boom", False)
    server.settled()

    assert server.results.empty()
    assert server.notes == []


# --- metrics


def test_records_carry_site_and_round(server: Server) -> None:
    """A metric belongs to the site and to the round of the task at hand."""
    server.engine.log("lr", 0.1, AnalyticsDataType.SCALAR, {})
    server.outbox.flush(0)
    first = server.batch()
    server.assign(3)
    server.engine.next_task(0)
    server.engine.log("loss", 0.5, AnalyticsDataType.SCALAR, {"global_step": 7})

    assert [(each["site"], each["round"], each["key"], each["step"]) for each in first + server.batch()] == [
        ("site-1", None, "lr", None),
        ("site-1", 3, "loss", 7),
    ]


# --- tasks that another site takes over


def kept_by(server: Server, number: int, owner: str = "site-2", target: str = "server", **how: Any) -> Ticket:
    """The ticket of a task whose answer is kept."""
    return Ticket(target, number, owner, ("server", "host"), **how)


def assign_kept(server: Server, ticket: Ticket, round: int = 1) -> None:
    model = shared(1)[0]
    server.engine.assign(Assignment("a", "train", round, 9, model.take), model, ticket)


def answered(server: Server, size: int = BIG) -> dict[str, Any]:
    """Let the script take its task and answer, and then use its arrays for something else."""
    task = server.engine.next_task(LIMIT_S)
    assert task is not None
    result = answer(size)
    assert server.engine.answer(task, result) is None
    weights(result)[:] = -1
    return fetched(server)


def fetched(server: Server, size: int = BIG) -> dict[str, Any]:
    """The next result; its arrays are those that were answered."""
    delivery = server.results.get(timeout=LIMIT_S)
    fields: dict[str, Any] = delivery.plain()
    model = decode(fields["model"], delivery.pull().result(LIMIT_S))
    assert weights(model).tolist() == [1.0] * size
    delivery.reply({"accepted": True, "reason": ""})
    return fields


@pytest.mark.parametrize("when", ["waiting", "open", "answered"])
def test_whoever_takes_a_round_over_gets_the_answer_to_it(server: Server, when: str) -> None:
    """Whether the script has begun, or answered to somebody else; it works once."""
    assign_kept(server, kept_by(server, 7))
    taken = server.engine.next_task(0) if when == "open" else None
    if when == "answered":
        assert answered(server)["number"] == 7

    assert server.engine.resume("train", 1, kept_by(server, 3, "site-3"))

    if taken is not None:
        server.engine.answer(taken, answer(BIG))
    found = fetched(server) if when != "waiting" else answered(server)
    assert (found["number"], found["owner"]) == (3, "site-3")
    assert server.engine.next_task(0) is None


def test_there_is_nothing_to_take_over_of_another_round(server: Server) -> None:
    """Neither of another task; and an answer is kept until the next one only."""
    assert not server.engine.resume("train", 1, kept_by(server, 3))
    assign_kept(server, kept_by(server, 7))
    answered(server)
    assert not server.engine.resume("train", 2, kept_by(server, 3))
    assert not server.engine.resume("validate", 1, kept_by(server, 3))
    assign_kept(server, kept_by(server, 8), round=2)
    answered(server)

    assert not server.engine.resume("train", 1, kept_by(server, 3))
    assert server.engine.resume("train", 2, kept_by(server, 3))
    fetched(server)


def test_what_the_old_owner_calls_off_the_new_one_still_wants(server: Server) -> None:
    """A task belongs to whoever took it over."""
    assign_kept(server, kept_by(server, 7))
    server.engine.resume("train", 1, kept_by(server, 3, "site-3"))
    server.engine.cancel(("site-2", 7))

    assert answered(server)["owner"] == "site-3"


@pytest.mark.parametrize("credit", [0, 4 * BIG - 1, 4 * BIG])
def test_a_kept_answer_comes_along_as_far_as_its_credit_goes(server: Server, credit: int) -> None:
    """Without enough of it, it is announced and fetched."""
    pool = SlabPool()
    server.cell.inbox("task", "result", server.results.put, room=lambda _: pool)
    assign_kept(server, kept_by(server, 7, credit=credit))
    task = server.engine.next_task(0)
    assert task is not None
    server.engine.answer(task, answer(BIG))
    delivery = server.results.get(timeout=LIMIT_S)

    assert delivery.is_here == (credit == 4 * BIG)
    assert delivery.nbytes == 4 * BIG
    delivery.reply({"accepted": True, "reason": ""})


def test_an_answer_to_its_own_site_takes_no_way_through_the_router(server: Server) -> None:
    """A leader's own result moves within its cell."""
    came: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    server.host.inbox("task", "result", came.put)
    assign_kept(server, kept_by(server, 7, "site-1", target="host"))
    task = server.engine.next_task(0)
    assert task is not None
    before = server.router.statistics()
    server.engine.answer(task, answer(BIG))
    delivery = came.get(timeout=LIMIT_S)
    assert weights(decode(delivery.plain()["model"], delivery.pull().result(LIMIT_S))).tolist() == [1.0] * BIG
    delivery.reply({"accepted": True, "reason": ""})
    server.settled()

    assert server.router.statistics() == before
