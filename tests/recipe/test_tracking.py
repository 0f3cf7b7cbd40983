"""add_experiment_tracking: what it puts into the job, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flarebus.errors import ConfigError
from flarebus.recipe import FedAvgRecipe, Recipe, add_experiment_tracking
from flarebus.tracking.params import params_of_job
from tests.tracking.conftest import FAKE


def test_trackers_are_part_of_the_job(make, tmp_path):
    """They survive the way through a folder, in order, with their settings and sides, and make jobs different."""
    recipe = make()
    add_experiment_tracking(recipe, FAKE)
    add_experiment_tracking(recipe, FAKE, {"uri": "https://ada:${PASSWORD}@host"}, client_side=True, server_side=False)

    loaded = Recipe.load(recipe.export(tmp_path / "job"))

    assert loaded == recipe != make()
    assert [(ref.config, ref.server_side, ref.client_side) for ref in loaded.definition.tracking] == [
        ({}, True, False),
        ({"uri": "https://ada:${PASSWORD}@host"}, False, True),
    ]


def test_other_additions_and_trackers_do_not_get_in_each_others_way(make, tmp_path):
    """Whatever is added before and after, all of it comes back."""
    recipe = make()
    recipe.add_client_config({"max_resends": 5})
    add_experiment_tracking(recipe, FAKE)
    recipe.add_client_config({"max_resends": 7}, ["site-2"])

    loaded = FedAvgRecipe.load(recipe.export(tmp_path / "job"))

    assert loaded == recipe
    assert len(loaded.definition.tracking) == 1
    assert loaded.definition.site_config("site-2").client_config == {"max_resends": 7}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tensorbord",), "did you mean 'tensorboard'?"),
        ((7,), "tracking_type=7: a string, not int"),
        ((FAKE, ["uri"]), "tracking_config=['uri']: a dict, not list"),
        ((FAKE, {"url": "x"}), "did you mean 'uri'?"),
        ((FAKE, {"uri": {1, 2}}), "tracking_config=['uri']: no JSON values"),
        (
            (FAKE, {"uri": "https://a:secret@host"}),
            "tracking_config['uri']='https://***@host': a URL without a password",
        ),
        ((FAKE, {"api_key": "secret"}), "tracking_config['api_key']='***': not in clear"),
        ((FAKE, None, False, False), "server_side=False: True, unless client_side is"),
        ((FAKE, None, "yes"), "client_side='yes': True or False"),
    ],
)
def test_mistakes_are_named_and_change_nothing(make, arguments, said):
    """The recipe is as it was, and no secret is shown."""
    recipe = make()

    with pytest.raises(ConfigError) as caught:
        add_experiment_tracking(recipe, *arguments)

    assert said in str(caught.value)
    assert "secret" not in str(caught.value)
    assert recipe == make()


def test_it_takes_a_recipe():
    """Not the job that one makes, or its name."""
    with pytest.raises(ConfigError, match="recipe='fedavg'"):
        add_experiment_tracking("fedavg", FAKE)  # type: ignore[arg-type]


def test_the_same_twice_is_refused(make):
    """Both would write to the same place; another one of the same kind is fine."""
    recipe = make()
    add_experiment_tracking(recipe, FAKE, {"uri": "one"})
    add_experiment_tracking(recipe, FAKE, {"uri": "two"})

    with pytest.raises(ConfigError, match="added already"):
        add_experiment_tracking(recipe, FAKE, {"uri": "one"}, client_side=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tracker": "tensorbord"}, "tracking_type='tensorbord': did you mean"),
        ({"config": {"url": "x"}}, "did you mean 'uri'?"),
        ({"config": {"password": "hunter22"}}, "tracking[0]: tracking_config['password']='***'"),
        ({"server_side": 1}, "tracking[0]: server_side=1: True or False"),
        ({"cleint_side": True}, "tracking[0]['cleint_side']=True: unknown key; did you mean 'client_side'?"),
    ],
)
def test_a_damaged_description_is_refused_by_name(make, tmp_path, change, said):
    """What was written into the folder by hand goes through the same checks."""
    recipe = make()
    add_experiment_tracking(recipe, FAKE)
    folder = recipe.export(tmp_path / "job")
    data = json.loads((folder / "job.json").read_text())
    data["tracking"][0] |= change
    (folder / "job.json").write_text(json.dumps(data))

    with pytest.raises(ConfigError) as caught:
        Recipe.load(folder)

    assert said in str(caught.value)
    assert str(folder / "job.json") in str(caught.value)
    assert "hunter22" not in str(caught.value)


def test_parameters_of_a_job_are_plain_and_hold_no_secret(make):
    """What was given, by name: numbers as numbers, everything else as text, nothing that was left out."""
    recipe = make(
        num_rounds=7,
        train_args="--lr 0.1 --token abcdef",
        aggregation_weights={"site-1": 2.0},
        model={"class_path": "model.Net", "args": {}},
        initial_ckpt="/models/start.npz",
    )

    found = params_of_job(recipe.definition)

    assert (
        found.items()
        >= {
            "job": "fedavg",
            "num_rounds": 7,
            "deterministic": False,
            "aggregation_weights": '{"site-1": 2.0}',
            "train_script": "client.py",
            "train_args": "--lr 0.1 --token '***'",
            "framework": "pytorch",
            "model": "model.Net",
            "initial_ckpt": "start.npz",
        }.items()
    )
    assert "patience" not in found
    assert all(type(value) in (str, int, float, bool) for value in found.values())
    assert params_of_job(make(model={"w": np.zeros(1)}).definition)["model"] == "dict"
