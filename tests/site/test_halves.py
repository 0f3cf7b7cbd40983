"""Executors at sites: real ones in a real host, against a real server job over a bus."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from flarebus.errors import ConfigError, QuorumNotReached, RemoteError
from flarebus.job.class_ref import ClassRef
from flarebus.job.executor_ref import ExecutorRef
from flarebus.job.filter_ref import FilterRef
from flarebus.model import FLModel
from flarebus.workflow.controller import Task
from flarebus.workflow.executor import Executor, SiteTask
from flarebus.workflow.filter import Filter, FilterTask
from tests.server.played import BIG, LIMIT_S
from tests.site.hosted import Hosted

SCRIPT = """
import flarebus.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    flare.send(flare.FLModel(params=model.params, meta={"by": "script"}))
"""


class Desk(ModuleType):
    """What the executors of a test are told to do, and where they are."""

    def __init__(self) -> None:
        super().__init__("desk")
        self.begun: queue.SimpleQueue[SiteTask] = queue.SimpleQueue()
        self.go_on = threading.Event()
        self.go_on.set()
        self.answer: Callable[[SiteTask], Any] = lambda task: FLModel(params=task.model.params)


class Works(Executor):
    """Does what the test says, and notes by whom it was done."""

    def __init__(self, name: str = "executor") -> None:
        self.name = name

    def execute(self, task: SiteTask) -> FLModel:
        desk: Any = sys.modules["desk"]
        desk.begun.put(task)
        assert desk.go_on.wait(LIMIT_S)
        found = desk.answer(task)
        if isinstance(found, FLModel):
            found.meta.setdefault("by", self.name)
        return found  # type: ignore[no-any-return]


class AddTen(Filter):
    """Adds ten; refuses what has no weights."""

    def process(self, model: FLModel, task: FilterTask) -> FLModel:
        assert model.params, "no weights"
        assert Path.cwd().name == task.site
        return FLModel(params={"w": model.params["w"] + 10}, meta=model.meta)


def ref(kind: type, **args: Any) -> ClassRef:
    return ClassRef(f"{kind.__module__}.{kind.__name__}", args)


def works(*tasks: str, **args: Any) -> ExecutorRef:
    return ExecutorRef(ref(Works, **args), tasks)


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    made = Desk()
    monkeypatch.setitem(sys.modules, "desk", made)
    return made


@pytest.fixture
def hosted(tmp_path: Path, desk: Desk) -> Iterator[Hosted]:
    made = Hosted(tmp_path)
    yield made
    desk.go_on.set()
    made.close()


def ask(hosted: Hosted, name: str, *sites: str, size: int = 4, value: float = 0, **how: Any) -> Any:
    """Give sites a task; the future has site -> who answered, and the first weight."""

    def run() -> dict[str, tuple[str, float]]:
        model = FLModel(params={"w": np.full(size, value, np.float32)})
        return {
            result.site: (result.model.meta["by"], float((result.model.params or {})["w"][0]))
            for result in hosted.bus.job.broadcast(Task(name, model, 2, 5), sites=sites or None, **how)
        }

    return hosted.bus.start(run)


@pytest.mark.parametrize("size", [4, BIG], ids=["inline", "transfer"])
def test_tasks_go_to_whom_they_are_for(hosted: Hosted, desk: Desk, size: int) -> None:
    """Names and patterns lead to executors, the one added last first; the script has the rest."""
    made = (works("score", name="second"), works("score", "sw?rm_*", name="first"))
    hosted.start("a", "b", text=SCRIPT, executors=made)

    for name, by in (("train", "script"), ("score", "second"), ("swarm_x", "first"), ("swrm_x", "script")):
        assert ask(hosted, name, size=size, value=3).result(LIMIT_S) == {"a": (by, 3.0), "b": (by, 3.0)}


def test_an_executor_knows_its_task(hosted: Hosted, desk: Desk, tmp_path: Path) -> None:
    """It gets name, round, model, site and folder; its arrays are its own."""

    def answer(task: SiteTask) -> FLModel:
        assert task.model.params is not None
        task.model.params["w"] += 1
        return FLModel(params=task.model.params)

    desk.answer = answer
    hosted.start("a", "b", text="", executors=(works("score"),))

    assert ask(hosted, "score", value=1).result(LIMIT_S) == dict.fromkeys("ab", ("executor", 2.0))
    seen = {task.site: task for task in (desk.begun.get_nowait(), desk.begun.get_nowait())}
    assert (seen["a"].name, seen["a"].round, seen["a"].total_rounds, seen["a"].job_id) == ("score", 2, 5, "job-1")
    assert seen["b"].folder == tmp_path / "b"
    assert seen["a"].model.current_round == 2


def _raise(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda _: _raise(ValueError("boom")), "Works: ValueError: boom"),
        (lambda _: _raise(SystemExit(3)), "Works: SystemExit: 3"),
        (lambda _: None, r"execute\(\) returned an object of type NoneType, not an FLModel"),
        (lambda _: {"w": 1}, "of type dict, not an FLModel"),
        (lambda _: FLModel(meta={"x": object()}), "object"),
    ],
    ids=["raises", "exits", "None", "dict", "what cannot travel"],
)
def test_an_executor_that_fails_fails_its_task_and_goes_on(
    hosted: Hosted, desk: Desk, answer: Callable[[SiteTask], Any], said: str
) -> None:
    """The reason reaches the server, and the next task is done."""
    good, desk.answer = desk.answer, answer
    hosted.start("a", text=SCRIPT, executors=(works("score"),))
    with pytest.raises(QuorumNotReached, match=said):
        ask(hosted, "score").result(LIMIT_S)
    desk.answer = good

    assert ask(hosted, "score", value=7).result(LIMIT_S) == {"a": ("executor", 7.0)}


def test_a_task_that_is_for_nobody_fails_at_once(hosted: Hosted) -> None:
    """A site without a script says so, by the name of the task."""
    hosted.start("a", text="", executors=(works("score"),))

    with pytest.raises(QuorumNotReached, match="a has no script, and no executor for tasks named 'train'"):
        ask(hosted, "train").result(LIMIT_S)


def test_the_sites_filters_see_executors_models_as_well(hosted: Hosted, desk: Desk) -> None:
    """What an executor is given came through the input filters, what it answers goes through the output filters."""
    seen: list[float] = []

    def answer(task: SiteTask) -> FLModel:
        seen.append(float((task.model.params or {})["w"][0]))
        return FLModel(params=task.model.params)

    desk.answer = answer
    filters = (FilterRef(ref(AddTen), ("score",)),)
    hosted.start("a", text="", executors=(works("*"),), input_filters=filters, output_filters=filters)

    assert ask(hosted, "score", value=1).result(LIMIT_S) == {"a": ("executor", 21.0)}
    assert ask(hosted, "other", value=1).result(LIMIT_S) == {"a": ("executor", 1.0)}
    assert seen == [11.0, 1.0]


@pytest.mark.parametrize("where", ["input_filters", "output_filters"])
def test_a_filter_that_refuses_fails_the_task(hosted: Hosted, desk: Desk, where: str) -> None:
    """Neither does an executor see what a filter refuses, nor does its answer leave the site."""
    desk.answer = lambda task: FLModel(metrics={"loss": 1.0})
    hosted.start("a", text="", executors=(works("score"),), **{where: (FilterRef(ref(AddTen)),)})

    def run() -> list[str]:
        return [result.site for result in hosted.bus.job.broadcast(Task("score", FLModel()))]

    with pytest.raises(QuorumNotReached, match=r"AddTen.*no weights"):
        hosted.bus.start(run).result(LIMIT_S)
    assert desk.begun.empty() == (where == "input_filters")


def test_a_task_that_was_cancelled_is_not_begun(hosted: Hosted, desk: Desk) -> None:
    """An executor that is busy skips what nobody wants any more."""
    desk.go_on.clear()
    hosted.start("a", text="", executors=(works("score"),))
    for value in (1, 2):
        running = ask(hosted, "score", value=value, timeout=10)
        if value == 1:
            desk.begun.get(timeout=LIMIT_S)
        else:
            hosted.bus.heard()
        hosted.bus.pass_time(10)
        with pytest.raises(QuorumNotReached):
            running.result(LIMIT_S)
    # Handled after the cancellation before it.
    nothing = {"site": "x", "number": 0, "reason": ""}
    hosted.bus.cell.request("worker-1", "task", "refused", nothing).result(LIMIT_S)
    running = ask(hosted, "score", value=3)
    desk.go_on.set()

    assert running.result(LIMIT_S) == {"a": ("executor", 3.0)}
    assert float((desk.begun.get_nowait().model.params or {})["w"][0]) == 3.0


def test_what_waits_when_the_job_ends_is_not_begun(hosted: Hosted, desk: Desk) -> None:
    """An executor that is busy at the end of the job is the last that anybody waits for."""
    desk.go_on.clear()
    hosted.start("a", text="", executors=(works("score"),))
    running = ask(hosted, "score", timeout=10)
    desk.begun.get(timeout=LIMIT_S)
    hosted.bus.pass_time(10)
    with pytest.raises(QuorumNotReached):
        running.result(LIMIT_S)
    running = ask(hosted, "score")
    hosted.bus.heard()
    hosted.bus.job.abort("somebody")
    with pytest.raises(Exception, match="somebody"):
        running.result(LIMIT_S)
    hosted.host.end("aborted")  # type: ignore[union-attr]
    desk.go_on.set()
    hosted.over.result(LIMIT_S)

    assert desk.begun.empty()


@pytest.mark.parametrize(
    ("topic", "fields"),
    [
        ("cancel", {"owner": "", "number": 1, "sites": ["a"]}),
        ("refused", {"site": "a", "number": 1, "reason": "no"}),
        ("end", {"reason": "completed", "aborted": True}),
        ("directory", {"hosts": {"stranger": {"sites": ["s"], "external": [], "takes": 0}}, "dead": {}}),
    ],
)
def test_strangers_have_no_say(hosted: Hosted, desk: Desk, topic: str, fields: dict[str, Any]) -> None:
    """A cell that is neither the server nor in its directory gives no tasks, takes none back and ends nothing."""
    desk.go_on.clear()
    hosted.start("a", text="", executors=(works("score"),))
    stranger = hosted.bus.trainer("stranger")
    running = ask(hosted, "score", value=5)
    desk.begun.get(timeout=LIMIT_S)
    stranger.notify("worker-1", "task", topic, fields)
    task = {"task": "score", "number": 9, "owner": "s", "round": 0, "total_rounds": 1, "sites": ["a"], "model": b""}
    sent = stranger.request("worker-1", "task", "assign", task)

    with pytest.raises(RemoteError, match="stranger may not give tasks"):
        sent.result(LIMIT_S)
    desk.go_on.set()
    assert running.result(LIMIT_S) == {"a": ("executor", 5.0)}
    assert ask(hosted, "score", value=6).result(LIMIT_S) == {"a": ("executor", 6.0)}
    stranger.close()


@pytest.mark.parametrize("fields", [None, {}, {"owner": ["a"], "number": 1}, {"owner": "a", "number": [1]}], ids=str)
def test_results_that_make_no_sense_are_answered(hosted: Hosted, fields: Any) -> None:
    """Whatever a host is told, it goes on."""
    hosted.start("a", text="", executors=(works("score"),))
    sent = hosted.bus.cell.request("worker-1", "task", "result", fields)
    if fields is None or not isinstance(fields.get("owner"), str):
        with pytest.raises(RemoteError, match="result cannot be read"):
            sent.result(LIMIT_S)
    else:
        assert not sent.result(LIMIT_S).plain()["accepted"]

    assert ask(hosted, "score", value=5).result(LIMIT_S) == {"a": ("executor", 5.0)}


def test_a_class_that_is_neither_executor_nor_controller_is_refused(hosted: Hosted) -> None:
    """A host says by name what its configuration has got wrong."""
    with pytest.raises(ConfigError, match="AddTen is neither"):
        hosted.start("a", text="", executors=(ExecutorRef(ref(AddTen), ("score",)),))
