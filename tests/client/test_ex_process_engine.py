"""TrainerEngine: tasks in, answers and metrics out, against a client job that the test plays."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from flarebus.client.config import ClientConfig
from flarebus.client.engine import Assignment, Seat, set_process_seat, sit
from flarebus.client.ex_process import engine as ex_engine
from flarebus.client.ex_process import seat as ex_seat
from flarebus.client.ex_process.engine import TrainerEngine
from flarebus.client.ex_process.words import HELLO, PROTOCOL, RESULT, unpack
from flarebus.client.session import Session
from flarebus.errors import (
    ClientApiError,
    ConfigError,
    DeadlineExceeded,
    FlarebusError,
    LinkError,
    RemoteError,
    SourceLost,
)
from flarebus.metric import AnalyticsDataType
from flarebus.model import FLModel
from flarebus.pipes import Message
from tests.client.played_job import LIMIT_S, SIZE, PlayedJob, SlowPipe, weights
from tests.pipes.links import InThread, wait_until


@pytest.fixture
def job() -> Iterator[PlayedJob]:
    played = PlayedJob()
    yield played
    played.close()


@pytest.fixture
def engine(job: PlayedJob) -> Iterator[TrainerEngine]:
    made = job.engine()
    yield made
    made.close()


@pytest.fixture
def slow(job: PlayedJob) -> SlowPipe:
    return SlowPipe(job.token)


def model_of(assignment: Assignment | None) -> np.ndarray:
    assert assignment is not None
    model = assignment.take()
    assert model.params is not None
    found: np.ndarray = model.params["w"]
    return found


def answer_with(value: float, size: int = SIZE) -> FLModel:
    return FLModel(params={"w": np.full(size, value, np.float32)})


def is_waiting(engine: TrainerEngine) -> Callable[[], bool]:
    """Whether somebody waits for the next task."""
    return lambda: bool(engine._changed._waiters)  # type: ignore[attr-defined]


# --- hello


def test_a_trainer_says_who_it_is_and_is_let_in(job: PlayedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Site, job, rank, number of ranks and token come with the hello; the engine is there once it was accepted."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    connecting = InThread(TrainerEngine.connect, job.config(), 0)
    hello = job.next(HELLO)
    fields = unpack(hello.body, protocol=int, job_id=str, site=str, rank=int, world_size=int, token=str, pid=int)
    assert connecting.is_running
    job.welcome(hello)
    engine = connecting.result()

    assert fields.pop("pid") > 0
    assert fields == {
        "protocol": PROTOCOL,
        "job_id": "job-1",
        "site": "site-1",
        "rank": 0,
        "world_size": 4,
        "token": "secret",
    }
    assert (engine.site_name, engine.job_id, engine.is_follower, engine.ended) == ("site-1", "job-1", False, None)
    assert "auth_token" not in engine.config
    engine.close()
    assert job.statuses.get(timeout=LIMIT_S) == ("_END_", "the script has ended")


@pytest.mark.parametrize("size", ["", "0", "-1", "many", "1e3", "99999", "\u0663"])
def test_a_strange_world_size_is_one(job: PlayedJob, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    """What is no sensible number of ranks comes from somebody else's environment."""
    monkeypatch.setenv("WORLD_SIZE", size)
    connecting = InThread(TrainerEngine.connect, job.config(), 0)
    hello = job.next(HELLO)
    job.welcome(hello)
    connecting.result().close()

    assert unpack(hello.body, world_size=int) == {"world_size": 1}


def test_a_trainer_that_is_refused_hears_why_and_leaves_nothing(job: PlayedJob) -> None:
    """The reason is in the error; pipes and threads are gone."""
    before = set(threading.enumerate())
    connecting = InThread(TrainerEngine.connect, job.config(), 0)
    job.welcome(job.next(HELLO), "its token is not the one")

    with pytest.raises(ClientApiError, match="refused this process: its token is not the one"):
        connecting.result()
    wait_until(lambda: set(threading.enumerate()) <= before, "its threads end")


def test_a_client_job_that_does_not_answer_is_named(job: PlayedJob) -> None:
    """A hello that nobody answers in time is an error that says who was asked."""
    with pytest.raises(LinkError, match="client job of site-1, job job-1, did not answer"):
        TrainerEngine.connect(job.config(submit_result_timeout=0.05), 0)


@pytest.mark.parametrize("missing", ["SITE_NAME", "JOB_ID"])
def test_a_configuration_says_for_whom_it_is(job: PlayedJob, missing: str) -> None:
    """Without site or job it is no trainer's; nothing is opened."""
    config = job.config().get_config()
    del config[missing]

    with pytest.raises(ConfigError) as caught:
        TrainerEngine.connect(ClientConfig(config), 0)
    assert caught.value.parameter == missing


def test_a_pipe_that_cannot_be_made_is_an_error_and_the_other_one_is_closed(job: PlayedJob) -> None:
    """The task pipe does not stay open when the metric pipe fails."""
    config = job.config().get_config()
    config["METRICS_EXCHANGE"]["pipe"] = {"CLASS_NAME": "no.such.Pipe"}

    with pytest.raises(ConfigError, match="Pipe"):
        TrainerEngine.connect(ClientConfig(config), 0)
    job.engine().close()  # its place is free


# --- tasks


def test_a_task_waits_for_the_script_with_its_arrays(job: PlayedJob, engine: TrainerEngine) -> None:
    """What was handed out is fetched before the script asks; it gets name, round and its own writable model."""
    (given,) = job.give(3, 5.0)
    given.result(LIMIT_S)  # its arrays are there

    task = engine.next_task(0)

    assert task is not None
    assert (task.task_id, task.task_name, task.round, task.total_rounds) == ("3", "train", 3, 9)
    found = model_of(task)
    assert found.tolist() == [5.0] * SIZE
    found[:] = 1
    assert engine.still_wanted(task)


def test_a_script_waits_for_the_arrays_of_its_task(job: PlayedJob, slow: SlowPipe) -> None:
    """Until they are all there the task is not."""
    engine = job.engine(slow)
    (given,) = job.give(1, 2.0)
    waiting = InThread(engine.next_task, None)
    wait_until(is_waiting(engine), "the script waits")
    assert engine.next_task(0.01) is None

    slow.arrive()

    assert model_of(waiting.result()).tolist() == [2.0] * SIZE
    given.result(LIMIT_S)
    engine.close()


def test_a_task_whose_arrays_are_lost_is_none_for_the_script(job: PlayedJob, slow: SlowPipe) -> None:
    """The script never sees it; the client job is told, and the next task comes as if nothing had been."""
    engine = job.engine(slow)
    (given,) = job.give(1)
    waiting = InThread(engine.next_task, None)
    slow.lose(SourceLost("server.job-1"))
    result = job.next(RESULT)
    job.give(2, 7.0)
    slow.arrive()

    assert unpack(result.body, number=int, error=str) == {
        "number": 1,
        "error": "could not take the task: source server.job-1 lost: gone",
    }
    assert model_of(waiting.result()).tolist() == [7.0] * SIZE
    given.result(LIMIT_S)
    engine.close()


def test_a_task_that_is_cancelled_while_its_arrays_are_on_their_way_is_forgotten(
    job: PlayedJob, slow: SlowPipe
) -> None:
    """Its round is closed, and the server withdraws the model: nobody hears of that, neither script nor client job."""
    engine = job.engine(slow)
    job.give(1)
    job.cancel(1)
    slow.lose(SourceLost("server.job-1"))
    job.give(2, 4.0)
    slow.arrive()

    assert model_of(engine.next_task(LIMIT_S)).tolist() == [4.0] * SIZE
    assert job.said.empty()
    engine.close()


def test_a_task_that_was_cancelled_before_it_came_is_not_fetched(job: PlayedJob, slow: SlowPipe) -> None:
    """Of a cancelled task nothing is fetched; whoever offers its arrays is answered all the same."""
    engine = job.engine(slow)
    job.cancel(2)
    (given,) = job.give(2)

    given.result(LIMIT_S)
    assert slow.pulls.empty()
    assert engine.next_task(0) is None
    engine.close()


def test_a_task_that_is_cancelled_before_the_script_saw_it_is_not_wanted(job: PlayedJob, engine: TrainerEngine) -> None:
    """Waiting or just taken, it is dropped, and asking for the next one gives nothing up."""
    job.give(1)[0].result(LIMIT_S)
    job.cancel(1)
    assert engine.next_task(0) is None
    job.give(2)[0].result(LIMIT_S)
    task = engine.next_task(LIMIT_S)
    assert task is not None
    job.cancel(2)

    assert not engine.still_wanted(task)
    assert engine.next_task(0) is None
    assert job.said.empty()


def test_a_newer_task_takes_the_place_of_one_that_nobody_took(job: PlayedJob, engine: TrainerEngine) -> None:
    """Only the last round counts."""
    for number in (1, 2, 3):
        job.give(number, number)[0].result(LIMIT_S)

    assert model_of(engine.next_task(0)).tolist() == [3.0] * SIZE
    assert engine.next_task(0) is None


def test_asking_for_the_next_task_gives_the_open_one_up(job: PlayedJob, engine: TrainerEngine) -> None:
    """The client job hears at once that no answer will come; unless the task was cancelled."""
    job.give(1)[0].result(LIMIT_S)
    engine.next_task(LIMIT_S)
    assert engine.next_task(0) is None
    fields = unpack(job.next(RESULT).body, number=int, error=str, model=bytes)
    assert (fields["number"], fields["model"]) == (1, b"")
    assert "without answering" in fields["error"]

    job.give(2)[0].result(LIMIT_S)
    engine.next_task(LIMIT_S)
    job.cancel(2)
    assert engine.next_task(0) is None
    assert job.said.empty()


def test_what_is_no_task_is_answered_with_an_error(job: PlayedJob, engine: TrainerEngine) -> None:
    """A topic that is not known and fields that are wrong are told to whoever sent them; the engine goes on."""
    for message in (Message("dance"), Message("task", b"\xc1"), Message("task")):
        with pytest.raises(RemoteError) as caught:
            job.handlers[0].request(message).result(LIMIT_S)
        assert caught.value.kind == "DecodeError"

    job.give(1)[0].result(LIMIT_S)
    assert engine.next_task(LIMIT_S) is not None


# --- answers


def test_an_answer_is_settled_when_the_client_job_says_so(
    job: PlayedJob, engine: TrainerEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Until then it waits; a result that was not used is a warning, and none of the script's business."""
    for number, accepted in ((1, True), (2, False)):
        job.give(number)[0].result(LIMIT_S)
        task = engine.next_task(LIMIT_S)
        assert task is not None
        wait = InThread(engine.answer(task, answer_with(number)))
        result = job.next(RESULT)
        assert weights(result) == [float(number)] * SIZE
        assert unpack(result.body, number=int, error=type(None))["number"] == number
        assert wait.is_running
        job.answer(result, accepted, "" if accepted else "NaN in w")
        wait.result()

    assert engine.next_task(0) is None
    assert job.said.empty()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "site-1: the server did not use the result: NaN in w"
    ]


def test_an_answer_waits_as_long_as_bytes_move(job: PlayedJob, slow: SlowPipe) -> None:
    """However long the server takes to fetch it: only a whole lease without a byte is too long."""
    engine = job.engine(slow, download_complete_timeout=0.05)
    job.give(1)
    slow.arrive()
    task = engine.next_task(LIMIT_S)
    assert task is not None
    looked = threading.Semaphore(0)

    def moved() -> int:
        slow.moved += 1
        looked.release()
        return slow.moved

    slow.moved_bytes = moved  # type: ignore[method-assign]
    wait = InThread(engine.answer(task, answer_with(1)))
    result = job.next(RESULT)
    for _ in range(6):  # three leases and more
        assert looked.acquire(timeout=LIMIT_S)
    assert wait.is_running
    job.answer(result)
    wait.result()

    job.give(2)
    slow.arrive()
    task = engine.next_task(LIMIT_S)
    assert task is not None
    slow.moved_bytes = lambda: 7  # type: ignore[method-assign]
    model = answer_with(1)
    held = weakref.ref(model.params["w"])  # type: ignore[index]
    wait = InThread(engine.answer(task, model))
    with pytest.raises(DeadlineExceeded):
        wait.result()
    # Nobody will fetch it any more: it is let go.
    job.next(RESULT)
    del model, wait
    wait_until(lambda: (gc.collect(), held() is None)[1], "its arrays are free")
    engine.close()


def test_an_answer_that_failed_can_be_sent_again(job: PlayedJob, engine: TrainerEngine) -> None:
    """The error that the client job answers with is that of `send`, and the task is still open."""
    job.give(1)[0].result(LIMIT_S)
    task = engine.next_task(LIMIT_S)
    assert task is not None
    wait = InThread(engine.answer(task, answer_with(1)))
    job.handlers[0].fail(job.next(RESULT), SourceLost("site-1.job-1.0.x"))
    with pytest.raises(SourceLost):
        wait.result()

    wait = InThread(engine.answer(task, answer_with(2)))
    job.answer(job.next(RESULT))
    wait.result()


# --- the end


ENDS: dict[str, tuple[Callable[[PlayedJob], Any], str]] = {
    "END": (lambda job: job.handlers[0].notify_end("completed"), "completed"),
    "ABORT": (lambda job: job.handlers[0].notify_abort("aborted by user"), "aborted by user"),
    "ABORT without a reason": (lambda job: job.handlers[0].notify_abort(), "the job was aborted"),
    "PEER_GONE": (lambda job: job.handlers[0].stop(), "the client job is gone"),
}


@pytest.mark.parametrize(("end", "reason"), ENDS.values(), ids=ENDS)
def test_the_end_wakes_a_script_that_waits(
    job: PlayedJob, engine: TrainerEngine, end: Callable[[PlayedJob], Any], reason: str
) -> None:
    """Whatever ended it: no more tasks, and the reason stays readable."""
    waiting = InThread(engine.next_task, None)
    wait_until(is_waiting(engine), "the script waits")

    end(job)

    assert waiting.result() is None
    assert engine.ended is not None
    assert engine.ended.startswith(reason)
    assert engine.next_task(None) is None


@pytest.mark.parametrize(("end", "reason"), ENDS.values(), ids=ENDS)
def test_the_end_drops_an_answer_that_is_on_its_way(
    job: PlayedJob, engine: TrainerEngine, end: Callable[[PlayedJob], Any], reason: str
) -> None:
    """`flare.send()` returns, with a warning in the log; the script finds out by `is_running()`."""
    session = Session(Seat(engine))
    job.give(1)[0].result(LIMIT_S)
    assert session.is_running()
    model = session.receive(LIMIT_S)
    assert model is not None
    sending = InThread(session.send, FLModel(params=model.params), True)
    job.next(RESULT)
    assert sending.is_running

    end(job)

    sending.result()
    assert not session.is_running()
    assert engine.ended is not None
    assert engine.ended.startswith(reason)


def test_the_end_comes_before_a_task_that_waits(job: PlayedJob, slow: SlowPipe) -> None:
    """A task that came last is not begun when the job is over, nor fetched any more."""
    engine = job.engine(slow)
    job.give(1)
    wait_until(lambda: engine._waiting, "it is on its way")
    job.handlers[0].notify_end("completed")
    wait_until(lambda: engine.ended, "the end is known")

    assert engine.next_task(None) is None
    slow.arrive()
    assert engine.next_task(None) is None
    engine.close()


# --- followers


def test_followers_see_every_task_in_order_and_never_answer() -> None:
    """Rank 1 gets what rank 0 gets, behind it by a task at most; what it leaves unanswered is given up by nobody."""
    job = PlayedJob(ranks=2)
    engine = job.engine(rank=1)
    session = Session(Seat(engine))
    assert engine.is_follower
    seen = []
    for number in range(3):
        for given in job.give(number, number, ranks=[1]):
            given.result(LIMIT_S)
        assert session.is_running()
        model = session.receive(LIMIT_S)
        assert model is not None
        assert session.receive(LIMIT_S) is model
        seen.append(float(model.params["w"][0]))  # type: ignore[index]
    for number in (3, 4):
        for given in job.give(number, number, ranks=[1]):
            given.result(LIMIT_S)
    for _ in (3, 4):
        assert session.is_running()
        model = session.receive(LIMIT_S)
        assert model is not None
        seen.append(float(model.params["w"][0]))  # type: ignore[index]

    assert seen == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert job.said.empty()
    job.handlers[1].notify_end("completed")
    assert not session.is_running()
    engine.close()
    job.close()


def test_a_follower_has_no_metrics(caplog: pytest.LogCaptureFixture) -> None:
    """Only rank 0 has a metric channel; what another rank logs all the same is dropped, not raised."""
    job = PlayedJob(ranks=2)
    engine = job.engine(rank=1)
    engine.log("loss", 1.0, AnalyticsDataType.SCALAR, {})
    engine.close()
    job.close()

    assert job.records.empty()


# --- metrics


def test_metrics_belong_to_the_open_task_and_are_flushed_at_the_end(job: PlayedJob) -> None:
    """What was logged reaches the client job before the goodbye."""
    engine = job.engine()
    engine.log("before", 1.0, AnalyticsDataType.SCALAR, {})
    job.give(4)[0].result(LIMIT_S)
    engine.next_task(LIMIT_S)
    for step in range(100):
        engine.log("loss", float(step), AnalyticsDataType.SCALAR, {"global_step": step})
    engine.close()

    found = [job.records.get(timeout=LIMIT_S) for _ in range(101)]
    assert [(each["round"], each["key"]) for each in found] == [(None, "before"), *[(4, "loss")] * 100]
    assert [each["value"] for each in found[1:]] == [float(step) for step in range(100)]
    assert {each["site"] for each in found} == {"site-1"}


def test_metrics_after_the_end_of_the_job_are_still_heard(job: PlayedJob) -> None:
    """A script that logs its last words when `is_running()` was False logs them for somebody."""
    engine = job.engine()
    job.handlers[0].notify_end("completed")
    assert engine.next_task(None) is None
    engine.log("final", 1.0, AnalyticsDataType.SCALAR, {})
    engine.close()

    assert job.records.get(timeout=LIMIT_S)["key"] == "final"


def test_nobody_waits_for_metrics_after_an_abort(job: PlayedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go nowhere, and the script ends at once."""
    monkeypatch.setattr(ex_engine, "FAREWELL_S", 1000.0)
    job.metrics._on_message = lambda _: None  # type: ignore[method-assign]
    engine = job.engine()
    job.handlers[0].notify_abort("user")
    assert engine.next_task(None) is None
    engine.log("final", 1.0, AnalyticsDataType.SCALAR, {})

    InThread(engine.close).result()


# --- nothing is left


def test_close_is_idempotent_and_leaves_no_thread(job: PlayedJob) -> None:
    """Fifty trainers in one process, one after the other, each with a task and metrics, leave nothing."""
    before = set(threading.enumerate())
    job.close()
    for _ in range(50):
        played = PlayedJob()
        engine = played.engine()
        played.give(1)[0].result(LIMIT_S)
        engine.next_task(LIMIT_S)
        engine.log("loss", 1.0, AnalyticsDataType.SCALAR, {})
        engine.close()
        engine.close()
        assert played.statuses.get(timeout=LIMIT_S)[0] == "_END_"
        played.close()

    wait_until(lambda: set(threading.enumerate()) <= before, "all threads end")


def test_an_engine_holds_no_model_after_its_round(job: PlayedJob, engine: TrainerEngine) -> None:
    """Once it was answered, neither the received model nor the result is referenced by anything of the engine."""
    session = Session(Seat(engine))
    held = []
    for number in range(2):
        job.give(number, 1.0, size=100_000)[0].result(LIMIT_S)
        model = session.receive(LIMIT_S)
        assert model is not None
        assert model.params is not None
        result = FLModel(params={"w": model.params["w"] + 1})
        held += [weakref.ref(model.params["w"]), weakref.ref(result.params["w"])]  # type: ignore[index]
        sending = InThread(session.send, result, True)
        message = job.next(RESULT)
        job.answer(message)
        sending.result()
        del message, model, result, sending

    wait_until(lambda: not any(each() is not None for each in held), "they are free")


def test_a_trainer_says_goodbye_once(job: PlayedJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """After `flare.shutdown()` of its last context the client job knows that it left, and it does not come back."""
    import flarebus.client as flare

    monkeypatch.setattr(ex_seat, "_has_left", False)
    path = tmp_path / "client.json"
    job.config().to_json(path)
    try:
        opening = InThread(flare.init, "0", str(path))
        job.welcome(job.next(HELLO))
        context = opening.result()
        assert flare.get_site_name() == "site-1"
        assert context.end_reason is None
        flare.shutdown()
        assert job.statuses.get(timeout=LIMIT_S) == ("_END_", "the script has ended")
        with pytest.raises(ClientApiError, match=r"ended|goodbye"):
            flare.init("0", str(path))
    finally:
        set_process_seat(None)


def test_scripts_may_sit_on_an_engine_like_any_other(job: PlayedJob, engine: TrainerEngine) -> None:
    """The Client API over a trainer's engine: receive, send, receive."""
    import flarebus.client as flare

    def script() -> list[float]:
        seen = []
        with sit(Seat(engine), {}):
            flare.init()
            while flare.is_running():
                model = flare.receive()
                assert model is not None
                assert model.params is not None
                seen.append(float(model.params["w"][0]))
                flare.send(FLModel(params=model.params))
        return seen

    running = InThread(script)
    for number in range(3):
        job.give(number, number)
        job.answer(job.next(RESULT))
    job.handlers[0].notify_end("completed")

    assert running.result() == [0.0, 1.0, 2.0]


def test_errors_of_a_closed_engine_are_those_of_the_bus(job: PlayedJob) -> None:
    """Who answers after the engine was closed hears so, and does not wait."""
    engine = job.engine()
    job.give(1)[0].result(LIMIT_S)
    task = engine.next_task(LIMIT_S)
    assert task is not None
    engine.close()

    with pytest.raises(FlarebusError):
        engine.answer(task, answer_with(1))()
    assert engine.ended == "the script has ended"


def test_whoever_waits_for_an_answer_hears_of_the_end_no_sooner_than_of_its_reason(
    job: PlayedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe tells its waiters before it tells its status: in between a script must not get an error."""
    told, gate = TrainerEngine._on_status, threading.Event()

    def late(self: TrainerEngine, topic: str, reason: str) -> None:
        gate.wait(LIMIT_S)
        told(self, topic, reason)

    monkeypatch.setattr(TrainerEngine, "_on_status", late)
    engine = job.engine()
    session = Session(Seat(engine))
    job.give(1)[0].result(LIMIT_S)
    session.receive(LIMIT_S)
    sending = InThread(session.send, answer_with(1), True)
    job.next(RESULT)
    job.handlers[0].notify_end("completed")
    wait_until(lambda: is_waiting(engine)() or not sending.is_running, "the script hears of it")
    assert sending.is_running
    assert engine.ended is None
    gate.set()

    sending.result()
    assert engine.ended == "completed"
    engine.close()
