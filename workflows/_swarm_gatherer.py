"""Gatherer: gathers the results of one round at the site that aggregates it, and makes the next model of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flarebus.errors import UpdateRefused
from flarebus.workflow.aggregator import RoundMean
from flarebus.workflow.controller import Result, Task
from flarebus.workflow.site_controller import SiteJob
from flarebus.workflow.weights import weight_of

__all__ = ["Gatherer", "MetricComparator"]


class MetricComparator:
    """Compares two values of the key metric; what `metric_comparator_id` names has this method."""

    def compare(self, a: float, b: float) -> float:
        """Above 0 if `a` is better than `b`, below 0 if it is worse."""
        return a - b


class Gatherer:
    """One round at its aggregator.

    Args:
        task_data: what the trainers do.
        for_round: its round, from 0.
        executor: of the aggregating site; it gives the task to the trainers.
        aggregator: what the results become a model in.
        metric_comparator: says which of two values of the key metric is better.
        all_clients: the sites of the swarm.
        trainers: those of them who take part in this round.
        min_responses_required: usable results that the round needs; 0 is one of each trainer.
        wait_time_after_min_resps_received: seconds that the others have from then on; None for as long as they live.
        timeout: seconds for all of it; None leaves it to the trainers' lives.
        max_concurrent_submissions: results of more than 1 MiB fetched at once; smaller ones come with their messages. A
            place is held no longer than its result comes: the next one has it as soon as a trainer dies.
        request_to_submit_result_max_wait: seconds that a result may wait for its place; None for no limit.
        aggregation_weights: site -> factor of the weight of its results.
        in_order: use results in the order of the sites' names, so that the bits of the mean do not depend on time.
        resumes: another site began the round: trainers give what they have made for it.
    """

    def __init__(
        self,
        task_data: Task,
        for_round: int,
        executor: SiteJob,
        aggregator: RoundMean,
        metric_comparator: MetricComparator,
        all_clients: Sequence[str],
        trainers: Sequence[str],
        min_responses_required: int,
        wait_time_after_min_resps_received: float | None,
        timeout: float | None,
        max_concurrent_submissions: int = 1,
        *,
        request_to_submit_result_max_wait: float | None = None,
        aggregation_weights: Mapping[str, float] | None = None,
        in_order: bool = False,
        resumes: bool = False,
    ) -> None:
        self.for_round = for_round
        self.trainers = list(trainers)
        self.accepted: list[str] = []
        """The sites whose results are in the mean."""
        self._task = task_data
        self._executor = executor
        self._aggregator = aggregator
        self._comparator = metric_comparator
        self._all_clients = frozenset(all_clients)
        self._weights = dict(aggregation_weights or {})
        self._how: dict[str, Any] = {
            "min_responses": min(min_responses_required, len(self.trainers)),
            "wait_time_after_min_received": wait_time_after_min_resps_received,
            "timeout": timeout,
            "in_order": in_order,
            "most_staged": max_concurrent_submissions,
            "staging_timeout": request_to_submit_result_max_wait,
            "resumes": resumes,
        }
        self._is_done = False

    def run(self) -> None:
        """Give the task out, and gather results until the round is over, or taken over by another site.

        Raises:
            QuorumNotReached: fewer usable results than are required.
            JobAborted: the job has ended.
        """
        for result in self._executor.broadcast(self._task, sites=self.trainers, **self._how):
            self.gather(result.site, result)
        self._is_done = True

    def can_accept_submission(self, client_name: str, result: Result) -> str:
        """Why this result must not count, or ""."""
        if client_name not in self._all_clients:
            return f"{client_name} is no site of this swarm"
        if client_name not in self.trainers:
            return f"{client_name} does not train in round {self.for_round}"
        if result.round != self.for_round:
            return f"a result of round {result.round}, this is round {self.for_round}"
        return f"{client_name} has submitted already" if client_name in self.accepted else ""

    def gather(self, client_name: str, result: Result) -> None:
        """Take one result in, or refuse it; whose it is hears why."""
        reason = self.can_accept_submission(client_name, result)
        if reason:
            result.refuse(reason)
            return
        try:
            self._aggregator.add(result.model, weight_of(result, self._weights), client_name)
        except UpdateRefused as why:
            result.refuse(UpdateRefused(why.reason, why.key))  # whose it is, the result knows
        else:
            self.accepted.append(client_name)

    def is_done(self) -> bool:
        """Whether the round is over, and nobody's result is waited for."""
        return self._is_done

    @property
    def metrics(self) -> dict[str, float]:
        """The weighted mean of each metric; of the model that entered the round."""
        return self._aggregator.metrics

    def better(self, key_metric: str, best: float | None) -> float | None:
        """The key metric of the model that entered the round, if it is better than `best`; else None. A missing or
        non-finite value is never better."""
        value = self.metrics.get(key_metric) if key_metric else None
        if value is None or not math.isfinite(value):
            return None
        return value if best is None or self._comparator.compare(value, best) > 0 else None

    def aggregate(self, model: dict[str, Any]) -> dict[str, Any]:
        """The next model, from the one that entered the round; on the pages of the next model file."""
        return self._aggregator.apply_to(model, out=self._executor.shelf.pages(model))
