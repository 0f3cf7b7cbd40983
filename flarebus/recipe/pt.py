"""Recipes for PyTorch: those of `flarebus.recipe`, whose defaults are for PyTorch already. PyTorch is not imported."""

from __future__ import annotations

from flarebus.recipe.fedavg import FedAvgRecipe
from flarebus.recipe.fedopt import FedOptRecipe
from flarebus.recipe.fedprox import FedProxRecipe
from flarebus.recipe.scaffold import ScaffoldRecipe

__all__ = ["FedAvgRecipe", "FedOptRecipe", "FedProxRecipe", "ScaffoldRecipe"]
