"""FedOpt: the mean of the answers is where the server's optimizer steps to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.workflow.fake_job import FakeJob, update
from tests.workflow.test_fedavg import Sum
from workflows.fedavg import FedAvg
from workflows.fedopt import FedOpt

ZEROS = {"w": np.zeros(3, np.float32)}
SGD = {"server_optimizer": "sgd", "optimizer_args": {"lr": 0.5, "momentum": 0.5}, "average_vars": None}


def run(job: FakeJob, rounds: int = 1, **settings: Any) -> FakeJob:
    FedOpt(**{"num_rounds": rounds, "min_clients": 1, **SGD, **settings}).run(job)
    return job


def committed(job: FakeJob) -> list[float]:
    return [done.params["w"][0] for done in job.rounds_done]


@pytest.mark.parametrize("kind", ["FULL", "DIFF"])
def test_the_server_steps_towards_the_weighted_mean(kind: str) -> None:
    """Models and differences of one meaning give the same steps, with the momentum of the rounds before."""

    def answer(site: str, round: int, params: dict[str, Any]) -> Any:
        change = 0.0 if site == "a" else 4.0  # 3 on average, with weights 1 and 3
        return update(change if kind == "DIFF" else params["w"][0] + change, 1 if site == "a" else 3, kind)

    job = run(FakeJob(answer, params=ZEROS), rounds=3)

    # m: 3, 4.5, 5.25
    assert committed(job) == [1.5, 3.75, 6.375]
    assert job.model["w"] is job.pages_given["w"]
    assert ZEROS["w"].tolist() == [0.0] * 3


def test_plain_steps_are_federated_averaging() -> None:
    """With a rate of 1 and no momentum the server takes the mean, as ever."""
    answer = lambda site, round, params: update(params["w"][0] + ord(site))  # noqa: E731
    plain, stepped = (FakeJob(answer, params=ZEROS) for _ in range(2))
    FedAvg(num_rounds=2, min_clients=1).run(plain)
    run(stepped, 2, optimizer_args={"lr": 1.0, "momentum": 0.0})

    assert committed(stepped) == committed(plain) == [97.5, 195.0]


def test_it_steps_towards_what_a_custom_aggregator_gives() -> None:
    """The direction may come from any aggregator."""
    job = run(FakeJob(lambda *_: update(1), params=ZEROS), aggregator=Sum(), deterministic=True)

    assert committed(job) == [1.0]


def test_a_job_may_begin_without_a_model() -> None:
    """The first answers make the model, and the next ones are steps from it."""
    job = run(FakeJob(lambda site, round, params: update(4 if not params else params["w"][0] + 2)), rounds=2)

    assert committed(job) == [4.0, 5.0]
