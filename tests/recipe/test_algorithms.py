"""Recipes on the frame of federated averaging: what they add and refuse, and that they come back from a folder."""

from __future__ import annotations

import math
from typing import Any

import pytest

from flarebus.errors import ConfigError
from flarebus.recipe import FedAvgRecipe, FedOptRecipe, FedProxRecipe, Recipe, ScaffoldRecipe

# recipe -> what its workflow is built with besides, by default
OWN: dict[type[FedAvgRecipe], dict[str, Any]] = {
    FedOptRecipe: {
        "server_optimizer": "adam",
        "optimizer_args": {"lr": 0.03, "betas": [0.9, 0.99], "tau": 0.001},
        "average_vars": r"(running_mean|running_var|num_batches_tracked)$",
    },
    FedProxRecipe: {"fedprox_mu": 0.01},
    ScaffoldRecipe: {},
}
WORKFLOWS = {FedOptRecipe: "fedopt", FedProxRecipe: "fedprox", ScaffoldRecipe: "scaffold"}
CHANGED: dict[type[FedAvgRecipe], dict[str, Any]] = {
    FedOptRecipe: {
        "server_optimizer": "sgd",
        "optimizer_args": {"lr": 0.5, "momentum": 0.25},
        "average_vars": None,
    },
    FedProxRecipe: {"fedprox_mu": 0.5},
    ScaffoldRecipe: {},
}
WRONG: list[tuple[type[FedAvgRecipe], dict[str, Any], str, str]] = [
    (FedOptRecipe, {"server_optimizer": "adams"}, "server_optimizer", "did you mean 'adam'?"),
    (FedOptRecipe, {"optimizer_args": {"momentum": 0.9}}, "optimizer_args['momentum']", "known: lr, betas, tau"),
    (FedOptRecipe, {"optimizer_args": {"lr": -1}}, "optimizer_args['lr']", "above 0"),
    (FedOptRecipe, {"average_vars": ""}, "average_vars", "regular expression"),
    (ScaffoldRecipe, {"launch_external_process": True, "launch_once": False}, "launch_once", "lives in its script"),
    (
        ScaffoldRecipe,
        {"per_site_config": {"a": {"launch_external_process": True, "launch_once": False}}},
        "launch_once",
        "lives in its script",
    ),
    *((FedProxRecipe, {"fedprox_mu": mu}, "fedprox_mu", "from 0") for mu in (-1, math.nan, math.inf, "1", None, True)),
]


@pytest.fixture
def basic(code):
    """What every recipe needs."""
    return {"min_clients": 1, "train_script": str(code / "client.py"), "model": [1.0, 2.0]}


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_settings_are_those_of_fedavg_and_its_own(kind, basic):
    """The workflow is built with all that federated averaging takes, and what the algorithm adds."""
    plain = FedAvgRecipe(**basic, num_rounds=7, seed=3).definition.workflow_settings

    job = kind(**basic, num_rounds=7, seed=3).definition

    assert job.workflow_settings == {**plain, **OWN[kind]}
    assert job.workflow == job.name == WORKFLOWS[kind]


@pytest.mark.usefixtures("checked_out_workflows")
@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_the_workflow_is_installed_and_takes_the_settings(kind, basic):
    """The recipe's workflow is an entry point of this distribution, and takes exactly what the recipe gives it."""
    workflow = kind(**basic, **CHANGED[kind]).definition.make_workflow()

    assert type(workflow).__module__ == f"workflows.{WORKFLOWS[kind]}"
    for name, value in CHANGED[kind].items():
        assert getattr(workflow, name) == value


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_comes_back_equal(kind, basic, tmp_path):
    """Export and load give an equal recipe of the same class, whoever loads it."""
    recipe = kind(**basic, **CHANGED[kind], name="mine", exclude_vars="^bn")

    target = recipe.export(tmp_path / "job")

    for loader in (kind, FedAvgRecipe, Recipe):
        loaded = loader.load(target)
        assert type(loaded) is kind
        assert loaded == recipe
    assert loaded.definition.workflow_settings == recipe.definition.workflow_settings
    assert recipe != kind(**basic, name="mine", exclude_vars="^bn") or not CHANGED[kind]


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_a_job_of_federated_averaging_is_not_one_of_its_own(kind, basic, tmp_path):
    """A job is never read back as one of another algorithm."""
    target = FedAvgRecipe(**basic).export(tmp_path / "job")

    with pytest.raises(ConfigError, match=rf"not a job of {kind.__name__}; use FedAvgRecipe\.load"):
        kind.load(target)


@pytest.mark.parametrize(("kind", "changes", "parameter", "said"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_parameter_is_named(kind, changes, parameter, said, basic):
    """A wrong parameter is refused at construction, by name."""
    with pytest.raises(ConfigError) as caught:
        kind(**basic, **changes)

    assert caught.value.parameter == parameter
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_an_unknown_parameter_names_the_nearest_known_one(kind, basic):
    """A misspelt parameter is a TypeError, whether it is one of the algorithm or one of federated averaging."""
    with pytest.raises(TypeError, match=rf"{kind.__name__} has no parameter 'num_round'; did you mean 'num_rounds'\?"):
        kind(**basic, num_round=3)
    for name in OWN[kind]:
        with pytest.raises(TypeError, match=rf"did you mean '{name}'\?"):
            kind(**basic, **{name + "s": 3})
