"""CustomMean: a custom aggregator in the place of the weighted mean. Metrics are averaged as ever."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flarebus.errors import JobFailed, QuorumNotReached
from flarebus.model import FLModel, MetaKey, ParamsType
from flarebus.workflow.aggregator import ModelAggregator
from flarebus.workflow.mean import WeightedMean
from flarebus.workflow.params import as_array, flatten, rebuild, restore

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

    @property
    def metrics(self) -> dict[str, float]:
        """The weighted mean of each metric."""
        return self._metrics.metrics

    def add(self, model: FLModel, weight: Any, site: str) -> None:
        """Hand over one result; its meta says who sent it.

        Raises:
            UpdateRefused: its weight or metrics make no sense, or the aggregator refused it.
        """
        if model.metrics:
            self._metrics.add(FLModel(metrics=model.metrics), weight, site)
        model.meta.setdefault(MetaKey.CLIENT_NAME, site)
        self._aggregator.accept_model(model)
        self._accepted += 1

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
            raise JobFailed(f"the aggregator's difference has {min(unknown)!r}, which the model has not")
        new: dict[str, Any] = {}
        for name, step in steps.items():
            base, change = as_array(leaves[name]), as_array(step)
            if base is None or change is None:
                new[name] = leaves[name] + step
                continue
            target = out.get(name)
            total = np.add(base, change, out=target, casting="same_kind", dtype=base.dtype)
            new[name] = restore(np.asarray(total), leaves[name])
        return rebuild(model, new)
