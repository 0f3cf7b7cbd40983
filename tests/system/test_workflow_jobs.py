"""Workflows that jobs bring: controllers, executors, site controllers and filters of the job, in real workers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from flarebus.errors import ConfigError, JobFailed
from flarebus.recipe import Recipe, SimEnv, WorkflowRecipe
from flarebus.recipe.described import code_in

FLOW = '''
import numpy as np

from flarebus.errors import JobFailed, QuorumNotReached
from flarebus.model import FLModel
from flarebus.workflow.controller import Controller, Task
from flarebus.workflow.executor import Executor
from flarebus.workflow.filter import Filter
from flarebus.workflow.site_controller import SiteController


def model(value, size=4):
    return FLModel(params={"w": np.full(size, value, np.float32)})


def weight(model):
    (value,) = set(model.params["w"].tolist())
    return value


class Score(Controller):
    """Asks for scores, and reports them with the reasons of those that gave none."""

    def __init__(self, needed):
        self.needed = needed

    def run(self, job):
        found, failed = {}, {}
        for result in job.broadcast(
            Task("score_all", model(3)), min_responses=self.needed, on_failed=failed.__setitem__
        ):
            found[result.site] = [weight(result.model), result.model.meta["by"]]
        job.save_report("scores.json", {"found": found, "failed": failed})


class Scorer(Executor):
    def __init__(self, add):
        self.add = add

    def execute(self, task):
        folder = task.folder.name
        return FLModel(params={"w": task.model.params["w"] + self.add}, meta={"by": f"{task.site} in {folder}"})


class Broken(Executor):
    def execute(self, task):
        raise OSError("the disk is broken")


class Nonsense(Executor):
    def execute(self, task):
        return 3


class Double(Filter):
    def process(self, model, task):
        return FLModel(params={"w": model.params["w"] * 2}, meta=model.meta)


class Watch(Controller):
    """Starts one site, and reports what is heard until that says it is done."""

    def __init__(self, size, start="site-1"):
        self.size = size
        self.start = start

    def run(self, job):
        job.send(Task("steer_begin", model(1, self.size), 0, 1), [self.start])
        heard = []
        for report in job.reports(timeout=20):
            if report.event not in ("round_started", "result_accepted", "site_joined"):
                heard.append([report.site, report.event, dict(report.fields)])
            if report.event == "controller_failed":
                raise JobFailed(f"{report.site}: {report.fields['reason']}")
            if report.event == "done":
                break
        job.save_report("heard.json", {"heard": heard})


class Steer(SiteController):
    """Begins when it is told to, and answers what others ask."""

    def run(self, job):
        for call in job.calls():
            if call.name == "steer_begin":
                begun = call.model
                call.answer()
                self.begin(job, begun)
            elif call.name == "steer_fail":
                raise ValueError(f"{job.site} was told to fail")
            elif call.name == "steer_refuse":
                call.fail("not today")
            else:
                assert call.source == "site-1"
                call.answer(FLModel(params={"w": call.model.params["w"] * 10}, meta={"source": call.source}))

    def begin(self, job, begun):
        trained = {r.site: weight(r.model) for r in job.broadcast(Task("train", begun, 0, 1))}
        relayed = [weight(r.model) for r in job.relay(Task("train", begun, 0, 1), job.sites)]
        asked = job.send(Task("steer_ask", begun, 0, 1), ["site-3"])
        held = job.send(Task("steer_ask", begun, 0, 1), ["site-2"], fetch=False).held
        passed = [weight(r.model) for r in job.broadcast(Task("train", held, 0, 1), sites=["site-3"])]
        held.release()
        try:
            job.send(Task("steer_refuse", begun, 0, 1), ["site-2"])
        except QuorumNotReached as error:
            refused = error.reasons["site-2"]
        first = []
        for result in job.broadcast(Task("train", begun, 0, 1), newcomers=True):
            first.append(weight(result.model))
            job.cancel("one is enough")
        pages = job.shelf.pages(begun.params)
        pages["w"][:] = 42
        job.shelf.keep(pages, 1)
        job.shelf.keep_best({"w": np.full_like(pages["w"], 7)})
        told = {"trained": trained, "relayed": relayed, "passed": passed, "refused": refused, "first": first}
        job.fire("done", **told, asked=weight(asked.model), source=asked.model.meta["source"])


class Fails(Steer):
    """Tells another site to fail."""

    def begin(self, job, begun):
        for _ in job.broadcast(Task("steer_fail", begun, 0, 1), sites=["site-2"]):
            pass
'''
SCRIPT = """
import flarebus.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    flare.send(flare.FLModel(params={"w": model.params["w"] + 1}))
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The code of the job, in the working directory."""
    folder = tmp_path / "code"
    folder.mkdir()
    folder.joinpath("flow.py").write_text(FLOW)
    folder.joinpath("client.py").write_text(SCRIPT)
    monkeypatch.chdir(folder)
    with code_in(folder):
        yield folder
    sys.modules.pop("flow", None)


def run(recipe: Recipe, tmp_path: Path, report: str, **env: Any) -> Any:
    """What the server's half reported."""
    settings = {"num_clients": 3, "num_threads": 2, "workspace_root": tmp_path / "runs", **env}
    result = recipe.execute(SimEnv(**settings)).get_result()
    return json.loads((Path(str(result)) / "server" / report).read_text())


def scores(**changes: Any) -> WorkflowRecipe:
    executors = [({"class_path": "flow.Scorer", "args": {"add": 1}}, ["score_*"])]
    settings = {"workflow": "flow:Score", "settings": {"needed": 1}, "executors": executors, **changes}
    return WorkflowRecipe(**settings)


# --- executors


def test_sites_without_a_script(code: Path, tmp_path: Path) -> None:
    """Each site makes its own executor; those that fail are named with their reasons."""
    recipe = scores()
    recipe.add_executor({"class_path": "flow.Broken"}, ["score_all"], clients=["site-2"])
    recipe.add_executor({"class_path": "flow.Nonsense"}, ["score_?ll"], clients=["site-3"])

    found = run(recipe, tmp_path, "scores.json")

    assert found["found"] == {"site-1": [4.0, "site-1 in site-1"]}
    assert "Broken: OSError: the disk is broken" in found["failed"]["site-2"]
    assert "of type int, not an FLModel" in found["failed"]["site-3"]


@pytest.mark.parametrize("debug", [False, True])
def test_a_job_that_was_exported_is_the_same_with_its_code(code: Path, tmp_path: Path, debug: bool) -> None:
    """Read back elsewhere, controller, executors and the server's filters come from the job folder."""
    recipe = scores()
    recipe.add_server_output_filter({"class_path": "flow.Double"})
    recipe.add_server_input_filter({"class_path": "flow.Double"}, tasks=["score_all"])
    recipe.add_server_input_filter({"class_path": "flow.Double"}, tasks=["train"])

    folder = recipe.export(tmp_path / "job")
    code.joinpath("flow.py").unlink()
    sys.modules.pop("flow", None)
    loaded = Recipe.load(folder)
    found = run(loaded, tmp_path, "scores.json", **({"debug": True, "num_threads": None} if debug else {}))

    assert isinstance(loaded, WorkflowRecipe)
    assert {site: value for site, (value, _) in found["found"].items()} == dict.fromkeys(
        ("site-1", "site-2", "site-3"), 14.0
    )


def test_a_task_for_nobody_fails_the_job_by_quorum(code: Path, tmp_path: Path) -> None:
    """Each site says that it has neither script nor executor for it."""
    recipe = scores(executors=[({"class_path": "flow.Scorer", "args": {"add": 1}}, ["other"])])

    with pytest.raises(JobFailed, match="site-1 has no script, and no executor for tasks named 'score_all'"):
        run(recipe, tmp_path, "scores.json")


# --- site controllers


def steering(half: str, **settings: Any) -> WorkflowRecipe:
    return WorkflowRecipe(
        workflow="flow:Watch",
        settings={"size": 4, **settings},
        name="steer",
        train_script="client.py",
        executors=[({"class_path": f"flow.{half}"}, ["steer_*"])],
    )


@pytest.mark.parametrize("size", [4, 100_000], ids=["inline", "transfer"])
def test_sites_give_tasks_to_each_other(code: Path, tmp_path: Path, size: int) -> None:
    """Scripts and controllers of all sites answer one of them, its own script too; the server hears what it fires."""
    heard = run(steering("Steer", size=size), tmp_path, "heard.json")["heard"]

    site, event, fields = heard[-1]
    assert (site, event) == ("site-1", "done")
    assert fields == {
        "trained": {"site-1": 2.0, "site-2": 2.0, "site-3": 2.0},
        "relayed": [2.0, 3.0, 4.0],
        "asked": 10.0,
        "source": "site-1",
        "passed": [11.0],
        "refused": "not today",
        "first": [2.0],
    }
    models = tmp_path / "runs" / "steer" / "site-1" / "models"
    assert set(load_file(models / "FL_global_model.safetensors")["w"].tolist()) == {42.0}
    assert set(load_file(models / "best_FL_global_model.safetensors")["w"].tolist()) == {7.0}
    assert list((tmp_path / "runs" / "steer" / "server" / "models").iterdir()) == []


def test_a_controller_that_raises_is_reported(code: Path, tmp_path: Path) -> None:
    """The server hears which site's it was, and what it raised."""
    with pytest.raises(JobFailed, match="site-2: ValueError: site-2 was told to fail"):
        run(steering("Fails"), tmp_path, "heard.json")


# --- the recipe


@pytest.mark.parametrize(
    ("changes", "parameter", "said"),
    [
        ({"workflow": "flow:Nothing"}, "workflow", "cannot load flow:Nothing"),
        ({"workflow": "fedav"}, "workflow", "did you mean 'fedavg'"),
        ({"workflow": "flow:Scorer"}, "workflow", "is no workflow"),
        ({"settings": {}}, "settings", "missing 1 required positional argument: 'needed'"),
        ({"settings": {"needed": object()}}, "settings", "needed"),
        ({"executors": []}, "train_script", "where there are no executors"),
        ({"executors": [{"class_path": "flow.Scorer"}]}, "executors", "pairs"),
        ({"executors": [({"class_path": "flow.Double"}, ["x"])]}, "executor", "is neither"),
        ({"executors": [({"class_path": "flow.Broken"}, [])]}, "tasks", "a list of names"),
        ({"per_site_config": {"site-1": {}}}, "per_site_config", "no site runs a script"),
        ({"train_script": "gone.py"}, "train_script", "no such file"),
    ],
)
def test_wrong_parameters_are_named(code: Path, changes: dict[str, Any], parameter: str, said: str) -> None:
    """A recipe that cannot work is refused at construction."""
    with pytest.raises(ConfigError) as caught:
        scores(**changes)

    assert caught.value.parameter.startswith(parameter)
    assert said in str(caught.value)


def test_comes_back_equal(code: Path, tmp_path: Path) -> None:
    """Everything that a recipe was made with is in its folder."""
    recipe = scores(
        train_script="client.py",
        train_args="--x 1",
        model={"w": np.zeros(3)},
        name="mine",
        per_site_config={"site-1": {"train_args": "--x 2"}, "site-2": {}},
        launch_external_process=True,
        command="python3 -u",
    )
    plain = recipe.definition
    recipe.add_server_output_filter({"class_path": "flow.Double"}, tasks=["train"])
    recipe.add_server_input_filter({"class_path": "flow.Double"})
    loaded = WorkflowRecipe.load(recipe.export(tmp_path / "job"))

    assert loaded == recipe
    assert loaded.definition != plain
    assert loaded != scores()
    assert loaded.definition.site_config("site-2").executors == recipe.definition.site_defaults.executors
