"""ModelAggregator: what a custom aggregator implements. RoundMean: what a workflow gathers results in. Not a mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from flarebus.model import FLModel

__all__ = ["AGGREGATOR_METHODS", "ModelAggregator", "RoundMean"]

AGGREGATOR_METHODS = ("accept_model", "aggregate_model", "reset_stats")
"""The methods of an aggregator; any object that has all of them is one, subclass or not."""


class ModelAggregator(ABC):
    """Combines the results of one round into one model.

    The methods are called on one thread, in the order `reset_stats`, `expect_model`, `accept_model` for each usable
    result, `aggregate_model`. `UpdateRefused` from `accept_model` means that this result does not count; anything else
    that raises from any of them fails the job with that reason.
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

    def expect_model(self, model: Mapping[Any, Any]) -> None:  # noqa: B027  (most need not know)
        """What the results of the round will be of; only to be read, and unchanged until the round is aggregated.

        May be left out. `model` is empty where the job began without one.
        """


class RoundMean(Protocol):
    """What the results of one round become a model in: `WeightedMean`, `CustomMean`, or a workflow's own."""

    @property
    def metrics(self) -> dict[str, float]:
        """The weighted mean of each metric."""

    def add(self, model: FLModel, weight: Any, site: str) -> None:
        """Take one result.

        Raises:
            UpdateRefused: it must not count, and does not.
        """

    def apply_to(self, model: Mapping[Any, Any], out: Mapping[str, NDArray[Any]] | None = None) -> dict[Any, Any]:
        """The new model, from the one that the results are of; see `WeightedMean.apply_to`."""
