"""ColumnStatistics: a generator over columns of numbers, such as those of a table. NumPy does the work."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flarebus.statistics.groups import QuantileGroups, group
from flarebus.statistics.spec import Bin, DataType, Feature, Histogram, HistogramType, Statistics

__all__ = ["ColumnStatistics"]

Floats = NDArray[np.float64]

# Values that are worked on at once: their temporaries stay in the cache of the processor.
_BLOCK = 1 << 16
_TYPES = {
    "b": DataType.INT,
    "i": DataType.INT,
    "u": DataType.INT,
    "f": DataType.FLOAT,
    "U": DataType.STRING,
    "T": DataType.STRING,
    "S": DataType.BYTES,
    "V": DataType.STRUCT,
    "M": DataType.DATETIME,
    "m": DataType.DATETIME,
}


class ColumnStatistics(Statistics):
    """Statistics of columns that fit into memory. A site's own class says in `load` where they are.

    Values are taken as float64. Those that are NaN, infinite or None are failures: they count as records, and nothing
    else is worked out of them. Sums are exact to one rounding (Shewchuk's algorithm, `math.fsum`); squares are added up
    about a given mean, which loses no digits where the values are large and their spread is small.
    """

    @abstractmethod
    def load(self, site_name: str) -> Mapping[str, Mapping[str, Any]]:
        """The columns of each dataset: `{"train": {"age": array, ...}, ...}`; a pandas DataFrame is such a mapping.

        Returns:
            dataset -> feature -> `(n,)` values; columns of one dataset may differ in length.
        """

    def initialize(self, site_name: str) -> None:
        """Load the columns."""
        self._columns = {
            str(dataset): {str(name): _column(values) for name, values in columns.items()}
            for dataset, columns in self.load(site_name).items()
        }

    def features(self) -> dict[str, list[Feature]]:
        """All columns, with what they hold."""
        return {
            dataset: [Feature(name, column.data_type) for name, column in columns.items()]
            for dataset, columns in self._columns.items()
        }

    def count(self, dataset_name: str, feature_name: str) -> int:
        """Records of the column."""
        return self._columns[dataset_name][feature_name].n_records

    def failure_count(self, dataset_name: str, feature_name: str) -> int:
        """Records that are NaN, infinite or None."""
        return self._columns[dataset_name][feature_name].n_failures

    def sum(self, dataset_name: str, feature_name: str) -> float:
        """Rounded once."""
        return math.fsum(value for block in self._blocks(dataset_name, feature_name) for value in block.tolist())

    def variance_with_mean(
        self, dataset_name: str, feature_name: str, global_mean: float, global_count: float
    ) -> float:
        """The sum of (x - m)^2 / (N - 1)."""
        with np.errstate(over="ignore"):  # beyond the range of a float it is infinite, and not told
            squares = [
                float(np.square(block - global_mean).sum()) for block in self._blocks(dataset_name, feature_name)
            ]
        return math.fsum(squares) / (global_count - 1)

    def min_value(self, dataset_name: str, feature_name: str) -> float:
        """As it is; a cleanser hides it."""
        return float(self._values(dataset_name, feature_name).min())

    def max_value(self, dataset_name: str, feature_name: str) -> float:
        """As it is; a cleanser hides it."""
        return float(self._values(dataset_name, feature_name).max())

    def histogram(
        self, dataset_name: str, feature_name: str, num_of_bins: int, global_min_value: float, global_max_value: float
    ) -> Histogram:
        """Counted by `numpy.histogram`."""
        values = self._values(dataset_name, feature_name)
        counts, edges = np.histogram(values, num_of_bins, (global_min_value, global_max_value))
        bins = [
            Bin(low, high, count)
            for low, high, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
        ]
        return Histogram(HistogramType.STANDARD, bins)

    def quantile_groups(self, dataset_name: str, feature_name: str, num_of_groups: int) -> QuantileGroups:
        """See `flarebus.statistics.groups.group`."""
        return group(self._values(dataset_name, feature_name), num_of_groups)

    def finalize(self) -> None:
        """Let go of the columns."""
        self._columns = {}

    def _values(self, dataset_name: str, feature_name: str) -> Floats:
        return self._columns[dataset_name][feature_name].values

    def _blocks(self, dataset_name: str, feature_name: str) -> Iterator[Floats]:
        values = self._values(dataset_name, feature_name)
        return (values[begin : begin + _BLOCK] for begin in range(0, len(values), _BLOCK))


@dataclass(frozen=True, slots=True)
class _Column:
    """The usable values, float64, of a column; none if it holds no numbers."""

    data_type: DataType
    n_records: int
    n_failures: int
    values: Floats


def _column(given: Any) -> _Column:
    array = np.asarray(given)
    if array.ndim != 1:
        raise ValueError(f"a column is an array of one dimension, not of shape {array.shape}")
    if array.dtype.kind == "O":
        array = _out_of_objects(array)
    data_type = _TYPES.get(array.dtype.kind)
    if data_type in (DataType.INT, DataType.FLOAT):
        numbers = array.astype(np.float64)
        is_usable = np.isfinite(numbers)
        usable = numbers if is_usable.all() else numbers[is_usable]
        return _Column(data_type, len(array), len(array) - len(usable), usable)
    n_missing = sum(1 for value in array.tolist() if value is None or value != value)
    return _Column(DataType.STRUCT if data_type is None else data_type, len(array), n_missing, np.empty(0))


def _out_of_objects(array: NDArray[Any]) -> NDArray[Any]:
    """A column of Python objects as numbers, None as NaN, if that is what it holds; else as it is."""
    there = [value for value in array.tolist() if value is not None]
    if there and all(isinstance(value, (bool, int, float, np.number)) for value in there):
        return np.array([math.nan if value is None else float(value) for value in array.tolist()])
    return array
