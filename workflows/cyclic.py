"""Cyclic weight transfer (Chang et al., "Distributed deep learning networks among institutions for medical imaging",
2018).

In round t the model w goes from site to site. Each trains it on its own examples and hands it on; what the last one has
made of it begins the next round:

    w  <-  train_k(w)          for one site k after the other          (a site may send the difference train_k(w) - w)

Nothing is averaged, and the order matters: the last sites of a round leave the deepest mark.

`python -m workflows.cyclic` trains a small network on handwritten digits; with arguments, anybody's training script.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from flarebus.client.memory import release_memory
from flarebus.errors import JobFailed, QuorumNotReached, UpdateRefused
from flarebus.model import FLModel, MetaKey
from flarebus.workflow.controller import Controller, Job, Order, Result, Task
from flarebus.workflow.mean import WeightedMean
from flarebus.workflow.selection import BestModelSelector

__all__ = ["Cyclic"]


class Cyclic(Controller):
    """The server side of cyclic weight transfer.

    A site that is not there when its turn comes, that fails, or that is too slow, is passed over; so is an update that
    cannot be used. The metrics of a round are those of the first site whose update counted: only that one received the
    model which entered the round.

    Args:
        num_rounds: rounds in all.
        min_clients: sites that have to be there when a round begins, from 2; with fewer the job fails and keeps the
            last model.
        order: an `Order`, or the names of the sites one after the other, each as often as its turn comes in a round.
        seed: of random orders; the same seed draws the same ones for the same sites.
        task_assignment_timeout: seconds that a site which is not there has to come in its turn; None gives up only who
            will not come.
        task_result_timeout: seconds that a site may train; None leaves it to its life.
        allow_early_termination: a site ends the job, with the update that it sends, by `EARLY_TERMINATION` in its meta.
        exclude_vars: regular expression; parameters in whose name it is found keep their value.
        key_metric: the metric that says which model is the best; "" keeps none.
        key_metric_mode: "max" or "min"; None infers it, see `BestModelSelector`.
        memory_gc_rounds: give memory back to the system every so many rounds; 0 never.
        hyper_params: go to the sites beside the parameters of every model; sites answer without them.
    """

    def __init__(
        self,
        *,
        num_rounds: int,
        min_clients: int = 2,
        order: Order | str | Sequence[str] = Order.FIXED,
        seed: int = 0,
        task_assignment_timeout: float | None = 10.0,
        task_result_timeout: float | None = None,
        allow_early_termination: bool = False,
        exclude_vars: str | None = None,
        key_metric: str = "accuracy",
        key_metric_mode: str | None = None,
        memory_gc_rounds: int = 0,
        hyper_params: Mapping[str, Any] | None = None,
    ) -> None:
        self.num_rounds = num_rounds
        self.min_clients = min_clients
        self.order = Order(order) if isinstance(order, str) else list(order)
        self.seed = seed
        self.task_assignment_timeout = task_assignment_timeout
        self.task_result_timeout = task_result_timeout
        self.allow_early_termination = allow_early_termination
        self.exclude_vars = exclude_vars
        self.selector = BestModelSelector(key_metric, key_metric_mode, None)
        self.memory_gc_rounds = memory_gc_rounds
        self.hyper_params = dict(hyper_params or {})

    def run(self, job: Job) -> None:
        """Hand the model round for `num_rounds` rounds, or until a site that may do so ends it."""
        model = job.initial_params()
        for number in job.rounds(self.num_rounds):
            model, has_ended = self._round(job, number, model)
            if self.memory_gc_rounds and (number + 1) % self.memory_gc_rounds == 0:
                release_memory()
            if has_ended:
                return

    def _round(self, job: Job, number: int, entered: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        turns = self.turns(job.sites, number)
        self._check_present(number, turns, job.sites)
        model, metrics, has_ended = entered, None, False
        refused: dict[str, str] = {}
        for result in job.relay(
            Task("train", self._with_hyper_params(model), number, self.num_rounds),
            turns,
            assignment_timeout=self.task_assignment_timeout,
            timeout=self.task_result_timeout,
        ):
            try:
                mean = self._checked(model, result)
            except UpdateRefused as why:
                refused[result.site] = why.reason
                result.refuse(UpdateRefused(why.reason, why.key))
                continue
            model = mean.apply_to(model)
            metrics = mean.metrics if metrics is None else metrics
            has_ended = self.allow_early_termination and result.model.meta.get(MetaKey.EARLY_TERMINATION) is True
            if has_ended:
                break
            result.model = self._with_hyper_params(model)
        if metrics is None:
            raise QuorumNotReached(1, 0, refused)
        # A model that nobody received has not been judged.
        job.commit(number, model, metrics, best=bool(entered) and self.selector.is_best(metrics))
        return model, has_ended

    def turns(self, sites: Sequence[str], number: int) -> list[str]:
        """Whose turn it is in round `number`, one after the other: from the order, the seed and the sites alone."""
        if isinstance(self.order, list):
            return self.order
        if self.order is Order.FIXED:
            return sorted(sites)
        if self.order is Order.RANDOM:
            return self._drawn(sites, number)
        turns: list[str] = []
        for each in range(number + 1):
            last, turns = turns[-1:], self._drawn(sites, each)
            if last == turns[:1] and len(turns) > 1:
                turns.append(turns.pop(0))
        return turns

    def _drawn(self, sites: Sequence[str], number: int) -> list[str]:
        return random.Random(f"{self.seed}/{number}").sample(sorted(sites), len(sites))

    def _check_present(self, number: int, turns: Sequence[str], present: Sequence[str]) -> None:
        there = set(turns) & set(present)
        if len(there) < self.min_clients:
            names = ", ".join(sorted(there)) or "none"
            raise JobFailed(
                f"round {number + 1} needs {self.min_clients} sites; of those with a turn are there: {names}"
            )

    def _checked(self, model: dict[str, Any], result: Result) -> WeightedMean:
        """What a site made of the model, checked as in federated averaging: the mean of one is that one."""
        if result.model.params is None:
            raise UpdateRefused("no parameters in it")
        mean = WeightedMean(model, self.exclude_vars)
        mean.add(result.model, 1, result.site)
        return mean

    def _with_hyper_params(self, model: dict[str, Any]) -> FLModel:
        return FLModel(params={**model, **self.hyper_params})


if __name__ == "__main__":
    from workflows._program import main

    raise SystemExit(main(workflow="cyclic"))
