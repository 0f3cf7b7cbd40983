"""Swarm learning: sites train, and aggregate by turns; no model is at the server until the end.

The server starts the first round at one site, watches, has the lead taken over when the leading site dies, and fetches
the last and the best model in the end. Everything else goes from site to site; see `SwarmClientController`.

Warnat-Herresthal, S. et al. (2021). Swarm Learning for decentralized and confidential clinical machine learning.
Nature 594, 265-270.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flarebus.errors import JobFailed, QuorumNotReached
from flarebus.model import FLModel
from flarebus.workflow.controller import Controller, Job, Report, Task
from flarebus.workflow.held import HeldModel
from flarebus.workflow.params import flatten
from workflows._swarm_client import SwarmClientController, leaders
from workflows._swarm_gatherer import Gatherer, MetricComparator
from workflows._swarm_words import CONFIGURE, GIVE_BEST, GIVE_LAST, LEAD, SETTINGS, TERM, Course

__all__ = ["Gatherer", "MetricComparator", "Swarm", "SwarmClientController"]

log = logging.getLogger(__name__)


class Swarm(Controller):
    """The server's half.

    Args:
        num_rounds: rounds in all.
        min_clients: sites that have to be there; with fewer the job fails. 0 is all of them.
        seed: of the order in which sites lead.
        deterministic: the same bits whatever the order of arrival; slower results wait in line.
        aggr_clients: sites that lead; None for all.
        train_clients: sites that train; None for all.
        exclude_vars: a regular expression; parameters with a match keep their values.
        aggregation_weights: site -> factor of the weight of its results.
        key_metric: the metric that says which model is the best; "" keeps none.
        key_metric_mode: "max" or "min"; None infers it, see `BestModelSelector`.
        hyper_params: go to the scripts beside the parameters; not averaged.
        task_name_prefix: as at the sites.
        configure_task_timeout: seconds in which sites have to be configured.
        start_task_timeout: seconds in which a site has to take the lead when the server gives it.
        progress_timeout: seconds without news from any site after which the job fails.
        end_workflow_timeout: seconds in which the last and the best model have to come.
    """

    def __init__(
        self,
        *,
        num_rounds: int,
        min_clients: int = 0,
        seed: int = 0,
        deterministic: bool = False,
        aggr_clients: Sequence[str] | None = None,
        train_clients: Sequence[str] | None = None,
        exclude_vars: str | None = None,
        aggregation_weights: Mapping[str, float] | None = None,
        key_metric: str = "accuracy",
        key_metric_mode: str | None = None,
        hyper_params: Mapping[str, Any] | None = None,
        task_name_prefix: str = "swarm",
        configure_task_timeout: float = 300.0,
        start_task_timeout: float = 300.0,
        progress_timeout: float = 3600.0,
        end_workflow_timeout: float = 600.0,
    ) -> None:
        self.num_rounds = num_rounds
        self.min_clients = min_clients
        self.settings: dict[str, Any] = {
            "num_rounds": num_rounds,
            "seed": seed,
            "deterministic": deterministic,
            "aggr_clients": None if aggr_clients is None else list(aggr_clients),
            "train_clients": None if train_clients is None else list(train_clients),
            "exclude_vars": exclude_vars,
            "aggregation_weights": dict(aggregation_weights or {}),
            "key_metric": key_metric,
            "key_metric_mode": key_metric_mode,
            "hyper_params": None if hyper_params is None else dict(hyper_params),
        }
        self.task_name_prefix = task_name_prefix
        self.configure_task_timeout = configure_task_timeout
        self.start_task_timeout = start_task_timeout
        self.progress_timeout = progress_timeout
        self.end_workflow_timeout = end_workflow_timeout

    def run(self, job: Job) -> None:
        """Start the swarm, watch it to its end, and fetch what it has learnt."""
        watch = _Watch(self, job)
        watch.configure()
        watch.start()
        for report in job.reports(timeout=self.progress_timeout):
            watch.heard(report)
            if watch.is_done:
                watch.fetch_models()
                return
        raise JobFailed(f"no site has reported anything for {self.progress_timeout:g} s; {watch}")


class _Watch:
    """What the server knows of a swarm."""

    def __init__(self, swarm: Swarm, job: Job) -> None:
        self.is_done = False
        self._swarm = swarm
        self._job = job
        self._term = 0
        self._round = 0
        self._leader = ""
        self._best: float | None = None
        self._best_keeper = ""
        self._needed = 1
        # Of the arrays of the model; all models of the job are like the first one.
        self._nbytes = sum(getattr(leaf, "nbytes", 0) for leaf in flatten(job.initial_params()).values())
        # round -> the site that keeps the model with which it begins; the server keeps that of round 0.
        self._keepers: dict[int, str] = {}
        self._lost: set[str] = set()
        # Those that will not come back, and why.
        self._dead: dict[str, str] = {}
        self._noted: set[int] = set()

    def __str__(self) -> str:
        return f"round {self._round} is led by {self._leader or 'nobody'}"

    def configure(self) -> None:
        """Tell every site what the swarm does.

        Raises:
            QuorumNotReached: too few of them answered.
        """
        job, swarm = self._job, self._swarm
        self._needed = swarm.min_clients or len(job.sites)
        task = self._task(CONFIGURE, 0)
        for result in job.broadcast(task, min_responses=swarm.min_clients, timeout=swarm.configure_task_timeout):
            found = result.model.meta.get("round")
            if type(found) is int and 0 < found <= swarm.num_rounds:
                # Of an earlier life of the job, which ended before its time.
                self._keepers[found] = result.site

    def start(self) -> None:
        """Give the first round to its leader: the one after the last that is finished."""
        self._give_lead(resumes=False)

    def heard(self, report: Report) -> None:
        """A site has reported, or something was seen of it."""
        site, fields = report.site, report.fields
        if report.event == "controller_failed":
            raise JobFailed(f"{site}: {fields['reason']}")
        if report.event in ("site_lost", "site_dead"):
            self._lost.add(site)
            if report.event == "site_dead":
                self._dead[site] = fields["reason"]
            self._check_quorum()
            self._replace_if_lost(site)
        elif report.event == "site_joined":
            self._lost.discard(site)
        elif fields.get("term") != self._term:
            log.info("%s reports %s of a term that is over", site, report.event)
        elif report.event == "swarm_leads":
            self._leader, self._round = site, fields["round"]
        elif report.event == "swarm_round_done":
            self._round_done(site, fields)
        elif report.event == "swarm_handed_over":
            self._leader, self._round = fields["to"], fields["round"]
            self._replace_if_lost(self._leader)
        elif report.event == "swarm_done":
            self._best_keeper = fields["best_keeper"]
            self.is_done = True

    def fetch_models(self) -> None:
        """Have the last and the best model here as well.

        Raises:
            QuorumNotReached: no site gives the last model.
        """
        job, swarm = self._job, self._swarm
        keepers = [self._leader, *(site for site in job.sites if site != self._leader)]
        wait_s, limit_s = swarm.start_task_timeout, swarm.end_workflow_timeout
        task = replace(self._task(GIVE_LAST, swarm.num_rounds), asks_nbytes=self._nbytes)
        there = [site for site in keepers if site not in self._lost]
        job.keep(job.send(task, there, assignment_timeout=wait_s, timeout=limit_s).model.params or {})
        if not self._best_keeper:
            return
        # Everybody has it by now, if its keeper lived long enough to spread it.
        task = replace(self._task(GIVE_BEST, swarm.num_rounds), asks_nbytes=self._nbytes)
        for site in sorted(there, key=lambda site: site != self._best_keeper):
            try:
                best = job.send(task, [site], assignment_timeout=wait_s, timeout=limit_s)
            except QuorumNotReached as error:
                log.warning("%s does not give the best model: %s", site, error)
            else:
                job.keep(best.model.params or {}, best=True)
                return

    def _round_done(self, site: str, fields: Mapping[str, Any]) -> None:
        number = fields["round"]
        self._round = number + 1
        self._keepers[number + 1] = site
        self._best, self._best_keeper = fields["best"], fields["best_keeper"]
        if number not in self._noted:  # a round whose model was lost is done again
            self._noted.add(number)
            self._job.note_round(number, fields["metrics"], fields["sites"], by=site)

    def _replace_if_lost(self, site: str) -> None:
        if site == self._leader and site in self._lost and not self.is_done:
            log.warning("%s has died; %s", site, self)
            self._term += 1
            self._give_lead(resumes=True)

    def _check_quorum(self) -> None:
        alive = len(self._job.sites)
        if alive < self._needed and not self.is_done:
            dead = "; ".join(f"{site}: {reason}" for site, reason in sorted(self._dead.items()))
            raise JobFailed(f"{alive} sites are left, {self._needed} are needed ({dead})")

    def _give_lead(self, resumes: bool) -> None:
        """Have a site that is there lead the round after the last whose model is still kept somewhere."""
        job, swarm = self._job, self._swarm
        self._round = max([0, *(number for number in self._keepers if number < swarm.num_rounds)])
        while True:
            model = self._model_of(self._round)
            if model is not None:
                break
            del self._keepers[self._round]
            self._round = max([0, *self._keepers])
        if resumes:
            self._tell_term()
            self._check_best()
        task = self._task(LEAD, self._round, model, Course(self._term, resumes, self._best, self._best_keeper))
        allowed = swarm.settings["aggr_clients"]
        there = [s for s in job.sites if (allowed is None or s in allowed) and s not in self._lost]
        order = leaders(swarm.settings, there, self._round)
        for site in order:
            try:
                job.send(task, [site], assignment_timeout=swarm.start_task_timeout, timeout=swarm.start_task_timeout)
            except QuorumNotReached as error:
                log.warning("%s did not take the lead: %s", site, error)
                continue
            if isinstance(model, HeldModel):
                model.release()
            self._leader = site
            job.fire("swarm_lead_given", round=self._round, site=site, term=self._term)
            return
        raise JobFailed(f"no site takes the lead of round {self._round}")

    def _model_of(self, number: int) -> FLModel | HeldModel | None:
        """The model with which round `number` begins, left where it is kept; None if it is lost."""
        if number not in self._keepers:
            return FLModel(params=self._job.initial_params())
        wait = self._swarm.start_task_timeout
        try:
            task, keeper = self._task(GIVE_LAST, number), self._keepers[number]
            return self._job.send(task, [keeper], assignment_timeout=wait, timeout=wait, fetch=False).held
        except QuorumNotReached as error:
            log.warning("the model of round %d is lost: %s", number, error)
            return None

    def _check_best(self) -> None:
        """Forget the best model if its keeper has died with it: a later one will be the best of those that are left."""
        if self._best_keeper and not self._is_kept(self._best_keeper):
            log.warning("the best model so far is lost: it was kept by %s", self._best_keeper)
            self._best, self._best_keeper = None, ""

    def _is_kept(self, site: str) -> bool:
        try:
            wait = self._swarm.start_task_timeout
            task = self._task(GIVE_BEST, self._round)
            held = self._job.send(task, [site], assignment_timeout=wait, timeout=wait, fetch=False).held
        except QuorumNotReached:
            return False
        if held is not None:
            held.release()
        return True

    def _tell_term(self) -> None:
        """Let sites refuse the lead from whoever had it before. Those that cannot be told now have another leader."""
        others = [site for site in self._job.sites if site not in self._lost and site != self._leader]
        if not others:
            return
        task = self._task(TERM, self._round, course=Course(self._term))
        try:
            for _ in self._job.broadcast(task, sites=others, min_responses=1, timeout=self._swarm.start_task_timeout):
                break
        except QuorumNotReached as error:
            log.warning("no site could be told of the new lead: %s", error)

    def _task(
        self, asked: str, number: int, model: FLModel | HeldModel | None = None, course: Course | None = None
    ) -> Task:
        swarm = self._swarm
        meta = {SETTINGS: swarm.settings, **({} if course is None else course.to_meta())}
        return Task(f"{swarm.task_name_prefix}_{asked}", model or FLModel(), number, swarm.num_rounds, meta)


if __name__ == "__main__":
    from workflows._program import main

    raise SystemExit(main(workflow="swarm"))
