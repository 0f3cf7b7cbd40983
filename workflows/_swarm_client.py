"""SwarmClientController: the site's half of swarm learning. It trains for others, and leads rounds by turns.

The leader of a round gives its model to the trainers, gathers what they make of it, keeps the mean, and hands the lead
over with it: the rounds go from site to site, and the server only watches. What a leader needs to know beside the model
is in the `Course`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from flarebus.client.memory import release_memory
from flarebus.errors import QuorumNotReached
from flarebus.job.class_ref import ClassRef
from flarebus.model import FLModel
from flarebus.workflow.aggregator import ModelAggregator, RoundMean
from flarebus.workflow.controller import Task
from flarebus.workflow.custom import CustomMean
from flarebus.workflow.mean import WeightedMean
from flarebus.workflow.selection import BestModelSelector
from flarebus.workflow.site_controller import Call, SiteController, SiteJob
from workflows._swarm_gatherer import Gatherer, MetricComparator
from workflows._swarm_parameters import check_swarm_parameters
from workflows._swarm_words import (
    CONFIGURE,
    GIVE_BEST,
    GIVE_LAST,
    KEEP_BEST,
    KEEP_LAST,
    LEAD,
    SETTINGS,
    SPREAD_BEST,
    TERM,
    Course,
)

__all__ = ["SwarmClientController"]

log = logging.getLogger(__name__)

# What only the leader of the latest term may ask for.
_OF_LEADERS = (LEAD, KEEP_LAST, KEEP_BEST, SPREAD_BEST)


class SwarmClientController(SiteController):
    """One site of a swarm.

    Args:
        task_name_prefix: of the tasks that controllers give each other.
        learn_task_name: what the training script knows its task by.
        persistor_id: "persistor": models are kept as safetensors files in the folder of the site.
        shareable_generator_id: "shareable_generator": models travel as they are.
        aggregator_id: "aggregator" for the weighted mean of federated averaging, or `{"class_path", "args"}` of a
            `ModelAggregator`.
        metric_comparator_id: None for more or less of the key metric, as its name or `key_metric_mode` says, or
            `{"class_path", "args"}` of a `MetricComparator`.
        learn_task_check_interval: seconds; taken over from configurations of NVFlare. Tasks are pushed here.
        learn_task_abort_timeout: seconds; as `learn_task_check_interval`. A leader who is replaced stops at once.
        learn_task_ack_timeout: seconds that a site may take to accept the lead.
        learn_task_timeout: seconds that training may take in one round; None for no limit.
        final_result_ack_timeout: seconds that sites may take to accept the last and the best model.
        min_responses_required: usable results that a round needs; 0 is one of each trainer.
        wait_time_after_min_resps_received: seconds that the others have from then on; None for as long as they live.
        request_to_submit_result_max_wait: seconds that a result may wait at the leader while others are fetched; then
            it does not count. None for no limit. Nobody asks for permission: the leader fetches when it has room.
        request_to_submit_result_msg_timeout: seconds; as `learn_task_check_interval`.
        request_to_submit_result_interval: seconds; as `learn_task_check_interval`.
        max_concurrent_submissions: results of more than 1 MiB that a leader fetches at once.
        memory_gc_rounds: a leader gives memory back every so many rounds; 0 never.
        cuda_empty_cache: with it, give cached GPU memory back too.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        task_name_prefix: str = "swarm",
        learn_task_name: str = "train",
        persistor_id: str = "persistor",
        shareable_generator_id: str = "shareable_generator",
        aggregator_id: str | Mapping[str, Any] = "aggregator",
        metric_comparator_id: Mapping[str, Any] | None = None,
        learn_task_check_interval: float = 1.0,
        learn_task_abort_timeout: float = 5.0,
        learn_task_ack_timeout: float = 10.0,
        learn_task_timeout: float | None = None,
        final_result_ack_timeout: float = 10.0,
        min_responses_required: int = 1,
        wait_time_after_min_resps_received: float | None = 10.0,
        request_to_submit_result_max_wait: float | None = None,
        request_to_submit_result_msg_timeout: float = 5.0,
        request_to_submit_result_interval: float = 1.0,
        max_concurrent_submissions: int = 1,
        memory_gc_rounds: int = 1,
        cuda_empty_cache: bool = False,
    ) -> None:
        check_swarm_parameters(locals())
        self.task_name_prefix = task_name_prefix
        self.learn_task_name = learn_task_name
        self.persistor_id = persistor_id
        self.shareable_generator_id = shareable_generator_id
        self.aggregator_id = aggregator_id
        self.metric_comparator_id = metric_comparator_id
        self.learn_task_check_interval = learn_task_check_interval
        self.learn_task_abort_timeout = learn_task_abort_timeout
        self.learn_task_ack_timeout = learn_task_ack_timeout
        self.learn_task_timeout = learn_task_timeout
        self.final_result_ack_timeout = final_result_ack_timeout
        self.min_responses_required = min_responses_required
        self.wait_time_after_min_resps_received = wait_time_after_min_resps_received
        self.request_to_submit_result_max_wait = request_to_submit_result_max_wait
        self.request_to_submit_result_msg_timeout = request_to_submit_result_msg_timeout
        self.request_to_submit_result_interval = request_to_submit_result_interval
        self.max_concurrent_submissions = max_concurrent_submissions
        self.memory_gc_rounds = memory_gc_rounds
        self.cuda_empty_cache = cuda_empty_cache
        self._settings: dict[str, Any] = {}
        # The latest that this site has heard of, and the one in which it leads.
        self._term = 0
        self._leads_in: int | None = None
        self._aggregator: ModelAggregator | None = None
        self._comparator: Any = None

    def run(self, job: SiteJob) -> None:
        """Do what is asked for, to the end of the job."""
        for call in job.calls():
            self._adopt(job, call.model.meta[SETTINGS])
            asked = self._asked(call)
            if asked in _OF_LEADERS and Course.from_meta(call.model.meta).term < self._term:
                call.fail(f"the lead was taken over: this is term {self._term}")
            elif asked == CONFIGURE:
                call.answer(FLModel(meta={"round": job.shelf.round}))
            elif asked == TERM:
                call.answer()  # it was heard when it came
            elif asked == LEAD:
                self._take_lead(job, call)
            elif asked in (GIVE_LAST, GIVE_BEST):
                self._give(job, call, asked == GIVE_BEST)
            elif asked == KEEP_LAST:
                job.shelf.keep(_params_of(call), call.round)
                call.answer()
            elif asked == KEEP_BEST:
                job.shelf.keep_best(_params_of(call))
                call.answer()
            elif asked == SPREAD_BEST:
                call.answer()
                self._spread(job, KEEP_BEST, job.shelf.best_params, call.round)
            else:
                call.fail(f"{call.name!r} is no task of a swarm")

    def interrupts(self, call: Call) -> bool:
        """A later term than that in which this site leads: another one has the round by now."""
        if self._asked(call) in (TERM, *_OF_LEADERS):
            self._term = max(self._term, Course.from_meta(call.model.meta).term)
        return self._is_replaced()

    def _is_replaced(self) -> bool:
        return self._leads_in is not None and self._leads_in < self._term

    def _asked(self, call: Call) -> str:
        return call.name.removeprefix(f"{self.task_name_prefix}_")

    def _adopt(self, job: SiteJob, settings: Mapping[str, Any]) -> None:
        if settings == self._settings:
            return
        self._settings = dict(settings)
        if isinstance(self.aggregator_id, Mapping):
            self._aggregator = ClassRef.parse(self.aggregator_id, "aggregator_id").build(job.code_dir, "aggregator_id")
        if self.metric_comparator_id is not None:
            ref = ClassRef.parse(self.metric_comparator_id, "metric_comparator_id")
            self._comparator = ref.build(job.code_dir, "metric_comparator_id")

    def _give(self, job: SiteJob, call: Call, best: bool) -> None:
        params = job.shelf.best_params if best else job.shelf.params
        if not params or (not best and job.shelf.round != call.round):
            call.fail(f"{job.site} keeps no such model")
        else:
            call.answer(FLModel(params=params))

    # -- leading --

    def _take_lead(self, job: SiteJob, call: Call) -> None:
        call.answer()
        course = Course.from_meta(call.model.meta)
        self._leads_in = course.term
        try:
            self._lead(job, call.round, _taken(call), course)
        finally:
            self._leads_in = None

    def _lead(self, job: SiteJob, number: int, model: dict[str, Any], course: Course) -> None:
        """Aggregate rounds from `number` on, until another site takes the lead or there is none left."""
        while not self._is_replaced():
            job.fire("swarm_leads", round=number, term=course.term)
            gatherer = self._gather(job, number, model, course)
            if self._is_replaced():
                return
            model, course = self._aggregate(job, gatherer, model, course)
            del gatherer  # it has the model before, and memory of the results
            number += 1
            if number == self._settings["num_rounds"]:
                self._finish(job, number, model, course)
                return
            has_handed_over = self._hand_over(job, number, model, course)
            # It takes longer than a small round: whoever leads by now does not wait for it.
            if self.memory_gc_rounds and number % self.memory_gc_rounds == 0:
                release_memory(self.cuda_empty_cache)
            if has_handed_over:
                return

    def _gather(self, job: SiteJob, number: int, model: dict[str, Any], course: Course) -> Gatherer:
        trainers = self._among(job, self._settings["train_clients"])
        beside = self._settings["hyper_params"] or {}
        task = Task(self.learn_task_name, FLModel(params=model), number, self._settings["num_rounds"], beside=beside)
        gatherer = Gatherer(
            task,
            number,
            job,
            self._new_mean(model),
            self._comparator or self._new_comparator(),
            job.sites,
            trainers,
            self.min_responses_required,
            self.wait_time_after_min_resps_received,
            self.learn_task_timeout,
            self.max_concurrent_submissions,
            request_to_submit_result_max_wait=self.request_to_submit_result_max_wait,
            aggregation_weights=self._settings["aggregation_weights"],
            in_order=self._settings["deterministic"],
            resumes=course.resumes,
        )
        gatherer.run()
        return gatherer

    def _aggregate(
        self, job: SiteJob, gatherer: Gatherer, model: dict[str, Any], course: Course
    ) -> tuple[dict[str, Any], Course]:
        number = gatherer.for_round
        course = replace(self._judged(job, model, gatherer, course), resumes=False)
        job.fire("before_aggregation", round=number)
        model = gatherer.aggregate(model)
        job.fire("after_aggregation", round=number)
        job.shelf.keep(model, number + 1)
        job.fire(
            "swarm_round_done",
            round=number,
            term=course.term,
            metrics=gatherer.metrics,
            sites=gatherer.accepted,
            best=course.best,
            best_keeper=course.best_keeper,
        )
        return model, course

    def _judged(self, job: SiteJob, model: dict[str, Any], gatherer: Gatherer, course: Course) -> Course:
        """Keep the model that entered the round if its metrics are the best so far."""
        value = gatherer.better(self._settings["key_metric"], course.best)
        if value is None or not model:  # what nobody received was not judged
            return course
        job.shelf.keep_best(model)
        return replace(course, best=value, best_keeper=job.site)

    def _hand_over(self, job: SiteJob, number: int, model: dict[str, Any], course: Course) -> bool:
        """Give round `number` to its leader; False if that is this site, or nobody else will have it."""
        for site in leaders(self._settings, self._among(job, self._settings["aggr_clients"]), number):
            if site == job.site:
                return False
            task = self._task(LEAD, number, model, course)
            try:
                job.send(
                    task, [site], assignment_timeout=self.learn_task_ack_timeout, timeout=self.learn_task_ack_timeout
                )
            except QuorumNotReached as error:
                log.warning("%s: %s did not take the lead of round %d: %s", job.site, site, number, error)
                if self._is_replaced() or self._is_over(error):
                    return True
                continue
            job.fire("swarm_handed_over", round=number, term=course.term, to=site)
            return True
        return False

    @staticmethod
    def _is_over(error: QuorumNotReached) -> bool:
        """Whether the lead was refused because another site has it by now."""
        return any("the lead was taken over" in why for why in error.reasons.values())

    def _finish(self, job: SiteJob, number: int, model: dict[str, Any], course: Course) -> None:
        """Give the last model to every site, and have the best one given."""
        self._spread(job, KEEP_LAST, model, number)
        if course.best_keeper == job.site:
            self._spread(job, KEEP_BEST, job.shelf.best_params, number)
        elif course.best_keeper in job.sites:
            try:
                timeout = self.final_result_ack_timeout
                task = self._task(SPREAD_BEST, number, {}, course)
                job.send(task, [course.best_keeper], assignment_timeout=timeout, timeout=timeout)
            except QuorumNotReached as error:
                log.warning("the best model is not given to all sites: %s", error)
        job.fire("swarm_done", round=number, term=course.term, best_keeper=course.best_keeper)

    def _spread(self, job: SiteJob, name: str, params: dict[str, Any], number: int) -> None:
        others = [site for site in job.sites if site != job.site]
        if not others or not params:
            return
        task, timeout = self._task(name, number, params, Course(self._term)), self.final_result_ack_timeout
        try:
            for _ in job.broadcast(task, sites=others, timeout=timeout):
                continue
        except QuorumNotReached as error:
            log.warning("%s: not every site has the model of %s: %s", job.site, name, error)

    def _task(self, name: str, number: int, params: dict[str, Any], course: Course) -> Task:
        model = FLModel(params=params) if params else FLModel()
        meta = {SETTINGS: self._settings, **course.to_meta()}
        return Task(f"{self.task_name_prefix}_{name}", model, number, self._settings["num_rounds"], meta)

    def _among(self, job: SiteJob, named: Sequence[str] | None) -> list[str]:
        """The sites that are there, as far as they are named; all of them if none is."""
        return [site for site in job.sites if named is None or site in named]

    def _new_mean(self, model: dict[str, Any]) -> RoundMean:
        if self._aggregator is not None:
            return CustomMean(self._aggregator, model)
        return WeightedMean(model, self._settings["exclude_vars"])

    def _new_comparator(self) -> MetricComparator:
        selector = BestModelSelector(self._settings["key_metric"], self._settings["key_metric_mode"])
        return MetricComparator() if selector.mode == "max" else _Less()


def leaders(settings: Mapping[str, Any], candidates: Sequence[str], number: int) -> list[str]:
    """Who is to lead round `number`, best first: drawn anew for each round, from the seed and the round alone."""
    order = sorted(candidates)
    Random(f"{settings['seed']}/{number}").shuffle(order)
    return order


def _taken(call: Call) -> dict[str, Any]:
    """The same, and nobody else keeps it: the leader's next models are on its shelf, not in memory."""
    params, call.model.params = _params_of(call), None
    return params


class _Less(MetricComparator):
    """Less is better."""

    def compare(self, a: float, b: float) -> float:
        """Above 0 if `a` is less than `b`."""
        return b - a


def _params_of(call: Call) -> dict[str, Any]:
    return call.model.params or {}
