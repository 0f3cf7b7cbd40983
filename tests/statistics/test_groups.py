"""Quantiles out of groups: how far off they may be is promised, whatever the values and however they are split."""

from __future__ import annotations

import numpy as np
import pytest

from flarebus.statistics.groups import QuantileGroups, group, merge, quantile

SHARES = (0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999)


def rank_error(values: np.ndarray, found: float, p: float) -> float:
    """By how many values the rank of `found` misses p * N; ranks of equal values count as one."""
    below, up_to = (
        np.searchsorted(np.sort(values), [found, found], "left"),
        np.searchsorted(np.sort(values), found, "right"),
    )
    wanted = p * len(values)
    return float(max(0.0, below[0] - wanted, wanted - up_to))


def columns(random: np.random.Generator) -> list[np.ndarray]:
    """Values of very different distributions and sizes, ties and outliers among them."""
    n = int(random.integers(50, 3000))
    kinds = [
        random.normal(5, 2, n),
        random.lognormal(0, 3, n),
        random.integers(0, 4, n).astype(float),
        np.concatenate([np.zeros(n), random.standard_cauchy(max(1, n // 20)) * 1e12]),
    ]
    return [kinds[index] for index in random.permutation(4)[: random.integers(1, 5)]]


@pytest.mark.parametrize("seed", range(20))
def test_ranks_are_within_the_bound_that_is_promised(seed: int) -> None:
    """The rank is off by at most the largest groups of all sites, and half of the largest of them."""
    random = np.random.default_rng(seed)
    sites = columns(random)
    groups = [group(values, int(random.integers(5, 60))) for values in sites]

    merged = merge(groups)

    bound = sum(each.counts.max() for each in groups) + max(each.counts.max() for each in groups) / 2
    for p in SHARES:
        assert rank_error(np.concatenate(sites), quantile(merged, p), p) <= bound, f"seed {seed}, p {p}"


def test_usual_error_is_far_below_the_bound() -> None:
    """Of a smooth distribution, 512 groups tell quantiles to half a thousandth of the values."""
    random = np.random.default_rng(1)
    sites = [random.normal(index, 1 + index, 20_000) for index in range(4)]

    merged = merge(group(values, 512) for values in sites)

    values = np.concatenate(sites)
    for p in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert rank_error(values, quantile(merged, p), p) <= 5e-4 * len(values)


def test_groups_are_of_one_size_and_in_order() -> None:
    """Sizes differ by one at most, and every value is in some group."""
    groups = group(np.random.default_rng(0).permutation(1003).astype(float), 10)

    assert set(groups.counts.tolist()) == {100, 101}
    assert groups.counts.sum() == 1003
    assert (np.diff(groups.means) > 0).all()


@pytest.mark.parametrize("value", [0.1, -0.1, 1e308, -1e308, 5e-324])
def test_equal_values_are_their_own_quantiles(value: float) -> None:
    """Neither rounding nor overflow moves the mean of equal values."""
    groups = group(np.full(1000, value), 7)

    assert groups.means.tolist() == [value] * 7
    assert quantile(groups, 0.3) == value


def test_no_more_groups_than_values() -> None:
    """Three values make three groups, each value one."""
    assert group(np.array([3.0, 1.0, 2.0]), 512) == QuantileGroups(
        pytest.approx([1, 2, 3]),
        pytest.approx([1, 1, 1]),  # type: ignore[arg-type]
    )


def test_what_lies_beyond_the_outer_groups_is_their_mean() -> None:
    """A quantile is never lower or higher than what a site has told."""
    groups = group(np.arange(100.0), 4)

    assert (quantile(groups, 1e-9), quantile(groups, 1 - 1e-9)) == (12.0, 87.0)
