"""Robust aggregators: known answers, what bad sites can and cannot do, and what the models may look like."""

from __future__ import annotations

import itertools
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from flarebus.errors import ConfigError, QuorumNotReached
from flarebus.model import FLModel
from flarebus.workflow import robust
from flarebus.workflow.aggregator import ModelAggregator
from flarebus.workflow.robust import KrumAggregator, MedianAggregator, TrimmedMeanAggregator
from tests.workflow.fake_job import FakeJob, update
from workflows.fedavg import FedAvg

ALL = {
    "median": MedianAggregator,
    "trimmed mean": lambda: TrimmedMeanAggregator(0.2),
    "Krum": lambda: KrumAggregator(1),
    "multi-Krum": lambda: KrumAggregator(1, 3),
}


@pytest.fixture(params=ALL)
def aggregator(request: pytest.FixtureRequest) -> Any:
    return ALL[request.param]()


def aggregated(aggregator: ModelAggregator, values: Any, model: Any = None) -> Any:
    """What comes out of these values of `w`, each a site's."""
    aggregator.reset_stats()
    if model is not None:
        aggregator.expect_model(model)
    for value in values:
        aggregator.accept_model(FLModel(params={"w": value}))
    found = aggregator.aggregate_model().params
    assert found is not None
    return found["w"]


def numbers(*values: float) -> list[Any]:
    return [np.array([value], float) for value in values]


# --- known answers


@pytest.mark.parametrize(
    ("aggregator", "values", "expected"),
    [
        (MedianAggregator(), [7, 1, 5], 5),
        (MedianAggregator(), [1, 9, 3, 4], 3.5),
        (MedianAggregator(), [3], 3),
        (TrimmedMeanAggregator(0.2), [1, 2, 3, 7, 100], 4),
        (TrimmedMeanAggregator(0.1), [1, 2, 6, 100], 4),  # 0.4 of a result at each end is one
        (TrimmedMeanAggregator(0.4), [-50, 1, 2, 7, 100], 2),
        # f = 1: of each the two nearest count. 0: 1 + 6.25; 1: 1 + 2.25; 2.5: 0.25 + 2.25; 3: 0.25 + 4; 100: far
        (KrumAggregator(1), [0, 1, 2.5, 3, 100], 2.5),
        (KrumAggregator(1, 2), [0, 1, 2.5, 3, 100], 1.75),
        (KrumAggregator(1, 4), [0, 1, 2.5, 3, 100], 1.625),
        (KrumAggregator(0), [0, 4, 5], 4),  # f = 0: the nearest one counts, and the first of equals is taken
    ],
)
def test_known_answers(aggregator: ModelAggregator, values: list[float], expected: float) -> None:
    """Each formula on values that can be worked out by hand."""
    assert aggregated(aggregator, numbers(*values)).tolist() == [expected]


def test_every_coordinate_has_its_own_median() -> None:
    """The median of vectors is that of each coordinate; Krum takes whole vectors."""
    rows = [np.array(row, float) for row in ([0, 9, 5], [1, 8, 3], [2, 7, 4], [1, 8, 4], [50, 50, -50])]

    assert aggregated(MedianAggregator(), rows).tolist() == [1, 8, 4]
    assert aggregated(TrimmedMeanAggregator(0.2), rows).tolist() == [4 / 3, 25 / 3, 11 / 3]
    assert aggregated(KrumAggregator(1), rows).tolist() == [1, 8, 4]


def test_seven_of_fifty_are_not_eight() -> None:
    """A share that means a whole number of results is that number, whatever binary fractions make of it."""
    values = numbers(*[1e9] * 7, *[-1e9] * 7, 37.0, *[1.0] * 35)

    assert 0.14 * 50 > 7
    assert aggregated(TrimmedMeanAggregator(0.14), values).tolist() == [2.0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int32, np.complex64])
def test_blocks_make_no_difference(aggregator: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into blocks or whole, the bits are the same, in the dtype and shape of the model."""
    random = np.random.default_rng(1)
    values = [(random.normal(size=(7, 11)) * 50).astype(dtype) for _ in range(6)]
    whole = aggregated(aggregator, values)
    monkeypatch.setattr(robust, "_BLOCK", 6 * 13)
    cut = aggregated(aggregator, values)

    assert (whole.dtype, whole.shape) == (np.dtype(dtype), (7, 11))
    # Distances are sums, so blocks may round them; that must not matter for which site is taken.
    assert whole.tobytes() == cut.tobytes()


# --- bad sites


def test_one_bad_site_of_five(aggregator: Any) -> None:
    """Whatever one site sends, the result stays among what the others sent."""
    honest = [np.array([1.0, 2.0]), np.array([1.1, 2.1]), np.array([0.9, 1.9]), np.array([1.05, 2.0])]
    for bad in ([1e6, 1e6], [-1e6, 3.0], [1e308, -1e308], [1.0, -math.pi]):
        for place in range(5):
            values = [*honest[:place], np.array(bad), *honest[place:]]
            found = aggregated(aggregator, values)
            assert np.all((found >= [0.9, 1.9]) & (found <= [1.1, 2.1]))


def test_the_order_of_arrival_does_not_matter(aggregator: Any) -> None:
    """The same results in any order give the same bits, ties included."""
    values = {"a": 0.0, "b": 1.0, "c": 2.0, "d": 3.0, "e": 100.1}  # b and c have the same score
    found = set()
    for order in itertools.permutations(values):
        aggregator.reset_stats()
        for site in order:
            aggregator.accept_model(FLModel(params={"w": np.array([values[site]])}, meta={"client_name": site}))
        found.add(aggregator.aggregate_model().params["w"].tobytes())

    assert len(found) == 1


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (FLModel(params={"w": np.zeros(3, np.float32)}), "shape"),
        (FLModel(params={"w": np.zeros(2)}), "dtype"),
        (FLModel(params={"v": np.zeros(2, np.float32)}), "'v'"),
        (FLModel(params={"w": np.full(2, math.nan, np.float32)}), "NaN or Inf"),
        (FLModel("DIFF", {"w": np.full(2, 3.4e38, np.float32)}), "NaN or Inf"),
    ],
    ids=["shape", "dtype", "name", "NaN", "too far"],
)
def test_a_bad_site_that_comes_first_is_the_one_refused(bad: FLModel, said: str, aggregator: Any) -> None:
    """What the model looks like is known from the model, not from whoever answers first."""
    model = {"w": np.full(2, 1e38, np.float32)}
    job = FakeJob(
        lambda site, *_: bad if site == "a" else FLModel(params={"w": np.ones(2, np.float32)}), "abcdef", model
    )
    FedAvg(num_rounds=1, min_clients=5, aggregator=aggregator, deterministic=True).run(job)

    assert list(job.rounds_done[0].refused) == ["a"]
    assert said in job.rounds_done[0].refused["a"]
    assert job.model["w"].tolist() == [1.0, 1.0]


def test_differences_and_models_meet(aggregator: Any) -> None:
    """A site that sends the other kind cannot get the rest refused: a difference is the model that it leads to."""
    model = {"w": np.full(3, 10.0, np.float32)}
    job = FakeJob(lambda site, *_: update(2, kind="DIFF") if site in "ab" else update(12), "abcde", model)
    FedAvg(num_rounds=2, min_clients=5, aggregator=aggregator, deterministic=True).run(job)

    assert [done.refused for done in job.rounds_done] == [{}, {}]
    assert job.rounds_done[0].params["w"].tolist() == [12.0] * 3
    assert model["w"].tolist() == [10.0] * 3


def test_a_site_cannot_claim_weight(aggregator: Any) -> None:
    """However many steps a site says it made, it is one of five."""
    job = FakeJob(lambda site, *_: update(9, 10**6) if site == "a" else update(1, 1), "abcde", {"w": np.zeros(3, "f4")})
    FedAvg(num_rounds=1, min_clients=5, aggregator=aggregator).run(job)

    assert job.model["w"].tolist() == [1.0] * 3


# --- how many it takes


@pytest.mark.parametrize(
    ("aggregator", "count", "needed"),
    [
        (MedianAggregator(), 0, 1),
        (TrimmedMeanAggregator(0.2), 2, 3),
        (TrimmedMeanAggregator(0.4), 4, 5),
        (KrumAggregator(0), 2, 3),
        (KrumAggregator(1), 4, 5),
        (KrumAggregator(1, 5), 5, 6),
    ],
)
def test_too_few_results_end_the_job(aggregator: ModelAggregator, count: int, needed: int) -> None:
    """Where the formula has nothing to say the job ends, and the error tells how many results it takes."""
    with pytest.raises(QuorumNotReached, match=f"{count} usable results?, {needed} needed"):
        aggregated(aggregator, numbers(*range(count)))
    assert aggregated(aggregator, numbers(*range(needed))) is not None


@pytest.mark.parametrize(
    ("make", "parameter"),
    [
        (lambda: TrimmedMeanAggregator(0.0), "trim_ratio"),
        (lambda: TrimmedMeanAggregator(0.5), "trim_ratio"),
        (lambda: TrimmedMeanAggregator(math.nan), "trim_ratio"),
        (lambda: KrumAggregator(-1), "num_byzantine"),
        (lambda: KrumAggregator(1.5), "num_byzantine"),  # type: ignore[arg-type]
        (lambda: KrumAggregator(1, 0), "num_selected"),
    ],
)
def test_wrong_parameters_are_named(make: Any, parameter: str) -> None:
    """What makes no sense is refused when the aggregator is made."""
    with pytest.raises(ConfigError, match=f"^{parameter}="):
        make()


# --- models of all kinds


def test_nested_models_numbers_and_text(aggregator: Any) -> None:
    """Every number of a model is combined; what is none stays; tensors stay tensors."""
    model = {"net": {"w": np.zeros(2), "n": np.array(0)}, "t": torch.zeros(1), "x": 0.0, "z": 0j, "note": "text"}

    def answer(site: str, *_: Any) -> FLModel:
        far = 1000 if site == "e" else 1
        params = {"net": {"w": np.full(2, far, float), "n": np.array(far)}, "t": torch.full((1,), float(far))}
        return FLModel(params={**params, "x": far, "z": far * 1j, "note": "text"})

    job = FakeJob(answer, "abcde", model)
    FedAvg(num_rounds=1, min_clients=5, aggregator=aggregator).run(job)

    found = job.model
    assert (found["net"]["w"].tolist(), found["net"]["n"].item()) == ([1.0, 1.0], 1)
    assert found["net"]["n"].dtype == np.int64
    assert (found["t"].tolist(), found["x"], found["z"], found["note"]) == ([1.0], 1.0, 1j, "text")


def test_counters_do_not_decide_who_is_near() -> None:
    """Krum compares floating-point parameters: a counter of batches says nothing about a model."""
    aggregator = KrumAggregator(1)
    aggregator.reset_stats()
    for value, count in ((0, 50), (1, 10), (2.5, 1), (3, 9), (100, 10)):
        aggregator.accept_model(FLModel(params={"w": np.array([value], float), "n": np.array([count])}))

    assert aggregator.aggregate_model().params == {"w": [2.5], "n": [1]}
    whole = [np.array([value]) for value in (0, 10, 25, 30, 1000)]
    assert aggregated(aggregator, whole).tolist() == [25]  # where there is nothing else they do


def test_a_job_may_begin_without_a_model(aggregator: Any) -> None:
    """Then the first result says what the others must look like; a difference cannot be the first."""
    job = FakeJob(
        lambda site, round, params: update(1, kind="DIFF") if site == "a" and not params else update(2), "abcdef"
    )
    FedAvg(num_rounds=2, min_clients=5, aggregator=aggregator, deterministic=True).run(job)

    assert "no model yet" in job.rounds_done[0].refused["a"]
    assert job.model["w"].tolist() == [2.0] * 3


def test_what_came_is_copied_and_let_go(aggregator: Any) -> None:
    """Arrays that are lent may be written to afterwards, and no round hears of the one before."""
    value = np.ones(2)
    aggregator.reset_stats()
    for _ in range(5):
        aggregator.accept_model(FLModel(params={"w": value}))
    value[:] = 7

    assert aggregator.aggregate_model().params["w"].tolist() == [1.0, 1.0]
    with pytest.raises(QuorumNotReached, match="0 usable"):
        aggregator.aggregate_model()
