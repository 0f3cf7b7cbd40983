"""`add_client_config`: what a job changes in its trainers' configuration, for all sites or for some."""

from __future__ import annotations

import json
import logging
import math

import pytest

from flarebus.errors import ConfigError
from flarebus.recipe import FedAvgRecipe, Recipe


def test_reaches_every_site(make):
    """Without `clients` every site of the job gets it, known by name or not, under canonical names."""
    recipe = make(per_site_config={"a": {}, "b": {}})

    recipe.add_client_config(
        {
            "submit_result_timeout": 30,
            "max_resends": None,
            "download_complete_timeout": 60.5,
            "HEARTBEAT_TIMEOUT": 20,
            "heartbeat_interval": 2,
            "external_pre_init_timeout": None,
            "train_with_eval": False,
            "exchange_format": "raw",
            "memory_gc_rounds": 4,
            "train_task_name": "fit",
            "pipe": "file",
        }
    )

    for site in ("a", "b"):
        config = recipe.definition.site_config(site)
        assert config.client_config == {
            "submit_result_timeout": 30.0,
            "max_resends": None,
            "download_complete_timeout": 60.5,
            "heartbeat_timeout": 20.0,
            "heartbeat_interval": 2.0,
            "train_with_eval": False,
            "exchange_format": "raw",
            "train_task_name": "fit",
            "pipe": {"CLASS_NAME": "file", "ARG": {}},
        }
        assert (config.launch_timeout, config.memory_gc_rounds) == (None, 4)
    assert recipe.definition.site_defaults.client_config["max_resends"] is None


def test_some_sites_only_and_the_others_stay(make):
    """Naming a site of a job for any sites changes that one and keeps nobody out."""
    recipe = make()

    recipe.add_client_config({"max_resends": 9}, clients=["site-2"])

    job = recipe.definition
    assert job.site_config("site-2").client_config == {"max_resends": 9}
    assert job.site_config("site-1").client_config == {}
    job.check_sites(["site-1", "site-2", "site-3"])
    with pytest.raises(ConfigError, match=r"clients\['site-2'\].*did you mean 'site-1'"):
        job.check_sites(["site-1"])


def test_sites_of_the_job_stay_its_sites(make):
    """With a per_site_config the named sites are the sites, before and after; another one is a mistake."""
    recipe = make(per_site_config={"site-1": {}, "site-2": {"train_args": "-v"}})

    recipe.add_client_config({"max_resends": 9}, clients=["site-2"])

    assert recipe.definition.site_config("site-2").train_args == "-v"
    with pytest.raises(ConfigError, match="site-3 has no entry"):
        recipe.definition.check_sites(["site-1", "site-2", "site-3"])
    with pytest.raises(ConfigError, match=r"clients='site-3': no site of this job; did you mean 'site-"):
        recipe.add_client_config({"max_resends": 9}, clients=["site-3"])


def test_calls_count_in_their_order(make):
    """What is said last counts, whether it was said for all sites or for one."""
    recipe = make()

    recipe.add_client_config({"max_resends": 1, "train_task_name": "fit"})
    recipe.add_client_config({"max_resends": 2}, clients=["a"])
    recipe.add_client_config({"max_resends": 3}, clients=["b"])
    recipe.add_client_config({"train_task_name": "learn"})
    recipe.add_client_config({"max_resends": 4}, clients=["b"])

    found = {site: recipe.definition.site_config(site).client_config for site in ("a", "b", "c")}
    assert {site: (each["max_resends"], each["train_task_name"]) for site, each in found.items()} == {
        "a": (2, "learn"),
        "b": (4, "learn"),
        "c": (1, "learn"),
    }


@pytest.mark.parametrize(
    ("config", "parameter", "said"),
    [
        ({"max_resend": 1}, "client_config['max_resend']", "unknown key; did you mean 'max_resends'?"),
        ({"launch_timeouts": 1}, "client_config['launch_timeouts']", "did you mean 'launch_timeout'?"),
        ({3: 1}, "client_config[3]", "unknown key"),
        ({"params_transfer_type": "DIFF"}, "client_config['params_transfer_type']", "unknown key"),
        ({"transfer_type": "DIFF"}, "client_config['transfer_type']", "a parameter of the recipe: params_transfer"),
        ({"launch_once": True}, "client_config['launch_once']", "a parameter of the recipe: launch_once"),
        ({"max_resends": True}, "client_config['max_resends']", "a whole number"),
        ({"max_resends": 2.0}, "client_config['max_resends']", "a whole number"),
        ({"max_resends": "2"}, "client_config['max_resends']", "a whole number"),
        ({"submit_result_timeout": 0}, "client_config['submit_result_timeout']", "above 0"),
        ({"submit_result_timeout": None}, "client_config['submit_result_timeout']", "a finite number"),
        ({"download_complete_timeout": math.inf}, "client_config['download_complete_timeout']", "a finite number"),
        ({"heartbeat_timeout": True}, "client_config['heartbeat_timeout']", "a finite number"),
        ({"heartbeat_interval": 60}, "client_config['heartbeat_interval']", "less than the heartbeat timeout"),
        ({"HEARTBEAT_TIMEOUT": 9, "heartbeat_timeout": 9}, "client_config['heartbeat_timeout']", "another name"),
        ({"train_with_eval": 1}, "client_config['train_with_eval']", "True or False"),
        ({"train_task_name": ""}, "client_config['train_task_name']", "a value"),
        ({"exchange_format": "jax"}, "client_config['exchange_format']", "keras_layer_weights"),
        ({"cuda_empty_cache": True}, "cuda_empty_cache", "needs memory_gc_rounds"),
        ({"pipe": 3}, "client_config['pipe']", "CLASS_NAME"),
        ({"pipe": "two words"}, "client_config['pipe']['CLASS_NAME']", "the name of a pipe"),
        ({"pipe": {}}, "client_config['pipe']", "'CLASS_NAME' is missing"),
        ({"pipe": {"CLASS_NAME": "file", "ARGS": {}}}, "client_config['pipe']", "did you mean 'ARG'?"),
        ({"pipe": {"CLASS_NAME": "file", "ARG": [1]}}, "client_config['pipe']['ARG']", "an object"),
        ({"pipe": {"CLASS_NAME": "file", "ARG": {"x": {1}}}}, "client_config['pipe']['ARG']", "not JSON"),
    ],
    ids=str,
)
def test_mistake_is_named_and_changes_nothing(make, config, parameter, said):
    """A wrong key or value is refused by name, and the recipe is what it was."""
    recipe = make(per_site_config={"a": {}})

    with pytest.raises(ConfigError) as caught:
        recipe.add_client_config(config)

    assert (caught.value.parameter, said in str(caught.value)) == (parameter, True)
    assert recipe == make(per_site_config={"a": {}})


@pytest.mark.parametrize("config", [None, "max_resends=3", [("max_resends", 3)]])
def test_needs_a_dict(make, config):
    """What is no dict is a TypeError that shows one."""
    with pytest.raises(TypeError, match="needs a dict"):
        make().add_client_config(config)


@pytest.mark.parametrize("clients", ["site-1", [], 3, ["server"], ["a b"], [None]])
def test_clients_are_names_of_sites(make, clients):
    """A single string, no name at all, or a name that no site can have is refused."""
    with pytest.raises(ConfigError, match=r"^clients="):
        make().add_client_config({"max_resends": 1}, clients=clients)


def test_negative_resends_are_none_and_warn(make, caplog):
    """Fewer than no repetitions is none at all."""
    recipe = make()

    with caplog.at_level(logging.WARNING, "flarebus.client"):
        recipe.add_client_config({"max_resends": -2})

    assert recipe.definition.site_config("a").client_config == {"max_resends": 0}
    assert "max_resends" in caplog.text


@pytest.mark.parametrize("sites", [None, {"a": {}, "b": {"client_memory_gc_rounds": 1}}])
def test_survives_export(make, tmp_path, sites):
    """What was added is in the job folder and comes back, for all sites and for some."""
    recipe = make(per_site_config=sites, client_memory_gc_rounds=5)
    recipe.add_client_config(
        {"max_resends": None, "pipe": {"CLASS_NAME": "my.Pipe", "ARG": {"deep": [1, {"x": None}]}}}
    )
    recipe.add_client_config({"launch_timeout": None, "cuda_empty_cache": True}, clients=["b"])

    loaded = FedAvgRecipe.load(recipe.export(tmp_path / "job"))

    assert loaded == recipe
    assert Recipe.load(loaded.export(tmp_path / "again")) == recipe
    for site in ("a", "b", *(() if sites else ("c",))):
        mine, theirs = (each.definition.site_config(site).to_json() for each in (recipe, loaded))
        assert {key: theirs[key] for key in theirs if key != "train_script"} == {
            key: mine[key] for key in mine if key != "train_script"
        }
    assert loaded.definition.open_to_others == (sites is None)


def test_takes_part_in_equality(make):
    """Jobs that differ in what was added, or for whom, are different jobs."""
    recipes = [make() for _ in range(4)]
    recipes[1].add_client_config({"max_resends": 5})
    recipes[2].add_client_config({"max_resends": 5}, clients=["a"])
    recipes[3].add_client_config({"max_resends": 5}, clients=["b"])

    assert [one == other for one in recipes for other in recipes] == [
        one is other for one in recipes for other in recipes
    ]
    again = make()
    again.add_client_config({"max_resends": 5})
    assert again == recipes[1]


def test_open_sites_in_a_folder_differ_in_additions_only(make, tmp_path):
    """A site that runs something else cannot hide in a job that is open to any site."""
    recipe = make(min_clients=2)
    recipe.add_client_config({"max_resends": 5}, clients=["a"])
    target = recipe.export(tmp_path / "job")
    path = target / "job.json"
    data = json.loads(path.read_text())
    data["sites"]["a"]["train_args"] = "--other"
    path.write_text(json.dumps(data))

    with pytest.raises(ConfigError, match=r"sites\['a'\].*set open_to_others to false"):
        FedAvgRecipe.load(target)
