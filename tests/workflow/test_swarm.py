"""The site's half of a swarm: its parameters, who leads, what a round needs, and leads that are over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from flarebus.errors import ConfigError, QuorumNotReached
from flarebus.model import FLModel
from flarebus.workflow.controller import Result, Task
from flarebus.workflow.mean import WeightedMean
from flarebus.workflow.site_controller import SiteJob
from tests.workflow.fake_job import FakeJob, update
from workflows._swarm_client import leaders
from workflows._swarm_gatherer import Gatherer, MetricComparator
from workflows._swarm_words import SETTINGS, Course
from workflows.swarm import SwarmClientController

SETTING = {
    "num_rounds": 3,
    "seed": 0,
    "deterministic": True,
    "aggr_clients": None,
    "train_clients": None,
    "exclude_vars": None,
    "aggregation_weights": {},
    "key_metric": "accuracy",
    "key_metric_mode": None,
    "hyper_params": None,
}
ZEROS = {"w": np.zeros(3, np.float32)}


# --- parameters

# Every parameter of the reference document, with another value than its default.
ALL = {
    "task_name_prefix": "team",
    "learn_task_name": "learn",
    "persistor_id": "persistor",
    "shareable_generator_id": "shareable_generator",
    "aggregator_id": {"class_path": "own:Sum", "args": {}},
    "metric_comparator_id": {"class_path": "own:Nearest", "args": {}},
    "learn_task_check_interval": 0.5,
    "learn_task_abort_timeout": 1.0,
    "learn_task_ack_timeout": 20,
    "learn_task_timeout": 100,
    "final_result_ack_timeout": 20,
    "min_responses_required": 2,
    "wait_time_after_min_resps_received": 1.0,
    "request_to_submit_result_max_wait": 60,
    "request_to_submit_result_msg_timeout": 1.0,
    "request_to_submit_result_interval": 0.5,
    "max_concurrent_submissions": 2,
    "memory_gc_rounds": 0,
    "cuda_empty_cache": True,
}


def test_every_parameter_is_taken() -> None:
    """And kept under its name."""
    made = SwarmClientController(**ALL)

    assert {name: getattr(made, name) for name in ALL} == ALL


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task_name_prefix", ""),
        ("learn_task_name", 1),
        ("persistor_id", "mine"),
        ("shareable_generator_id", "mine"),
        ("learn_task_ack_timeout", None),
        ("learn_task_timeout", -1),
        ("final_result_ack_timeout", "10"),
        ("min_responses_required", -1),
        ("min_responses_required", 1.5),
        ("wait_time_after_min_resps_received", float("nan")),
        ("request_to_submit_result_max_wait", float("inf")),
        ("request_to_submit_result_interval", True),
        ("max_concurrent_submissions", 0),
        ("memory_gc_rounds", -1),
    ],
)
def test_what_a_parameter_cannot_be(name: str, value: Any) -> None:
    """It is refused by name."""
    with pytest.raises(ConfigError, match=name):
        SwarmClientController(**{name: value})


# --- who leads


def test_sites_lead_by_turns() -> None:
    """The order follows from seed and round alone, and every site has its share."""
    sites = ["a", "b", "c", "d"]
    first = [leaders(SETTING, sites, number)[0] for number in range(400)]

    assert [leaders(SETTING, sites[::-1], number)[0] for number in range(400)] == first
    assert min(Counter(first).values()) > 60
    assert sorted(leaders(SETTING, sites, 0)) == sites
    assert [leaders({**SETTING, "seed": 1}, sites, number)[0] for number in range(400)] != first


# --- gathering


def gatherer(
    job: FakeJob, min_responses: int = 2, wait: float | None = None, timeout: float | None = None, **more: Any
) -> Gatherer:
    task, sites = Task("train", FLModel(params=ZEROS), 1, 3), ["a", "b", "c"]
    mean, comparator = WeightedMean(ZEROS, None), MetricComparator()
    return Gatherer(
        task, 1, cast(SiteJob, job), mean, comparator, [*sites, "d"], sites, min_responses, wait, timeout, **more
    )


def test_a_round_is_asked_for_as_the_rules_say() -> None:
    """Each rule is one of the broadcast; more responses than trainers are not waited for."""
    job = FakeJob(lambda site, *_: update(1.0), ["a", "b", "c"])
    more = {"max_concurrent_submissions": 3, "request_to_submit_result_max_wait": 4.0}
    gatherer(job, 9, 1.0, 2.0, in_order=True, resumes=True, **more).run()

    (asked,) = job.rounds_done
    assert asked.sites == ["a", "b", "c"]
    assert asked.how == {
        "min_responses": 3,
        "wait_time_after_min_received": 1.0,
        "timeout": 2.0,
        "in_order": True,
        "most_staged": 3,
        "staging_timeout": 4.0,
        "resumes": True,
    }


def test_bad_results_are_refused_and_others_count() -> None:
    """A shape that does not fit costs its site the round; weights of sites count."""
    answers = {"a": update(1.0), "b": update(5.0, size=4), "c": update(4.0)}
    job = FakeJob(lambda site, *_: answers[site], ["a", "b", "c"])
    round_ = gatherer(job, aggregation_weights={"c": 2.0}, in_order=True)
    assert not round_.is_done()
    round_.run()

    assert round_.is_done()
    assert round_.accepted == ["a", "c"]
    assert list(job.rounds_done[0].refused) == ["b"]
    assert round_._aggregator.apply_to(ZEROS)["w"].tolist() == [3.0] * 3


def test_too_few_usable_results() -> None:
    """They end the round with an error."""
    job = FakeJob(lambda site, *_: update(1.0) if site == "a" else None, ["a", "b", "c"])

    with pytest.raises(QuorumNotReached):
        gatherer(job).run()


@pytest.mark.parametrize(
    ("site", "round", "reason"),
    [
        ("a", 1, ""),
        ("x", 1, "no site of this swarm"),
        ("d", 1, "does not train in round 1"),
        ("a", 0, "a result of round 0, this is round 1"),
        ("b", 1, "has submitted already"),
    ],
)
def test_what_is_not_of_this_round_does_not_count(site: str, round: int, reason: str) -> None:
    """Somebody else's result, one of another round, and a second one are refused, each with its reason."""
    told: dict[str, str] = {}
    round_ = gatherer(FakeJob(lambda *_: update(1.0), ["a", "b", "c"]))
    round_.gather("b", Result("b", 1, update(1.0), told.__setitem__))
    result = Result(site, round, update(1.0), told.__setitem__)

    assert reason in round_.can_accept_submission(site, result)
    round_.gather(site, result)
    assert (site in told) == bool(reason)
    assert round_.accepted == (["b"] if reason else ["b", "a"])


@pytest.mark.parametrize(
    ("value", "best", "found"),
    [
        (0.5, None, 0.5),
        (0.5, 0.4, 0.5),
        (0.5, 0.5, None),
        (0.5, 0.6, None),
        (float("nan"), None, None),
        (None, None, None),
    ],
)
def test_the_best_model_is_that_with_the_better_metric(
    value: float | None, best: float | None, found: float | None
) -> None:
    """A missing or senseless value is never better."""
    round_ = gatherer(FakeJob(lambda *_: update(1.0), ["a", "b", "c"]))
    metrics = {} if value is None else {"accuracy": value}
    round_._aggregator = cast(Any, SimpleNamespace(metrics=metrics))

    assert round_.better("accuracy", best) == found


# --- terms


class Asked:
    """A call, and how it was answered."""

    def __init__(self, asked: str, term: int = 0, params: Any = None, round: int = 0) -> None:
        self.name, self.round, self.total_rounds, self.source = f"swarm_{asked}", round, 3, "b"
        self.model = FLModel(params=params, meta={SETTINGS: SETTING, **Course(term).to_meta()})
        self.answered, self.failed = False, ""

    def answer(self, model: FLModel | None = None) -> None:
        self.answered = True

    def fail(self, reason: str) -> None:
        self.failed = reason


class Kept:
    """A shelf in memory."""

    def __init__(self) -> None:
        self.round: int | None = None
        self.params: dict[str, Any] = {}
        self.best_params: dict[str, Any] = {}

    def pages(self, params: dict[str, Any]) -> dict[str, Any]:
        return {name: np.empty_like(array) for name, array in params.items()}

    def keep(self, params: dict[str, Any], round: int) -> None:
        self.params, self.round = params, round


class FakeSiteJob(FakeJob):
    """Site a of three, with these calls; `during` comes while the script of a trains."""

    def __init__(self, controller: SwarmClientController, calls: list[Asked], during: Asked | None = None) -> None:
        super().__init__(self._train, ["a", "b", "c"])
        self.site, self.shelf = "a", Kept()
        self._controller, self._calls, self._during = controller, calls, during
        self._is_cancelled = False

    def _train(self, site: str, round: int, params: dict[str, Any]) -> FLModel:
        during, self._during = self._during, None
        if during is not None:
            self._calls.append(during)
            self._is_cancelled = self._controller.interrupts(cast(Any, during))
        return update(1.0)

    def broadcast(self, task: Task, **how: Any) -> Iterator[Any]:
        for result in super().broadcast(task, **how):
            if self._is_cancelled:
                return
            yield result

    def calls(self) -> Iterator[Asked]:
        while self._calls:
            call = self._calls.pop(0)
            self._controller.interrupts(cast(Any, call))
            yield call


def serve(*calls: Asked, during: Asked | None = None) -> FakeSiteJob:
    """Let the controller of site a serve these calls to the end."""
    controller = SwarmClientController(min_responses_required=3)
    job = FakeSiteJob(controller, list(calls), during)
    controller.run(cast(SiteJob, job))
    return job


@pytest.mark.parametrize("asked", ["lead", "keep_last", "keep_best", "spread_best"])
def test_the_leader_of_an_earlier_term_is_refused(asked: str) -> None:
    """Once a later one was heard of; and nothing is kept of it."""
    stale = Asked(asked, term=1, params=dict(ZEROS))
    job = serve(Asked("term", term=2), stale)

    assert "the lead was taken over" in stale.failed
    assert not stale.answered
    assert job.rounds_done == []
    assert job.shelf.params == job.shelf.best_params == {}


def test_a_model_of_a_later_term_is_kept_and_ends_the_ones_before() -> None:
    """Who was away while a term began learns of it from the first that it is given."""
    new, stale = Asked("keep_last", term=3, params=dict(ZEROS), round=2), Asked("keep_last", term=2, params={})
    job = serve(new, stale)

    assert new.answered
    assert stale.failed
    assert job.shelf.round == 2


def test_a_leader_who_is_replaced_stops_at_once() -> None:
    """Nothing is kept or handed over of the round, and the site serves on."""
    later = Asked("term", term=1)
    job = serve(Asked("lead", params=dict(ZEROS)), during=later)

    assert later.answered
    assert job.shelf.round is None
    assert [name for name, _ in job.events] == ["swarm_leads"]
