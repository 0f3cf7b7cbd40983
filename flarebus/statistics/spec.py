"""Statistics: what a generator of a site's statistics implements. It sees the data; what it finds is cleansed later."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from flarebus.statistics.groups import QuantileGroups

__all__ = ["Bin", "DataType", "Feature", "Histogram", "HistogramType", "Statistics"]


class DataType(IntEnum):
    """What the values of a feature are. Only of INT and FLOAT is more than a count to be had."""

    INT = 0
    FLOAT = 1
    STRING = 2
    BYTES = 3
    STRUCT = 4
    DATETIME = 5


class Feature(NamedTuple):
    """A feature of a dataset: a column of a table, or something else that has a value in every record."""

    feature_name: str
    data_type: DataType


class Bin(NamedTuple):
    """One bin: `low_value` belongs to it, `high_value` only in the last bin of a histogram."""

    low_value: float
    high_value: float
    sample_count: float


class HistogramType(IntEnum):
    """STANDARD: bins of equal width."""

    STANDARD = 0
    QUANTILES = 1


class Histogram(NamedTuple):
    """Bins from the lowest to the highest."""

    hist_type: HistogramType
    bins: list[Bin]
    hist_name: str | None = None


class Statistics(ABC):
    """Works out the statistics of one site. Made at the site; all methods are called on one thread.

    Only what a job asks for has to be implemented, and `features` and `count` always. What is not there raises
    `NotImplementedError`, and the site then goes without that statistic.
    """

    def initialize(self, site_name: str) -> None:  # noqa: B027  (some have nothing to load)
        """Get ready; called once, before anything else."""

    def pre_run(
        self,
        statistics: Sequence[str],
        num_of_bins: Mapping[str, int] | None,
        bin_ranges: Mapping[str, Sequence[float] | None] | None,
    ) -> dict[str, Any]:
        """Hear what the job will ask for; called at most once, before it asks.

        Args:
            statistics: their names.
            num_of_bins: feature -> bins of its histogram; "*" stands for all others. None: no histograms.
            bin_ranges: feature -> lowest and highest value of its histogram; None where they are to be found out.

        Returns:
            Something small to tell the server, or nothing. It passes no cleanser: no values.
        """
        return {}

    @abstractmethod
    def features(self) -> dict[str, list[Feature]]:
        """The features of each dataset: `{"train": [Feature("age", DataType.INT), ...], ...}`."""

    @abstractmethod
    def count(self, dataset_name: str, feature_name: str) -> int:
        """How many records there are, those without a usable value among them."""

    def failure_count(self, dataset_name: str, feature_name: str) -> int:
        """How many of the records have no usable value."""
        return 0

    def sum(self, dataset_name: str, feature_name: str) -> float:
        """The sum of the usable values."""
        raise NotImplementedError

    def mean(self, dataset_name: str, feature_name: str) -> float:
        """The mean of the usable values, of which there is at least one."""
        usable = self.count(dataset_name, feature_name) - self.failure_count(dataset_name, feature_name)
        return self.sum(dataset_name, feature_name) / usable

    def variance_with_mean(
        self, dataset_name: str, feature_name: str, global_mean: float, global_count: float
    ) -> float:
        """The site's part in the variance about a mean that is not its own.

        Args:
            global_mean: m, of all sites.
            global_count: N, the usable values of all sites, at least 2.

        Returns:
            The sum of (x - m)^2 over the site's usable values, divided by N - 1.
        """
        raise NotImplementedError

    def min_value(self, dataset_name: str, feature_name: str) -> float:
        """The lowest usable value."""
        raise NotImplementedError

    def max_value(self, dataset_name: str, feature_name: str) -> float:
        """The highest usable value."""
        raise NotImplementedError

    def histogram(
        self, dataset_name: str, feature_name: str, num_of_bins: int, global_min_value: float, global_max_value: float
    ) -> Histogram:
        """Count the usable values in bins of equal width.

        Args:
            num_of_bins: how many.
            global_min_value: where the first begins.
            global_max_value: where the last ends. What lies outside is not counted.
        """
        raise NotImplementedError

    def quantile_groups(self, dataset_name: str, feature_name: str, num_of_groups: int) -> QuantileGroups:
        """Cut the sorted usable values into groups of equal size, within one, and give the mean of each.

        `flarebus.statistics.groups.group` does it for an array.

        Args:
            num_of_groups: how many, at most the number of values.
        """
        raise NotImplementedError

    def finalize(self) -> None:  # noqa: B027  (most have nothing to close)
        """Let go of everything; called once, at the end."""
