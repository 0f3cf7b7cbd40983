"""A recipe goes to a folder and comes back equal; a damaged folder is refused by name."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flarebus.errors import ConfigError
from flarebus.recipe import FedAvgRecipe, Recipe
from flarebus.workflow.params import flatten


def _torch_model():
    torch = pytest.importorskip("torch")
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))


MODELS = {
    "array": lambda: np.arange(6, dtype=np.float64).reshape(2, 3),
    "list": lambda: [1.0, 2.0, 3.0],
    "arrays by name": lambda: {"w": np.full((2, 2), np.nan, np.float32), "n": np.array(3, np.int64)},
    "nested": lambda: {"deep": {"w": np.ones(2, np.float16)}, "list": [1.0, math.nan], "note": "text", "none": None},
    "tensors": lambda: _torch_model().state_dict(),
    "class": lambda: {"class_path": "model.Net", "args": {"size": 3}},
    "module": _torch_model,
}


@pytest.mark.parametrize("kind", MODELS)
def test_comes_back_equal(make, tmp_path, kind):
    """Whatever the model was given as, the folder holds an equal recipe with the same initial parameters."""
    recipe = make(model=MODELS[kind](), num_rounds=7, train_args="--note 'two words'", stop_cond="accuracy > 0.5")

    target = recipe.export(tmp_path / "job")
    loaded = FedAvgRecipe.load(target)

    assert loaded == recipe
    assert Recipe.load(target) == recipe
    before, after = (flatten(each.definition.initial_params()) for each in (recipe, loaded))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, strict=isinstance(value, np.ndarray))


def test_every_setting_comes_back(make, tmp_path, code):
    """All settings, sites and the description of an aggregator survive the way through the folder."""
    (tmp_path / "other").mkdir()
    shutil.copy(code / "client.py", tmp_path / "other" / "client.py")
    recipe = make(
        name="everything",
        min_clients=2,
        num_rounds=4,
        aggregator={"class_path": "model.Net", "args": {"size": 1}},
        aggregator_data_kind="WEIGHT_DIFF",
        framework="numpy",
        server_expected_format="raw",
        params_transfer_type="DIFF",
        key_metric="loss",
        key_metric_mode="min",
        stop_cond="loss < 0.1",
        patience=2,
        best_model_filename="mine.safetensors",
        server_memory_gc_rounds=3,
        enable_tensor_disk_offload=True,
        client_memory_gc_rounds=2,
        cuda_empty_cache=True,
        wait_time_after_min_received=1.5,
        round_timeout=90.0,
        clients_per_round=2,
        seed=5,
        deterministic=True,
        launch_external_process=True,
        command=["python", "-X", "dev"],
        launch_once=False,
        shutdown_timeout=3,
        launch_timeout=20,
        per_site_config={
            "a": {"train_script": str(tmp_path / "other" / "client.py"), "framework": "raw"},
            "b": {"train_args": "-v", "client_memory_gc_rounds": 1, "launch_external_process": False},
            "c": {"launch_timeout": None},
            "d": {"attach": True, "shutdown_timeout": 7},
        },
    )

    loaded = FedAvgRecipe.load(recipe.export(tmp_path / "job"))

    assert loaded == recipe
    assert loaded.definition.workflow_settings == recipe.definition.workflow_settings
    assert Path(loaded.definition.site_config("a").train_script).parent.parent.name == "site_scripts"


@pytest.mark.parametrize(
    "change",
    [
        {"num_rounds": 3},
        {"name": "other"},
        {"train_args": "-v"},
        {"model": [1.0, 2.5]},
        {"model": np.array([1.0, 2.0], np.float64)},
        {"model": {"class_path": "model.Net"}},
        {"framework": "numpy"},
        {"attach": True},
        {"launch_external_process": True},
        {"launch_timeout": None},
        {"per_site_config": {"a": {}}},
        {"best_model_filename": "x.pt"},
        {"aggregator": {"class_path": "model.Net"}},
        {"aggregator_data_kind": None},
        {"initial_ckpt": "/server/x.npz"},
    ],
    ids=str,
)
def test_any_difference_makes_recipes_unequal(make, change):
    """Equality is about the whole description, arrays included."""
    assert make() == make()
    assert make(**change) != make()


def test_changed_code_makes_recipes_unequal(make, tmp_path, code):
    """Two jobs with different code are different jobs."""
    recipe = make()
    loaded = FedAvgRecipe.load(recipe.export(tmp_path / "job"))

    code.joinpath("model.py").write_text("changed = True\n")

    assert loaded != recipe


def test_added_or_missing_module_makes_recipes_unequal(make, tmp_path, code):
    """A module more or less is a difference too, whichever side is asked."""
    recipe = make()
    loaded = FedAvgRecipe.load(recipe.export(tmp_path / "job"))

    code.joinpath("extra.py").write_text("")

    assert loaded != recipe
    assert recipe != loaded


def test_same_bytes_of_another_dtype_are_another_model(make):
    """Zeros of two dtypes have the same bytes and are not the same parameters."""
    assert make(model=np.zeros(2, np.float32)) != make(model=np.zeros(2, np.int32))


def test_script_may_lie_deeper_in_the_code(make, tmp_path):
    """Where a description names a script in a sub-folder, the modules of the whole code folder stay its own."""
    target = make().export(tmp_path / "job")
    target.joinpath("code", "client.py").rename(target / "code" / "layers" / "client.py")
    _edit(target, lambda data: data["site_defaults"].update(train_script="layers/client.py"))

    job = FedAvgRecipe.load(target).definition

    assert job.code_dir == target / "code"
    assert sorted(job.code_layout().files) == ["layers/__init__.py", "layers/client.py", "model.py"]


def test_folder_holds_the_code_and_nothing_else(make, tmp_path, code):
    """Python files around the script travel; data, hidden folders, environments and other jobs do not."""
    for name in (".hidden", "__pycache__", "venv", "old_job"):
        (code / name).mkdir()
        code.joinpath(name, "extra.py").write_text("")
    code.joinpath("venv", "pyvenv.cfg").write_text("")
    code.joinpath("old_job", "job.json").write_text("{}")

    target = make().export(tmp_path / "job")

    files = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    assert files == ["code/client.py", "code/layers/__init__.py", "code/model.py", "job.json", "model.safetensors"]


def test_relative_checkpoint_travels(make, tmp_path, code, monkeypatch):
    """A relative `initial_ckpt` is copied into the folder, and again when the loaded recipe is exported."""
    np.savez(code / "start.npz", w=np.ones(2, np.float32))
    monkeypatch.chdir(code)
    recipe = make(model=None, initial_ckpt="start.npz")
    first = FedAvgRecipe.load(recipe.export(tmp_path / "one"))
    code.joinpath("start.npz").unlink()

    second = FedAvgRecipe.load(first.export(tmp_path / "two"))

    shutil.rmtree(tmp_path / "one")
    assert list(second.definition.initial_params()) == ["w"]
    assert second != recipe


def test_absolute_checkpoint_stays_where_it_is(make, tmp_path):
    """An absolute `initial_ckpt` is written down as a path and not copied."""
    recipe = make(model=None, initial_ckpt="/server/only/x.safetensors")

    target = recipe.export(tmp_path / "job")

    assert FedAvgRecipe.load(target) == recipe
    assert not (target / "checkpoint").exists()


def test_export_into_the_script_folder_does_not_eat_itself(make, code):
    """Exporting beside the script twice gives the same job: an exported job is not code of the next one."""
    recipe = make()

    recipe.export(code / "fl_job")
    target = recipe.export(code / "fl_job")

    assert not (target / "code" / "fl_job").exists()
    assert FedAvgRecipe.load(target) == recipe


def test_loaded_recipe_can_be_exported_over_itself(make, tmp_path):
    """The old folder is read to the end before the new one takes its place."""
    target = make().export(tmp_path / "job")

    FedAvgRecipe.load(target).export(target)

    assert FedAvgRecipe.load(target) == make()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", "job"]


def test_failed_export_leaves_the_old_folder(make, tmp_path, code):
    """When the new job cannot be written, the old one stays whole and nothing is left beside it."""
    target = make().export(tmp_path / "job")
    before = {path.name: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    recipe = make(num_rounds=9)
    code.joinpath("client.py").unlink()

    with pytest.raises(ConfigError, match=r"client\.py"):
        recipe.export(target)

    assert {path.name: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", "job"]


def test_export_replaces_nothing_but_a_job(make, tmp_path):
    """A folder with somebody's files in it is refused."""
    tmp_path.joinpath("mine").mkdir()
    tmp_path.joinpath("mine", "thesis.txt").write_text("precious")

    with pytest.raises(ConfigError, match="is no job folder"):
        make().export(tmp_path / "mine")

    assert tmp_path.joinpath("mine", "thesis.txt").read_text() == "precious"


def test_aggregator_object_cannot_be_exported(make, tmp_path):
    """An object is not written down; the error says how to name its class instead."""

    class Own:
        def accept_model(self, model): ...
        def aggregate_model(self): ...
        def reset_stats(self): ...

    with pytest.raises(ConfigError, match="class_path"):
        make(aggregator=Own()).export(tmp_path / "job")

    assert not tmp_path.joinpath("job").exists()


def test_too_much_code_is_refused_by_folder(make, tmp_path, code, monkeypatch):
    """A script in a folder full of other things is refused, not copied with all of it."""
    monkeypatch.setattr("flarebus.job.code._MAX_FILES", 2)

    with pytest.raises(ConfigError, match="folder of their own"):
        make().export(tmp_path / "job")


@pytest.mark.parametrize("content", [None, b"", b"x" * 100])
def test_damaged_model_file_is_named(make, tmp_path, content):
    """A missing or damaged model file is a mistake in the folder, said in words."""
    target = make().export(tmp_path / "job")
    target.joinpath("model.safetensors").unlink()
    if content is not None:
        target.joinpath("model.safetensors").write_bytes(content)

    with pytest.raises(ConfigError, match=r"job\.json: model='model\.safetensors'"):
        FedAvgRecipe.load(target)


def _edit(target: Path, change) -> None:
    path = target / "job.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.update(nam="x"), r"job\['nam'\].*did you mean 'name'"),
        (lambda data: data["settings"].update(num_round=3), r"settings\['num_round'\].*did you mean 'num_rounds'"),
        (
            lambda data: data["site_defaults"].update(train_arg=""),
            r"site_defaults\['train_arg'\].*did you mean 'train_args'",
        ),
        (lambda data: data.pop("workflow"), "'workflow' is missing"),
        (lambda data: data["settings"].pop("min_clients"), "'min_clients' is missing"),
        (lambda data: data["settings"].update(num_rounds=0), "num_rounds=0: a whole number from 1"),
        (lambda data: data.update(schema_version=99), "schema_version=99: this version of flarebus reads 1"),
        (lambda data: data.pop("schema_version"), "schema_version=None"),
        (lambda data: data.update(name=3), "job.name=3: a string"),
        (lambda data: data.update(ckpt_is_bundled=0), "job.ckpt_is_bundled=0: true or false"),
        (lambda data: data.update(workflow="cyclc"), "workflow='cyclc': no recipe.*did you mean 'cyclic'"),
        (lambda data: data["site_defaults"].update(train_script="../../etc/x.py"), "train_script.*a path below"),
        (lambda data: data["site_defaults"].update(train_script="layers/../client.py"), "train_script.*a path below"),
        (lambda data: data["site_defaults"].update(train_script="/etc/x.py"), "train_script.*a path below"),
        (lambda data: data["site_defaults"].update(train_script="gone.py"), "train_script.*no such file"),
        (lambda data: data["site_defaults"].update(framework="jax"), r"site_defaults\['framework'\]='jax'"),
        (lambda data: data.update(initial_ckpt="../x.npz", ckpt_is_bundled=True), "initial_ckpt.*a path below"),
        (lambda data: data.update(initial_ckpt="x.npz"), "initial_ckpt.*an absolute path"),
        (lambda data: data.update(model="pickle"), "job.model='pickle'"),
        (lambda data: data.update(sites={"a": 3}), r"sites\['a'\]=3: a dict"),
        (lambda data: data.update(sites={"a b": data["site_defaults"]}), "per_site_config='a b'"),
    ],
)
def test_mistake_in_job_json_is_named(make, tmp_path, change, said):
    """Every mistake in a description names the file, the key, the value and what is allowed."""
    target = make().export(tmp_path / "job")
    _edit(target, change)

    with pytest.raises(ConfigError, match=said) as caught:
        FedAvgRecipe.load(target)

    assert str(target / "job.json") in str(caught.value)


@pytest.mark.parametrize("text", ["", "[", "[]", "null", "\udcff", "[" * 100_000])
def test_what_is_no_description_is_refused(make, tmp_path, text):
    """A `job.json` that is not JSON, or not an object, is refused without a traceback of the parser."""
    target = make().export(tmp_path / "job")
    target.joinpath("job.json").write_text(text, errors="surrogateescape")

    with pytest.raises(ConfigError, match=r"job\.json"):
        FedAvgRecipe.load(target)


def test_missing_folder_is_refused(tmp_path):
    """Reading a job that is not there says so."""
    with pytest.raises(ConfigError, match="no job can be read there"):
        Recipe.load(tmp_path / "nowhere")


def test_script_that_is_a_link_out_of_the_job_is_refused(make, tmp_path, code):
    """A description cannot reach a file outside its folder through a link."""
    target = make().export(tmp_path / "job")
    target.joinpath("code", "client.py").unlink()
    os.symlink(code / "client.py", target / "code" / "client.py")

    with pytest.raises(ConfigError, match="leaves it through a link"):
        FedAvgRecipe.load(target)


@settings(max_examples=25, deadline=None)
@given(
    args=st.text(st.characters(codec="utf-8", exclude_characters="'\"\\")),
    rounds=st.integers(1, 10**12),
    wait=st.none() | st.floats(0, 1e300),
    weights=st.none() | st.dictionaries(st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True), st.floats(1e-300, 1e300)),
)
def test_any_valid_values_come_back(tmp_path_factory, args, rounds, wait, weights):
    """Strings and numbers of every size come back exactly."""
    folder = tmp_path_factory.mktemp("code")
    folder.joinpath("client.py").write_text("")
    recipe = FedAvgRecipe(
        min_clients=1,
        train_script=str(folder / "client.py"),
        model=[0.0],
        train_args=args,
        num_rounds=rounds,
        wait_time_after_min_received=wait,
        aggregation_weights={site: weight for site, weight in (weights or {}).items() if site not in RESERVED} or None,
    )

    assert FedAvgRecipe.load(recipe.export(folder / "job")) == recipe


RESERVED = {"server", "con", "prn", "aux", "nul"}
