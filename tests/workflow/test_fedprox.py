"""FedProx: mu goes to every site with the model, and the rest is federated averaging."""

from __future__ import annotations

import numpy as np

from tests.workflow.fake_job import FakeJob, update
from workflows.fedavg import FedAvg
from workflows.fedprox import FedProx

ZEROS = {"w": np.zeros(3, np.float32)}


def test_every_task_tells_mu() -> None:
    """The task of each round carries mu beside the model, under the name that scripts look for."""
    job = FakeJob(lambda *_: update(1), params=ZEROS)
    FedProx(fedprox_mu=0.25, num_rounds=2, min_clients=2).run(job)

    assert [done.task.meta for done in job.rounds_done] == [{"fedprox_mu": 0.25}] * 2
    assert [(done.task.name, done.task.round, done.task.total_rounds) for done in job.rounds_done] == [
        ("train", 0, 2),
        ("train", 1, 2),
    ]


def test_the_server_averages_as_ever() -> None:
    """Apart from mu the server does what it does in federated averaging, which sends nothing beside the model."""
    plain, proximal = (
        FakeJob(lambda site, *_: update(0, 1, loss=1.0) if site == "a" else update(4, 3, loss=2.0), params=ZEROS)
        for _ in range(2)
    )
    FedAvg(num_rounds=1, min_clients=2).run(plain)
    FedProx(fedprox_mu=0.25, num_rounds=1, min_clients=2).run(proximal)

    assert plain.rounds_done[0].task.meta == {}
    assert proximal.model["w"].tolist() == plain.model["w"].tolist() == [3.0] * 3
    assert proximal.rounds_done[0].metrics == plain.rounds_done[0].metrics
