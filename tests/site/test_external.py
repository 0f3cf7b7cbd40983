"""ExternalSite: lives of trainers, tasks that go through unopened, and answers that are owed whatever happens."""

from __future__ import annotations

import gc
import stat
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flarebus_pipes import memory_pipe

from flarebus.client.config import ClientConfig, from_file
from flarebus.client.ex_process.engine import TrainerEngine
from flarebus.errors import ClientApiError, ConfigError, LinkError, RemoteError, SourceLost
from flarebus.job.class_ref import ClassRef
from flarebus.job.filter_ref import FilterRef
from flarebus.metric import AnalyticsDataType
from flarebus.pipes import Message
from flarebus.site.external import HUNG_S, LEAVE_S, SUSPECT_S
from flarebus.site.work import Work
from flarebus.workflow.filter import FilterChain
from tests.pipes.links import InThread, wait_until
from tests.site.played_trainer import BIG, LIMIT_S, PlayedSite, model_of, send, take

Play = Callable[..., PlayedSite]
PIPES = ("cell", "memory")


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    """Makes a site that runs."""
    played: list[PlayedSite] = []

    def make(**given: Any) -> PlayedSite:
        played.append(PlayedSite(tmp_path / "site-1", **given))
        played[-1].site.start()
        return played[-1]

    yield make
    for each in played:
        each.close()


def answered(site: PlayedSite, engine: TrainerEngine, value: float) -> list[float]:
    """Take the task, answer it, have it accepted; what it began with."""
    task, found = take(engine)
    sending = send(engine, task, value)
    assert model_of(site.accept(site.result())) == [value, value]
    sending.result()
    return found


# --- tasks and results


@pytest.mark.parametrize("size", [4, BIG], ids=["inline", "transfer"])
@pytest.mark.parametrize("pipe", PIPES)
def test_a_task_goes_to_the_trainer_and_its_result_to_the_server(play: Play, pipe: str, size: int) -> None:
    """Round after round; `send` is over when the server has the result, and a pipe that passes manifests moves
    nothing through the site."""
    site = play(pipe=pipe)
    engine = site.launch().init()
    for number in range(3):
        site.give(number, number, size)
        task, found = take(engine)
        assert (found, task.round) == ([float(number)] * 2, number)
        sending = send(engine, task, number + 10.0, size)
        result = site.result()
        assert sending.is_running
        assert (result.source, result.plain()["site"], result.plain()["number"]) == ("worker-1.job", "site-1", number)
        assert model_of(site.accept(result)) == [number + 10.0] * 2
        sending.result()

    moved = site.host.statistics().bytes_pulled + site.host.statistics().bytes_served
    assert (moved == 0) == (pipe == "cell" or size == 4)
    wait_until(lambda: site.host.statistics().offers_held == 0, "nothing is offered any more")


@pytest.mark.parametrize("pipe", PIPES)
def test_a_task_waits_for_a_trainer_that_comes_later(play: Play, pipe: str) -> None:
    """It is handed out when the script has called `flare.init()`, once."""
    site = play(pipe=pipe)
    process = site.launch()
    site.give(1, 5.0)
    engine = process.init()

    assert answered(site, engine, 6.0) == [5.0, 5.0]
    assert engine.next_task(0.05) is None


def test_a_trainer_that_comes_with_its_task_gets_it_once(play: Play) -> None:
    """Whichever is first, hello or task: never two of one."""
    site = play(launch_once=False)
    for number in range(20):
        giving = InThread(site.give, number, 1.0, 4)
        process = site.launch()
        engine = process.init()
        giving.result()
        task, _ = take(engine)
        assert engine.next_task(0.01) is None  # which gives the task up
        assert "without answering" in site.failure()
        assert task.task_id == str(number)
        process.exit(code=0)


@pytest.mark.parametrize("launch_once", [True, False], ids=["for good", "for one task"])
@pytest.mark.parametrize("pipe", PIPES)
def test_a_result_that_stays_rests_with_the_site(play: Play, pipe: str, launch_once: bool) -> None:
    """Its trainer goes on or leaves; whoever may fetch it does so later, until it is released."""
    site = play(pipe=pipe, launch_once=launch_once)
    site.give(1, readers=["server.job"], stays=True)
    process = site.launch()
    engine = process.init()
    task, _ = take(engine)
    send(engine, task, 7.0, BIG).result()
    held = site.result()
    if launch_once:
        site.give(2)
        answered(site, engine, 8.0)
    process.exit(code=0)

    assert model_of(site.accept(held)) == [7.0, 7.0]
    wait_until(lambda: site.host.statistics().offers_held == 0, "nothing is offered any more")


def test_a_result_that_is_not_used_is_noted(play: Play) -> None:
    """The script is not told by an exception, the user by the site's log."""
    site = play()
    engine = site.launch().init()
    site.give(1)
    task, _ = take(engine)
    sending = send(engine, task, 1.0)
    site.accept(site.result(), accepted=False, reason="NaN in w")

    sending.result()
    assert ("WARNING", "the server did not use the result: NaN in w") in site.logs.notes


def test_a_second_answer_and_one_that_is_late_are_refused(play: Play) -> None:
    """One answer for each task; after the next one came an answer to the last is too late."""
    site = play()
    engine = site.launch().init()
    site.give(1)
    task, _ = take(engine)
    first, second = send(engine, task, 1.0), send(engine, task, 2.0)
    second.result()
    site.accept(site.result())
    first.result()
    site.give(2)
    send(engine, task, 3.0).result()

    assert site.results.empty()
    assert answered(site, engine, 4.0) == [0.0, 0.0]


def test_what_a_trainer_gives_up_has_failed(play: Play) -> None:
    """The server hears the reason, and the trainer gets the next task."""
    site = play()
    engine = site.launch().init()
    site.give(1)
    take(engine)
    waiting = InThread(engine.next_task, LIMIT_S)

    assert "without answering" in site.failure()
    site.give(2)
    assert waiting.result() is not None


def test_nonsense_of_a_trainer_is_answered(play: Play) -> None:
    """A result that cannot be read fails the task, and whoever sent it does not wait for ever."""
    site = play()
    engine = site.launch().init()
    site.give(1)
    take(engine)
    sent = engine._handler.request(Message("result", b"\xc1"))

    with pytest.raises(RemoteError, match="DecodeError"):
        sent.result(LIMIT_S)
    assert "its result was not sent" in site.failure()


def test_metrics_go_on_unopened(play: Play) -> None:
    """What the script logs reaches the server; a process that was not let in logs nothing."""
    site = play()
    engine = site.launch().init()
    engine.log("loss", 1.0, AnalyticsDataType.SCALAR, {})
    engine._metrics.flush(LIMIT_S)

    fields = site.records.get(timeout=LIMIT_S)
    assert fields["dropped"] == {}
    assert b"loss" in fields["records"]


# --- trainers that never come


def test_a_trainer_that_does_not_come_in_time_fails_its_task_and_is_ended(play: Play) -> None:
    """The next task finds another one."""
    site = play(launch_timeout=30.0)
    process = site.launch()
    site.give(1)
    site.pass_time(29.9)
    assert site.results.empty()
    site.pass_time(0.2)

    assert site.failure() == "its trainer did not call flare.init() within 30 s"
    assert process.ended.get(timeout=LIMIT_S) == HUNG_S
    site.give(2, 7.0)
    site.settle()
    assert site.launched.empty()  # the old one is still there
    process.exit(signal=15, was_ended=True)
    assert answered(site, site.launch().init(), 1.0) == [7.0, 7.0]


def test_a_trainer_that_comes_has_all_the_time_for_its_task(play: Play) -> None:
    """The limit is for `flare.init()`."""
    site = play(launch_timeout=30.0)
    engine = site.launch().init()
    site.settle()
    site.pass_time(1000.0)
    site.give(1)

    answered(site, engine, 1.0)


def test_a_stillborn_trainer_fails_the_task_that_comes_then(play: Play) -> None:
    """Why it never came is told once, at once; the task after that gets another try."""
    site = play()
    site.launch().exit(code=1, last_words="ModuleNotFoundError: No module named 'torch'")
    site.settle()
    site.give(1)
    assert "exit code 1" in (reason := site.failure())
    assert "No module named 'torch'" in reason
    assert site.launched.empty()

    site.give(2)
    assert answered(site, site.launch().init(), 1.0) == [0.0, 0.0]


def test_a_trainer_that_cannot_be_started_fails_the_task(play: Play, tmp_path: Path) -> None:
    """Whatever kept it from starting: the reason goes to the server, and nothing stays open."""
    site = PlayedSite(tmp_path / "site-1")
    site.fault = ConfigError("pipe", "x", "something else")
    site.site.start()
    site.give(1)
    assert "its trainer could not be started" in site.failure()
    site.fault = OSError(28, "No space left on device")
    site.give(2)
    assert "No space left on device" in site.failure()

    site.give(3)
    answered(site, site.launch().init(), 1.0)
    site.close()


def test_a_pipe_that_stays_in_the_process_cannot_be_attached_to(tmp_path: Path) -> None:
    """Nobody could ever come."""
    site = PlayedSite(tmp_path / "site-1", pipe="memory", attach=True)
    site.site.start()
    site.give(1)

    assert "with attach=True a pipe that leaves the process" in site.failure()
    site.close()


# --- lives


def test_a_trainer_that_was_killed_gets_a_second_life_for_its_task_and_no_third(play: Play) -> None:
    """The same task, the same model; killed twice it has failed. The task after that begins anew."""
    site = play()
    site.give(1, 3.0)
    for _ in range(2):
        process = site.launch()
        assert take(process.init())[1] == [3.0, 3.0]
        process.exit(signal=9)

    assert site.failure() == "its trainer process was killed by SIGKILL, 2 times"
    site.give(2, 4.0)
    assert answered(site, site.launch().init(), 1.0) == [4.0, 4.0]


def test_a_trainer_whose_guardian_died_was_killed(play: Play) -> None:
    """What is known is only that somebody killed it: it gets a second life."""
    site = play()
    site.give(1, 3.0)
    process = site.launch()
    take(process.init())
    process.exit(guardian_end="was killed by SIGKILL")

    assert answered(site, site.launch().init(), 1.0) == [3.0, 3.0]


def test_a_script_that_fails_would_fail_again(play: Play) -> None:
    """Its end is the answer; a new process is started for the next task only."""
    site = play()
    site.give(1)
    process = site.launch()
    take(process.init())
    process.exit(code=3, last_words="ValueError: boom")
    reason = site.failure()

    assert reason == "its trainer process ended with exit code 3 (last output: ValueError: boom)"
    site.settle()
    assert site.launched.empty()
    site.give(2)
    answered(site, site.launch().init(), 1.0)


def test_a_script_that_ends_without_an_answer_is_told_what_it_lacks(play: Play) -> None:
    """An exit code of 0 is no answer."""
    site = play()
    site.give(1)
    process = site.launch()
    take(process.init())
    process.exit(code=0)

    assert "it did not answer its task" in site.failure()


@pytest.mark.parametrize("pipe", PIPES)
def test_a_script_that_ends_after_each_task_does_not_lose_the_next(play: Play, pipe: str) -> None:
    """A task that comes while the process is leaving gets another one; but only one that has answered before."""
    site = play(pipe=pipe)
    process = site.launch()
    engine = process.init()
    site.give(1, 1.0)
    answered(site, engine, 1.0)
    site.give(2, 2.0)
    site.settle()
    process.exit(code=0)

    again = site.launch()
    assert take(again.init())[1] == [2.0, 2.0]
    again.exit(code=0)
    assert "it did not answer its task" in site.failure()


def test_a_process_that_hangs_without_a_connection_is_given_up(play: Play) -> None:
    """Its pipe is broken and it does not end: after a moment its task has failed, and it is made to end."""
    site = play()
    process = site.launch()
    engine = process.init()
    site.give(1)
    take(engine)
    engine.ended = "gone without a word"
    engine.close()
    wait_until(lambda: (site.settle(), site.site._patience)[1] is not None, "it is noticed")
    assert site.results.empty()
    site.pass_time(SUSPECT_S)

    assert "hangs" in site.failure()
    assert process.ended.get(timeout=LIMIT_S) == HUNG_S


def test_one_trainer_for_each_task(play: Play) -> None:
    """With launch_once=False the one before has left before the next one is started, however early the task comes."""
    site = play(launch_once=False)
    assert site.launched.empty()
    site.give(1, 1.0)
    process = site.launch()
    engine = process.init()
    assert answered(site, engine, 1.0) == [1.0, 1.0]
    assert engine.next_task(LIMIT_S) is None
    assert engine.ended == "this trainer was for one task"
    site.give(2, 2.0)
    site.settle()
    assert site.launched.empty()
    assert process.ended.empty()
    process.exit(code=0)

    assert answered(site, site.launch().init(), 1.0) == [2.0, 2.0]


def test_a_trainer_for_one_task_that_does_not_leave_is_made_to(play: Play) -> None:
    """It has its time, then it is in the way."""
    site = play(launch_once=False, shutdown_timeout=20.0)
    site.give(1)
    process = site.launch()
    answered(site, process.init(), 1.0)
    site.settle()
    site.give(2)
    site.pass_time(19.0)
    assert process.ended.empty()
    site.pass_time(1.0)

    assert process.ended.get(timeout=LIMIT_S) == HUNG_S
    process.exit(signal=9, was_ended=True)
    answered(site, site.launch().init(), 1.0)


@pytest.mark.parametrize("how", ["failed", "cancelled"])
def test_a_trainer_for_one_task_gets_no_second_one(play: Play, how: str) -> None:
    """Also when its task failed or was cancelled: the next one has a process of its own."""
    site = play(launch_once=False)
    site.give(1)
    process = site.launch()
    engine = process.init()
    task, _ = take(engine)
    if how == "failed":
        assert engine.next_task(0) is None
        site.failure()
    else:
        site.site.cancel(("", 1))
        site.settle()
        with pytest.raises(LinkError):
            send(engine, task, 1.0).result()
    site.give(2, 2.0)
    assert engine.next_task(LIMIT_S) is None
    process.exit(code=0)

    assert answered(site, site.launch().init(), 1.0) == [2.0, 2.0]


def test_a_trainer_that_was_not_needed_yet_serves_the_next_task(play: Play) -> None:
    """With launch_once=False a task that is cancelled before its trainer came leaves that to the next task."""
    site = play(launch_once=False)
    site.give(1)
    process = site.launch()
    site.site.cancel(("", 1))
    site.settle()
    site.give(2, 2.0)

    assert answered(site, process.init(), 1.0) == [2.0, 2.0]
    assert site.launched.empty()


@pytest.mark.parametrize("pipe", PIPES)
def test_a_cancelled_task_is_neither_begun_nor_answered(play: Play, pipe: str) -> None:
    """A trainer that has not begun forgets it; one that has is told that it is too late."""
    site = play(pipe=pipe)
    engine = site.launch().init()
    site.give(1)
    task, _ = take(engine)
    site.site.cancel(("", 1))
    send(engine, task, 1.0).result()
    assert site.results.empty()

    site.give(2)
    site.site.cancel(("", 2))
    wait_until(lambda: engine._unwanted == 2, "the trainer knows")
    site.give(3, 3.0)
    assert answered(site, engine, 1.0) == [3.0, 3.0]


# --- results that are lost


def test_a_result_that_died_with_its_trainer_is_asked_of_the_next_one(play: Play) -> None:
    """Its process ended while the server fetched the result: the next life gets the same task."""
    site = play()
    process = site.launch()
    engine = process.init()
    site.give(1, 5.0)
    task, _ = take(engine)
    send(engine, task, 1.0)
    result = site.result()
    process.exit(signal=9)
    result.fail(SourceLost("site-1.job.0.x"))

    assert answered(site, site.launch().init(), 2.0) == [5.0, 5.0]


def test_a_result_that_was_lost_on_its_way_is_the_scripts_to_send_again(play: Play) -> None:
    """The trainer lives: `send` raises, and a second one is taken."""
    site = play()
    engine = site.launch().init()
    site.give(1)
    task, _ = take(engine)
    sending = send(engine, task, 1.0)
    site.result().fail(SourceLost("site-1.job.0.x"))
    with pytest.raises(SourceLost):
        sending.result()

    again = send(engine, task, 2.0)
    assert model_of(site.accept(site.result())) == [2.0, 2.0]
    again.result()


# --- the end


@pytest.mark.parametrize("pipe", PIPES)
def test_the_end_is_told_and_waited_for(play: Play, pipe: str) -> None:
    """The trainer leaves by itself; nobody ends it, and it is over when the process is."""
    site = play(pipe=pipe)
    process = site.launch()
    engine = process.init()
    waiting = InThread(engine.next_task, None)
    site.site.end("completed")
    assert waiting.result() is None
    assert engine.ended == "completed"
    assert not site.site.wait_ended(0)
    process.exit(code=0)

    assert site.site.wait_ended(LIMIT_S)
    assert process.ended.empty()


@pytest.mark.parametrize(("given", "expected_s"), [({}, LEAVE_S), ({"shutdown_timeout": 60.0}, 60.0)])
def test_a_trainer_that_stays_is_made_to_leave(play: Play, given: dict[str, Any], expected_s: float) -> None:
    """It has as long as the job says, or ten seconds."""
    site = play(**given)
    process = site.launch()
    process.init()
    site.settle()
    site.site.end("completed")
    site.settle()
    site.pass_time(expected_s - 0.1)
    assert process.ended.empty()
    site.pass_time(0.2)

    assert process.ended.get(timeout=LIMIT_S) == HUNG_S
    assert site.site.leave_s == expected_s


def test_a_trainer_that_has_not_come_at_the_end_is_ended(play: Play) -> None:
    """It has nothing to finish; should it come all the same, it hears that it is over."""
    site = play()
    process = site.launch()
    site.site.end("completed")
    assert process.ended.get(timeout=LIMIT_S) == HUNG_S
    engine = process.init()

    assert engine.next_task(LIMIT_S) is None
    assert engine.ended == "completed"
    process.exit(code=0)
    assert site.site.wait_ended(LIMIT_S)


def test_what_comes_after_the_end_is_dropped(play: Play) -> None:
    """Tasks, answers, and another end change nothing."""
    site = play()
    process = site.launch()
    engine = process.init()
    site.give(1)
    task, _ = take(engine)
    site.site.end("aborted")
    site.give(2)
    site.site.cancel(("", 1))
    site.site.end("again")
    with pytest.raises(LinkError):
        send(engine, task, 1.0).result()
    process.exit(code=1)

    assert site.site.wait_ended(LIMIT_S)
    assert site.results.empty()


# --- filters

FILTERS = """
from flarebus.model import FLModel


class Values:
    def __init__(self, add=0.0, fail=False):
        self.n, self.add, self.fail = 0, add, fail

    def process(self, model, task):
        self.n += 1
        if self.fail:
            raise ValueError(f"no {task.name} leaves {task.site}")
        return FLModel(params={key: value + self.add * self.n for key, value in model.params.items()})


class Around(Values):
    needs_values = False

    def process(self, model, task):
        super().process(FLModel(params={}), task)
        return FLModel(meta={**model.meta, "seen": self.n})
"""


def chain(folder: Path, name: str, **args: Any) -> FilterChain:
    (folder / "my_filters.py").write_text(FILTERS)
    return FilterChain.build([FilterRef(ClassRef(f"my_filters.{name}", args))], folder)


@pytest.mark.parametrize("pipe", PIPES)
def test_filters_that_see_values_see_them_once(play: Play, tmp_path: Path, pipe: str) -> None:
    """The model is fetched to the site for them; every rank and every life gets the same outcome."""
    filters = chain(tmp_path, "Values", add=1.0), chain(tmp_path, "Values", add=100.0)
    site = play(pipe=pipe, filters=filters)
    site.give(1, 5.0)
    process = site.launch()
    assert take(process.init())[1] == [6.0, 6.0]
    process.exit(signal=9)
    engine = site.launch().init()
    task, found = take(engine)
    assert found == [6.0, 6.0]
    sending = send(engine, task, 7.0)

    assert model_of(site.accept(site.result())) == [107.0, 107.0]
    sending.result()
    wait_until(lambda: site.host.statistics().offers_held == 0, "nothing is offered any more")


def test_filters_that_see_no_values_cost_no_bytes(play: Play, tmp_path: Path) -> None:
    """They change what stands around the parameters, which stay where they are."""
    site = play(filters=(chain(tmp_path, "Around"), chain(tmp_path, "Around")))
    engine = site.launch().init()
    site.give(1, 5.0)
    task = engine.next_task(LIMIT_S)
    assert task is not None
    model = task.take()
    assert (model_of(model), model.meta["seen"], model.meta["from"]) == ([5.0, 5.0], 1, "server")
    sending = send(engine, task, 7.0)
    result = site.accept(site.result())

    assert (model_of(result), result.meta["seen"]) == ([7.0, 7.0], 1)
    sending.result()
    statistics = site.host.statistics()
    assert (statistics.bytes_pulled, statistics.bytes_served) == (0, 0)


@pytest.mark.parametrize("name", ["Values", "Around"])
@pytest.mark.parametrize("where", ["task", "result"])
def test_a_filter_that_fails_lets_nothing_through(play: Play, tmp_path: Path, name: str, where: str) -> None:
    """A task does not reach the script, a result does not leave the site; the reason does."""
    bad, none = chain(tmp_path, name, fail=True), FilterChain()
    site = play(filters=(bad, none) if where == "task" else (none, bad))
    engine = site.launch().init()
    site.settle()
    site.give(1)
    if where == "task":
        reason = site.failure()
        assert engine.next_task(0.05) is None
    else:
        task, _ = take(engine)
        sending = send(engine, task, 1.0)
        reason = site.failure()
        with pytest.raises(RemoteError, match="no train leaves site-1"):
            sending.result()

    assert "no train leaves site-1" in reason
    assert site.results.empty()


# --- ranks


@pytest.mark.parametrize("pipe", PIPES)
def test_all_ranks_see_the_same_task(play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipe: str) -> None:
    """Whenever they come, before rank 0 or after it, before the task or after it; only rank 0 answers."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    site = play(pipe=pipe, filters=(chain(tmp_path, "Values", add=1.0), FilterChain()))
    process = site.launch()
    site.give(1, 1.0)
    early = InThread(process.init, 2)
    engines = {0: process.init()}
    engines[2] = early.result()
    assert [take(engines[rank])[1] for rank in (0, 2)] == [[2.0, 2.0]] * 2
    engines[1] = process.init(1)
    assert take(engines[1])[1] == [2.0, 2.0]
    task = engines[0]._open
    assert task is not None
    sending = send(engines[0], task, 5.0)
    site.accept(site.result())
    sending.result()

    site.give(2, 2.0)
    assert [take(engines[rank])[1] for rank in (1, 0, 2)] == [[4.0, 4.0]] * 3
    site.site.end("completed")
    assert [engines[rank].next_task(LIMIT_S) for rank in (0, 1, 2)] == [None] * 3


# --- attach


@pytest.fixture
def attached(play: Play, tmp_path: Path) -> PlayedSite:
    """A site whose trainer somebody else starts."""
    pipe = "flarebus_pipes.cell_pipe.CellPipe"
    site = play(pipe=pipe, attach=True, launch_timeout=30.0)
    wait_until(config_file(site).exists, "the configuration is published")
    return site


def config_file(site: PlayedSite) -> Path:
    return site.folder / "config" / "client_api_config.json"


def attach(site: PlayedSite) -> TrainerEngine:
    """What somebody's trainer does."""
    engine = InThread(TrainerEngine.connect, from_file(config_file(site)), 0).result()
    site.attached.append(engine)
    return engine


def test_a_trainer_attaches_with_the_published_configuration(attached: PlayedSite) -> None:
    """The file is its user's alone, and gone when the job is over; nothing was launched."""
    mode = config_file(attached).stat().st_mode
    assert stat.S_IMODE(mode) == 0o600
    engine = attach(attached)
    attached.give(1, 5.0)
    assert answered(attached, engine, 1.0) == [5.0, 5.0]
    attached.site.end("completed")
    assert engine.next_task(LIMIT_S) is None
    engine.close()

    assert attached.site.wait_ended(LIMIT_S)
    wait_until(lambda: not config_file(attached).parent.exists(), "the configuration is gone")
    assert attached.launched.empty()


def test_a_task_waits_so_long_for_a_trainer_to_attach(attached: PlayedSite) -> None:
    """Each task has the time again; nobody waits for ever."""
    for number in range(2):
        attached.give(number)
        attached.settle()
        attached.pass_time(31.0)
        assert attached.failure() == "no trainer was attached within 30 s"

    attached.give(2, 2.0)
    assert answered(attached, attach(attached), 1.0) == [2.0, 2.0]


@pytest.mark.parametrize("says_goodbye", [True, False])
def test_another_trainer_may_attach_when_one_has_gone(attached: PlayedSite, says_goodbye: bool) -> None:
    """With a new token. The task of one that vanished is the next one's; one that left without an answer has failed."""
    before = from_file(config_file(attached)).get_auth_token()
    engine = attach(attached)
    attached.give(1, 1.0)
    take(engine)
    if not says_goodbye:
        engine.ended = "killed"
    engine.close()
    if says_goodbye:
        assert "left without answering" in attached.failure()
        attached.give(2, 1.0)
    wait_until(lambda: is_renewed(attached, before), "there is a new configuration")

    assert answered(attached, attach(attached), 1.0) == [1.0, 1.0]


def is_renewed(site: PlayedSite, before: str | None) -> bool:
    try:
        return from_file(config_file(site)).get_auth_token() != before
    except ConfigError:  # it is being replaced
        return False


def test_a_process_that_is_not_welcome_leaves_no_trace(attached: PlayedSite) -> None:
    """Started with an old configuration it is refused, with a reason; the place stays free for the right one."""
    wrong = from_file(config_file(attached)).get_config()
    wrong["auth_token"] = "old"
    for _ in range(3):
        with pytest.raises(ClientApiError, match="start it with the new file"):
            InThread(TrainerEngine.connect, ClientConfig(wrong), 0).result()
    wait_until(lambda: can_attach(attached), "the right one is let in")
    attached.settle()
    assert not attached.noted("its trainer is gone")


def can_attach(site: PlayedSite) -> bool:
    """Whether a trainer is let in; while another one is being shown out it may have to try again."""
    try:
        engine = attach(site)
    except LinkError:
        return False
    site.give(1, 5.0)
    assert answered(site, engine, 1.0) == [5.0, 5.0]
    engine.close()
    return True


def test_an_attached_trainer_that_stays_holds_nobody_up_for_long(attached: PlayedSite) -> None:
    """At the end its last words are waited for, but not its end: that is nobody's to bring about."""
    engine = attach(attached)
    attached.settle()
    attached.site.end("completed")
    attached.settle()
    assert not attached.site.wait_ended(0)
    attached.clock.now += LEAVE_S
    attached.site._events.put(lambda: None)

    assert attached.site.wait_ended(LIMIT_S)
    engine.close()


# --- nothing is left


def test_nothing_holds_a_model_after_its_round(play: Play) -> None:
    """Neither a task, nor its arrays, nor a result that went through is referenced when the round is over."""
    for pipe in PIPES:
        site = play(pipe=pipe)
        engine = site.launch().init()
        held = []
        for number in range(2):
            site.give(number)
            held += answered_and_watched(site, engine)
        pools = site.host._carrier._pool, memory_pipe._POOL
        wait_until(lambda held=held: not any(alive(held)), f"its models are free: {pipe}")
        wait_until(lambda pools=pools: [pool.leased_bytes for pool in pools] == [0, 0], f"its memory is free: {pipe}")
        # By type: asking others for their class wakes the deprecations of whole libraries.
        assert not [each for each in gc.get_objects() if type(each) is Work]


def answered_and_watched(site: PlayedSite, engine: TrainerEngine) -> list[weakref.ref[Any]]:
    task = engine.next_task(LIMIT_S)
    assert task is not None
    model = task.take()
    sending = InThread(engine.answer(task, model))
    result = site.result()
    site.accept(result)
    sending.result()
    return [weakref.ref(model.params["w"])]  # type: ignore[index]


def alive(held: list[weakref.ref[Any]]) -> list[Any]:
    gc.collect()
    return [each() for each in held if each() is not None]


@pytest.mark.parametrize("pipe", PIPES)
def test_fifty_lives_leave_no_thread(play: Play, pipe: str) -> None:
    """Each life's pipes, handlers and threads are gone when the next one works."""
    site = play(pipe=pipe, launch_once=False)
    counts = []
    for number in range(50):
        site.give(number, number, 4)
        process = site.launch()
        answered(site, process.init(), 1.0)
        process.exit(code=0)
        site.settle()
        counts.append(threading.active_count())

    assert max(counts[40:]) <= max(counts[:10]), counts


# --- rounds that another site takes over


READERS = ["server.job", "worker-2.job"]


@pytest.mark.parametrize("has_answered", [False, True])
def test_whoever_takes_a_round_over_gets_what_the_trainer_made(play: Play, has_answered: bool) -> None:
    """Whoever gave the task dies, before or after the trainer has answered; it trains once."""
    site = play()
    leader = site.bus.attach("worker-2.job")
    leader.inbox("task", "result", lambda delivery: None)
    engine = site.launch().init()
    site.give(4, 1.0, giver=leader, owner="site-2", readers=READERS)
    task, found = take(engine)
    leader.close()
    sending = send(engine, task, 5.0, BIG) if has_answered else None
    if has_answered:
        wait_until(lambda: site.site._work is not None and site.site._work.unsent is not None, "it is not taken")

    site.give(9, 2.0, round=4, owner="site-3", readers=READERS, resumes=True)
    if sending is None:
        site.settle()
        sending = send(engine, task, 5.0, BIG)
    result = site.result()
    assert (result.plain()["number"], result.plain()["owner"]) == (9, "site-3")
    assert model_of(site.accept(result)) == [5.0] * 2
    sending.result()
    assert found == [1.0, 1.0]
    assert engine.next_task(0.05) is None


def test_a_task_of_another_round_is_not_taken_for_the_open_one(play: Play) -> None:
    """It replaces it."""
    site = play()
    engine = site.launch().init()
    site.give(4, 1.0, owner="site-2", readers=READERS)
    take(engine)
    site.give(9, 2.0, round=5, owner="site-3", readers=READERS, resumes=True)
    site.settle()

    assert engine.next_task(LIMIT_S) is not None
