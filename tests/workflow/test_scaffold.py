"""SCAFFOLD's server: c goes out with the model, and follows what the sites say has changed in theirs."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from flarebus.errors import QuorumNotReached
from flarebus.model import FLModel
from tests.workflow.fake_job import FakeJob
from workflows.fedavg import FedAvg
from workflows.scaffold import Scaffold

ZEROS = {"w": np.zeros(2, np.float32)}


def answer(value: float, change: Any, steps: int = 1, kind: str = "FULL", **metrics: float) -> FLModel:
    """What a site sends: a number in every weight, and a change of its control variate."""
    control = {"w": np.full(2, change, np.float32)} if isinstance(change, int | float) else change
    return FLModel(
        kind,
        {"w": np.full(2, value, np.float32)},
        optimizer_params={"scaffold_c": control},
        metrics=metrics or None,
        meta={"NUM_STEPS_CURRENT_ROUND": steps},
    )


def run(job: FakeJob, rounds: int = 1, **settings: Any) -> Scaffold:
    workflow = Scaffold(**{"num_rounds": rounds, "min_clients": 1, **settings})
    workflow.run(job)
    return workflow


def sent(job: FakeJob) -> list[Any]:
    """The c of each round, as the sites got it."""
    found = []
    for done in job.rounds_done:
        assert done.task.model.optimizer_params is not None
        found.append({name: value.tolist() for name, value in done.task.model.optimizer_params["scaffold_c"].items()})
    return found


def test_hyper_params_go_out_too() -> None:
    """What federated averaging sends beside the model, SCAFFOLD sends as well."""
    job = FakeJob(lambda *_: answer(1, 1), params=ZEROS)
    run(job, hyper_params={"rate": 0.5})

    task = job.rounds_done[0].task
    assert ((task.model.params or {}).keys(), task.beside) == ({"w"}, {"rate": 0.5})
    assert sent(job) == [{"w": [0, 0]}]


@pytest.mark.parametrize("kind", ["FULL", "DIFF"])
def test_two_rounds_by_hand(kind: str) -> None:
    """c begins at zero and moves by the mean of the changes, whether sites send models or differences."""

    def of_site(site: str, round: int, params: dict[str, Any]) -> FLModel:
        base = 0.0 if kind == "DIFF" else float(params["w"][0])
        return answer(base + (1.0 if site == "a" else 3.0), 2.0 if site == "a" else -4.0, kind=kind)

    job = FakeJob(of_site, params=ZEROS)
    workflow = run(job, rounds=3)

    assert sent(job) == [{"w": [0.0, 0.0]}, {"w": [-1.0, -1.0]}, {"w": [-2.0, -2.0]}]
    assert workflow.control["w"].tolist() == [-3.0, -3.0]
    assert [done.params["w"][0] for done in job.rounds_done] == [2.0, 4.0, 6.0]
    assert job.model["w"] is job.pages_given["w"]


def test_sites_weigh_the_same_in_model_and_control_variate() -> None:
    """A site with three times the steps counts three times, in both."""
    job = FakeJob(lambda site, *_: answer(0, 0) if site == "a" else answer(4, 8, steps=3), params=ZEROS)
    workflow = run(job)

    assert (job.model["w"].tolist(), workflow.control["w"].tolist()) == ([3.0, 3.0], [6.0, 6.0])


def test_sites_that_take_no_part_keep_their_share_of_c() -> None:
    """If one of four sites answers, c moves by a quarter of what changed there."""
    job = FakeJob(lambda *_: answer(1, 8), "abcd", ZEROS)
    workflow = run(job, clients_per_round=1)

    assert workflow.control["w"].tolist() == [2.0, 2.0]
    assert job.model["w"].tolist() == [1.0, 1.0]


def test_what_was_sent_does_not_change_later() -> None:
    """A site that is late still reads the c of its round."""
    job = FakeJob(lambda *_: answer(1, 8), params=ZEROS)
    run(job, rounds=2)
    first, second = (done.task.model.optimizer_params for done in job.rounds_done)

    assert first is not None
    assert second is not None
    assert first["scaffold_c"]["w"].tolist() == [0.0, 0.0]
    assert not np.shares_memory(first["scaffold_c"]["w"], second["scaffold_c"]["w"])


def test_what_is_not_trained_does_not_change_c() -> None:
    """c covers floating-point arrays, in at least float32; those that a site says nothing about stay."""
    model = {
        "net": {"w": np.zeros(2, ml_dtypes.bfloat16), "frozen": np.zeros(1)},
        "steps": np.zeros(1, np.int64),
        "scale": 1.0,
    }

    def of_site(site: str, *_: Any) -> FLModel:
        change = {"net.w": np.full(2, 0.001, np.float32)}
        return FLModel(params=model, optimizer_params={"scaffold_c": change})

    workflow = run(FakeJob(of_site, params=model))

    assert {name: value.dtype.name for name, value in workflow.control.items()} == {
        "net.w": "float32",
        "net.frozen": "float64",
    }
    assert workflow.control["net.w"].tolist() == [np.float32(0.001)] * 2
    assert workflow.control["net.frozen"].tolist() == [0.0]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (FLModel(params={"w": np.ones(2, np.float32)}), "no control variate"),
        (answer(1, [1.0]), "no control variate"),
        (answer(1, {"v": np.ones(2, np.float32)}), "'v'"),
        (answer(1, {"w": np.ones(3, np.float32)}), "shape"),
        (answer(1, {"w": np.full(2, np.nan, np.float32)}), "NaN"),
        (answer(np.inf, 1), "NaN or Inf"),
        (answer(1, 1, steps=-1), "weight"),
    ],
    ids=["none", "no dict", "unknown", "shape", "NaN in c", "Inf in model", "weight"],
)
def test_half_a_bad_answer_is_a_bad_answer(bad: FLModel, said: str) -> None:
    """If model or control variate cannot be used neither counts, and the reason is told."""
    job = FakeJob(lambda site, *_: bad if site == "a" else answer(2, 4), params=ZEROS)
    workflow = run(job, deterministic=True)

    assert list(job.rounds_done[0].refused) == ["a"]
    assert said in job.rounds_done[0].refused["a"]
    assert job.model["w"].tolist() == [2.0, 2.0]
    assert workflow.control["w"].tolist() == [2.0, 2.0]  # one of two sites


def test_metrics_alone_need_no_control_variate() -> None:
    """An answer that only measures is averaged as ever."""
    job = FakeJob(
        lambda site, *_: FLModel(metrics={"loss": 1.0}) if site == "a" else answer(2, 4, loss=3.0), params=ZEROS
    )
    run(job)

    assert job.rounds_done[0].metrics == {"loss": 2.0}
    assert job.rounds_done[0].refused == {}
    with pytest.raises(QuorumNotReached):
        run(FakeJob(lambda *_: FLModel(metrics={"loss": 1.0}), params=ZEROS))


def test_a_job_may_begin_without_a_model() -> None:
    """The first answers make model and c; one that does not fit the first is refused whole."""
    bad = answer(1, {"v": np.ones(2, np.float32)})
    job = FakeJob(lambda site, *_: bad if site == "b" else answer(2, 4), "abc")
    workflow = run(job, rounds=2, deterministic=True)

    assert sent(job) == [{}, {"w": [np.float32(4 * 2 / 3)] * 2}]
    assert [list(done.refused) for done in job.rounds_done] == [["b"], ["b"]]
    assert workflow.control["w"] == pytest.approx(4 * 4 / 3)


def test_tensors_are_taken_as_well() -> None:
    """A job whose server gets tensors works like any other."""

    def of_site(*_: Any) -> FLModel:
        return FLModel(params={"w": torch.ones(2)}, optimizer_params={"scaffold_c": {"w": torch.full((2,), 4.0)}})

    job = FakeJob(of_site, params={"w": torch.zeros(2)})

    assert run(job).control["w"].tolist() == [4.0, 4.0]
    assert job.model["w"].tolist() == [1.0, 1.0]


def test_without_change_it_is_federated_averaging() -> None:
    """As long as the control variates are zero the models are those of federated averaging."""
    plain, scaffold = (
        FakeJob(lambda site, round, params: answer(params["w"][0] + ord(site), 0), params=ZEROS) for _ in range(2)
    )
    FedAvg(num_rounds=2, min_clients=1).run(plain)
    run(scaffold, rounds=2)

    assert scaffold.model["w"].tolist() == plain.model["w"].tolist()
