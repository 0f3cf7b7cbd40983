"""The mathematics of federated statistics at the server: what sites are asked, and what their answers make together.

Let site k have n_k usable values with sum s_k. The first pass gives N = sum_k n_k and the mean m = sum_k s_k / N; sums
over sites are exact to one rounding. In the second pass each site adds up q_k = sum_i (x_i - m)^2. Over the sites that
answered, with N' values of mean m', the variance is

    var  =  (sum_k q_k  -  N' (m' - m)^2) / (N' - 1),

the corrected two-pass algorithm (Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983). The
second term makes up for the rounding of m, and for sites that had a part in m and are lost now: no digits are lost
where values are large and their spread is small, and no site is needed twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flarebus.statistics import StatisticConfigs
from flarebus.statistics.groups import merge, quantile
from workflows._statistics_answers import Feature, Values, usable

__all__ = ["GLOBAL", "Common", "common_of", "first_pass", "in_common", "report"]

GLOBAL = "Global"
"""Stands among the sites of a report for all of them together."""

Common = dict[str, Any]
"""What the sites are told of one feature in the second pass: `mean` and `count` for the variance, `histogram` (bins,
low, high), `quantile`; each only where it is wanted and can be told."""


def first_pass(configs: StatisticConfigs) -> list[str]:
    """The statistics that the first pass has to ask for."""
    wanted = {"count", "failure_count", *configs.names}
    if not wanted.isdisjoint({"mean", "var", "stddev"}):
        wanted.add("sum")
    if configs.needs_range:
        wanted |= {"min", "max"}
    return [name for name in ("count", "failure_count", "sum", "mean", "min", "max") if name in wanted]


def in_common(sites: Mapping[str, Values], configs: StatisticConfigs) -> dict[Feature, Common]:
    """What the second pass tells every site, out of what the first pass has brought."""
    features = dict.fromkeys(feature for values in sites.values() for feature in values)
    found = {feature: common_of(feature[1], _of(feature, sites), configs) for feature in features}
    return {feature: common for feature, common in found.items() if common}


def common_of(name: str, sites: Mapping[str, Mapping[str, Any]], configs: StatisticConfigs) -> Common:
    """The same for the feature of this name: site -> statistic -> value."""
    common: Common = {}
    total = sum(usable(values) for values in sites.values() if "sum" in values)
    if total > 1 and not {"var", "stddev"}.isdisjoint(configs.names):
        common["mean"] = _mean(sites)
        common["count"] = total
    histogram = configs.histogram_of(name)
    limits = None if histogram is None else histogram.range or _range(sites)
    if histogram is not None and limits is not None:
        common["histogram"] = [histogram.bins, *limits]
    if configs.quantiles_of(name) and any(usable(values) for values in sites.values()):
        common["quantile"] = True
    return common


def report(
    sites: Mapping[str, Values], common: Mapping[Feature, Common], configs: StatisticConfigs, precision: int | None
) -> dict[str, Any]:
    """Feature -> statistic -> site, or "Global" -> dataset -> value.

    A histogram is a list of [low, high, count]; quantiles are a dict of share -> value.

    Args:
        sites: what each site answered in both passes.
        common: what it was told between them.
        precision: decimal places; None keeps all digits.
    """
    found: dict[str, Any] = {}
    features = dict.fromkeys(feature for values in sites.values() for feature in values)
    for dataset, name in features:
        of_sites = _of((dataset, name), sites)
        told = common.get((dataset, name), {})
        rows = {site: _row({site: values}, name, told, configs) for site, values in of_sites.items()}
        # A site's own variance is about its own mean.
        for site, values in of_sites.items():
            rows[site] |= {"var": values["var"], "stddev": math.sqrt(values["var"])} if "var" in values else {}
        rows[GLOBAL] = _row(of_sites, name, told, configs)
        for statistic in configs.names:
            for site, row in rows.items():
                if statistic in row:
                    places = found.setdefault(name, {}).setdefault(statistic, {}).setdefault(site, {})
                    places[dataset] = _rounded(row[statistic], precision)
    return found


def _of(feature: Feature, sites: Mapping[str, Values]) -> dict[str, dict[str, Any]]:
    return {site: values[feature] for site, values in sites.items() if feature in values}


def _row(sites: Mapping[str, Mapping[str, Any]], name: str, told: Common, configs: StatisticConfigs) -> dict[str, Any]:
    """All statistics over some sites together."""
    row: dict[str, Any] = {}
    for statistic, combine in (("count", sum), ("failure_count", sum), ("sum", math.fsum), ("min", min), ("max", max)):
        values = [each[statistic] for each in sites.values() if statistic in each]
        if values:
            row[statistic] = combine(values)
    if any("sum" in values for values in sites.values()):
        row["mean"] = _mean(sites)
    variance = _variance(sites, told)
    if variance is not None:
        row |= {"var": variance, "stddev": math.sqrt(variance)}
    histograms = [values["histogram"] for values in sites.values() if "histogram" in values]
    if histograms:
        row["histogram"] = _bins(np.sum(histograms, axis=0), *told["histogram"])
    groups = [values["quantile"] for values in sites.values() if "quantile" in values]
    if groups:
        merged = merge(groups)
        row["quantile"] = {f"{p:g}": quantile(merged, p) for p in configs.quantiles_of(name)}
    return row


def _mean(sites: Mapping[str, Mapping[str, Any]]) -> float:
    with_sums = [values for values in sites.values() if "sum" in values]
    return math.fsum(values["sum"] for values in with_sums) / sum(usable(values) for values in with_sums)


def _variance(sites: Mapping[str, Mapping[str, Any]], told: Common) -> float | None:
    there = {site: values for site, values in sites.items() if "squares" in values and "sum" in values}
    count = sum(usable(values) for values in there.values())
    if count < 2:
        return None
    off = _mean(there) - told["mean"]
    squares = math.fsum([*(values["squares"] for values in there.values()), -count * off * off])
    return max(0.0, squares) / (count - 1)


def _range(sites: Mapping[str, Mapping[str, Any]]) -> tuple[float, float] | None:
    there = [values for values in sites.values() if "min" in values and "max" in values]
    if not there:
        return None
    low, high = min(values["min"] for values in there), max(values["max"] for values in there)
    return (low, high) if low < high else (low - 0.5, low + 0.5)


def _bins(counts: Any, n_bins: int, low: float, high: float) -> list[list[float]]:
    edges = np.linspace(low, high, n_bins + 1).tolist()
    return [list(each) for each in zip(edges[:-1], edges[1:], counts.tolist(), strict=True)]


def _rounded(value: Any, precision: int | None) -> Any:
    if precision is None or isinstance(value, int):
        return value
    if isinstance(value, dict):
        return {key: _rounded(each, precision) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each, precision) for each in value]
    return round(value, precision)
