"""Federated statistics at a site: what a generator implements, a ready one over columns, and what may leave the site.

A generator derives from `Statistics`, or from `ColumnStatistics`, which asks for columns and works out the rest. What
it finds goes through cleansers before it leaves. The algorithm that asks is `workflows.statistics`.
"""

from __future__ import annotations

from flarebus.statistics.cleansers import (
    AddNoiseToMinMax,
    HistogramBinsCleanser,
    MinCountCleanser,
    StatisticsPrivacyCleanser,
    Withheld,
)
from flarebus.statistics.columns import ColumnStatistics
from flarebus.statistics.config import StatisticConfigs
from flarebus.statistics.executor import StatisticsExecutor
from flarebus.statistics.groups import QuantileGroups
from flarebus.statistics.spec import Bin, DataType, Feature, Histogram, HistogramType, Statistics

__all__ = [
    "AddNoiseToMinMax",
    "Bin",
    "ColumnStatistics",
    "DataType",
    "Feature",
    "Histogram",
    "HistogramBinsCleanser",
    "HistogramType",
    "MinCountCleanser",
    "QuantileGroups",
    "StatisticConfigs",
    "Statistics",
    "StatisticsExecutor",
    "StatisticsPrivacyCleanser",
    "Withheld",
]
