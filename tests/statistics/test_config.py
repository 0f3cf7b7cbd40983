"""What a job may ask for, and what is said to one that asks for something else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flarebus.errors import ConfigError
from flarebus.statistics import StatisticConfigs
from flarebus.statistics.config import HistogramConfig

ALL = {
    "stddev": {},
    "count": {},
    "histogram": {"*": {"bins": 20}, "age": {"bins": 10, "range": [0, 120]}},
    "quantile": {"*": [0.5, 0.1], "age": [0.25]},
}


def test_what_is_read_comes_back_from_json_equal() -> None:
    """Also after a way through a file."""
    configs = StatisticConfigs.parse(ALL)

    assert configs.names == ("count", "stddev", "histogram", "quantile")
    assert StatisticConfigs.parse(json.loads(json.dumps(configs.to_json()))) == configs


def test_features_that_are_not_named_get_what_the_star_says() -> None:
    """And nothing, where there is none."""
    configs = StatisticConfigs.parse(ALL)
    named = StatisticConfigs.parse({"histogram": {"age": {"bins": 3, "range": [0, 1]}}})

    assert configs.histogram_of("age") == HistogramConfig(10, (0.0, 120.0))
    assert configs.histogram_of("size") == HistogramConfig(20)
    assert (configs.quantiles_of("age"), configs.quantiles_of("size")) == ((0.25,), (0.1, 0.5))
    assert (named.histogram_of("size"), named.quantiles_of("size")) == (None, ())
    assert (configs.needs_range, named.needs_range) == (True, False)


@pytest.mark.parametrize(("name", "needs"), [("mean", False), ("max", False), ("var", True), ("stddev", True)])
def test_second_pass_is_for_what_needs_the_mean_or_the_range(name: str, needs: bool) -> None:
    """All else is there after the first."""
    assert StatisticConfigs.parse({name: {}}).needs_second_pass is needs


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "statistic_configs={}: at least one of count, failure_count, sum"),
        (["count"], "a dict, not list"),
        ({"std": {}}, "statistic_configs['std']={}: unknown key; did you mean 'stddev'?"),
        ({"count": {"bins": 3}}, "statistic_configs['count']={'bins': 3}: {}: there is nothing to set"),
        ({"histogram": {}}, "['histogram']={}: for each feature, or '*' for all others"),
        ({"histogram": {"bins": 20}}, "['histogram']['bins']=20: a dict, not int"),
        ({"histogram": {"*": {}}}, "['histogram']['*']=[]: the key 'bins' is missing"),
        ({"histogram": {"*": {"bins": 0}}}, "['bins']=0: a whole number from 1"),
        ({"histogram": {"*": {"bins": 10**6}}}, "['bins']=1000000: at most 10000"),
        ({"histogram": {"*": {"bins": 3, "range": [1, 1]}}}, "['range']=[1, 1]: [low, high] with low below high"),
        ({"histogram": {"*": {"bins": 3, "range": [1]}}}, "['range']=[1]: the lowest and the highest value"),
        ({"quantile": {"*": []}}, "['quantile']['*']=[]: a list of shares"),
        ({"quantile": {"*": [25, 50]}}, "shares between 0 and 1"),
        ({"quantile": {"*": [0]}}, "a finite number above 0"),
    ],
)
def test_what_makes_no_sense_is_named(given: Any, said: str) -> None:
    """With the place, and what would be right."""
    with pytest.raises(ConfigError) as caught:
        StatisticConfigs.parse(given)
    assert said in str(caught.value)
