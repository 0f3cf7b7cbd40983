"""Cleansers: each holds back what it should, and one that fails holds back everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from flarebus.errors import ConfigError, FilterFailed
from flarebus.statistics import (
    AddNoiseToMinMax,
    HistogramBinsCleanser,
    MinCountCleanser,
    QuantileGroups,
    StatisticsPrivacyCleanser,
    Withheld,
)
from flarebus.statistics.cleansers import cleanse, max_groups


def groups(*counts: int) -> QuantileGroups:
    return QuantileGroups(np.arange(float(len(counts))), np.array(counts))


@pytest.mark.parametrize(("count", "is_kept"), [(9, False), (10, True)])
def test_few_values_are_withheld_with_their_count(count: int, is_kept: bool) -> None:
    """Ten are enough by default, nine are not; the reason does not tell how many there are."""
    kept, withheld = cleanse([MinCountCleanser()], {"count": count, "sum": 1.0}, count)

    assert kept == ({"count": count, "sum": 1.0} if is_kept else {})
    assert withheld == ({} if is_kept else dict.fromkeys(("count", "sum"), "fewer than 10 values"))


def test_small_groups_of_quantiles_are_withheld() -> None:
    """The mean of fewer values than may be counted is not told either."""
    values = {"var": 1.0, "quantile": groups(10, 9)}

    assert cleanse([MinCountCleanser()], values, 19) == (
        {"var": 1.0},
        {"quantile": "groups of fewer than 10 values"},
    )


@pytest.mark.parametrize(("bins", "is_kept"), [(20, True), (21, False)])
def test_histogram_with_too_many_bins_is_withheld(bins: int, is_kept: bool) -> None:
    """By default there may be one bin for ten values; everything else goes on."""
    values = {"histogram": np.zeros(bins, np.int64), "var": 1.0}

    kept, withheld = cleanse([HistogramBinsCleanser()], values, 200)

    assert ("histogram" in kept, "histogram" in withheld) == (is_kept, not is_kept)
    assert kept["var"] == 1.0


def test_too_many_groups_are_withheld() -> None:
    """Groups are judged as bins are."""
    assert "quantile" in cleanse([HistogramBinsCleanser()], {"quantile": groups(10, 10, 10)}, 20)[1]


@pytest.mark.parametrize(("low", "high"), [(0.0, 10.0), (1990.0, 2020.0), (-5.0, -5.0), (0.0, 0.0), (-1e300, 1e300)])
def test_noise_moves_the_extremes_outwards_by_part_of_the_spread(low: float, high: float) -> None:
    """Between a tenth and three tenths of it, another part for each; a single value stands for its own spread."""
    spread = high - low or abs(high) or 1.0
    seen = set()
    for _ in range(50):
        kept, withheld = cleanse([AddNoiseToMinMax()], {"min": low, "max": high, "sum": 7.0}, 100)
        assert 0.0999 < (low - kept["min"]) / spread < 0.3001
        assert 0.0999 < (kept["max"] - high) / spread < 0.3001
        assert (kept["sum"], withheld) == (7.0, {})
        seen |= {kept["min"], kept["max"]}
    assert len(seen) > 90


def test_an_extreme_without_the_other_is_withheld() -> None:
    """There is no spread to hide it in."""
    assert cleanse([AddNoiseToMinMax()], {"min": 1.0, "sum": 2.0}, 100) == (
        {"sum": 2.0},
        {"min": "no spread to hide it in"},
    )


def test_cleansers_allow_as_many_groups_as_the_strictest_of_them() -> None:
    """A hundred values: ten groups for one, nine for the other; a single value none."""
    cleansers = [HistogramBinsCleanser(10), MinCountCleanser(11)]

    assert [max_groups(cleansers, count) for count in (100, 10, 1, 10**6)] == [9, 0, 0, 512]
    assert max_groups([], 3) == 3


class Odd(StatisticsPrivacyCleanser):
    """Does what the test says."""

    def __init__(self, does: Any) -> None:
        self.does = does

    def apply(self, values: Mapping[str, Any], count: int) -> Any:
        return self.does(values)


@pytest.mark.parametrize(
    ("does", "said"),
    [
        (lambda values: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda values: None, "did not answer for count"),
        (lambda values: {}, "did not answer for count"),
        (lambda values: {**values, "mean": 3.0}, "did not answer for count"),
    ],
)
def test_cleanser_that_fails_lets_nothing_go(does: Any, said: str) -> None:
    """Whatever it does instead of judging, its class is named and nothing is returned."""
    with pytest.raises(FilterFailed, match=said) as caught:
        cleanse([Odd(does)], {"count": 100}, 100)
    assert "Odd" in str(caught.value)


def test_later_cleansers_do_not_see_what_is_withheld() -> None:
    """And cannot bring it back."""
    seen: list[dict[str, Any]] = []

    def note(values: dict[str, Any]) -> dict[str, Any]:
        seen.append(values)
        return values

    cleansers = [Odd(lambda values: {**values, "sum": Withheld("secret")}), Odd(note)]

    assert cleanse(cleansers, {"count": 3, "sum": 1.0}, 3) == ({"count": 3}, {"sum": "secret"})
    assert seen == [{"count": 3}]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MinCountCleanser(0), "min_count=0: a whole number from 1"),
        (lambda: AddNoiseToMinMax(0, 0.3), "min_noise_level=0: a finite number above 0"),
        (lambda: AddNoiseToMinMax(0.3, 0.1), "max_noise_level=0.1: above min_noise_level=0.3, up to 1"),
        (lambda: AddNoiseToMinMax(0.3, 1.5), "max_noise_level=1.5: above min_noise_level=0.3, up to 1"),
        (lambda: HistogramBinsCleanser(0), "max_bins_percent=0: a finite number above 0"),
        (lambda: HistogramBinsCleanser(101), "max_bins_percent=101: up to 100"),
    ],
)
def test_settings_that_make_no_sense_are_named(make: Any, said: str) -> None:
    """When the cleanser is made."""
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == said
