"""Federated statistics: the same as of all values in one place, whatever sites leave out, lose or make up."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from flarebus.errors import ConfigError, QuorumNotReached
from flarebus.model import FLModel
from flarebus.statistics import (
    AddNoiseToMinMax,
    DataType,
    Feature,
    HistogramBinsCleanser,
    MinCountCleanser,
    Statistics,
    StatisticsPrivacyCleanser,
)
from tests.workflow.stats_job import Columns, StatsJob, run
from workflows.statistics import StatisticsController

PLAIN: dict[str, Any] = {name: {} for name in ("count", "failure_count", "sum", "mean", "min", "max", "var", "stddev")}
ALL = {**PLAIN, "histogram": {"*": {"bins": 8}}, "quantile": {"*": [0.25, 0.5, 0.9]}}
CLEANSERS = [MinCountCleanser(10), AddNoiseToMinMax(0.1, 0.3), HistogramBinsCleanser(10)]
REPORT, LEFT_OUT = "statistics/statistics.json", "statistics/statistics_left_out.json"


def tables(seed: int, n_sites: int = 3) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Sites of different sizes with two datasets of two columns, some values missing."""
    random = np.random.default_rng(seed)
    found = {}
    for number in range(n_sites):
        n = int(random.integers(60, 900))
        age, size = random.normal(50 + number, 10, n), random.lognormal(number, 1, n)
        size[random.random(n) < 0.1] = math.nan
        found[f"site-{number + 1}"] = {"train": {"age": age, "size": size}, "test": {"age": age[:50] + 1}}
    return found


def pooled(sites: Mapping[str, Any], dataset: str, feature: str) -> np.ndarray:
    """All usable values of a feature in one place."""
    values = np.concatenate([tables[dataset][feature] for tables in sites.values()])
    return values[np.isfinite(values)]


def exact_variance(values: np.ndarray) -> float:
    """Worked out in fractions."""
    exact = list(map(Fraction, values.tolist()))
    mean = sum(exact) / len(exact)
    return float(sum((value - mean) ** 2 for value in exact) / (len(exact) - 1))


@pytest.mark.parametrize("seed", range(3))
def test_global_values_are_those_of_all_values_in_one_place(seed: int) -> None:
    """Every statistic, of every feature and dataset, and the sites' own ones beside it."""
    sites = tables(seed)
    report = run(StatsJob(sites), ALL)

    for dataset, feature in (("train", "age"), ("train", "size"), ("test", "age")):
        values = pooled(sites, dataset, feature)
        found = {name: rows["Global"][dataset] for name, rows in report[feature].items()}
        assert found["count"] - found["failure_count"] == len(values), f"seed {seed}"
        assert found["sum"] == pytest.approx(math.fsum(values), rel=1e-15)
        assert found["mean"] == pytest.approx(float(sum(map(Fraction, values.tolist())) / len(values)), rel=3e-16)
        assert found["var"] == pytest.approx(exact_variance(values), rel=1e-14)
        assert found["stddev"] == math.sqrt(found["var"])
        assert (found["min"], found["max"]) == (values.min(), values.max())
        counts, edges = np.histogram(values, 8)
        assert [count for *_, count in found["histogram"]] == counts.tolist()
        assert [low for low, *_ in found["histogram"]] == edges[:-1].tolist()
        assert found["quantile"]["0.5"] == pytest.approx(np.median(values), rel=0.02)
        own = sites["site-2"][dataset][feature]
        own = own[np.isfinite(own)]
        assert report[feature]["var"]["site-2"][dataset] == pytest.approx(own.var(ddof=1), rel=1e-12)
        assert report[feature]["mean"]["site-2"][dataset] == pytest.approx(own.mean(), rel=1e-14)
        assert sum(count for *_, count in report[feature]["histogram"]["site-2"][dataset]) == len(own)


def test_small_spread_of_large_values_keeps_its_digits() -> None:
    """Where the sum of squares less the square of the sum has no digit left, the variance here has nearly all."""
    random = np.random.default_rng(5)
    sites = {f"site-{k}": {"d": {"x": 1e9 + k + random.normal(0, 1e-3, 500)}} for k in range(3)}
    values = pooled(sites, "d", "x")

    found = run(StatsJob(sites), {"var": {}, "mean": {}})["x"]

    assert found["var"]["Global"]["d"] == pytest.approx(exact_variance(values), rel=1e-9)
    assert found["mean"]["Global"]["d"] == pytest.approx(math.fsum(values) / len(values), abs=2e-7)
    naive = (np.square(values).sum() - len(values) * values.mean() ** 2) / (len(values) - 1)
    assert naive != pytest.approx(exact_variance(values), rel=0.5)


def test_site_lost_between_the_passes_leaves_no_trace() -> None:
    """The report is that of the sites that answered both times, the variance too, about a mean that was not theirs."""
    sites = tables(7)
    job = StatsJob(sites, lost=[("site-2", "fed_stats_second")])

    report = run(job, ALL, min_clients=2)

    left = {site: given for site, given in sites.items() if site != "site-2"}
    for dataset, feature in (("train", "age"), ("train", "size")):
        values = pooled(left, dataset, feature)
        assert report[feature]["var"]["Global"][dataset] == pytest.approx(exact_variance(values), rel=1e-13)
        assert report[feature]["sum"]["Global"][dataset] == pytest.approx(math.fsum(values), rel=1e-15)
        assert set(report[feature]["mean"]) == {"site-1", "site-3", "Global"}
    assert job.reports[LEFT_OUT] == {"site-2": "no usable answer; the log of the server says why"}


def test_too_few_sites_fail_the_job() -> None:
    """One pass below the quorum is the end; by default every site has to answer."""
    job = StatsJob(tables(1), lost=[("site-1", "fed_stats_first")])

    with pytest.raises(QuorumNotReached):
        run(job, ALL)
    assert job.reports == {}


def test_tasks_rounds_and_limits() -> None:
    """A pre-run, then two passes, each with the quorum and limits of the settings."""
    job = StatsJob(tables(1))
    run(job, ALL, min_clients=2, wait_time_after_min_received=3, result_wait_timeout=60)

    assert [(done.task.name, done.task.round, done.task.total_rounds) for done in job.rounds_done] == [
        ("fed_stats_pre_run", 0, 3),
        ("fed_stats_first", 1, 3),
        ("fed_stats_second", 2, 3),
    ]
    limits = {"min_responses": 2, "wait_time_after_min_received": 3, "timeout": 60}
    assert [done.how for done in job.rounds_done] == [limits] * 3


def test_no_pass_more_than_needed() -> None:
    """Without a variance, a histogram or quantiles there is one, and without a pre-run nothing before it."""
    job = StatsJob(tables(1))
    report = run(job, {"mean": {}, "max": {}}, enable_pre_run_task=False)

    assert [(done.task.name, done.task.round, done.task.total_rounds) for done in job.rounds_done] == [
        ("fed_stats_first", 0, 1)
    ]
    assert list(report["age"]) == ["mean", "max"]


def test_site_that_is_lost_is_not_asked_again() -> None:
    """A pass goes to those that have answered the one before."""
    job = StatsJob(tables(1), lost=[("site-1", "fed_stats_pre_run"), ("site-3", "fed_stats_first")])
    report = run(job, ALL, min_clients=1)

    assert [done.sites for done in job.rounds_done] == [
        ["site-1", "site-2", "site-3"],
        ["site-2", "site-3"],
        ["site-2"],
    ]
    assert set(report["age"]["var"]) == {"site-2", "Global"}
    assert set(job.reports[LEFT_OUT]) == {"site-1", "site-3"}


@pytest.mark.parametrize(("configs", "n_passes"), [({"mean": {}}, 2), ({"var": {}}, 3)])
def test_generator_has_its_data_from_the_first_pass_to_the_last(configs: dict[str, Any], n_passes: int) -> None:
    """It is told the site's name once, before anything else, and once that it is over."""
    told: list[str] = []

    class Told(Columns):
        def initialize(self, site_name: str) -> None:
            told.append(f"initialize {site_name}")
            super().initialize(site_name)

        def features(self) -> dict[str, list[Feature]]:
            told.append("features")
            return super().features()

        def finalize(self) -> None:
            told.append("finalize")
            super().finalize()

    run(StatsJob({"a": Told({"d": {"x": [1.0, 2.0]}})}), configs)

    assert told == ["initialize a", *["features"] * (n_passes - 1), "finalize"]


def test_generators_hear_what_is_asked_for() -> None:
    """Before the first pass; what they say to it is told to whoever listens."""

    class Curious(Columns):
        def pre_run(self, statistics: Any, num_of_bins: Any, bin_ranges: Any) -> dict[str, Any]:
            return {"heard": [list(statistics), num_of_bins, bin_ranges]}

    columns = {"d": {"x": np.arange(20.0)}}
    job = StatsJob({"a": Curious(columns), "b": columns})
    run(job, {"mean": {}, "histogram": {"*": {"bins": 4}, "y": {"bins": 2, "range": [0, 1]}}})

    heard = [["mean", "histogram"], {"*": 4, "y": 2}, {"*": None, "y": [0.0, 1.0]}]
    assert ("pre_run_result", {"site": "a", "told": {"heard": heard}}) in job.fired
    assert ("pre_run_result", {"site": "b", "told": {}}) in job.fired


def test_cleansed_report() -> None:
    """Values are those of all sites, extremes lie outside them, and histograms and quantiles have lost no value."""
    sites = tables(3)
    report = run(StatsJob(sites, CLEANSERS), {**PLAIN, "histogram": {"*": {"bins": 5}}, "quantile": {"*": [0.5]}})

    for dataset, feature in (("train", "age"), ("test", "age")):
        values = pooled(sites, dataset, feature)
        spread = values.max() - values.min()
        found = {name: rows["Global"][dataset] for name, rows in report[feature].items()}
        assert values.min() - 0.31 * spread < found["min"] < values.min()
        assert values.max() < found["max"] < values.max() + 0.31 * spread
        assert sum(count for *_, count in found["histogram"]) == len(values)
        assert found["histogram"][0][0] == found["min"]
        assert abs((values < found["quantile"]["0.5"]).mean() - 0.5) < 0.1


def test_feature_with_few_values_is_left_out_where_it_is() -> None:
    """The others' values are the global ones, and the reason stands beside the report."""
    few, many = {"d": {"x": np.arange(9.0), "y": np.arange(200.0)}}, {"d": {"x": np.arange(200.0)}}
    job = StatsJob({"a": few, "b": many}, CLEANSERS)

    report = run(job, {"count": {}, "mean": {}, "histogram": {"*": {"bins": 20}}})

    assert report["x"]["count"] == {"b": {"d": 200}, "Global": {"d": 200}}
    assert report["x"]["mean"]["Global"] == {"d": 99.5}
    reasons = job.reports[LEFT_OUT]
    assert set(reasons) == {"a"}
    assert set(reasons["a"]["d"]["x"].values()) == {"fewer than 10 values"}
    assert "count" in reasons["a"]["d"]["x"]
    assert "y" not in reasons["a"]["d"]


def test_histogram_with_too_many_bins_is_left_out() -> None:
    """Twenty bins want two hundred values; all else of the site is there."""
    sites = {"a": {"d": {"x": np.arange(199.0)}}, "b": {"d": {"x": np.arange(200.0)}}}
    job = StatsJob(sites, CLEANSERS)

    report = run(job, {"count": {}, "histogram": {"*": {"bins": 20}}})

    assert set(report["x"]["histogram"]) == {"b", "Global"}
    assert report["x"]["count"]["Global"] == {"d": 399}
    assert job.reports[LEFT_OUT]["a"]["d"]["x"] == {"histogram": "20 bins are more than 10 % of the values"}


@pytest.mark.parametrize(("n", "is_told"), [(49, False), (50, True)])
def test_quantiles_of_few_groups_are_left_out(n: int, is_told: bool) -> None:
    """With ten values to a group, fifty values make five groups; from fewer, quantiles would mean little."""
    job = StatsJob({"a": {"d": {"x": np.arange(float(n))}}}, CLEANSERS)

    report = run(job, {"count": {}, "quantile": {"*": [0.5]}})

    assert report["x"]["count"]["a"] == {"d": n}
    assert ("quantile" in report["x"]) is is_told
    if is_told:
        assert report["x"]["quantile"]["Global"]["d"]["0.5"] == pytest.approx(24.5, abs=1)
    else:
        reasons = job.reports[LEFT_OUT]["a"]["d"]["x"]
        assert reasons == {"quantile": "too few values for groups that may be told"}


def test_site_whose_cleanser_fails_is_left_out_as_a_whole() -> None:
    """Not a single value of it arrives, and the others go on."""

    class Broken(StatisticsPrivacyCleanser):
        def apply(self, values: Mapping[str, Any], count: int) -> dict[str, Any]:
            if count == 77:
                raise RuntimeError("no budget left")
            return dict(values)

    sites = {"a": {"d": {"x": np.arange(500.0), "y": np.arange(77.0)}}, "b": {"d": {"x": np.arange(100.0)}}}
    job = StatsJob(sites, [Broken()])

    report = run(job, {"count": {}}, min_clients=1)

    assert report == {"x": {"count": {"b": {"d": 100}, "Global": {"d": 100}}}}
    assert "Broken" in job.reasons["a"]
    assert "no budget left" in job.reasons["a"]
    assert set(job.reports[LEFT_OUT]) == {"a"}


class Partial(Statistics):
    """Knows counts and sums only."""

    def features(self) -> dict[str, list[Feature]]:
        return {"d": [Feature("x", DataType.FLOAT), Feature("name", DataType.STRING)]}

    def count(self, dataset_name: str, feature_name: str) -> int:
        return 4

    def sum(self, dataset_name: str, feature_name: str) -> float:
        return 8.0


def test_generator_that_cannot_do_all_says_what_it_lacks() -> None:
    """What it has counts; text has counts only."""
    job = StatsJob({"a": Partial(), "b": {"d": {"x": [1.0, 3.0]}}})

    report = run(job, {"count": {}, "mean": {}, "var": {}, "histogram": {"x": {"bins": 2, "range": [0, 4]}}})

    assert report["x"]["mean"] == {"a": {"d": 2.0}, "b": {"d": 2.0}, "Global": {"d": 2.0}}
    assert report["x"]["var"] == {"b": {"d": 2.0}, "Global": {"d": 2.0}}
    assert report["name"] == {"count": {"a": {"d": 4}, "Global": {"d": 4}}}
    path = f"{Partial.__module__}.Partial"
    assert job.reports[LEFT_OUT]["a"]["d"]["x"] == {
        "var": f"{path} does not tell it",
        "histogram": f"{path} does not tell it",
    }


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([math.nan, math.nan], {"count": 2, "failure_count": 2}),
        ([], {"count": 0, "failure_count": 0}),
        (
            [3.0],
            {
                "count": 1,
                "sum": 3.0,
                "mean": 3.0,
                "histogram": [[2.5, 3.0, 0], [3.0, 3.5, 1]],
                "quantile": {"0.5": 3.0},
            },
        ),
        (
            [0.0, 0.0],
            {"var": 0.0, "stddev": 0.0, "histogram": [[-0.5, 0.0, 0], [0.0, 0.5, 2]], "quantile": {"0.5": 0.0}},
        ),
        ([1e308, 1e308], {"count": 2, "failure_count": 0}),
        ([1e200, 3e200], {"count": 2, "sum": 4e200, "mean": 2e200, "quantile": {"0.5": 2e200}}),
    ],
    ids=["missing", "empty", "one", "constant", "huge", "squares too large"],
)
def test_columns_with_nothing_to_work_out(column: list[float], expected: dict[str, Any]) -> None:
    """What can be said is said; nothing is NaN, infinite or an error."""
    configs = {**PLAIN, "histogram": {"*": {"bins": 2}}, "quantile": {"*": [0.5]}}
    report = run(StatsJob({"a": {"d": {"x": column}}}), configs)

    found = {name: rows["Global"]["d"] for name, rows in report["x"].items()}
    assert found | expected == found
    assert math.isfinite(sum(value for value in found.values() if isinstance(value, int | float)))


@pytest.mark.parametrize(
    ("precision", "mean"),
    [(4, 0.3333), (0, 0.0), (None, 1 / 3)],
)
def test_report_is_rounded_at_the_very_end(precision: int | None, mean: float) -> None:
    """Four decimal places by default."""
    report = run(StatsJob({"a": {"d": {"x": [0.0, 0.0, 1.0]}}}), {"mean": {}, "count": {}}, precision=precision)

    assert report["x"] == {
        "count": {"a": {"d": 3}, "Global": {"d": 3}},
        "mean": {"a": {"d": mean}, "Global": {"d": mean}},
    }


def test_report_does_not_depend_on_the_order_of_arrival() -> None:
    """Bit for bit."""
    sites = tables(11)
    reports = []
    for order in range(3):
        job = StatsJob(sites)
        job._order.seed(order)
        reports.append(run(job, ALL))

    assert reports[0] == reports[1] == reports[2]


def answer(**statistics: Any) -> FLModel:
    return FLModel(params={"values": {"d": {"x": statistics}}, "left_out": {}})


@pytest.mark.parametrize(
    ("comes", "said"),
    [
        (FLModel(params={"w": np.zeros(3)}), "it has no 'values': no answer of a StatisticsExecutor"),
        (FLModel(params={"values": {"d": 3}, "left_out": {}}), "not a dict of datasets"),
        (FLModel(params={"values": {"d": {"x": 3}}, "left_out": {}}), "not a dict of datasets"),
        (answer(count=3, failure_count=5), "'d.x.failure_count': more failures than records"),
        (answer(count=-1), "'d.x.count': int is not what it should be"),
        (answer(count=10**400), "'d.x.count': int is not"),
        (answer(count=3, sum=1.7e308), "'d.x.sum': float is not"),
        (answer(count=True), "'d.x.count': bool is not"),
        (answer(count=3, mean=math.nan), "'d.x.mean': float is not"),
        (answer(count=3, mean="12"), "'d.x.mean': str is not"),
        (answer(count=3, raw=[1, 2, 3]), "'d.x.raw': nobody asked for it"),
    ],
)
def test_answer_that_cannot_be_is_refused(comes: FLModel, said: str) -> None:
    """With the place, and the others go on."""
    columns = {"d": {"x": np.arange(10.0)}}
    job = StatsJob({"a": columns, "b": columns}, tampered={("a", "fed_stats_first"): comes})

    report = run(job, {"count": {}}, min_clients=1)

    assert report["x"]["count"] == {"b": {"d": 10}, "Global": {"d": 10}}
    assert said in job.rounds_done[1].refused["a"]


@pytest.mark.parametrize(
    ("statistics", "said"),
    [
        ({"histogram": np.zeros(3, np.int64)}, "3 bins, not the 2 asked for"),
        ({"histogram": np.zeros(2)}, "ndarray is not"),
        ({"histogram": np.array([-1, 2])}, "ndarray is not"),
        ({"histogram": np.array([1 << 62, 1 << 62])}, "ndarray is not"),
        ({"squares": -1.0}, "float is not"),
        ({"squares": 1.7e308}, "float is not"),
        ({"quantile": {"means": np.array([2.0, 1.0]), "counts": np.array([1, 1])}}, "dict is not"),
        ({"quantile": {"means": np.array([1.0]), "counts": np.array([0])}}, "dict is not"),
        ({"quantile": {"means": np.array([math.inf]), "counts": np.array([1])}}, "dict is not"),
        ({"quantile": {"means": np.arange(600.0), "counts": np.ones(600, np.int64)}}, "dict is not"),
        ({"quantile": {"counts": np.array([1])}}, "dict is not"),
    ],
)
def test_second_answer_that_cannot_be_is_refused(statistics: dict[str, Any], said: str) -> None:
    """Shapes, types and signs are looked at before anything is added up."""
    columns = {"d": {"x": np.arange(10.0)}}
    job = StatsJob({"a": columns, "b": columns}, tampered={("a", "fed_stats_second"): answer(**statistics)})

    run(job, {"var": {}, "histogram": {"x": {"bins": 2}}, "quantile": {"x": [0.5]}}, min_clients=1)

    assert said in job.rounds_done[2].refused["a"]


def test_site_answers_a_question_once() -> None:
    """Asked the same again it says the same, noise included; asked anything else it refuses."""
    columns = {"d": {"x": np.arange(100.0)}}
    job = StatsJob({"a": columns}, CLEANSERS)
    configs = {"min": {}, "max": {}, "histogram": {"*": {"bins": 5}}}
    first = run(job, configs)
    second = run(StatsJob({"a": columns}, CLEANSERS), configs)

    assert run(job, configs) == first
    assert second["x"]["min"] != first["x"]["min"]
    with pytest.raises(QuorumNotReached):
        run(job, {"min": {}, "histogram": {"x": {"bins": 5, "range": [0, 10]}}}, enable_pre_run_task=False)
    assert "asks for something else than before; a site answers it once" in job.reasons["a"]


def test_settings_that_make_no_sense_are_named() -> None:
    """When the controller is made."""
    with pytest.raises(ConfigError, match="did you mean 'stddev'"):
        StatisticsController(statistic_configs={"std": {}})
    with pytest.raises(ConfigError, match="precision=-1: a whole number from 0"):
        StatisticsController(statistic_configs={"count": {}}, precision=-1)


def test_known_table() -> None:
    """Against the standard library, on a table small enough to check by hand."""
    sites = {"a": {"d": {"x": [1, 2, 3, 4]}}, "b": {"d": {"x": [10, 20]}}}
    found = run(StatsJob(sites), PLAIN)["x"]

    assert {name: rows["Global"]["d"] for name, rows in found.items()} == {
        "count": 6,
        "failure_count": 0,
        "sum": 40.0,
        "mean": 40 / 6,
        "min": 1.0,
        "max": 20.0,
        "var": pytest.approx(statistics.variance([1, 2, 3, 4, 10, 20]), rel=1e-15),
        "stddev": pytest.approx(statistics.stdev([1, 2, 3, 4, 10, 20]), rel=1e-15),
    }
