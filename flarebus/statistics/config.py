"""StatisticConfigs: which statistics a job asks for, checked, with what histograms and quantiles need to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flarebus.errors import ConfigError
from flarebus.job.checks import check_int, check_keys, check_mapping, check_number

__all__ = ["ANY", "NAMES", "HistogramConfig", "StatisticConfigs"]

NAMES = ("count", "failure_count", "sum", "mean", "min", "max", "var", "stddev", "histogram", "quantile")
"""Every statistic, in the order of a report."""
ANY = "*"
"""Stands for all features that are not named."""
# A histogram is for looking at; also bounds what a site is made to count.
_MAX_BINS = 10_000


@dataclass(frozen=True, slots=True)
class HistogramConfig:
    """The bins of a histogram, and its range if it is given: lowest and highest value."""

    bins: int
    range: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class StatisticConfigs:
    """What is asked for.

    Args:
        names: of statistics, in the order of `NAMES`.
        histograms: feature, or "*", -> bins.
        quantiles: feature, or "*", -> shares between 0 and 1, rising.
    """

    names: tuple[str, ...]
    histograms: Mapping[str, HistogramConfig] = field(default_factory=dict)
    quantiles: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: object, parameter: str = "statistic_configs") -> StatisticConfigs:
        """Read `{"count": {}, "histogram": {"*": {"bins": 20}, "age": {"bins": 10, "range": [0, 120]}}, ...}`.

        Raises:
            ConfigError: it asks for nothing, for something unknown, or in a way that makes no sense.
        """
        given = check_mapping(parameter, value)
        if not given:
            raise ConfigError(parameter, given, f"at least one of {', '.join(NAMES)}")
        check_keys(given, NAMES, (), parameter)
        for name in given.keys() - {"histogram", "quantile"}:
            if given[name] not in ({}, None):
                raise ConfigError(f"{parameter}[{name!r}]", given[name], "{}: there is nothing to set")
        return cls(
            tuple(name for name in NAMES if name in given),
            _per_feature(given, "histogram", parameter, _histogram),
            _per_feature(given, "quantile", parameter, _quantiles),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data that `parse` reads."""
        found: dict[str, Any] = {name: {} for name in self.names}
        for feature, config in self.histograms.items():
            limits = {} if config.range is None else {"range": list(config.range)}
            found["histogram"][feature] = {"bins": config.bins, **limits}
        for feature, shares in self.quantiles.items():
            found["quantile"][feature] = list(shares)
        return found

    def histogram_of(self, feature: str) -> HistogramConfig | None:
        """The bins for `feature`; None where no histogram is asked for."""
        return self.histograms.get(feature, self.histograms.get(ANY))

    def quantiles_of(self, feature: str) -> tuple[float, ...]:
        """The shares for `feature`; none where no quantiles are asked for."""
        return self.quantiles.get(feature, self.quantiles.get(ANY, ()))

    @property
    def needs_range(self) -> bool:
        """Whether some histogram takes its range from the values."""
        return any(config.range is None for config in self.histograms.values())

    @property
    def needs_second_pass(self) -> bool:
        """Whether something is asked for that is worked out about what all sites have in common."""
        return not {"var", "stddev", "histogram", "quantile"}.isdisjoint(self.names)


def _per_feature(given: Mapping[str, Any], name: str, parameter: str, parse: Any) -> dict[str, Any]:
    if name not in given:
        return {}
    label = f"{parameter}[{name!r}]"
    features = check_mapping(label, given[name])
    if not features:
        raise ConfigError(label, features, f"for each feature, or {ANY!r} for all others, what it takes")
    return {str(feature): parse(f"{label}[{feature!r}]", config) for feature, config in features.items()}


def _histogram(parameter: str, config: object) -> HistogramConfig:
    found = check_mapping(parameter, config)
    check_keys(found, ("bins", "range"), ("bins",), parameter)
    bins = check_int(f"{parameter}['bins']", found["bins"], 1)
    if bins > _MAX_BINS:
        raise ConfigError(f"{parameter}['bins']", bins, f"at most {_MAX_BINS}")
    limits = found.get("range")
    if limits is None:
        return HistogramConfig(bins)
    label = f"{parameter}['range']"
    if not isinstance(limits, list | tuple) or len(limits) != 2:
        raise ConfigError(label, limits, "the lowest and the highest value: [low, high]")
    low, high = (check_number(label, limit) for limit in limits)
    if low >= high:
        raise ConfigError(label, limits, "[low, high] with low below high")
    return HistogramConfig(bins, (low, high))


def _quantiles(parameter: str, config: object) -> tuple[float, ...]:
    if not isinstance(config, list | tuple) or not config:
        raise ConfigError(parameter, config, "a list of shares, such as [0.25, 0.5, 0.75]")
    shares = tuple(sorted({check_number(parameter, share, above=0.0) for share in config}))
    if shares[-1] >= 1:
        raise ConfigError(parameter, config, "shares between 0 and 1, such as [0.25, 0.5, 0.75]; 0.5 is the median")
    return shares
