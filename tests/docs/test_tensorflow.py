"""docs/tensorflow.md: what it shows runs, and what it says of names is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from flarebus.job.initial import params_of
from flarebus.workflow.params import flatten
from tests.docs.pages import ROOT, blocks

JOB, SCRIPT = blocks("tensorflow.md", "python")
# What a reader has of his own.
OWN = """
import keras
import numpy as np

hidden = keras.layers.Dense(8, name="hidden")
model = keras.Sequential([keras.Input((4,)), hidden, keras.layers.Dense(2, name="out")])
model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
x = np.random.default_rng(0).normal(size=(64, 4))
y = (x[:, 0] > 0).astype(int)
"""


def test_job_and_script_run(tf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word, and the model that comes out of it can be loaded."""
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("client.py").write_text(OWN + SCRIPT)
    names: dict[str, Any] = {}

    exec(JOB.replace("num_clients=2", "num_clients=2, debug=True"), names)

    assert names["run"].get_status() == "completed"
    folder = Path(names["run"].get_result()) / "server" / "models"
    before = names["model"].get_weights()
    names["model"].load_weights(folder / "FL_global_model.weights.h5")
    assert any((new != old).any() for new, old in zip(names["model"].get_weights(), before, strict=True))


def test_the_expressions_for_names_find_what_they_say(tf: Any) -> None:
    """Layers and moving averages, as `exclude_vars` looks for them."""
    import keras

    text = (ROOT / "docs" / "tensorflow.md").read_text(encoding="utf-8")
    layer, moving = re.findall(r'exclude_vars=r"(.*?)"', text)
    norm = keras.layers.BatchNormalization(name="norm")
    names = flatten(params_of(keras.Sequential([keras.Input((2,)), norm, keras.layers.Dense(1, name="normal")])))

    assert [name for name in names if re.search(layer, name)] == ["norm.0", "norm.1", "norm.2", "norm.3"]
    found = [norm.weights[int(name[-1])].name for name in names if re.search(moving, name)]
    assert found == ["moving_mean", "moving_variance"]
