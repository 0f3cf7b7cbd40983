"""Every parameter of `FedAvgRecipe`: what it accepts, what it refuses and with which words, where it ends up."""

from __future__ import annotations

import inspect
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flarebus.errors import ConfigError
from flarebus.job.kinds import DataKind, ExchangeFormat, FrameworkType, TransferType
from flarebus.job.site_config import SiteConfig
from flarebus.model import FLModel
from flarebus.recipe import FedAvgRecipe, ModelAggregator

SEED_DEFAULTS: dict[str, Any] = {
    "name": "fedavg",
    "model": None,
    "initial_ckpt": None,
    "min_clients": inspect.Parameter.empty,
    "num_rounds": 2,
    "train_script": inspect.Parameter.empty,
    "train_args": "",
    "aggregator": None,
    "aggregator_data_kind": DataKind.WEIGHTS,
    "launch_external_process": False,
    "command": "python3 -u",
    "framework": FrameworkType.PYTORCH,
    "server_expected_format": ExchangeFormat.NUMPY,
    "params_transfer_type": TransferType.FULL,
    "model_persistor": None,
    "per_site_config": None,
    "launch_once": True,
    "shutdown_timeout": 0.0,
    "key_metric": "accuracy",
    "stop_cond": None,
    "patience": None,
    "best_model_filename": None,
    "save_filename": None,
    "exclude_vars": None,
    "aggregation_weights": None,
    "server_memory_gc_rounds": 0,
    "enable_tensor_disk_offload": False,
    "client_memory_gc_rounds": 0,
    "cuda_empty_cache": False,
}

# parameters -> the parameter that the error names, and a part of what it says
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"name": "my job"}, "name", "letters"),
    ({"name": "../x"}, "name", "letters"),
    ({"model": None}, "model", "initial_ckpt"),
    ({"model": None, "framework": "numpy"}, "model", "initial_ckpt"),
    ({"model": "pkg.Net"}, "model", "class_path"),
    ({"model": dict}, "model", "dict()"),
    ({"model": []}, "model", "no parameters"),
    ({"model": {}}, "model", "no parameters"),
    ({"model": {"w": object()}}, "model['w']", "not a Python object"),
    ({"model": {"deep": [{"w": np.array([None])}]}}, "model['deep.0.w']", "not a Python object"),
    ({"model": [[1.0], [2.0, 3.0]]}, "model", "regular shape"),
    ({"model": {"args": {}}}, 'model["class_path"]', "pkg.mod.Class"),
    ({"model": {"class_path": 3}}, 'model["class_path"]', "pkg.mod.Class"),
    ({"model": {"path": "Net"}}, 'model["path"]', "pkg.mod.Class"),
    ({"model": {"path": "a.B", "class_path": "a.B"}}, "model", "not both"),
    ({"model": {"class_path": "a.B", "arg": {}}}, "model['arg']", "did you mean 'args'?"),
    ({"model": {"class_path": "a.B", "args": [1]}}, 'model["args"]', "keyword arguments"),
    ({"model": {"class_path": "a.B", "args": {"f": print}}}, "model[\"args\"]['f']", "numbers, strings"),
    ({"model": {"class_path": "a.B", "args": {"f": math.nan}}}, "model[\"args\"]['f']", "numbers, strings"),
    ({"model": {"class_path": "a.B", "args": {"no name": 1}}}, 'model["args"]', "names"),
    ({"initial_ckpt": "missing.npz"}, "initial_ckpt", "no such file"),
    ({"initial_ckpt": "/server/weights.bin"}, "initial_ckpt", ".safetensors"),
    ({"initial_ckpt": 3}, "initial_ckpt", "path of a file"),
    ({"min_clients": 0}, "min_clients", "whole number from 1"),
    ({"min_clients": True}, "min_clients", "whole number from 1"),
    ({"min_clients": 1.5}, "min_clients", "whole number from 1"),
    ({"num_rounds": 0}, "num_rounds", "whole number from 1"),
    ({"num_rounds": "3"}, "num_rounds", "whole number from 1"),
    ({"train_script": "missing.py"}, "train_script", "no such file"),
    ({"train_script": ""}, "train_script", "no such file"),
    ({"train_script": 3}, "train_script", "a string"),
    ({"train_args": "--name 'half"}, "train_args", "cannot be split"),
    ({"train_args": ["--lr", "1"]}, "train_args", "a string"),
    ({"aggregator": object()}, "aggregator", "lacks accept_model, aggregate_model, reset_stats"),
    ({"aggregator": SimpleNamespace(accept_model=print, reset_stats=print)}, "aggregator", "lacks aggregate_model"),
    ({"aggregator": SimpleNamespace}, "aggregator", "an instance"),
    ({"aggregator_data_kind": "SUM"}, "aggregator_data_kind", "DataKind.WEIGHT_DIFF"),
    ({"aggregator_data_kind": DataKind.WEIGHT_DIFF}, "aggregator_data_kind", "TransferType.DIFF"),
    ({"launch_external_process": "yes"}, "launch_external_process", "True or False"),
    ({"command": None}, "command", "a string"),
    ({"command": ""}, "command", "a program"),
    ({"command": []}, "command", "a program"),
    ({"command": ["torchrun", 2]}, "command", "list of its words"),
    ({"command": "python3 'half", "launch_external_process": True}, "command", "cannot be split"),
    ({"command": "torchrun"}, "command", "needs launch_external_process=True"),
    ({"command": "torchrun", "attach": True}, "command", "needs launch_external_process=True"),
    ({"launch_once": False}, "launch_once", "needs launch_external_process=True"),
    ({"launch_once": False, "attach": True}, "launch_once", "somebody else starts"),
    ({"shutdown_timeout": 1.0}, "shutdown_timeout", "needs launch_external_process=True"),
    ({"attach": 1}, "attach", "True or False"),
    ({"attach": True, "launch_external_process": True}, "attach", "not beside launch_external_process=True"),
    ({"launch_timeout": 0}, "launch_timeout", "above 0"),
    ({"launch_timeout": "5"}, "launch_timeout", "a finite number"),
    ({"per_site_config": {"s1": {"command": "torchrun"}}}, "per_site_config['s1']['command']", "needs launch_external"),
    (
        {"launch_external_process": True, "per_site_config": {"s1": {"attach": True, "launch_external_process": True}}},
        "per_site_config['s1']['attach']",
        "not beside",
    ),
    ({"framework": "jax"}, "framework", "FrameworkType.NUMPY"),
    ({"server_expected_format": "json"}, "server_expected_format", "ExchangeFormat.RAW"),
    ({"params_transfer_type": "HALF"}, "params_transfer_type", "TransferType.DIFF"),
    ({"launch_once": 1}, "launch_once", "True or False"),
    ({"shutdown_timeout": -1}, "shutdown_timeout", "from 0"),
    ({"shutdown_timeout": math.nan}, "shutdown_timeout", "from 0"),
    ({"key_metric": None}, "key_metric", "a string"),
    ({"key_metric_mode": "up"}, "key_metric_mode", '"min"'),
    ({"key_metric_mode": "min", "stop_cond": "accuracy >= 1"}, "key_metric_mode", "contradicts"),
    ({"stop_cond": "accuracy"}, "stop_cond", ">= <= > < ="),
    ({"stop_cond": ""}, "stop_cond", ">= <= > < ="),
    ({"stop_cond": "accuracy => 3"}, "stop_cond", ">= <= > < ="),
    ({"stop_cond": "accuracy > high"}, "stop_cond", "finite number"),
    ({"stop_cond": "accuracy > inf"}, "stop_cond", "finite number"),
    ({"patience": 3}, "patience", "needs a stop_cond"),
    ({"patience": 0, "stop_cond": "loss < 1"}, "patience", "whole number from 1"),
    ({"best_model_filename": "../best.pt"}, "best_model_filename", "plain file name"),
    ({"best_model_filename": "best.bin"}, "best_model_filename", ".safetensors or .pt"),
    ({"best_model_filename": "FL_global_model.pt"}, "best_model_filename", "taken"),
    ({"save_filename": "model-1.safetensors"}, "save_filename", "taken"),
    ({"best_model_filename": "best.pt", "framework": "numpy"}, "best_model_filename", ".safetensors"),
    ({"best_model_filename": "best.pt", "key_metric": ""}, "best_model_filename", "needs a key_metric"),
    ({"best_model_filename": "a.pt", "save_filename": "b.pt"}, "save_filename", "must be the same"),
    ({"exclude_vars": "("}, "exclude_vars", "not a regular expression"),
    ({"exclude_vars": ""}, "exclude_vars", "regular expression"),
    ({"exclude_vars": ["bn"]}, "exclude_vars", "regular expression"),
    ({"aggregation_weights": [1.0]}, "aggregation_weights", "a dict"),
    ({"aggregation_weights": {"site 1": 1.0}}, "aggregation_weights", "letters"),
    ({"aggregation_weights": {"site-1": -1.0}}, "aggregation_weights['site-1']", "from 0"),
    ({"aggregation_weights": {"site-1": math.inf}}, "aggregation_weights['site-1']", "finite"),
    ({"aggregation_weights": {"site-1": "1"}}, "aggregation_weights['site-1']", "finite"),
    ({"aggregation_weights": {"site-1": 0.0}}, "aggregation_weights", "above 0"),
    ({"server_memory_gc_rounds": -1}, "server_memory_gc_rounds", "from 0"),
    ({"enable_tensor_disk_offload": 1}, "enable_tensor_disk_offload", "True or False"),
    ({"client_memory_gc_rounds": -1}, "client_memory_gc_rounds", "from 0"),
    ({"cuda_empty_cache": "no"}, "cuda_empty_cache", "True or False"),
    ({"cuda_empty_cache": True}, "cuda_empty_cache", "client_memory_gc_rounds"),
    ({"wait_time_after_min_received": -0.5}, "wait_time_after_min_received", "from 0"),
    ({"wait_time_after_min_received": "10"}, "wait_time_after_min_received", "finite number"),
    ({"round_timeout": 0}, "round_timeout", "above 0"),
    ({"round_timeout": math.inf}, "round_timeout", "finite"),
    ({"min_clients": 3, "clients_per_round": 2}, "clients_per_round", "at least min_clients=3"),
    ({"clients_per_round": 0}, "clients_per_round", "whole number from 1"),
    ({"seed": -1}, "seed", "from 0"),
    ({"deterministic": None}, "deterministic", "True or False"),
    ({"per_site_config": ["site-1"]}, "per_site_config", "a dict"),
    ({"per_site_config": {"site-1": None}}, "per_site_config['site-1']", "a dict"),
    ({"per_site_config": {"a/b": {}}}, "per_site_config", "letters"),
    ({"per_site_config": {"server": {}}}, "per_site_config", "reserved"),
    ({"per_site_config": {"@ALL": {}}}, "per_site_config", "reserved"),
    ({"per_site_config": {"site-1": {}}, "min_clients": 2}, "per_site_config", "min_clients=2"),
    (
        {"per_site_config": {"s1": {"train_arg": ""}}},
        "per_site_config['s1']['train_arg']",
        "did you mean 'train_args'?",
    ),
    ({"per_site_config": {"s1": {"train_args": "'"}}}, "per_site_config['s1']['train_args']", "cannot be split"),
    ({"per_site_config": {"s1": {"train_script": "no.py"}}}, "per_site_config['s1']['train_script']", "no such file"),
    ({"per_site_config": {"s1": {"launch_once": 1}}}, "per_site_config['s1']['launch_once']", "True or False"),
    (
        {"per_site_config": {"s1": {"params_transfer_type": "DIFF"}, "s2": {}}},
        "params_transfer_type",
        "never mixes",
    ),
]


@pytest.mark.parametrize(("changes", "parameter", "said"), WRONG, ids=[f"{p}-{i}" for i, (_, p, _) in enumerate(WRONG)])
def test_wrong_parameter_is_named_with_its_value_and_what_is_allowed(make, changes, parameter, said):
    """A wrong parameter is refused at construction, by name."""
    with pytest.raises(ConfigError) as caught:
        make(**changes)

    assert caught.value.parameter == parameter
    assert said in str(caught.value)


@pytest.mark.parametrize("parameter", ["exclude_vars", "aggregation_weights"])
def test_what_a_custom_aggregator_would_ignore_is_refused(make, parameter):
    """A parameter of the built-in mean is not silently dropped beside a custom aggregator."""
    value = {"exclude_vars": "bn", "aggregation_weights": {"site-1": 2.0}}[parameter]

    with pytest.raises(ConfigError, match=f"^{parameter}="):
        make(aggregator=Keeper(), **{parameter: value})


def test_what_is_not_there_yet_says_what_it_belongs_to(make):
    """A parameter of later work is refused with the reason, never ignored."""
    with pytest.raises(NotImplementedError, match=r"model_persistor='a persistor'.* belong(s)? to"):
        make(model_persistor="a persistor")


def test_signature_is_that_of_the_seed_and_keyword_only():
    """Every documented parameter is there, with the documented default, by keyword only."""
    parameters = dict(inspect.signature(FedAvgRecipe).parameters)

    assert {name: parameters[name].default for name in SEED_DEFAULTS} == SEED_DEFAULTS
    assert all(each.kind is inspect.Parameter.KEYWORD_ONLY for each in parameters.values())


def test_unknown_parameter_names_the_nearest_known_one(make):
    """A misspelt parameter is a TypeError that says which one was meant."""
    with pytest.raises(TypeError, match=r"'num_round'; did you mean 'num_rounds'\?"):
        make(num_round=3)


def test_settings_reach_the_workflow_unchanged(make):
    """What the user chose is what the workflow is built with, under the names it has there."""
    chosen = {
        "num_rounds": 5,
        "min_clients": 2,
        "clients_per_round": 3,
        "seed": 9,
        "deterministic": True,
        "wait_time_after_min_received": 0.5,
        "round_timeout": 60.0,
        "exclude_vars": "^bn",
        "aggregation_weights": {"site-1": 2.0},
        "key_metric": "loss",
        "key_metric_mode": "min",
        "stop_cond": "loss < 0.1",
        "patience": 4,
        "enable_tensor_disk_offload": True,
        "hyper_params": {"eta0": 0.1, "loss": "hinge", "penalty": None},
    }

    recipe = make(**chosen, server_memory_gc_rounds=2)

    assert recipe.definition.workflow == "fedavg"
    assert recipe.definition.workflow_settings == chosen | {"memory_gc_rounds": 2, "aggregator": None}


def test_default_settings_are_those_of_the_signature(make):
    """With nothing chosen the workflow gets the defaults of the recipe, each by name."""
    settings = make(min_clients=2).definition.workflow_settings

    assert settings == {
        "num_rounds": 2,
        "min_clients": 2,
        "clients_per_round": None,
        "seed": 0,
        "deterministic": False,
        "wait_time_after_min_received": None,
        "round_timeout": None,
        "exclude_vars": None,
        "aggregation_weights": None,
        "aggregator": None,
        "key_metric": "accuracy",
        "key_metric_mode": None,
        "stop_cond": None,
        "patience": None,
        "enable_tensor_disk_offload": False,
        "memory_gc_rounds": 0,
        "hyper_params": None,
    }


def test_numpy_numbers_become_plain_ones(make):
    """Numbers computed with NumPy are accepted and kept as numbers that can be written down."""
    settings = make(num_rounds=np.int64(3), round_timeout=np.float32(2.0)).definition.workflow_settings

    assert (type(settings["num_rounds"]), type(settings["round_timeout"])) == (int, float)


def test_site_inherits_what_it_does_not_set(make, code):
    """A site's entry changes what it names and leaves the rest; None is the same as leaving it out."""
    recipe = make(
        train_args="--lr 1",
        framework="raw",
        client_memory_gc_rounds=2,
        per_site_config={"a": {"train_args": "--lr 2", "framework": None}, "b": {}},
    )

    common = SiteConfig(str(code / "client.py"), "--lr 1", FrameworkType.RAW, memory_gc_rounds=2)
    assert recipe.definition.site_config("b") == common
    assert recipe.definition.site_config("a").train_args == "--lr 2"
    assert recipe.definition.site_config("a").framework is FrameworkType.RAW


def test_settings_of_processes_reach_every_site(make):
    """What the script's own process takes is in the configuration of every site."""
    recipe = make(
        launch_external_process=True,
        command=["torchrun", "--nproc-per-node", "2"],
        launch_once=False,
        shutdown_timeout=2,
        launch_timeout=None,
    )

    site = recipe.definition.site_config("any")
    assert site.is_external
    assert site.command == ("torchrun", "--nproc-per-node", "2")
    assert (site.launch_once, site.shutdown_timeout, site.launch_timeout) == (False, 2.0, None)


def test_sites_differ_in_who_starts_their_process(make):
    """A site that runs inside, or is attached, ignores what the job says about starting processes."""
    recipe = make(
        launch_external_process=True,
        command="torchrun",
        shutdown_timeout=2.0,
        launch_timeout=9.0,
        per_site_config={
            "launched": {},
            "inside": {"launch_external_process": False},
            "attached": {"attach": True, "launch_timeout": None},
        },
    )

    launched, inside, attached = (recipe.definition.site_config(name) for name in ("launched", "inside", "attached"))
    assert (launched.launch_external_process, launched.command, launched.launch_timeout) == (True, "torchrun", 9.0)
    assert (inside.is_external, inside.command, inside.shutdown_timeout) == (False, "python3 -u", 0.0)
    assert (attached.attach, attached.launch_external_process, attached.command) == (True, False, "python3 -u")
    assert (attached.shutdown_timeout, attached.launch_timeout) == (2.0, None)


def test_command_of_the_job_is_for_the_sites_that_start_processes(make):
    """The job may say how processes are started and leave it to its sites whether they do."""
    recipe = make(command="torchrun", per_site_config={"a": {"launch_external_process": True}, "b": {}})

    assert recipe.definition.site_config("a").command == "torchrun"
    assert recipe.definition.site_config("b").command == "python3 -u"


def test_raw_framework_may_start_without_a_model(make):
    """RAW needs no model: the job starts with no parameters."""
    assert make(model=None, framework=FrameworkType.RAW).definition.initial_params() == {}


def test_absolute_checkpoint_may_be_on_the_server_only(make):
    """An absolute path need not exist where the recipe is made."""
    job = make(model=None, initial_ckpt="/server/only/weights.safetensors").definition

    assert (job.initial_ckpt, job.ckpt_is_bundled) == (Path("/server/only/weights.safetensors"), False)


def test_relative_checkpoint_is_found_and_belongs_to_the_job(make, code, monkeypatch):
    """A relative path is looked for in the working directory and marked as part of the job."""
    np.savez(code / "start.npz", w=np.ones(2, np.float32))
    monkeypatch.chdir(code)

    job = make(model=None, initial_ckpt="start.npz").definition

    assert (job.initial_ckpt, job.ckpt_is_bundled) == (code / "start.npz", True)


def test_script_is_found_beside_the_running_program(code, monkeypatch, tmp_path):
    """`train_script="client.py"` works from any folder when it lies beside the program that is run."""
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=str(code / "job.py")))
    monkeypatch.chdir(tmp_path)

    recipe = FedAvgRecipe(min_clients=1, train_script="client.py", model=[1.0])

    assert recipe.definition.site_defaults.train_script == str(code / "client.py")


def test_old_name_of_the_best_file_still_works_and_warns(make):
    """`save_filename` alone names the best model's file, with a warning that points at the caller."""
    with pytest.warns(DeprecationWarning, match="best_model_filename") as seen:
        recipe = make(save_filename="mine.pt")

    assert recipe.definition.best_model_filename == "mine.pt"
    assert seen[0].filename == str(Path(__file__).with_name("conftest.py"))


def test_best_files_share_one_name(make):
    """The name chosen for the best model stands before the suffix of each of its files."""
    assert make().definition.best_stem == "best_FL_global_model"
    assert make(best_model_filename="mine.v2.pt").definition.best_stem == "mine.v2"


def test_construction_writes_nothing(make, code):
    """Making a recipe leaves the disk as it was."""
    before = sorted(code.parent.rglob("*"))

    make(model={"class_path": "model.Net"})

    assert sorted(code.parent.rglob("*")) == before


def test_aggregator_that_only_looks_like_one_is_accepted(make):
    """Any object with the three methods is an aggregator; a subclass is too."""
    own = Keeper()

    assert make(aggregator=own).definition.workflow_settings["aggregator"] is own
    assert make(aggregator=Derived()).definition.workflow_settings["aggregator"].aggregate_model().params == {}


class Keeper:
    """Has what an aggregator needs and is not derived from anything."""

    def accept_model(self, model: FLModel) -> None:
        self.last = model

    def aggregate_model(self) -> FLModel:
        return self.last

    def reset_stats(self) -> None:
        self.last = FLModel()


class Derived(ModelAggregator):
    """Derived from the interface."""

    def accept_model(self, model: FLModel) -> None:
        pass

    def aggregate_model(self) -> FLModel:
        return FLModel(params={})

    def reset_stats(self) -> None:
        pass
