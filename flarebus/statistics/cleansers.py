"""Cleansers: what may leave a site. Each sees the values of one feature and lets them go, changes or withholds them.

They fail closed: a cleanser that raises, or answers with something else than it should, lets nothing of its site go.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flarebus.errors import ConfigError, FilterFailed
from flarebus.job.checks import check_int, check_number
from flarebus.plugins import origin_of
from flarebus.statistics.groups import MAX_GROUPS

__all__ = [
    "AddNoiseToMinMax",
    "HistogramBinsCleanser",
    "MinCountCleanser",
    "StatisticsPrivacyCleanser",
    "Withheld",
    "cleanse",
    "max_groups",
]


@dataclass(frozen=True, slots=True)
class Withheld:
    """Stands in the place of a value that may not leave the site, and says why; the reason leaves it."""

    reason: str


class StatisticsPrivacyCleanser(ABC):
    """Judges the values of one feature of one dataset."""

    @abstractmethod
    def apply(self, values: Mapping[str, Any], count: int) -> dict[str, Any]:
        """Return, under the same names, what may leave the site.

        Args:
            values: name of a statistic -> its value: `count` and `failure_count` (whole numbers), `sum`, `mean`, `min`,
                `max`, `var`, `squares` (numbers; the last is a sum of squares about the mean of all sites), `histogram`
                (an array of counts), `quantile` (`QuantileGroups`). What an earlier cleanser withheld is not among
                them.
            count: usable values that they are worked out of.

        Returns:
            For every name the value, another one, or `Withheld`.
        """

    def max_groups(self, count: int) -> int:
        """How many groups of `count` sorted values may be told by their means."""
        return MAX_GROUPS


class MinCountCleanser(StatisticsPrivacyCleanser):
    """Withholds everything about a feature with fewer than `min_count` usable values, its count too.

    Args:
        min_count: from 1.

    Raises:
        ConfigError: it is no such number.
    """

    def __init__(self, min_count: int = 10) -> None:
        self.min_count = check_int("min_count", min_count, 1)

    def apply(self, values: Mapping[str, Any], count: int) -> dict[str, Any]:
        """Judge by the count, and the groups of quantiles by their own."""
        if count < self.min_count:
            return dict.fromkeys(values, Withheld(f"fewer than {self.min_count} values"))
        found = dict(values)
        groups = found.get("quantile")
        if groups is not None and groups.counts.min() < self.min_count:
            found["quantile"] = Withheld(f"groups of fewer than {self.min_count} values")
        return found

    def max_groups(self, count: int) -> int:
        """Groups of at least `min_count`."""
        return count // self.min_count


class AddNoiseToMinMax(StatisticsPrivacyCleanser):
    """Makes the lowest value lower and the highest one higher, by a random part of what lies between them.

    All values stay between the two, so histograms over them lose none. The part is drawn for each of the two from the
    system's own source of randomness: nobody who knows the job can take it away again. It is a part of the spread, not
    of the value: years from 1990 to 2020 do not become 1400 to 2600, and a lowest value of 0 does not stay as it is.

    Args:
        min_noise_level: the smallest part, above 0.
        max_noise_level: the largest one, up to 1.

    Raises:
        ConfigError: they are no such numbers, or not in this order.
    """

    def __init__(self, min_noise_level: float = 0.1, max_noise_level: float = 0.3) -> None:
        self.min_noise_level = check_number("min_noise_level", min_noise_level, above=0.0)
        self.max_noise_level = check_number("max_noise_level", max_noise_level, above=0.0)
        if not self.min_noise_level < self.max_noise_level <= 1:
            allowed = f"above min_noise_level={self.min_noise_level:g}, up to 1"
            raise ConfigError("max_noise_level", max_noise_level, allowed)
        self._random = random.SystemRandom()

    def apply(self, values: Mapping[str, Any], count: int) -> dict[str, Any]:
        """Change `min` and `max`; one that came without the other is withheld, for its spread is not known."""
        found = dict(values)
        if "min" in values and "max" in values:
            # Of a feature that is the same everywhere, the value itself takes the place of the spread.
            spread = values["max"] - values["min"] or abs(values["max"]) or 1.0
            found["min"] -= spread * self._level()
            found["max"] += spread * self._level()
            return found
        return {name: Withheld("no spread to hide it in") if name in ("min", "max") else found[name] for name in found}

    def _level(self) -> float:
        return self._random.uniform(self.min_noise_level, self.max_noise_level)


class HistogramBinsCleanser(StatisticsPrivacyCleanser):
    """Withholds a histogram that has too many bins for its values, and quantiles out of too many groups.

    Args:
        max_bins_percent: bins, or groups, for each hundred usable values; above 0, up to 100.

    Raises:
        ConfigError: it is no such number.
    """

    def __init__(self, max_bins_percent: float = 10) -> None:
        self.max_bins_percent = check_number("max_bins_percent", max_bins_percent, above=0.0)
        if self.max_bins_percent > 100:
            raise ConfigError("max_bins_percent", max_bins_percent, "up to 100")

    def apply(self, values: Mapping[str, Any], count: int) -> dict[str, Any]:
        """Count the bins and groups."""
        found = dict(values)
        for name, n_bins in (("histogram", _n_bins(values)), ("quantile", _n_groups(values))):
            if n_bins > self.max_groups(count):
                found[name] = Withheld(f"{n_bins} bins are more than {self.max_bins_percent:g} % of the values")
        return found

    def max_groups(self, count: int) -> int:
        """The part of `count` that is allowed."""
        return int(count * self.max_bins_percent / 100)


def _n_bins(values: Mapping[str, Any]) -> int:
    return len(values["histogram"]) if "histogram" in values else 0


def _n_groups(values: Mapping[str, Any]) -> int:
    return len(values["quantile"].counts) if "quantile" in values else 0


def max_groups(cleansers: Sequence[StatisticsPrivacyCleanser], count: int) -> int:
    """How many groups all of the cleansers allow; 0: none."""
    return min((MAX_GROUPS, count, *(cleanser.max_groups(count) for cleanser in cleansers)))


def cleanse(
    cleansers: Sequence[StatisticsPrivacyCleanser], values: Mapping[str, Any], count: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Let the values of one feature go through all cleansers in order.

    Returns:
        What may leave the site, and for each statistic that may not, why.

    Raises:
        FilterFailed: a cleanser raised, or did not answer for what it was given. Nothing of the site may leave it.
    """
    kept = dict(values)
    withheld: dict[str, str] = {}
    for cleanser in cleansers:
        name = origin_of(type(cleanser))
        try:
            found = cleanser.apply(dict(kept), count)
        except Exception as error:  # somebody else's code: whatever it raises keeps everything where it is
            raise FilterFailed(name, f"raised {type(error).__name__}: {error}") from error
        if not isinstance(found, dict) or found.keys() != kept.keys():
            raise FilterFailed(name, f"did not answer for {', '.join(sorted(kept))}")
        withheld |= {key: value.reason for key, value in found.items() if isinstance(value, Withheld)}
        kept = {key: value for key, value in found.items() if not isinstance(value, Withheld)}
    return kept, withheld
