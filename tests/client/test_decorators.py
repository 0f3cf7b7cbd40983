"""`@train` and `@evaluate`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flarebus.client as flare
from flarebus.errors import ClientApiError
from tests.client.fake_engine import FakeEngine


@flare.train
def train(model: flare.FLModel, step: float = 1.0) -> flare.FLModel:
    assert model.params is not None
    return flare.FLModel(params={"w": model.params["w"] + step})


@flare.evaluate()
def evaluate(model: flare.FLModel) -> dict[str, float]:
    assert model.params is not None
    return {"accuracy": float(model.params["w"][0])}


def model(value: float = 0.0) -> flare.FLModel:
    return flare.FLModel(params={"w": np.full(1, value)})


def test_train_receives_and_sends(engine: FakeEngine) -> None:
    """The function gets the received model and its own arguments; its result is the answer."""
    flare.init()
    engine.give(model())
    train(step=2.0)

    assert (engine.next_answer().params or {})["w"].tolist() == [2]


def test_model_that_is_given_is_replaced(engine: FakeEngine) -> None:
    """A caller that passes the model itself, by name or by place, gets the received one used."""
    flare.init()
    engine.give(model())
    train(model=model(99))
    engine.give(model())
    train(model(99), step=3.0)

    assert (engine.next_answer().params or {})["w"].tolist() == [1]
    assert (engine.next_answer().params or {})["w"].tolist() == [3]


def test_metrics_go_out_with_the_next_train_result_only(engine: FakeEngine) -> None:
    """They describe the received model; the next round begins without."""
    flare.init()
    for _ in range(2):
        engine.give(model(0.5))
    evaluate()
    train()
    train()

    assert engine.next_answer().metrics == {"accuracy": 0.5}
    assert engine.next_answer().metrics is None


def test_evaluate_answers_a_validate_task(engine: FakeEngine) -> None:
    """In a task to evaluate, the metrics are the answer."""
    flare.init()
    engine.give(model(0.5), "validate")
    evaluate()
    answer = engine.next_answer()

    assert (answer.metrics, answer.params) == ({"accuracy": 0.5}, None)


@pytest.mark.parametrize("decorate", [flare.train, flare.evaluate])
def test_wrong_result_is_named(engine: FakeEngine, decorate: Any) -> None:
    """The error says which function returned what."""
    flare.init()
    engine.give(model())

    def fit(received: flare.FLModel) -> float:
        return 0.5

    with pytest.raises(ClientApiError, match=r"fit\(\).*float"):
        decorate(fit)()


def test_end_of_job_is_an_error(engine: FakeEngine) -> None:
    """A decorated function that is called without a task says why there is none."""
    flare.init()
    engine.end("aborted by ada")

    with pytest.raises(ClientApiError, match="aborted by ada"):
        train()
