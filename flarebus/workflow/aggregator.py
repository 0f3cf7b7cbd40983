"""ModelAggregator: what a custom aggregator implements. Not an implementation of any mean."""

from __future__ import annotations

from abc import ABC, abstractmethod

from flarebus.model import FLModel

__all__ = ["AGGREGATOR_METHODS", "ModelAggregator"]

AGGREGATOR_METHODS = ("accept_model", "aggregate_model", "reset_stats")
"""The methods of an aggregator; any object that has all of them is one, subclass or not."""


class ModelAggregator(ABC):
    """Combines the results of one round into one model.

    All three methods are called on one thread, in the order `reset_stats`, `accept_model` for each usable result,
    `aggregate_model`. What raises from any of them fails the round with that reason.
    """

    @abstractmethod
    def accept_model(self, model: FLModel) -> None:
        """Take one site's result. The arrays are lent for the call: copy what has to stay."""

    @abstractmethod
    def aggregate_model(self) -> FLModel:
        """Return the combined model of the round; its arrays belong to the caller."""

    @abstractmethod
    def reset_stats(self) -> None:
        """Forget the round before; called ahead of every round."""
