"""Tournament: of the models that the sites have trained, the one that all sites together find best goes on."""

from __future__ import annotations

import statistics
from typing import Any

from flarebus.errors import UpdateRefused
from flarebus.model import FLModel
from flarebus.workflow.controller import Controller, Job, Task
from flarebus.workflow.template import Template

__all__ = ["Tournament"]

# Who has trained the model that entered the round: nobody, in this round.
REIGNING = ""


class Tournament(Controller):
    """The server side.

    In every round each site trains the model. Every candidate, and the model that entered the round, is then judged by
    every site on its own data; the one with the least mean loss is the next model. Nothing is averaged.

    Args:
        num_rounds: rounds in all.
        min_clients: candidates that a round needs, and judges that a candidate needs.
        grace: seconds that the other sites have once there are so many.
    """

    def __init__(self, *, num_rounds: int, min_clients: int, grace: float | None = None) -> None:
        self.num_rounds = num_rounds
        self.min_clients = min_clients
        self.grace = grace

    def run(self, job: Job) -> None:
        """Play `num_rounds` rounds."""
        model = job.initial_params()
        for number in job.rounds(self.num_rounds):
            candidates = {REIGNING: model, **self._train(job, number, model)}
            losses = {site: self._judge(job, number, params) for site, params in candidates.items()}
            winner = min(losses, key=losses.__getitem__)
            job.fire("candidate_won", round=number, site=winner, losses=losses)
            # Metrics of a round belong to the model that entered it, so that rounds can be compared.
            job.commit(number, candidates[winner], {"loss": losses[REIGNING]})
            model = candidates[winner]

    def _train(self, job: Job, number: int, model: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """What each site makes of the model."""
        template, candidates = Template(model), {}
        for result in job.broadcast(
            Task("train", FLModel(params=model), number, self.num_rounds),
            min_responses=self.min_clients,
            wait_time_after_min_received=self.grace,
            in_order=True,
        ):
            params = result.model.params or {}
            try:
                template.check(params, result.site)
            except UpdateRefused as why:
                result.refuse(why)
            else:
                candidates[result.site] = params
        return candidates

    def _judge(self, job: Job, number: int, params: dict[str, Any]) -> float:
        """The mean loss of a candidate over the sites."""
        results = job.broadcast(
            Task("score", FLModel(params=params), number, self.num_rounds),
            min_responses=self.min_clients,
            wait_time_after_min_received=self.grace,
        )
        return statistics.fmean((result.model.metrics or {})["loss"] for result in results)
