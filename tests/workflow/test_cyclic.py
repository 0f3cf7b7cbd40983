"""Cyclic weight transfer on a job in memory: whose turn it is, what goes on, and when it ends."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest

from flarebus.errors import ConfigError, JobFailed, QuorumNotReached
from flarebus.model import FLModel
from flarebus.workflow.controller import Order
from tests.workflow.fake_job import FakeJob, update
from workflows import cyclic
from workflows.cyclic import Cyclic

ZEROS = {"w": np.zeros(3, np.float32)}
SITES = [f"site-{number}" for number in range(1, 6)]


def add_one(site: str, round: int, params: dict[str, Any]) -> FLModel:
    """What a site makes of a model."""
    return update(params["w"][0] + 1, accuracy=float(params["w"][0]))


def run(job: FakeJob, rounds: int = 1, **settings: Any) -> FakeJob:
    Cyclic(num_rounds=rounds, **settings).run(job)
    return job


def weights(job: FakeJob) -> list[float]:
    found: list[float] = job.model["w"].tolist()
    return found


def turns(order: Any, rounds: int = 8, seed: int = 0, sites: list[str] = SITES) -> list[list[str]]:
    job = run(FakeJob(add_one, sites, ZEROS), rounds, order=order, seed=seed)
    return [done.sites for done in job.rounds_done]


# --- the model


def test_three_sites_add_one_for_two_rounds() -> None:
    """Each site adds one to what the one before it made: two rounds of three sites end six higher."""
    job = run(FakeJob(add_one, "abc", ZEROS), 2)

    assert weights(job) == [6.0] * 3
    assert ZEROS["w"].tolist() == [0.0] * 3


def test_each_site_receives_what_the_one_before_it_made() -> None:
    """Whole models replace, differences are added, and both may come in one round."""
    seen: list[tuple[str, float]] = []

    def answer(site: str, round: int, params: dict[str, Any]) -> FLModel:
        seen.append((site, float(params["w"][0])))
        return update(10, kind="DIFF") if site == "b" else update(params["w"][0] + 1)

    job = run(FakeJob(answer, "abc", ZEROS), 2, order=["c", "b", "a"])

    assert seen == [("c", 0.0), ("b", 1.0), ("a", 11.0), ("c", 12.0), ("b", 13.0), ("a", 23.0)]
    assert weights(job) == [24.0] * 3


def test_the_bits_of_an_update_stay() -> None:
    """What a site sends goes on as it is, to the last bit."""
    sent = np.random.default_rng(0).normal(size=3).astype(np.float32) * np.float32(1e-30)
    job = run(FakeJob(lambda *_: FLModel(params={"w": sent.copy()}), "ab", ZEROS))

    assert job.model["w"].tobytes() == sent.tobytes()


def test_what_sites_are_told() -> None:
    """Every turn has its limits, and the round and its number reach the sites."""
    job = run(FakeJob(add_one, "ab", ZEROS), 2, task_assignment_timeout=5.0, task_result_timeout=60.0)

    assert [done.how for done in job.rounds_done] == [{"assignment_timeout": 5.0, "timeout": 60.0}] * 2
    assert [(done.task.name, done.task.round, done.task.total_rounds) for done in job.rounds_done] == [
        ("train", 0, 2),
        ("train", 1, 2),
    ]
    assert run(FakeJob(add_one, "ab", ZEROS)).rounds_done[0].how == {"assignment_timeout": 10.0, "timeout": None}


def test_hyper_params_go_along_and_names_can_be_left_out() -> None:
    """Every site finds them beside the model; excluded parameters keep the server's value."""
    seen: list[dict[str, Any]] = []

    def answer(site: str, round: int, params: dict[str, Any]) -> FLModel:
        seen.append(params)
        return FLModel(params={"w": params["w"] + 1, "bn": np.ones(2)})

    job = FakeJob(answer, "ab", {"w": np.zeros(3), "bn": np.zeros(2)})
    run(job, hyper_params={"rate": 0.5}, exclude_vars="^bn")

    assert [params["rate"] for params in seen] == [0.5, 0.5]
    assert job.model.keys() == {"w", "bn"}
    assert (job.model["w"].tolist(), job.model["bn"].tolist()) == ([2.0] * 3, [0.0] * 2)


def test_a_job_may_begin_without_a_model() -> None:
    """The first site makes it."""
    job = run(FakeJob(lambda site, n, params: update(params["w"][0] + 1 if params else 1, accuracy=1.0), "ab"))

    assert weights(job) == [2.0] * 3
    assert job.rounds_done[0].best is False


def test_committed_rounds_are_not_run_again() -> None:
    """A job that is resumed goes on with the first round that is not committed, with its turns."""
    whole = turns(Order.RANDOM_WITHOUT_SAME_IN_A_ROW)
    job = run(FakeJob(add_one, SITES, ZEROS, first_round=5), 8, order="RANDOM_WITHOUT_SAME_IN_A_ROW")

    assert [done.task.round for done in job.rounds_done] == [5, 6, 7]
    assert [done.sites for done in job.rounds_done] == whole[5:]


# --- orders


def test_the_order_is_that_of_the_names_or_the_one_given() -> None:
    """FIXED sorts; a list is taken as it is."""
    assert turns("FIXED", 2, sites=["b", "c", "a"]) == [["a", "b", "c"]] * 2
    assert turns(["b", "a", "b"], 2, sites=["a", "b", "c"]) == [["b", "a", "b"]] * 2


@pytest.mark.parametrize("order", [Order.RANDOM, Order.RANDOM_WITHOUT_SAME_IN_A_ROW])
def test_random_orders_follow_from_the_seed(order: Order) -> None:
    """Everybody has one turn a round, in an order of that round, the same for the same seed."""
    found = turns(order, seed=7)

    assert found == turns(order, seed=7, sites=SITES[::-1])
    assert found != turns(order, seed=8)
    assert len({tuple(names) for names in found}) > 1
    assert all(sorted(names) == SITES for names in found)


def test_no_site_has_two_turns_in_a_row() -> None:
    """With plain random orders that happens, with the other ones it does not."""

    def repeats(order: Order) -> int:
        found = turns(order, 60, sites=["a", "b", "c"])
        return sum(before[-1] == after[0] for before, after in itertools.pairwise(found))

    assert repeats(Order.RANDOM) > 5
    assert repeats(Order.RANDOM_WITHOUT_SAME_IN_A_ROW) == 0


def test_unknown_orders_are_refused() -> None:
    """An order is one of three words, or a list."""
    with pytest.raises(ValueError, match="SORTED"):
        Cyclic(num_rounds=1, order="SORTED")


# --- what must not count


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (update(math.nan), "'w': NaN or Inf"),
        (FLModel(params={"v": np.zeros(3)}), "'v': key 'v' not in the model"),
        (FLModel(params={"w": np.zeros(4, np.float32)}), r"'w': shape \(4,\)"),
        (FLModel(metrics={"loss": 1.0}), "no parameters in it"),
    ],
)
def test_a_bad_update_is_passed_over(bad: FLModel, said: str) -> None:
    """It is refused with its reason, and the next site gets what the one before had made."""
    job = run(FakeJob(lambda site, n, params: bad if site == "b" else add_one(site, n, params), "abc", ZEROS))

    assert weights(job) == [2.0] * 3
    assert job.rounds_done[0].refused.keys() == {"b"}
    assert re.match(said, job.rounds_done[0].refused["b"])


def test_a_lost_turn_is_passed_over() -> None:
    """A site without an answer costs its turn, and its metrics are not those of the round."""
    job = run(FakeJob(lambda site, n, params: None if site == "a" else add_one(site, n, params), "abc", ZEROS))

    assert weights(job) == [2.0] * 3
    assert job.rounds_done[0].metrics == {"accuracy": 0.0}


def test_a_round_without_any_usable_update_fails() -> None:
    """The job keeps the model of the round before, and the error names every site's reason."""
    job = FakeJob(lambda site, n, params: update(math.nan) if n else add_one(site, n, params), "ab", ZEROS)

    with pytest.raises(QuorumNotReached) as caught:
        run(job, 2)
    assert caught.value.reasons == dict.fromkeys("ab", "NaN or Inf")
    assert [bool(done.params) for done in job.rounds_done] == [True, False]


@pytest.mark.parametrize(
    ("sites", "settings"), [("a", {}), ("ab", {"min_clients": 3}), ("abc", {"order": ["a", "x", "y"]})]
)
def test_too_few_sites_are_said_before_the_round(sites: str, settings: dict[str, Any]) -> None:
    """At least two sites that have a turn must be there, or as many as were asked for."""
    job = FakeJob(add_one, sites, ZEROS)

    with pytest.raises(JobFailed, match=r"round 1 needs [23] sites; of those with a turn are there: a"):
        run(job, **settings)
    assert job.rounds_done == []


# --- metrics, the best model, and the end


def test_metrics_are_those_of_the_model_that_entered_the_round() -> None:
    """Only the first site received that model, so its metrics decide on the best one."""
    values = {0: 0.5, 1: 0.9, 2: 0.7}

    def answer(site: str, round: int, params: dict[str, Any]) -> FLModel:
        return update(params["w"][0] + 1, accuracy=values[round] if site == "a" else 1.0)

    job = run(FakeJob(answer, "ab", ZEROS), 3)
    assert [done.metrics for done in job.rounds_done] == [{"accuracy": value} for value in values.values()]
    assert [done.best for done in job.rounds_done] == [True, True, False]

    job = run(FakeJob(answer, "ab", ZEROS), 3, key_metric="")
    assert [done.best for done in job.rounds_done] == [False] * 3


@pytest.mark.parametrize("allowed", [False, True])
def test_a_site_may_end_the_job_where_it_is_allowed_to(allowed: bool) -> None:
    """Its update counts, nobody else has a turn, and the round is committed."""

    def answer(site: str, round: int, params: dict[str, Any]) -> FLModel:
        model = add_one(site, round, params)
        if (site, round) == ("b", 1):
            model.meta["EARLY_TERMINATION"] = True
        return model

    job = run(FakeJob(answer, "abc", ZEROS), 3, allow_early_termination=allowed)

    assert (len(job.rounds_done), weights(job)[0]) == ((2, 5.0) if allowed else (3, 9.0))


def test_memory_is_given_back_every_so_many_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second round here; never unless it is asked for."""
    cleaned: list[int] = []
    job = FakeJob(add_one, "ab", ZEROS)
    monkeypatch.setattr(cyclic, "release_memory", lambda: cleaned.append(len(job.rounds_done)))
    run(job, 5, memory_gc_rounds=2)
    assert cleaned == [2, 4]

    run(FakeJob(add_one, "ab", ZEROS), 2)
    assert cleaned == [2, 4]


def test_a_pattern_that_is_none_is_refused() -> None:
    """As in federated averaging."""
    with pytest.raises(ConfigError, match="exclude_vars"):
        run(FakeJob(add_one, "ab", ZEROS), exclude_vars="(")
