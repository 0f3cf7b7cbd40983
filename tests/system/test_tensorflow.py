"""Jobs that train Keras models, in this process: TensorFlow is imported once."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flarebus import recipe
from flarebus.job.tensor_file import load_params
from flarebus.recipe import ExchangeFormat, Run, SimEnv, TransferType, numpy, pt
from flarebus.recipe.tf import FedAvgRecipe

Start = Callable[..., Run]

SCRIPT = """
import keras

import flarebus.client as flare

flare.init()
site = flare.get_site_name()


def make_net(units=3, more=()):
    hidden = keras.layers.Dense(units, name="hidden")
    return keras.Sequential([keras.Input((4,)), hidden, *more, keras.layers.Dense(2, name="out")])


{make}
while flare.is_running():
    params = flare.receive().params
    {train}
"""


@pytest.fixture
def start(tf: Any, tmp_path: Path) -> Start:
    """Runs a script at sites of given names to the end of the job."""

    def run(sites: list[str], make: str, train: str, **given: Any) -> Run:
        script = tmp_path / "client.py"
        script.write_text(SCRIPT.format(make=make, train=textwrap.indent(train, "    ").strip()))
        made = FedAvgRecipe(
            **{"name": "job", "min_clients": 2, "num_rounds": 2, "train_script": str(script), "key_metric": "", **given}
        )
        return made.execute(SimEnv(clients=sites, workspace_root=tmp_path / "runs", debug=True))

    return run


@pytest.fixture
def net(tf: Any) -> Any:
    """The model that the job begins with."""
    import keras

    hidden = keras.layers.Dense(3, name="hidden")
    return keras.Sequential([keras.Input((4,)), hidden, keras.layers.Dense(2, name="out")])


def models(run: Run) -> Path:
    """Where the models of a run are."""
    return Path(run.get_result() or "") / "server" / "models"


def refused(run: Run) -> list[dict[str, str]]:
    """Round by round, which sites did not count and why."""
    text = (models(run).parent / "metrics.jsonl").read_text()
    return [json.loads(line)["refused"] for line in text.splitlines()]


def test_models_whose_shapes_differ_are_refused_and_the_round_goes_on(start: Start, net: Any) -> None:
    """Whatever a site's own model looks like: the reason names site and layer, and the others are averaged."""
    make = (
        "own = {'wide': {'units': 5}, 'deep': {'more': [keras.layers.Dense(3, name='extra')]}}\n"
        "net = make_net(**own.get(site, {}))"
    )
    train = (
        "if site not in own:\n"
        "    for name, weights in params.items():\n"
        "        net.get_layer(name).set_weights([weight + 1 for weight in weights])\n"
        "if site == 'half':\n"
        "    params = {'hidden': net.get_layer('hidden').get_weights()}\n"
        "else:\n"
        "    params = {layer.name: layer.get_weights() for layer in net.layers}\n"
        "if site == 'short':\n"
        "    params['out'].pop()\n"
        "flare.send(flare.FLModel(params=params))"
    )
    before = net.get_weights()
    run = start(["a", "wide", "deep", "half", "short", "b"], make, train, model=net)

    assert run.get_status() == "completed"
    for reasons in refused(run):
        assert reasons.keys() == {"wide", "deep", "half", "short"}
        assert "'hidden.0': shape (4, 5), the model has (4, 3)" in reasons["wide"]
        assert "'extra.0', 'extra.1' not in the model" in reasons["deep"]
        assert "missing keys 'out.0', 'out.1'" in reasons["half"]
        assert "missing key 'out.1'" in reasons["short"]
    net.load_weights(models(run) / "FL_global_model.weights.h5")
    for new, old in zip(net.get_weights(), before, strict=True):
        np.testing.assert_allclose(new, old + 2, rtol=1e-5)


def test_a_script_that_cannot_take_the_weights_fails_alone(start: Start, net: Any) -> None:
    """Keras says at the site what does not fit; that is the reason, and the others go on."""
    make = "net = make_net(5 if site == 'wide' else 3)"
    train = (
        "for name, weights in params.items():\n"
        "    net.get_layer(name).set_weights(weights)\n"
        "flare.send(flare.FLModel(params=params))"
    )
    run = start(["a", "wide", "b"], make, train, model=net)

    assert run.get_status() == "completed"
    assert [reasons.keys() for reasons in refused(run)] == [{"wide"}, {"wide"}]
    assert "shape (4, 3)" in refused(run)[0]["wide"]


@pytest.mark.parametrize("transfer", TransferType)
@pytest.mark.parametrize("wire", [ExchangeFormat.NUMPY, ExchangeFormat.KERAS_LAYER_WEIGHTS])
@pytest.mark.parametrize("sent", ["net.get_weights()", "net.weights", "[w.value + 0 for w in net.weights]"])
def test_the_weights_of_a_model_as_one_list(
    start: Start, net: Any, sent: str, wire: ExchangeFormat, transfer: TransferType
) -> None:
    """Arrays, variables or tensors go out, as a whole or as what changed; a list of arrays comes back."""
    train = (
        "net.set_weights([weight + 1 for weight in params['weights']])\n"
        f"flare.send(flare.FLModel(params={{'weights': {sent}}}, metrics={{'loss': net.weights[0][0, 0]}}))"
    )
    before = net.get_weights()
    formats = {"params_transfer_type": transfer, "server_expected_format": wire}
    run = start(["a", "b"], "net = make_net()", train, model={"weights": before}, **formats)

    found = load_params(models(run) / "FL_global_model.safetensors")["weights"]
    assert refused(run) == [{}, {}]
    for new, old in zip(found, before, strict=True):
        np.testing.assert_allclose(new, old + 2, rtol=1e-5, atol=1e-6)


def test_the_recipes_of_a_framework_only_add_defaults(net: Any, tmp_path: Path) -> None:
    """They are FedAvgRecipe with a framework, and go to a folder and back."""
    tmp_path.joinpath("client.py").write_text("")
    for recipe_of, framework in (
        (FedAvgRecipe, "tensorflow"),
        (pt.FedAvgRecipe, "pytorch"),
        (numpy.FedAvgRecipe, "numpy"),
    ):
        given: dict[str, Any] = {"model": net, "min_clients": 1, "train_script": str(tmp_path / "client.py")}
        made = recipe_of(**given)
        folder = made.export(tmp_path / "job")

        assert made == recipe.FedAvgRecipe(**given, framework=framework)
        assert recipe_of.load(folder) == recipe.Recipe.load(folder) == made
        with pytest.raises(TypeError, match="no parameter 'num_round'; did you mean 'num_rounds'"):
            recipe_of(**given, num_round=3)
