"""add_experiment_tracking: send what a job measures to TensorBoard, MLflow or Weights & Biases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flarebus.errors import ConfigError
from flarebus.job.tracking_ref import TrackingRef
from flarebus.recipe.recipe import Recipe
from flarebus.tracking.loading import check_installed

__all__ = ["add_experiment_tracking"]


def add_experiment_tracking(
    recipe: Recipe,
    tracking_type: str,
    tracking_config: dict[str, Any] | None = None,
    client_side: bool = False,
    server_side: bool = True,
) -> None:
    """Track the jobs that are made from `recipe`. May be called more than once, for more than one tracker.

    Args:
        recipe: changed.
        tracking_type: "tensorboard", "mlflow" or "wandb", another tracker that is installed, or the dotted path of the
            class of one.
        tracking_config: its settings; None for its defaults. Strings may name variables of the environment, `${NAME}`,
            which are looked up where the tracker runs. It is part of the job and written down with it, so passwords and
            keys are refused in clear.
        client_side: each site tracks what its script logs, where it runs.
        server_side: the server tracks what the scripts of all sites log, their metrics of each round, the aggregate,
            and at the end the models and reports.

    Raises:
        ConfigError: there is no such tracker (lists the known ones), its library is not installed (says how to install
            it), a setting is unknown (names the nearest) or wrong, nobody would track, or the recipe has this already.
    """
    if not isinstance(recipe, Recipe):
        raise ConfigError("recipe", recipe, "a recipe such as FedAvgRecipe(...)")
    config = {} if tracking_config is None else tracking_config
    ref = TrackingRef(tracking_type, config, server_side, client_side)
    check_installed(ref)
    job = recipe.definition
    if any((ref.tracker, ref.config) == (each.tracker, each.config) for each in job.tracking):
        raise ConfigError("tracking_type", tracking_type, "added already, with the same tracking_config")
    recipe._definition = replace(job, tracking=(*job.tracking, ref))
