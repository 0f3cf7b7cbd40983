"""Filters between a server and a trainer: they run in the client job, on values only if they need them, fail closed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flarebus.recipe import FedAvgRecipe
from tests.system.observed import ONE, ObservedRun

FILTERS = """
import gc
import os
import flarebus.client as flare
from flarebus.cell import Cell
from flarebus.model import FLModel
from flarebus.workflow.filter import Filter


class Add(Filter):
    def __init__(self, number):
        self.number = number

    def process(self, model, task):
        assert "client.py" not in open("/proc/self/cmdline").read()
        return FLModel(params={"w": model.params["w"] + self.number}, metrics=model.metrics, meta=model.meta)


class Fails(Filter):
    def process(self, model, task):
        raise ValueError(f"too many of {task.site} in round {task.round}")


class Around(Filter):
    needs_values = False

    def __init__(self, path):
        self.path = path

    def process(self, model, task):
        assert model.params is None
        moved = sum(cell.moved_bytes for cell in gc.get_objects() if isinstance(cell, Cell))
        with open(self.path, "a") as file:
            file.write(f"{task.site} {moved}\\n")
        return FLModel(metrics={**(model.metrics or {}), "seen": 1.0}, meta=model.meta)
"""
FETCHED = "a filter looks at the {}: it is fetched here first"
# More than travels inside a message.
SIZE = 1_000_000


def start(observed: ObservedRun, *filters: tuple[str, str, dict[str, Any]], pipe: str = "cell", **given: Any) -> None:
    """Two sites with trainers; site-1 has filters: direction, class, arguments."""
    (observed.folder / "my_filters.py").write_text(FILTERS)

    def prepare(recipe: FedAvgRecipe) -> None:
        recipe.add_client_config({"pipe": pipe})
        for direction, name, args in filters:
            add = getattr(recipe, f"add_client_{direction}_filter")
            add({"class_path": f"my_filters.{name}", "args": args}, clients=["site-1"])

    observed.start(ONE.format(body=""), launch_external_process=True, prepare=prepare, size=SIZE, **given)


@pytest.mark.parametrize("pipe", ["cell", "file", "shm"])
def test_filters_of_values(observed: ObservedRun, pipe: str) -> None:
    """Input and output filters see and change what the trainer gets and gives; with a pipe that leaves arrays where
    they are the log says that they are fetched."""
    start(observed, ("input", "Add", {"number": 10}), ("output", "Add", {"number": 200}), num_rounds=1, pipe=pipe)

    assert observed.end() == "completed", observed.reason
    # The mean of 0 + 10 + 1 + 200 and 0 + 1.
    assert set(observed.model()) == {106.0}
    assert FETCHED.format("model") in observed.log("site-1")
    assert (FETCHED.format("result") in observed.log("site-1")) == (pipe == "cell")
    assert "a filter looks at" not in observed.log("site-2")


@pytest.mark.parametrize(
    ("direction", "said"),
    [("input", "could not take the task: filter my_filters.Fails"), ("output", "its result was not sent: filter")],
)
def test_a_filter_that_fails(observed: ObservedRun, direction: str, said: str) -> None:
    """Nothing passes a filter that raises: the site fails with the filter's name and what it said, the others go on."""
    start(observed, (direction, "Fails", {}), min_clients=1)

    assert observed.end() == "completed", observed.reason
    assert set(observed.model()) == {2.0}
    assert [line["accepted"] for line in observed.rounds()] == [["site-2"]] * 2
    reason = observed.complaints()["site-1"]
    assert said in reason
    assert "my_filters.Fails" in reason
    assert "ValueError: too many of site-1 in round 1" in reason
    assert reason in observed.log("site-1")
    assert f"site-1 failed: {reason}" in observed.log("server")


def test_filters_that_need_no_values(observed: ObservedRun) -> None:
    """A filter that needs no arrays changes what is around them, and no byte of a model comes to the client job."""
    path = observed.folder / "moved"
    start(observed, ("input", "Around", {"path": str(path)}), ("output", "Around", {"path": str(path)}))

    assert observed.end() == "completed", observed.reason
    assert set(observed.model()) == {2.0}
    assert path.read_text() == "site-1 0\n" * 4
    assert "a filter looks at" not in observed.log("site-1")
    assert [line["sites"]["site-1"] for line in observed.rounds()] == [{"loss": 1.0, "seen": 1.0}] * 2


def test_a_filter_is_asked_once_for_a_task(observed: ObservedRun) -> None:
    """When a trainer is killed the second one gets the model as the filter left it for the first."""
    (observed.folder / "my_filters.py").write_text(
        "import random\n" + FILTERS.replace('model.params["w"] + self.number', 'model.params["w"] + random.random()')
    )
    body = """
    import os, signal
    with open("got", "a") as file:
        file.write(f"{model.params['w'][0]}\\\\n")
    if not os.path.exists("killed"):
        open("killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
"""
    observed.start(
        ONE.replace("{body}", body.replace("\\\\n", "\\n")).replace("{{", "{").replace("}}", "}"),
        ["site-1"],
        size=SIZE,
        num_rounds=1,
        launch_external_process=True,
        prepare=lambda recipe: recipe.add_client_input_filter({"class_path": "my_filters.Add", "args": {"number": 0}}),
    )

    assert observed.end() == "completed", observed.reason
    first, second = (observed.run_dir / "site-1/got").read_text().split()
    assert first == second
    assert np.float32(first) > 0
