"""add_executor: executors by installed name, by path and as instances, and what is none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flarebus.errors import ConfigError
from flarebus.model import FLModel
from flarebus.recipe import FedAvgRecipe, FrameworkType
from flarebus.workflow.executor import Executor, SiteTask

SWARM = "workflows._swarm_client.SwarmClientController"


class Echo(Executor):
    """Answers what it got."""

    def __init__(self, factor: int = 1) -> None:
        self.factor = factor

    def execute(self, task: SiteTask) -> FLModel:
        return task.model


def a_recipe(tmp_path: Path) -> FedAvgRecipe:
    tmp_path.joinpath("client.py").write_text("")
    return FedAvgRecipe(min_clients=1, train_script=str(tmp_path / "client.py"), framework=FrameworkType.RAW)


@pytest.mark.parametrize(
    ("executor", "path", "args", "steers"),
    [
        ({"class_path": "swarm"}, SWARM, {}, True),
        ({"class_path": "swarm", "args": {"memory_gc_rounds": 3}}, SWARM, {"memory_gc_rounds": 3}, True),
        ({"class_path": f"{__name__}:Echo"}, f"{__name__}:Echo", {}, False),
        (Echo(2), f"{__name__}.Echo", {"factor": 2}, False),
    ],
    ids=["name", "name and arguments", "path", "instance"],
)
def test_an_executor_is_carried_by_its_path(
    tmp_path: Path, executor: Any, path: str, args: dict[str, Any], steers: bool
) -> None:
    """However it is given, the job knows it by the path of its class, and whether it steers."""
    recipe = a_recipe(tmp_path)
    recipe.add_executor(executor, ["echo"])

    (ref,) = recipe.definition.site_defaults.executors
    assert (ref.ref.class_path, dict(ref.ref.args), ref.tasks, ref.steers) == (path, args, ("echo",), steers)


@pytest.mark.parametrize(
    ("executor", "said"),
    [
        ({"class_path": "swam"}, "did you mean 'swarm'"),
        ({"class_path": "swarm", "args": {"memory_gc_rounds": -1}}, "memory_gc_rounds"),
        ({"class_path": "pathlib.Path"}, "is neither"),
        ({"class_path": f"{__name__}:Nobody"}, "has no 'Nobody'"),
        (Echo, "an instance, not the class"),
    ],
)
def test_what_is_no_executor_is_refused(tmp_path: Path, executor: Any, said: str) -> None:
    """The error says what is wrong with it, and the recipe is as it was."""
    recipe = a_recipe(tmp_path)
    with pytest.raises(ConfigError, match=said):
        recipe.add_executor(executor, ["echo"])
    assert recipe.definition.site_defaults.executors == ()


@pytest.mark.parametrize("tasks", [[], "echo", None, [1]])
def test_an_executor_needs_tasks(tmp_path: Path, tasks: Any) -> None:
    """One that takes no task would never be asked."""
    with pytest.raises(ConfigError, match="tasks"):
        a_recipe(tmp_path).add_executor(Echo(), tasks)
