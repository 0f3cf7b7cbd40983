"""Federated averaging (McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
2017).

In round t the server sends the model w to the sites; site k trains it on its n_k examples and answers with w_k; the new
model is the mean of the answers, each weighted with its n_k:

    w  <-  sum_k (n_k / n) w_k          n = sum_k n_k        (a site may send the difference w_k - w instead)

`python -m workflows.fedavg` trains a small network on handwritten digits; with arguments, anybody's training script.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from flarebus.client.memory import release_memory
from flarebus.errors import UpdateRefused
from flarebus.model import FLModel
from flarebus.workflow.aggregator import ModelAggregator, RoundMean
from flarebus.workflow.controller import Controller, Job, Task
from flarebus.workflow.custom import CustomMean
from flarebus.workflow.mean import WeightedMean
from flarebus.workflow.selection import BestModelSelector, StopRule
from flarebus.workflow.weights import weight_of

__all__ = ["FedAvg"]


class FedAvg(Controller):
    """The server side of federated averaging.

    Algorithms that differ from it in what they send, gather or make of it override `new_task`, `new_mean` and
    `update_model`; rounds, quorum, refusals and the best model stay what they are here.

    Args:
        num_rounds: rounds in all.
        min_clients: usable results that a round needs; with fewer the job fails and keeps the last model.
        clients_per_round: sites drawn for each round; None takes all of them.
        seed: of the draw; the same seed draws the same sites.
        deterministic: fold results in the order of the sites' names, so that two runs agree bit for bit.
        wait_time_after_min_received: seconds that the others have once `min_clients` have answered; None waits for all
            that are alive.
        round_timeout: seconds for a round; None is no limit.
        exclude_vars: regular expression; parameters in whose name it is found keep their value.
        aggregation_weights: site -> factor on its number of examples; 1 for those not named.
        aggregator: combines the results instead of the mean; see `ModelAggregator`.
        key_metric: the metric that says which model is the best; "" keeps none.
        key_metric_mode: "max" or "min"; None infers it, see `BestModelSelector`.
        stop_cond: such as "accuracy >= 0.95": no more rounds once a round's metrics meet it.
        patience: no more rounds after so many without a better `stop_cond` metric.
        enable_tensor_disk_offload: results wait in files, not in memory. Read by the server job.
        memory_gc_rounds: give memory back to the system every so many rounds; 0 never.
        hyper_params: go to the sites beside the parameters of every model; sites answer without them.
    """

    def __init__(
        self,
        *,
        num_rounds: int,
        min_clients: int,
        clients_per_round: int | None = None,
        seed: int = 0,
        deterministic: bool = False,
        wait_time_after_min_received: float | None = None,
        round_timeout: float | None = None,
        exclude_vars: str | None = None,
        aggregation_weights: Mapping[str, float] | None = None,
        aggregator: ModelAggregator | None = None,
        key_metric: str = "accuracy",
        key_metric_mode: str | None = None,
        stop_cond: str | None = None,
        patience: int | None = None,
        enable_tensor_disk_offload: bool = False,
        memory_gc_rounds: int = 0,
        hyper_params: Mapping[str, Any] | None = None,
    ) -> None:
        self.num_rounds = num_rounds
        self.min_clients = min_clients
        self.clients_per_round = clients_per_round
        self.seed = seed
        self.deterministic = deterministic
        self.wait_time_after_min_received = wait_time_after_min_received
        self.round_timeout = round_timeout
        self.exclude_vars = exclude_vars
        self.aggregation_weights = dict(aggregation_weights or {})
        self.aggregator = aggregator
        self.selector = BestModelSelector(key_metric, key_metric_mode, stop_cond)
        self.stop_rule = StopRule(stop_cond, patience)
        self.enable_tensor_disk_offload = enable_tensor_disk_offload
        self.memory_gc_rounds = memory_gc_rounds
        self.hyper_params = dict(hyper_params or {})

    def run(self, job: Job) -> None:
        """Average for `num_rounds` rounds, or until the stop condition is met."""
        model = job.initial_params()
        for number in job.rounds(self.num_rounds):
            model, metrics = self._round(job, number, model)
            if self.memory_gc_rounds and (number + 1) % self.memory_gc_rounds == 0:
                release_memory()
            if self.stop_rule.is_met(metrics):
                return

    def _round(self, job: Job, number: int, model: dict[str, Any]) -> tuple[dict[str, Any], Mapping[str, float]]:
        mean = self._train(job, number, model)
        # A model that nobody received has not been judged.
        is_best = bool(model) and self.selector.is_best(mean.metrics)
        job.fire("before_aggregation", round=number, metrics=mean.metrics)
        model = self.update_model(job, model, mean)
        job.fire("after_aggregation", round=number)
        job.commit(number, model, mean.metrics, best=is_best)
        return model, mean.metrics

    def _train(self, job: Job, number: int, model: dict[str, Any]) -> RoundMean:
        mean = self.new_mean(model)
        for result in job.broadcast(
            self.new_task(number, model),
            sites=self._sample(job.sites, number),
            min_responses=self.min_clients,
            wait_time_after_min_received=self.wait_time_after_min_received,
            timeout=self.round_timeout,
            in_order=self.deterministic,
        ):
            try:
                mean.add(result.model, weight_of(result, self.aggregation_weights), result.site)
            except UpdateRefused as why:
                result.refuse(UpdateRefused(why.reason, why.key))  # whose it is, the result knows
        return mean

    # What an algorithm on this frame does in its own way.

    def new_task(self, number: int, model: dict[str, Any]) -> Task:
        """What the sites are given in round `number`."""
        return Task("train", FLModel(params=model), number, self.num_rounds, beside=self.hyper_params)

    def new_mean(self, model: dict[str, Any]) -> RoundMean:
        """Where the results of one round are gathered."""
        if self.aggregator is not None:
            return CustomMean(self.aggregator, model)
        return WeightedMean(model, self.exclude_vars)

    def update_model(self, job: Job, model: dict[str, Any], mean: RoundMean) -> dict[str, Any]:
        """The next model, from the one that the sites were given and what they made of it."""
        return mean.apply_to(model, out=job.pages(model))

    def _sample(self, sites: Sequence[str], number: int) -> Sequence[str]:
        """The sites of one round; drawn anew each round, from the seed and the round alone."""
        if self.clients_per_round is None or self.clients_per_round >= len(sites):
            return sites
        return sorted(random.Random(f"{self.seed}/{number}").sample(sorted(sites), self.clients_per_round))


if __name__ == "__main__":
    from workflows._program import main

    raise SystemExit(main())
