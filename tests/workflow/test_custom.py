"""CustomMean: what an aggregator is given, and what is made of what it gives."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from flarebus.errors import JobFailed, QuorumNotReached, UpdateRefused
from flarebus.model import FLModel
from flarebus.workflow.aggregator import ModelAggregator
from flarebus.workflow.custom import CustomMean


class Giving(ModelAggregator):
    """Takes anything but what it is told to refuse; gives what it is told to."""

    def __init__(self, gives: Any = None, refuses: str = "") -> None:
        self.gives = gives
        self.refuses = refuses
        self.got: list[FLModel] = []
        self.n_resets = 0

    def reset_stats(self) -> None:
        self.n_resets += 1

    def accept_model(self, model: FLModel) -> None:
        if model.meta["client_name"] == self.refuses:
            raise UpdateRefused("not this one")
        self.got.append(model)

    def aggregate_model(self) -> FLModel:
        return self.gives  # type: ignore[no-any-return]


def full(value: float = 1.0) -> FLModel:
    return FLModel(params={"w": np.full(2, value)}, metrics={"loss": value})


def added(model: dict[str, Any], step: dict[str, Any], out: Any = None) -> dict[Any, Any]:
    mean = CustomMean(Giving(FLModel("DIFF", step)), model)
    mean.add(full(), 1, "a")
    return mean.apply_to(model, out)


def test_results_are_handed_over_as_they_came() -> None:
    """The aggregator is reset for the round and gets each result itself, with the name of the site that sent it."""
    aggregator = Giving()
    mean = CustomMean(aggregator, {})
    results = [full(), full()]
    results[1].meta["client_name"] = "somebody else"
    for site, result in zip("ab", results, strict=True):
        mean.add(result, 1, site)

    assert aggregator.n_resets == 1
    assert [found is given for found, given in zip(aggregator.got, results, strict=True)] == [True, True]
    assert [found.meta["client_name"] for found in aggregator.got] == ["a", "b"]


def test_an_aggregator_is_told_what_to_expect() -> None:
    """After the reset it gets the model that the results are of, unless it has no method for that."""
    model = {"w": np.zeros(2)}
    told: list[Any] = []

    class Expecting(Giving):
        def expect_model(self, model: Any) -> None:
            told.append((self.n_resets, model))

    CustomMean(Expecting(), model)
    assert len(told) == 1
    assert told[0][0] == 1
    assert told[0][1] is model

    methods = {name: lambda *_: None for name in ("reset_stats", "accept_model", "aggregate_model")}
    CustomMean(type("Plain", (), methods)(), model)


def test_metrics_of_what_counts_are_averaged() -> None:
    """Metrics are the weighted mean over results that were accepted; a refused one leaves no trace."""
    aggregator = Giving(full(), refuses="b")
    mean = CustomMean(aggregator, {})
    mean.add(full(1.0), 1, "a")
    with pytest.raises(UpdateRefused, match="not this one"):
        mean.add(full(9.0), 1, "b")
    with pytest.raises(UpdateRefused, match="weight -1"):
        mean.add(full(9.0), -1, "c")
    mean.add(full(5.0), 3, "d")

    assert mean.metrics == {"loss": 4.0}
    assert [model.meta["client_name"] for model in aggregator.got] == ["a", "d"]


def test_results_without_parameters_are_not_for_the_aggregator() -> None:
    """A result with metrics only is averaged and not handed over; an empty one is refused."""
    aggregator = Giving(full())
    mean = CustomMean(aggregator, {})
    mean.add(FLModel(metrics={"loss": 2.0}), 1, "a")
    with pytest.raises(UpdateRefused, match="neither"):
        mean.add(FLModel(), 1, "b")

    assert (mean.metrics, aggregator.got) == ({"loss": 2.0}, [])
    with pytest.raises(QuorumNotReached):
        mean.apply_to({})


def test_a_whole_model_is_the_new_model() -> None:
    """Parameters of type FULL become the model as they are."""
    given = full(7.0)
    mean = CustomMean(Giving(given), {"w": np.zeros(2)})
    mean.add(full(), 1, "a")

    assert mean.apply_to({"w": np.zeros(2)}) is given.params


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, ml_dtypes.bfloat16, np.complex64])
def test_a_difference_is_added_in_the_dtype_of_the_model(dtype: Any) -> None:
    """The model keeps its dtype, lies where it was asked for, and what has no difference stays."""
    model = {"w": np.full(3, 5, dtype), "still": np.ones(2)}
    pages = {"w": np.zeros(3, dtype)}
    found = added(model, {"w": np.full(3, 2, dtype)}, pages)

    assert found["w"] is pages["w"]
    assert found["w"].dtype == dtype
    assert found["w"].tolist() == [7] * 3
    assert found["still"] is model["still"]
    assert model["w"].tolist() == [5] * 3


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_differences_may_be_finer_than_the_model(dtype: Any) -> None:
    """What an aggregator computed in double precision is rounded to the model's dtype."""
    found = added({"w": np.full(3, 1, dtype)}, {"w": np.full(3, 0.1)})

    assert found["w"].dtype == dtype
    assert found["w"].astype(float).tolist() == pytest.approx([1.1] * 3, rel=0.01)


def test_differences_of_integers_are_rounded() -> None:
    """A mean of whole numbers is seldom whole: it is rounded to the nearest, as everywhere."""
    found = added({"steps": np.array([10, 10, 10])}, {"steps": np.array([0.5, 1.5, 1.6])})

    assert found["steps"].tolist() == [10, 12, 12]
    assert found["steps"].dtype == np.int64


def test_differences_of_nested_models_numbers_and_tensors() -> None:
    """Names are those of the model, however deep; numbers are added, tensors stay tensors."""
    model = {"net": {"w": np.ones(2, np.float32), "n": 3}, "t": torch.ones(2, dtype=torch.bfloat16), "note": "text"}
    step = {"net": {"w": np.ones(2, np.float32), "n": 0.5}, "t": torch.ones(2, dtype=torch.bfloat16)}
    found = added(model, step)

    assert found["net"]["w"].tolist() == [2.0, 2.0]
    assert (found["net"]["n"], found["note"]) == (3.5, "text")
    assert (found["t"].dtype, found["t"].tolist()) == (torch.bfloat16, [2.0, 2.0])


@pytest.mark.parametrize(
    ("step", "name"),
    [
        ({"v": np.zeros(3)}, "v"),
        ({"w": np.zeros(4)}, "w"),
        ({"w": np.zeros(1)}, "w"),
        ({"w": np.zeros((2, 3))}, "w"),
        ({"w": np.zeros(3, complex)}, "w"),
        ({"w": np.array([None] * 3)}, "w"),
        ({"w": 1.0}, "w"),
        ({"n": "text"}, "n"),
        ({"n": np.zeros(2)}, "n"),
        ({"note": 1}, "note"),
    ],
    ids=str,
)
def test_a_difference_that_does_not_fit_ends_the_job_with_its_name(step: dict[str, Any], name: str) -> None:
    """A fault of the aggregator is named: which parameter, and that the difference is to blame."""
    with pytest.raises(JobFailed, match=f"the aggregator's difference .*'{name}'"):
        added({"w": np.zeros(3), "n": 1, "note": "text"}, step, {"w": np.zeros(3)})


@pytest.mark.parametrize("given", [None, {"w": np.zeros(2)}, FLModel(), FLModel(params={})], ids=str)
def test_an_aggregator_that_gives_no_model_is_named(given: Any) -> None:
    """What is no model with parameters ends the job with the name of the class."""
    mean = CustomMean(Giving(given), {})
    mean.add(full(), 1, "a")

    with pytest.raises(JobFailed, match=r"Giving.aggregate_model\(\) gave no FLModel with params"):
        mean.apply_to({})


def test_without_a_result_there_is_no_model() -> None:
    """Nothing accepted, nothing to aggregate."""
    with pytest.raises(QuorumNotReached):
        CustomMean(Giving(full()), {}).apply_to({})
