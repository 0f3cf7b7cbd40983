"""A job in memory: sites answer as the test says; what the controller does is noted. No bus, no threads, no files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import numpy as np

from flarebus.errors import QuorumNotReached
from flarebus.model import FLModel
from flarebus.workflow.controller import Result, Task

__all__ = ["FakeJob", "Round", "update"]

Answer = Callable[[str, int, dict[str, Any]], FLModel | None]


@dataclass
class Round:
    """What a controller did in one round."""

    task: Task
    sites: list[str]
    how: dict[str, Any]
    refused: dict[str, str] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    best: bool | None = None


class FakeJob:
    """Implements `flarebus.workflow.controller.Job`.

    Args:
        answer: (site, round, received parameters) -> what the site sends, or None if it fails.
        sites: names.
        params: the model that the job came with.
        first_round: rounds before this one are committed already.
        order: results arrive in an order drawn from this seed.
    """

    def __init__(
        self,
        answer: Answer,
        sites: Sequence[str] = ("a", "b"),
        params: dict[str, Any] | None = None,
        first_round: int = 0,
        order: int = 0,
    ) -> None:
        self.name = "job"
        self.job_id = "1" * 32
        self.sites: Sequence[str] = sorted(sites)
        self.rounds_done: list[Round] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.pages_given: dict[str, Any] = {}
        self._answer = answer
        self._params: dict[str, Any] = {} if params is None else params
        self._first = first_round
        self._order = Random(order)

    @property
    def model(self) -> dict[str, Any]:
        """The model committed last."""
        return self.rounds_done[-1].params

    def initial_params(self) -> dict[str, Any]:
        return self._params

    def rounds(self, num_rounds: int) -> Iterator[int]:
        yield from range(self._first, num_rounds)

    def broadcast(
        self, task: Task, *, sites: Sequence[str] | None = None, min_responses: int = 0, **how: Any
    ) -> Iterator[Result]:
        targets = list(self.sites if sites is None else sites)
        self.rounds_done.append(Round(task, targets, {"min_responses": min_responses, **how}))
        refused = self.rounds_done[-1].refused
        arriving = targets if how.get("in_order") else self._order.sample(targets, len(targets))
        failed = {}
        for site in arriving:
            model = self._answer(site, task.round, {**(task.model.params or {}), **task.beside})
            if model is None:
                failed[site] = "the script failed"
            else:
                yield Result(site, task.round, model, refused.__setitem__)
        usable = len(targets) - len(failed) - len(refused)
        if usable < (min_responses or len(targets)):
            raise QuorumNotReached(min_responses, usable, {**failed, **refused})

    def relay(self, task: Task, sites: Sequence[str], **how: Any) -> Iterator[Result]:
        self.rounds_done.append(Round(task, list(sites), how))
        done, answered = self.rounds_done[-1], 0
        for site in sites:
            assert isinstance(task.model, FLModel)
            model = self._answer(site, task.round, task.model.params or {})
            if model is None:
                continue
            result = Result(site, task.round, model, done.refused.__setitem__)
            answered += 1
            yield result
            if not result.is_refused:
                task = replace(task, model=result.model)
        if not answered:
            raise QuorumNotReached(1, 0, dict.fromkeys(sites, "the script failed"))

    def pages(self, params: Mapping[str, Any]) -> dict[str, Any]:
        arrays = {name: value for name, value in params.items() if isinstance(value, np.ndarray)}
        self.pages_given = {name: np.full_like(array, 77) for name, array in arrays.items()}
        return self.pages_given

    def commit(self, round: int, params: dict[str, Any], metrics: Mapping[str, Any], *, best: bool = False) -> None:
        done = self.rounds_done[-1]
        assert round == done.task.round
        done.params, done.metrics, done.best = params, dict(metrics), best

    def fire(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))


def update(value: Any, steps: Any = 1, kind: str = "FULL", size: int = 3, **metrics: Any) -> FLModel:
    """What a site answers: a number in every weight, after so many steps."""
    params = {"w": np.full(size, value, np.float32)}
    return FLModel(kind, params, metrics=metrics or None, meta={"NUM_STEPS_CURRENT_ROUND": steps})
