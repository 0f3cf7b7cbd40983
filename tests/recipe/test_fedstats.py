"""FedStatsRecipe: what it makes of its parameters, what it refuses, and that it comes back from a folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flarebus.errors import ConfigError
from flarebus.recipe import FedStatsRecipe, Recipe
from flarebus.recipe.described import code_in
from flarebus.statistics import ColumnStatistics, StatisticsExecutor
from workflows.statistics import StatisticsController

TABLES = """
from flarebus.statistics import ColumnStatistics, StatisticsPrivacyCleanser


class Tables(ColumnStatistics):
    def __init__(self, size=3):
        self.size = size

    def load(self, site_name):
        return {"d": {"x": range(self.size)}}


class Rounding(StatisticsPrivacyCleanser):
    def apply(self, values, count):
        return values


class Stranger:
    pass
"""


class Kept(ColumnStatistics):
    """A generator of this module that keeps its arguments."""

    def __init__(self, size: int = 3) -> None:
        self._size = size

    def load(self, site_name: str) -> Any:
        return {"d": {"x": range(self._size)}}


@pytest.fixture
def given(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What every recipe needs, with the code in a folder of its own."""
    tmp_path.joinpath("code").mkdir()
    tmp_path.joinpath("code", "my_tables.py").write_text(TABLES)
    with code_in(tmp_path / "code"):
        yield {
            "statistic_configs": {"mean": {}},
            "stats_generator": {"class_path": "my_tables.Tables", "args": {"size": 5}},
        }
    sys.modules.pop("my_tables", None)


def executor_of(recipe: FedStatsRecipe) -> Any:
    """What a site makes of the recipe."""
    (ref,) = recipe.definition.site_defaults.executors
    return ref, ref.ref.build(recipe.definition.code_dir, "executor")


def test_defaults(given: dict[str, Any]) -> None:
    """The workflow and the cleansers have the figures that are promised."""
    recipe = FedStatsRecipe(**given)

    workflow = recipe.definition.make_workflow()
    assert isinstance(workflow, StatisticsController)
    assert (workflow.precision, workflow.min_clients, workflow.wait_time_after_min_received) == (4, None, 1)
    assert (workflow.enable_pre_run_task, workflow.result_wait_timeout) == (True, None)
    ref, executor = executor_of(recipe)
    assert isinstance(executor, StatisticsExecutor)
    assert ref.tasks == ("fed_stats_pre_run", "fed_stats_first", "fed_stats_second")
    assert [each["args"] for each in ref.ref.args["cleansers"]] == [
        {"min_count": 10},
        {"min_noise_level": 0.1, "max_noise_level": 0.3},
        {"max_bins_percent": 10},
    ]
    assert recipe.definition.sites == {}


def test_comes_back_from_a_folder_equal(given: dict[str, Any], tmp_path: Path) -> None:
    """With everything changed, cleansers of the user's own included."""
    recipe = FedStatsRecipe(
        **given,
        name="irises",
        stats_output_path="a/b.json",
        sites=["north", "south"],
        min_count=20,
        min_noise_level=0.2,
        max_noise_level=0.5,
        max_bins_percent=5,
        cleansers=[{"class_path": "my_tables.Rounding"}],
        wait_time_after_min_received=3,
        result_wait_timeout=60,
        precision=None,
        min_clients=1,
        enable_pre_run_task=False,
    )

    folder = recipe.export(tmp_path / "job")
    back = Recipe.load(folder)

    assert isinstance(back, FedStatsRecipe)
    assert back == recipe
    assert back != FedStatsRecipe(**given)
    assert list(back.definition.sites) == ["north", "south"]
    tmp_path.joinpath("code", "my_tables.py").unlink()
    sys.modules.pop("my_tables", None)
    assert Recipe.load(folder).definition.code_dir == folder / "code"


def test_instance_that_keeps_its_arguments_is_described(given: dict[str, Any]) -> None:
    """By its class and its attributes."""
    given["stats_generator"] = Kept(size=7)

    ref, _ = executor_of(FedStatsRecipe(**given))

    assert ref.ref.args["generator"] == {"class_path": f"{Kept.__module__}.Kept", "args": {"size": 7}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"statistic_configs": {"std": {}}}, "did you mean 'stddev'?"),
        ({"stats_output_path": "../x.json"}, "stats_output_path='../x.json': the relative path"),
        ({"stats_generator": {"class_path": "my_tables.Tabels"}}, "did you mean 'Tables'?"),
        ({"stats_generator": {"class_path": "my_tables.Tables", "args": {"sise": 3}}}, "raised TypeError"),
        (
            {"stats_generator": {"class_path": "my_tables.Stranger"}},
            "derive it from flarebus.statistics.spec.Statistics",
        ),
        ({"stats_generator": Kept}, "an instance, not the class: Kept(...)"),
        ({"cleansers": [{"class_path": "my_tables.Stranger"}]}, "not a StatisticsPrivacyCleanser"),
        ({"min_count": 0}, "min_count=0"),
        ({"min_noise_level": 0.5}, "max_noise_level=0.3: above min_noise_level=0.5"),
        ({"max_bins_percent": 200}, "max_bins_percent=200"),
        ({"min_clients": 0}, "min_clients=0"),
        ({"precision": -1}, "precision=-1"),
        ({"result_wait_timeout": 0}, "result_wait_timeout=0"),
        ({"wait_time_after_min_received": -1}, "wait_time_after_min_received=-1"),
        ({"enable_pre_run_task": 1}, "enable_pre_run_task=1: True or False"),
        ({"sites": "site-1"}, "sites='site-1': a list of names"),
        ({"sites": []}, "sites=[]: a list of names"),
        ({"sites": ["a", "server"]}, "sites='server': this name is reserved"),
        ({"sites": ["a", "Global"]}, "sites='Global': another name"),
    ],
)
def test_what_makes_no_sense_is_named(given: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    """When the recipe is made; nothing is started for it."""
    with pytest.raises(ConfigError) as caught:
        FedStatsRecipe(**{**given, **changes})
    assert said in str(caught.value)


def test_unknown_parameter_names_the_nearest(given: dict[str, Any]) -> None:
    """As with every recipe."""
    with pytest.raises(TypeError, match="did you mean 'stats_generator'"):
        FedStatsRecipe(**given, stats_genrator=1)
