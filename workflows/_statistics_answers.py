"""What sites answered: every value checked before it is used, for a site may say anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from flarebus.errors import UpdateRefused
from flarebus.model import FLModel
from flarebus.statistics import QuantileGroups
from flarebus.statistics.executor import LARGEST
from flarebus.statistics.groups import MAX_GROUPS

__all__ = ["Answer", "Feature", "Values", "read_answer", "usable"]

Feature: TypeAlias = tuple[str, str]
"""Dataset and name."""
Values: TypeAlias = dict[Feature, dict[str, Any]]
"""Of one site: feature -> statistic -> value."""

_LARGEST_TOLD = 10 * LARGEST  # noise has been added to some
_MOST_RECORDS = 1 << 53


@dataclass(frozen=True, slots=True)
class Answer:
    """What one site answered.

    Args:
        values: whole numbers, floats, `(bins,) int64` histograms and `QuantileGroups`; all its own.
        left_out: feature -> statistic -> why it is not there.
    """

    values: Values
    left_out: dict[Feature, dict[str, str]]

    def joined(self, later: Answer) -> Answer:
        """This one with what the same site answered later."""
        return Answer(_joined(self.values, later.values), _joined(self.left_out, later.left_out))


def usable(values: Mapping[str, Any]) -> int:
    """The usable values of a feature, by its counts; 0 if those are withheld."""
    return int(values.get("count", 0) - values.get("failure_count", 0))


def read_answer(model: FLModel, bins: Mapping[Feature, int] | None = None) -> Answer:
    """Read and check one answer.

    Args:
        bins: features that histograms were asked of, with how many bins.

    Raises:
        UpdateRefused: it is no answer to what was asked; says where.
    """
    params = model.params or {}
    values: Values = {}
    for feature, given in _features(params, "values"):
        values[feature] = {name: _checked(feature, name, value, bins or {}) for name, value in given.items()}
        if usable(values[feature]) < 0:
            raise UpdateRefused("more failures than records", _named(feature, "failure_count"))
    left_out = {
        feature: {str(name)[:100]: str(reason)[:1000] for name, reason in given.items()}
        for feature, given in _features(params, "left_out")
    }
    return Answer(values, left_out)


def _features(params: Mapping[str, Any], part: str) -> list[tuple[Feature, dict[str, Any]]]:
    found = []
    datasets = params.get(part)
    if not isinstance(datasets, dict):
        raise UpdateRefused(f"it has no {part!r}: no answer of a StatisticsExecutor")
    for dataset, features in datasets.items():
        if not isinstance(dataset, str) or not isinstance(features, dict):
            raise UpdateRefused("not a dict of datasets, of features, of statistics", part)
        for feature, given in features.items():
            if not isinstance(feature, str) or not isinstance(given, dict):
                raise UpdateRefused("not a dict of datasets, of features, of statistics", part)
            found.append(((dataset, feature), given))
    return found


def _checked(feature: Feature, name: str, value: Any, bins: Mapping[Feature, int]) -> Any:
    check = _CHECKS.get(name)
    if check is None:
        raise UpdateRefused("nobody asked for it", _named(feature, name))
    try:
        found = check(value)
    except (TypeError, ValueError, KeyError, OverflowError):
        raise UpdateRefused(f"{type(value).__name__} is not what it should be", _named(feature, name)) from None
    if name == "histogram" and len(found) != bins.get(feature):
        raise UpdateRefused(f"{len(found)} bins, not the {bins.get(feature)} asked for", _named(feature, name))
    return found


def _named(feature: Feature, name: object) -> str:
    return f"{feature[0]}.{feature[1]}.{name}"[:200]


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MOST_RECORDS:
        raise ValueError
    return value


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= _LARGEST_TOLD:
        raise ValueError
    return float(value)


def _not_negative(value: Any) -> float:
    if _finite(value) < 0:
        raise ValueError
    return float(value)


def _counts(value: Any) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype != np.int64 or value.ndim != 1 or (value < 0).any():
        raise ValueError
    if value.sum(dtype=np.float64) > _MOST_RECORDS:
        raise ValueError
    return value.copy()  # the memory it came in is used again


def _groups(value: Any) -> QuantileGroups:
    means, counts = value["means"], _counts(value["counts"])
    if not isinstance(means, np.ndarray) or means.dtype != np.float64 or means.shape != counts.shape:
        raise ValueError
    if not 0 < len(means) <= MAX_GROUPS or not (np.abs(means) <= _LARGEST_TOLD).all() or (np.diff(means) < 0).any():
        raise ValueError
    if not counts.all():
        raise ValueError
    return QuantileGroups(means.copy(), counts)


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "count": _whole,
    "failure_count": _whole,
    "sum": _finite,
    "mean": _finite,
    "min": _finite,
    "max": _finite,
    "var": _not_negative,
    "squares": _not_negative,
    "histogram": _counts,
    "quantile": _groups,
}


def _joined(first: Mapping[Feature, dict[str, Any]], second: Mapping[Feature, dict[str, Any]]) -> Any:
    return {feature: first.get(feature, {}) | second.get(feature, {}) for feature in dict.fromkeys([*first, *second])}
