"""Gatherer: gathers the results of one round at the site that aggregates it, and makes the next model of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flarebus.errors import UpdateRefused
from flarebus.workflow.aggregator import RoundMean
from flarebus.workflow.controller import Task
from flarebus.workflow.site_controller import SiteJob
from flarebus.workflow.weights import weight_of

__all__ = ["GatherRules", "Gatherer"]


@dataclass(frozen=True, slots=True)
class GatherRules:
    """When a round is over, and what counts in it.

    Args:
        min_responses_required: usable results that it needs; 0 is one of each trainer.
        wait_time_after_min_resps_received: seconds that the others have from then on.
        timeout: seconds for all of it; None leaves it to the trainers' lives.
        max_concurrent_submissions: results of more than 1 MiB fetched at once; smaller ones come with their messages. A
            place is held no longer than its result comes: the next one has it as soon as a trainer dies.
        request_to_submit_result_max_wait: seconds that a result may wait for its place; None for no limit.
        aggregation_weights: site -> factor of the weight of its results.
        in_order: use results in the order of the sites' names, so that the bits of the mean do not depend on time.
    """

    min_responses_required: int = 1
    wait_time_after_min_resps_received: float | None = 10.0
    timeout: float | None = None
    max_concurrent_submissions: int = 1
    request_to_submit_result_max_wait: float | None = None
    aggregation_weights: Mapping[str, float] = field(default_factory=dict)
    in_order: bool = False


class Gatherer:
    """One round at its aggregator.

    Args:
        job: of the aggregating site.
        task: what the trainers do.
        trainers: who takes part.
        mean: what the results become a model in.
        rules: when it is over.
        resumes: another site began the round: trainers give what they have made for it.
    """

    def __init__(
        self,
        job: SiteJob,
        task: Task,
        trainers: Sequence[str],
        mean: RoundMean,
        rules: GatherRules,
        resumes: bool = False,
    ) -> None:
        self.task = task
        self.trainers = list(trainers)
        self.accepted: list[str] = []
        """The sites whose results are in the mean."""
        self._job = job
        self._mean = mean
        self._rules = rules
        self._resumes = resumes
        self._is_done = False

    def gather(self) -> None:
        """Give the task out, and take results in until the round is over, or taken over by another site.

        Raises:
            QuorumNotReached: fewer usable results than are required.
            JobAborted: the job has ended.
        """
        rules = self._rules
        for result in self._job.broadcast(
            self.task,
            sites=self.trainers,
            min_responses=min(rules.min_responses_required, len(self.trainers)),
            wait_time_after_min_received=rules.wait_time_after_min_resps_received,
            timeout=rules.timeout,
            in_order=rules.in_order,
            most_staged=rules.max_concurrent_submissions,
            staging_timeout=rules.request_to_submit_result_max_wait,
            resumes=self._resumes,
        ):
            try:
                self._mean.add(result.model, weight_of(result, rules.aggregation_weights), result.site)
            except UpdateRefused as why:
                result.refuse(UpdateRefused(why.reason, why.key))  # whose it is, the result knows
            else:
                self.accepted.append(result.site)
        self._is_done = True

    def is_done(self) -> bool:
        """Whether the round is over, and nobody's result is waited for."""
        return self._is_done

    @property
    def metrics(self) -> dict[str, float]:
        """The weighted mean of each metric; of the model that entered the round."""
        return self._mean.metrics

    def aggregate(self, model: dict[str, Any]) -> dict[str, Any]:
        """The next model, from the one that entered the round; on the pages of the next model file."""
        return self._mean.apply_to(model, out=self._job.shelf.pages(model))
