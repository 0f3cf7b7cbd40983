"""ColumnStatistics: values of columns as they come, failures apart, sums without loss."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from flarebus.statistics import Bin, DataType, Feature, HistogramType
from tests.workflow.stats_job import Columns


def made(**columns: Any) -> Columns:
    """A generator over one dataset `d`, ready."""
    generator = Columns({"d": columns})
    generator.initialize("site-1")
    return generator


def test_columns_say_what_they_hold() -> None:
    """Numbers in any dress are numbers."""
    generator = made(
        a=np.array([1, 2], np.int16),
        b=np.array([1.5], np.float32),
        c=[True, False],
        d=["x", "y"],
        e=[1, None, 2.5],
        f=np.array(["2020-01-01"], "datetime64[D]"),
        g=[b"x"],
        h=[None, {}],
    )

    types = [DataType.INT, DataType.FLOAT, DataType.INT, DataType.STRING, DataType.FLOAT, DataType.DATETIME]
    types += [DataType.BYTES, DataType.STRUCT]
    assert generator.features() == {"d": [Feature(name, kind) for name, kind in zip("abcdefgh", types, strict=True)]}


@pytest.mark.parametrize(
    ("column", "count", "failures"),
    [
        ([1.0, math.nan, math.inf, 4.0], 4, 2),
        ([1, None, 3], 3, 1),
        (["a", None, "b"], 3, 1),
        ([], 0, 0),
        ([1, 2, 3], 3, 0),
    ],
)
def test_records_without_a_usable_value_are_failures(column: list[Any], count: int, failures: int) -> None:
    """They count as records; nothing is worked out of them."""
    generator = made(x=column)

    assert (generator.count("d", "x"), generator.failure_count("d", "x")) == (count, failures)


def test_values_by_hand() -> None:
    """Every statistic of four values and a missing one."""
    generator = made(x=[4.0, 1.0, math.nan, 2.0, 9.0])

    assert generator.sum("d", "x") == 16
    assert generator.mean("d", "x") == 4
    assert (generator.min_value("d", "x"), generator.max_value("d", "x")) == (1, 9)
    assert generator.variance_with_mean("d", "x", 4.0, 4) == (0 + 9 + 4 + 25) / 3
    assert generator.histogram("d", "x", 2, 0, 8) == (
        HistogramType.STANDARD,
        [Bin(0, 4, 2), Bin(4, 8, 1)],  # 9 lies outside
        None,
    )
    assert generator.quantile_groups("d", "x", 2).means.tolist() == [1.5, 6.5]


@pytest.mark.parametrize("seed", range(5))
def test_sum_is_rounded_once(seed: int) -> None:
    """Of values whose digits do not overlap, across blocks, the exact sum of all of them."""
    random = np.random.default_rng(seed)
    values = random.normal(0, 1, 70_000) * 10.0 ** random.integers(-10, 15, 70_000)

    exact = float(sum(map(Fraction, values.tolist())))

    assert made(x=values).sum("d", "x") == exact, f"seed {seed}"


def test_column_of_several_dimensions_is_refused() -> None:
    """An image is no column."""
    with pytest.raises(ValueError, match=r"one dimension, not of shape \(2, 2\)"):
        made(x=np.zeros((2, 2)))


def test_generator_lets_go_of_its_columns() -> None:
    """After the end there is nothing left to ask."""
    generator = made(x=[1.0])
    generator.finalize()

    assert generator.features() == {}
