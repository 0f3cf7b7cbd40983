"""Scorer: how a site judges a model on its own data. A job derives from it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from flarebus.model import FLModel
from flarebus.workflow.executor import Executor, SiteTask

__all__ = ["Scorer"]


class Scorer(Executor):
    """Answers each candidate with a loss."""

    def execute(self, task: SiteTask) -> FLModel:
        """Judge one candidate."""
        return FLModel(metrics={"loss": float(self.loss(task.model.params or {}, task.site))})

    @abstractmethod
    def loss(self, params: dict[str, Any], site: str) -> float:
        """How bad the model is on the data of `site`; less is better."""
