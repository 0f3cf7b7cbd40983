"""CyclicRecipe: its settings, what it refuses, and that it comes back from a folder."""

from __future__ import annotations

from typing import Any

import pytest

from flarebus.errors import ConfigError
from flarebus.recipe import CyclicRecipe, Recipe
from flarebus.workflow.controller import Order

OWN = {
    "order": "FIXED",
    "task_assignment_timeout": 10.0,
    "task_result_timeout": None,
    "allow_early_termination": False,
}


@pytest.fixture
def basic(code):
    """What the recipe needs."""
    return {"train_script": str(code / "client.py"), "model": [1.0, 2.0]}


@pytest.mark.usefixtures("checked_out_workflows")
def test_the_workflow_takes_the_settings(basic):
    """By default sites have their turns in the order of their names, and ten seconds to come."""
    job = CyclicRecipe(**basic, num_rounds=7).definition
    workflow: Any = job.make_workflow()

    assert job.workflow == job.name == "cyclic"
    assert {name: job.workflow_settings[name] for name in OWN} == OWN
    assert (workflow.num_rounds, workflow.min_clients, workflow.order) == (7, 2, Order.FIXED)
    assert (workflow.memory_gc_rounds, workflow.task_assignment_timeout) == (0, 10.0)
    assert not job.workflow_settings.keys() & {"aggregator", "clients_per_round", "deterministic"}


@pytest.mark.parametrize("order", [*Order, "RANDOM", ["a", "b", "a"], ("b", "a")], ids=str)
def test_comes_back_equal(basic, tmp_path, order):
    """Export and load give an equal recipe, whoever loads it."""
    recipe = CyclicRecipe(
        **basic,
        name="mine",
        order=order,
        task_assignment_timeout=None,
        task_result_timeout=60,
        allow_early_termination=True,
        exclude_vars="^bn",
        hyper_params={"rate": 0.5},
        deterministic=True,
        server_memory_gc_rounds=0,
    )

    loaded = Recipe.load(recipe.export(tmp_path / "job"))

    assert isinstance(loaded, CyclicRecipe)
    assert loaded == recipe
    assert loaded != CyclicRecipe(**basic)


@pytest.mark.parametrize(
    ("given", "parameter", "said"),
    [
        ({"order": "SORTED"}, "order", "FIXED, RANDOM, RANDOM_WITHOUT_SAME_IN_A_ROW, or a list"),
        ({"order": 3}, "order", "or a list"),
        ({"order": ["a"]}, "order", "at least min_clients=2 sites"),
        ({"order": ["a", "b", "a"], "min_clients": 3}, "order", "at least min_clients=3 sites"),
        ({"order": ["a", "server"]}, "order", "reserved"),
        ({"min_clients": 1}, "min_clients", "at least 2"),
        ({"task_assignment_timeout": 0}, "task_assignment_timeout", "above 0"),
        ({"task_result_timeout": "1"}, "task_result_timeout", "above 0"),
        ({"allow_early_termination": 1}, "allow_early_termination", "True or False"),
        ({"clients_per_round": 2}, "clients_per_round", "one site after the other"),
        ({"aggregator": {"class_path": "mine.Sum"}}, "aggregator", "one site after the other"),
        ({"stop_cond": "accuracy >= 0.9"}, "stop_cond", "one site after the other"),
        ({"round_timeout": 3}, "round_timeout", "one site after the other"),
        ({"enable_tensor_disk_offload": True}, "enable_tensor_disk_offload", "one site after the other"),
    ],
)
def test_wrong_parameters_are_named(basic, given, parameter, said):
    """What is wrong, or has no meaning here, is refused at construction, by name."""
    with pytest.raises(ConfigError) as caught:
        CyclicRecipe(**basic, **given)

    assert caught.value.parameter == parameter
    assert said in str(caught.value)


def test_a_parameter_that_is_not_there_is_named_with_the_nearest(basic):
    """A slip of the pen is answered with what was meant."""
    with pytest.raises(TypeError, match="did you mean 'task_assignment_timeout'"):
        CyclicRecipe(**basic, task_assignement_timeout=3)
