"""Keras models: their parameters by layer, and checkpoints in Keras' own formats."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flarebus.errors import ConfigError
from flarebus.job.definition import JobDefinition
from flarebus.job.initial import load_initial, params_of
from flarebus.job.keras_models import export_keras
from flarebus.job.kinds import FrameworkType
from flarebus.recipe import FedAvgRecipe
from flarebus.server.archive import Archive

NET = """
import keras


def make_net(units=3):
    hidden = keras.layers.Dense(units, name="hidden")
    return keras.Sequential([keras.Input((4,)), hidden, keras.layers.Dense(2, name="out")])
"""


@pytest.fixture(scope="session")
def keras(tf: Any) -> Any:
    """Keras on TensorFlow."""
    import keras

    return keras


@pytest.fixture
def net(keras: Any) -> Any:
    """A small model with all that models have: state, parts without weights, layers within layers."""
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(2)], name="inner")
    layers = [
        keras.Input((4,)),
        keras.layers.Dense(3, name="hidden"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dropout(0.5, name="dropout"),
        inner,
    ]
    return keras.Sequential(layers)


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., JobDefinition]:
    """Makes a job from parameters of a recipe."""
    tmp_path.joinpath("client.py").write_text("")
    tmp_path.joinpath("net.py").write_text(NET)

    def make(**given: Any) -> JobDefinition:
        recipe = FedAvgRecipe(
            **{
                "framework": FrameworkType.TENSORFLOW,
                "min_clients": 1,
                "train_script": str(tmp_path / "client.py"),
                **given,
            }
        )
        return recipe.definition

    return make


def run(job: JobDefinition, folder: Path, params: dict[str, Any], new: dict[str, Any], best: bool = False) -> Path:
    """A job of one round that makes `new` of `params`; return where its models are."""
    folder.joinpath("server").mkdir()
    archive = Archive(folder / "server", job, params)
    archive.commit(0, new, {}, best)
    archive.close("completed", None)
    return folder / "server" / "models"


def listed(params: dict[str, Any]) -> dict[str, Any]:
    return {name: [array.tolist() for array in arrays] for name, arrays in params.items()}


def trained(params: dict[str, Any]) -> dict[str, Any]:
    """Other values of the same kind."""
    return {name: [array * 0 + 7 for array in arrays] for name, arrays in params.items()}


def test_a_model_is_the_weights_of_its_layers(net: Any) -> None:
    """As scripts give and take them, state and inner models included; the arrays are nobody else's."""
    params = params_of(net)

    assert list(params) == ["hidden", "norm", "dropout", "inner"]
    assert [len(arrays) for arrays in params.values()] == [2, 4, 0, 4]
    assert listed(params) == {layer.name: [w.tolist() for w in layer.get_weights()] for layer in net.layers}
    params["hidden"][0][...] = 9
    assert not (net.get_weights()[0] == 9).any()


def test_models_that_are_no_list_of_layers_are_refused(keras: Any, job: Callable[..., JobDefinition]) -> None:
    """Weights that would be left out are an error, and it says what can be done; so is a model without any."""

    class Own(keras.Model):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.scale = self.add_weight(shape=(1,), name="scale")

        def call(self, x: Any) -> Any:
            return x * self.scale

    class Twins(keras.Model):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = keras.layers.Dense(1, name="d"), keras.layers.Dense(1, name="d")
            self.one.build((1, 1)), self.other.build((1, 1))

    for model, told in (
        (Own(), r"outside its layers: own/scale; give {\"weights\": model.get_weights\(\)}"),
        (Twins(), "two layers of the name 'd'"),
        (keras.Sequential([keras.layers.Dense(1)]), "build it first"),
    ):
        with pytest.raises(ConfigError, match=told) as caught:
            job(model=model)
        assert caught.value.parameter == "model"
    assert listed(job(model={"weights": Own().get_weights()}).initial_params()).keys() == {"weights"}


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_checkpoints_of_keras(net: Any, job: Callable[..., JobDefinition], tmp_path: Path, suffix: str) -> None:
    """A job begins with the weights in the file; the model it was given keeps its own."""
    wanted, before = trained(params_of(net)), listed(params_of(net))
    export_keras(net, wanted, tmp_path / "mine.safetensors")

    assert listed(job(model=net, initial_ckpt=str(tmp_path / f"mine{suffix}")).initial_params()) == listed(wanted)
    assert listed(params_of(net)) == before


def test_a_keras_file_needs_no_model(net: Any, job: Callable[..., JobDefinition], tmp_path: Path) -> None:
    """It holds one; a file of weights alone does not, and says so."""
    wanted = trained(params_of(net))
    export_keras(net, wanted, tmp_path / "mine.safetensors")

    assert listed(load_initial(tmp_path / "mine.keras")) == listed(wanted)
    assert job(initial_ckpt=str(tmp_path / "mine.keras")).keras_model().name == net.name
    for model in (None, {"hidden": [np.ones(1)]}):
        with pytest.raises(ConfigError, match="weights without their model"):
            job(model=model, initial_ckpt=str(tmp_path / "mine.weights.h5")).initial_params()


def test_a_class_is_built_and_loaded(keras: Any, job: Callable[..., JobDefinition], tmp_path: Path) -> None:
    """A model may be described by its path, with weights from a file that must fit."""
    described = {"class_path": "net:make_net", "args": {"units": 5}}
    model = job(model=described).keras_model()
    assert [array.shape for array in job(model=described).initial_params()["hidden"]] == [(4, 5), (5,)]
    model.save_weights(tmp_path / "mine.weights.h5")

    loaded = job(model=described, initial_ckpt=str(tmp_path / "mine.weights.h5")).initial_params()
    assert listed(loaded) == listed(params_of(model))
    with pytest.raises(ConfigError, match=r"does not fit the model.*shape"):
        job(model={**described, "args": {}}, initial_ckpt=str(tmp_path / "mine.weights.h5")).initial_params()


def test_safetensors_of_an_earlier_run_fit_a_keras_model(
    net: Any, job: Callable[..., JobDefinition], tmp_path: Path
) -> None:
    """What a job of TensorFlow left is where the next one may begin."""
    folder = run(job(model=net), tmp_path, params_of(net), trained(params_of(net)))

    found = job(model=net, initial_ckpt=str(folder / "FL_global_model.safetensors"))
    assert listed(found.initial_params()) == listed(trained(params_of(net)))


def make_bad(keras: Any, folder: Path, case: str) -> tuple[Path, str]:
    """Write one bad file; return its path and what the error must say."""
    path = folder / case.rpartition(" ")[2]
    if case.startswith("missing"):
        return path, "cannot be read: No such file"
    if case.startswith("folder"):
        path.mkdir()
        return path, "cannot be read: Is a directory"
    if case.startswith("lambda"):
        shift = keras.layers.Lambda(lambda x: x + 1)
        keras.Sequential([keras.Input((4,)), shift, keras.layers.Dense(1)]).save(path)
        return path, "Lambda"
    if case.startswith("custom"):

        class Mine(keras.layers.Dense):  # type: ignore[misc,name-defined]
            pass

        keras.Sequential([keras.Input((4,)), Mine(1)]).save(path)
        return path, "give the model, too"
    path.write_bytes({"empty": b"", "junk": b"\x89HDF\r\n\x1a\n PK\x03\x04" * 20}[case.split()[0]])
    return path, "is damaged"


@pytest.mark.parametrize(
    "case",
    [
        *(
            f"{what} m{suffix}"
            for what in ("missing", "folder", "empty", "junk")
            for suffix in (".keras", ".weights.h5")
        ),
        "lambda m.keras",
        "custom m.keras",
    ],
)
def test_bad_files_are_errors_of_the_user(
    keras: Any, net: Any, job: Callable[..., JobDefinition], tmp_path: Path, case: str
) -> None:
    """A file that is not there, damaged, or holds code is named, with what is wrong; code in it never runs."""
    path, told = make_bad(keras, tmp_path, case)
    model = net if path.suffix == ".h5" else None

    with pytest.raises(ConfigError, match=told) as caught:
        job(model=model, initial_ckpt=str(path)).initial_params()

    assert (caught.value.parameter, caught.value.value) == ("initial_ckpt", str(path))


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_damage_anywhere_is_never_a_crash(
    net: Any, job: Callable[..., JobDefinition], tmp_path: Path, suffix: str
) -> None:
    """Flipped bits and cut ends give an error of the user's or a model, nothing else; the model stays as it was."""
    export_keras(net, params_of(net), tmp_path / "m.safetensors")
    path = tmp_path / f"m{suffix}"
    content, before = path.read_bytes(), listed(params_of(net))
    rng = random.Random(suffix)
    refused = 0

    for _ in range(25):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        try:
            assert list(job(model=net, initial_ckpt=str(path)).initial_params()) == list(before)
        except ConfigError:
            refused += 1
    assert refused > 5
    assert listed(params_of(net)) == before


def test_without_keras_the_error_names_the_extra(
    job: Callable[..., JobDefinition], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in a format of Keras needs Keras."""
    tmp_path.joinpath("m.keras").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "keras", None)

    with pytest.raises(ConfigError, match=r"pip install 'flarebus\[tensorflow\]'"):
        load_initial(tmp_path / "m.keras")
    assert params_of({"w": np.ones(1)})


@pytest.mark.parametrize("name", ["mine.keras", "mine.weights.h5", "mine.safetensors"])
def test_a_job_leaves_models_that_keras_reads(
    keras: Any, net: Any, job: Callable[..., JobDefinition], tmp_path: Path, name: str
) -> None:
    """Beside the safetensors there are the weights and the whole model, of the last round and of the best one."""
    first = params_of(net)
    folder = run(job(model=net, best_model_filename=name), tmp_path, first, trained(first), best=True)

    assert {path.name for path in folder.iterdir()} == {
        f"{stem}{suffix}"
        for stem in ("FL_global_model", "mine")
        for suffix in (".safetensors", ".weights.h5", ".keras")
    }
    for stem, wanted in (("FL_global_model", trained(first)), ("mine", first)):
        whole = keras.saving.load_model(folder / f"{stem}.keras")
        assert listed(params_of(whole)) == listed(wanted)
        whole.set_weights([array * 0 for array in whole.get_weights()])
        whole.load_weights(folder / f"{stem}.weights.h5")
        assert listed(params_of(whole)) == listed(wanted)
    assert listed(params_of(net)) == listed(first)


def test_a_model_that_cannot_be_described_leaves_its_weights(
    keras: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without `get_config` there is no whole model to write; a warning says so, and the weights are there."""

    class Bare(keras.Model):  # type: ignore[misc,name-defined]
        def __init__(self, thing: object) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(1, name="d")
            self.dense.build((1, 2))
            self.built = True

    model = Bare(object())
    with caplog.at_level(logging.WARNING):
        export_keras(model, trained(params_of(model)), tmp_path / "m.safetensors")

    assert [path.name for path in tmp_path.iterdir()] == ["m.weights.h5"]
    assert "no .keras file" in caplog.text
    model.load_weights(tmp_path / "m.weights.h5")
    assert listed(params_of(model)) == {"d": [[[7], [7]], [7]]}


def test_arrays_without_a_model_leave_safetensors_only(job: Callable[..., JobDefinition], tmp_path: Path) -> None:
    """A job that was given arrays does not know what model they belong to."""
    params = {"weights": [np.ones(2, np.float32)]}
    folder = run(job(model=params), tmp_path, params, trained(params))

    assert [path.name for path in folder.iterdir()] == ["FL_global_model.safetensors"]
