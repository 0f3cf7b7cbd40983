"""CustomMean: a custom aggregator in the place of the weighted mean. Metrics are averaged as ever."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flarebus.errors import JobFailed, QuorumNotReached
from flarebus.model import FLModel, MetaKey, ParamsType
from flarebus.workflow.aggregator import ModelAggregator
from flarebus.workflow.mean import WeightedMean
from flarebus.workflow.params import as_array, flatten, is_number_dtype, rebuild, restore

__all__ = ["CustomMean"]


class CustomMean:
    """Hands the results of one round to an aggregator.

    Args:
        aggregator: reset for this round.
        like: the model that the updates are of.
    """

    def __init__(self, aggregator: ModelAggregator, like: Mapping[Any, Any]) -> None:
        self._aggregator = aggregator
        self._metrics = WeightedMean(like)
        self._accepted = 0
        aggregator.reset_stats()
        if hasattr(aggregator, "expect_model"):  # one that is no `ModelAggregator` may lack it
            aggregator.expect_model(like)

    @property
    def metrics(self) -> dict[str, float]:
        """The weighted mean of each metric."""
        return self._metrics.metrics

    def add(self, model: FLModel, weight: Any, site: str) -> None:
        """Hand over one result; its meta says who sent it. One with metrics only is averaged, not handed over.

        Raises:
            UpdateRefused: its weight or metrics make no sense, or the aggregator refused it; it does not count then.
        """
        reported = FLModel(metrics=model.metrics)
        if model.metrics or model.params is None:
            WeightedMean(None).add(reported, weight, site)  # raises if it is to be refused, before anything counts
        if model.params is not None:
            model.meta[MetaKey.CLIENT_NAME] = site
            self._aggregator.accept_model(model)
            self._accepted += 1
        if model.metrics:
            self._metrics.add(reported, weight, site)

    def apply_to(self, model: Mapping[Any, Any], out: Mapping[str, NDArray[Any]] | None = None) -> dict[Any, Any]:
        """The aggregator's model; see `WeightedMean.apply_to`. A difference is added to `model`.

        Raises:
            QuorumNotReached: there was no result.
            JobFailed: the aggregator gave something that is no model.
        """
        if not self._accepted:
            raise QuorumNotReached(1, 0, {})
        combined = self._aggregator.aggregate_model()
        if not isinstance(combined, FLModel) or not combined.params:
            raise JobFailed(f"{type(self._aggregator).__name__}.aggregate_model() gave no FLModel with params")
        if combined.params_type is ParamsType.DIFF:
            return self._added(model, combined.params, out or {})
        return combined.params

    def _added(
        self, model: Mapping[Any, Any], difference: Mapping[Any, Any], out: Mapping[str, NDArray[Any]]
    ) -> dict[Any, Any]:
        leaves, steps = flatten(model), flatten(difference)
        unknown = steps.keys() - leaves.keys()
        if unknown:
            raise JobFailed(f"the aggregator's difference has a {min(unknown)!r}, which the model has not")
        return rebuild(model, {name: _sum(name, leaves[name], step, out.get(name)) for name, step in steps.items()})


def _sum(name: str, leaf: Any, step: Any, out: NDArray[Any] | None) -> Any:
    base, change = as_array(leaf), as_array(step)
    if base is None and isinstance(leaf, numbers.Number) and isinstance(step, numbers.Number):
        return leaf + step  # type: ignore[operator]  # numbers add up
    if base is None or change is None or base.shape != change.shape or not _adds_to(change.dtype, base.dtype):
        told = f"the model has {_shown(leaf)}, the difference {_shown(step)}"
        raise JobFailed(f"the aggregator's difference does not fit in {name!r}: {told}")
    total = np.empty(base.shape, base.dtype) if out is None else out
    if change.dtype == base.dtype:
        np.add(base, change, out=total)
    else:
        exact = base + change
        np.copyto(total, np.rint(exact) if base.dtype.kind in "iu" else exact, casting="unsafe")
    return restore(total, leaf)


def _adds_to(change: np.dtype[Any], base: np.dtype[Any]) -> bool:
    return is_number_dtype(change) and is_number_dtype(base) and (change.kind != "c" or base.kind == "c")


def _shown(leaf: Any) -> str:
    array = as_array(leaf)
    return type(leaf).__name__ if array is None else f"{array.dtype} {array.shape}"
