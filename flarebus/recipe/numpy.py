"""Recipes for NumPy: those of `flarebus.recipe` with other defaults."""

from __future__ import annotations

from typing import Any

from flarebus.job.kinds import FrameworkType
from flarebus.recipe.fedavg import FedAvgRecipe as _FedAvgRecipe

__all__ = ["FedAvgRecipe"]


class FedAvgRecipe(_FedAvgRecipe):
    """Federated averaging of arrays.

    Args:
        framework: what the script is written with.
        fedavg: the other parameters of `flarebus.recipe.FedAvgRecipe`.

    Raises:
        ConfigError: a parameter is wrong; names it, its value and what is allowed.
    """

    def __init__(self, *, framework: FrameworkType = FrameworkType.NUMPY, **fedavg: Any) -> None:
        super().__init__(framework=framework, **fedavg)
