"""Say what to run and where: recipes, environments, and the handle on a run. What a `job.py` imports."""

from __future__ import annotations

from flarebus.job.kinds import DataKind, ExchangeFormat, FrameworkType, TransferType
from flarebus.recipe.cyclic import CyclicRecipe
from flarebus.recipe.env import ExecEnv
from flarebus.recipe.evaluation import CrossSiteEvalRecipe, add_cross_site_evaluation
from flarebus.recipe.fedavg import FedAvgRecipe
from flarebus.recipe.fedopt import FedOptRecipe
from flarebus.recipe.fedprox import FedProxRecipe
from flarebus.recipe.fedstats import FedStatsRecipe
from flarebus.recipe.recipe import Recipe
from flarebus.recipe.run import Run
from flarebus.recipe.scaffold import ScaffoldRecipe
from flarebus.recipe.sim_env import SimEnv
from flarebus.recipe.swarm import SwarmRecipe
from flarebus.recipe.tracking import add_experiment_tracking
from flarebus.recipe.workflow import WorkflowRecipe
from flarebus.workflow.aggregator import ModelAggregator
from flarebus.workflow.filter import Filter, FilterTask
from flarebus.workflow.robust import KrumAggregator, MedianAggregator, TrimmedMeanAggregator

__all__ = [
    "CrossSiteEvalRecipe",
    "CyclicRecipe",
    "DataKind",
    "ExchangeFormat",
    "ExecEnv",
    "FedAvgRecipe",
    "FedOptRecipe",
    "FedProxRecipe",
    "FedStatsRecipe",
    "Filter",
    "FilterTask",
    "FrameworkType",
    "KrumAggregator",
    "MedianAggregator",
    "ModelAggregator",
    "Recipe",
    "Run",
    "ScaffoldRecipe",
    "SimEnv",
    "SwarmRecipe",
    "TransferType",
    "TrimmedMeanAggregator",
    "WorkflowRecipe",
    "add_cross_site_evaluation",
    "add_experiment_tracking",
]
