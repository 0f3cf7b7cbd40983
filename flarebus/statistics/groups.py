"""Quantiles over sites: each sends the means of groups of its sorted values; the server reads quantiles from those.

A group is told by its mean and its size, as a centroid of a t-digest is (Dunning and Ertl, "Computing extremely
accurate quantiles using t-digests", 2019), and merged groups are read as there: a centroid stands at the middle of its
weight, and between two of them the value is interpolated. Unlike there, all groups of a site are of one size, at the
ends too: the single lowest and highest values of a t-digest would be those of single persons.

Let m_k be the size of the largest group of site k. A site counts at most m_k values on the wrong side of any threshold,
for only one of its groups lies on both sides. The middle of a centroid is half a group away from its ends. So the rank
of what `quantile` returns is wrong by at most

    sum_k m_k  +  max_k m_k / 2        of N values in all,

whatever their distribution: with g groups at every site, at most 1.5 / g of N. Usually it is far less.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_GROUPS", "QuantileGroups", "group", "merge", "quantile"]

MAX_GROUPS = 512
"""What a site sends at most: 8 KiB for each feature, and ranks within 0.3 % of the number of values."""


class QuantileGroups(NamedTuple):
    """Groups of sorted values, from the lowest to the highest.

    Args:
        means: `(g,) float64`, not falling.
        counts: `(g,) int64`, above 0.
    """

    means: NDArray[np.float64]
    counts: NDArray[np.int64]


def group(values: NDArray[Any], num_of_groups: int) -> QuantileGroups:
    """Cut values into groups of equal size, within one.

    Args:
        values: `(n,)`, finite, in any order; n from 1.
        num_of_groups: from 1; at most n count.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    n = len(ordered)
    n_groups = min(num_of_groups, n)
    bounds = np.arange(n_groups + 1, dtype=np.int64) * n // n_groups
    counts = np.diff(bounds)
    # Divided first: the sum of a group may be beyond the range of a float where its mean is not.
    means = np.add.reduceat(ordered / np.repeat(counts, counts), bounds[:-1])
    # Rounding must not carry a mean out of its group: equal values have that value as their mean.
    return QuantileGroups(np.clip(means, ordered[bounds[:-1]], ordered[bounds[1:] - 1]), counts)


def merge(sites: Iterable[QuantileGroups]) -> QuantileGroups:
    """All groups of at least one site, sorted by their means."""
    groups = list(sites)
    means, counts = (np.concatenate(parts) for parts in zip(*groups, strict=True))
    order = np.argsort(means, kind="stable")
    return QuantileGroups(means[order], counts[order])


def quantile(groups: QuantileGroups, p: float) -> float:
    """The value below which a share `p` of all values lies, `0 < p < 1`."""
    ends = np.cumsum(groups.counts)
    middles = ends - groups.counts / 2
    return float(np.interp(p * ends[-1], middles, groups.means))
