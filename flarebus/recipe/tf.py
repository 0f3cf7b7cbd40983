"""Recipes for TensorFlow and Keras: those of `flarebus.recipe` with other defaults. TensorFlow is not imported."""

from __future__ import annotations

from typing import Any

from flarebus.job.kinds import FrameworkType
from flarebus.recipe.fedavg import FedAvgRecipe as _FedAvgRecipe

__all__ = ["FedAvgRecipe"]


class FedAvgRecipe(_FedAvgRecipe):
    """Federated averaging of a Keras model.

    Scripts get and send name of a layer -> list of its arrays: what `layer.set_weights` takes and `layer.get_weights`
    gives. `model.load_weights` and `keras.saving.load_model` read what the job leaves.

    Args:
        framework: what the script is written with.
        fedavg: the other parameters of `flarebus.recipe.FedAvgRecipe`.

    Raises:
        ConfigError: a parameter is wrong; names it, its value and what is allowed.
    """

    def __init__(self, *, framework: FrameworkType = FrameworkType.TENSORFLOW, **fedavg: Any) -> None:
        super().__init__(framework=framework, **fedavg)
