"""Ranks that share a task although some of them saw another one: real engines in two threads, each a rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import flarebus.client as flare
from flarebus.client import torch_task
from flarebus.client.engine import Seat, sit
from flarebus.client.ex_process.engine import TrainerEngine
from flarebus.client.ex_process.words import unpack
from flarebus.client.torch_params import ModuleParams
from flarebus.client.torch_task import TorchTask
from tests.client.played_job import LIMIT_S, PlayedJob, weights

N_RANKS = 2


class Ranks:
    """What `torch.distributed` does for ranks in processes of their own, between threads."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(N_RANKS, timeout=LIMIT_S)
        self._numbers: list[Any] = [None] * N_RANKS
        self._here = threading.local()

    def be(self, rank: int) -> None:
        """The calling thread is this rank."""
        self._here.rank = rank

    def gather(self, number: int | None) -> list[Any]:
        """What every rank has handed in."""
        self._numbers[self._here.rank] = number
        self._barrier.wait()
        found = list(self._numbers)
        self._barrier.wait()
        return found


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    found = Ranks()
    monkeypatch.setattr(torch_task, "n_ranks", lambda: N_RANKS)
    monkeypatch.setattr(torch_task, "_gather", found.gather)
    return found


@pytest.fixture
def job() -> Iterator[PlayedJob]:
    played = PlayedJob(ranks=N_RANKS)
    yield played
    played.close()


def train_once(
    engine: TrainerEngine, ranks: Ranks, module: nn.Module, meanwhile: Callable[[], None] = lambda: None
) -> bool:
    """One round of a script on one rank, whose training adds the number of ranks to every weight; False if there was
    none. `meanwhile` happens once this rank has a task."""
    ranks.be(engine.rank)
    with sit(Seat(engine), {}):
        context = flare.init(rank=engine.rank)
        task = TorchTask(context, ModuleParams(strict=True), "evaluate()")
        flare.is_running()
        meanwhile()
        if not task.begin_training(module):
            return False
        task.load(module)
        with torch.no_grad():
            module.get_parameter("w").add_(N_RANKS)
        task.answer(module, n_steps=3)
        return True


@pytest.fixture
def engines(job: PlayedJob) -> Iterator[list[TrainerEngine]]:
    made = [job.engine(rank=rank, exchange_format="pytorch", train_with_eval=False) for rank in range(N_RANKS)]
    yield made
    for engine in made:
        engine.close()


@pytest.fixture
def nets() -> list[nn.Module]:
    made = []
    for _ in range(N_RANKS):
        module = nn.Module()
        module.w = nn.Parameter(torch.zeros(1000))
        made.append(module)
    return made


def test_ranks_that_are_behind_let_their_task_go(
    job: PlayedJob, ranks: Ranks, engines: list[TrainerEngine], nets: list[nn.Module]
) -> None:
    """Rank 0 holds a task that was taken back before rank 1 looked; both work on the one after it, and rank 0 answers
    that one, once."""

    def take_back() -> None:
        job.cancel(0)
        job.give(1, 20.0, ranks=(0, 1))

    job.give(0, 10.0, ranks=(0,))
    with ThreadPoolExecutor(N_RANKS) as threads:
        done = [
            threads.submit(train_once, engines[0], ranks, nets[0], take_back),
            threads.submit(train_once, engines[1], ranks, nets[1]),
        ]
        result = job.next("result")
        job.answer(result)
        assert all(each.result(LIMIT_S) for each in done)

    assert unpack(result.body, number=int)["number"] == 1
    assert weights(result)[0] == 20.0 + N_RANKS
    assert [net.get_parameter("w")[0].item() for net in nets] == [20.0 + N_RANKS] * N_RANKS
    assert job.said.empty()


def test_no_rank_trains_alone_at_the_end(
    job: PlayedJob, ranks: Ranks, engines: list[TrainerEngine], nets: list[nn.Module]
) -> None:
    """If one rank has heard of the end of the job and another one still holds a task, nobody trains."""
    job.give(0, 10.0, ranks=(0,))
    with ThreadPoolExecutor(N_RANKS) as threads:
        done = [
            threads.submit(train_once, engines[0], ranks, nets[0]),
            threads.submit(train_once, engines[1], ranks, nets[1]),
        ]
        job.handlers[1].notify_end("the job has ended")
        assert [each.result(LIMIT_S) for each in done] == [False, False]

    assert job.said.empty()
