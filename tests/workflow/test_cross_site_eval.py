"""Cross-site evaluation on a job in memory: everything everywhere once, in waves, and a reason for every gap."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from flarebus.errors import ConfigError, FilterFailed, JobAborted
from flarebus.job.journal import json_text
from flarebus.model import FLModel
from tests.workflow.eval_job import EvalJob, run
from workflows.cross_site_eval import CrossSiteEval

OWN = {"a": 1, "b": 2, "c": 3, "d": 4}
SERVED = {"FL_global_model.pt": 10.0, "best_FL_global_model.pt": 20.0}
ALL = {**OWN, **{f"SRV_{name}": number for name, number in SERVED.items()}}


# --- everything, everywhere


def test_every_model_is_evaluated_on_every_site() -> None:
    """What is in the table of a site and a model is what that site says of that model."""
    job = run(EvalJob(OWN, SERVED))

    assert job.results == {
        site: {owner: {"v": f"{site} on {number:g}"} for owner, number in sorted(ALL.items())} for site in OWN
    }
    assert job.gaps == {"models": {}, "evaluations": {}}


@pytest.mark.parametrize("n_sites", [1, 2, 3, 7])
def test_no_model_goes_twice_to_a_site_and_few_fetch_one_at_a_time(n_sites: int) -> None:
    """Each wave gives every site a model; those of one group are spread as evenly as can be."""
    sites = {f"s{number}": number for number in range(n_sites)}
    job = run(EvalJob(sites, SERVED))

    seen = Counter((site, number) for wave in job.waves for site, number in wave.items())
    assert seen == {(site, number): 1 for site in sites for number in (*sites.values(), *SERVED.values())}
    assert len(job.waves) == n_sites + 2
    for wave in job.waves:
        group = 2 if set(wave.values()) <= set(SERVED.values()) else n_sites
        assert max(Counter(wave.values()).values()) == math.ceil(n_sites / group)


def test_models_of_sites_stay_there_and_are_released() -> None:
    """Not one is fetched by the server, and none is held when it is over."""
    job = run(EvalJob(OWN))

    assert job.most_held == 4
    assert job.held == []


def test_the_memory_budget_says_how_many_models_are_out_at_once() -> None:
    """They are taken to be as big as the server's, and lie in three places."""
    own = {f"s{number}": number for number in range(7)}
    job = run(EvalJob(own, SERVED), memory_budget=2 * 3 * 8)
    assert job.most_held == 2
    assert set(job.results) == set(own)
    assert all(
        set(row) == {*own, "SRV_FL_global_model.pt", "SRV_best_FL_global_model.pt"} for row in job.results.values()
    )

    assert run(EvalJob(own, SERVED), memory_budget=1).most_held == 1
    assert run(EvalJob(own), memory_budget=1).most_held == 7  # their size is not known


def test_participants_alone_take_part() -> None:
    """With their models and their data; one that is not there leaves gaps."""
    job = run(EvalJob(OWN), ["b", "d", "x"])

    assert job.results == {site: {o: {"v": f"{site} on {OWN[o]}"} for o in "bd"} for site in "bd"}
    assert job.gaps == {
        "models": {"x": "the site is gone"},
        "evaluations": {"x": {"b": "the site is gone", "d": "the site is gone"}},
    }


def test_tasks_say_what_they_are() -> None:
    """Names that scripts ask for, their time, and hyper-parameters beside every model."""
    job = run(EvalJob({"a": 1}, SERVED), submit_model_timeout=5, validation_timeout=7, hyper_params={"loss": "hinge"})

    assert [(task.name, how["timeout"]) for task, how in job.asked] == [("submit_model", 5), *[("validate", 7)] * 3]
    assert all(task.beside == {"loss": "hinge"} for task, _ in job.asked)


def test_listeners_hear_what_is_found_and_what_is_missing() -> None:
    """Enough to show how far it is."""
    job = run(EvalJob({"a": 1, "b": "no model yet"}, evaluate=lambda site, _: "boom" if site == "b" else metrics(v=1)))

    assert job.fired[0] == ("evaluation_started", {"sites": ["a", "b"], "models": ["a", "b"]})
    assert sorted(job.fired[1:-1], key=str) == [
        ("evaluation_missing", {"data_site": "b", "owner": "a", "reason": "boom"}),
        ("model_missing", {"site": "b", "reason": "no model yet"}),
        ("site_evaluated", {"data_site": "a", "owner": "a", "metrics": {"v": 1}}),
    ]
    assert job.fired[-1] == ("evaluation_ended", {})


# --- gaps


def metrics(**values: Any) -> FLModel:
    return FLModel(metrics=values)


def test_sites_without_a_model_still_evaluate() -> None:
    """One fails, one is silent, one has metrics only: the others' models are evaluated there."""
    own = {"a": 1, "b": "FileNotFoundError: best.npy", "c": None, "d": metrics(loss=1.0)}
    job = run(EvalJob(own), submit_model_timeout=60)

    assert job.results == {site: {"a": {"v": f"{site} on 1"}} for site in "abcd"}
    assert job.gaps == {
        "models": {
            "b": "FileNotFoundError: best.npy",
            "c": "no answer within 60 s",
            "d": "it answered without params",
        },
        "evaluations": {},
    }
    assert job.held == []


def test_a_validator_that_fails_leaves_a_gap() -> None:
    """For that model, or for all, and the site is asked again."""

    def evaluate(site: str, number: float) -> FLModel | str:
        return "ValueError: odd" if site == "b" or (site, number) == ("c", 3) else metrics(v=number)

    job = run(EvalJob({"a": 1, "b": 2, "c": 3}, evaluate=evaluate))

    assert job.results == {
        "a": {o: {"v": n} for o, n in zip("abc", (1, 2, 3), strict=True)},
        "c": {"a": {"v": 1}, "b": {"v": 2}},
    }
    assert job.gaps["evaluations"] == {
        "b": dict.fromkeys("abc", "ValueError: odd"),
        "c": {"c": "ValueError: odd"},
    }


def test_a_site_that_is_too_late_is_asked_no_more() -> None:
    """It may still be busy; its model is evaluated by the others."""
    job = run(
        EvalJob(OWN, evaluate=lambda site, n: None if (site, n) == ("b", 3) else metrics(v=n)), validation_timeout=9
    )

    given = [wave["b"] for wave in job.waves if "b" in wave]
    assert given == [2, 3]
    assert job.results["b"] == {"b": {"v": 2}}
    assert job.gaps["evaluations"] == {
        "b": {
            "a": "it took too long for the model of c",
            "c": "no answer within 9 s",
            "d": "it took too long for the model of c",
        }
    }
    assert all(job.results[site]["b"] == {"v": 2} for site in "acd")


def test_a_site_that_dies_is_asked_no_more() -> None:
    """Between two waves it goes: what it found stays."""

    def evaluate(site: str, number: float) -> FLModel:
        if len(job.waves) == 2:
            job.sites = ["a", "c", "d"]
        return metrics(v=number)

    job = EvalJob(OWN, evaluate=evaluate)
    run(job)

    assert len(job.results["b"]) == 2
    assert set(job.gaps["evaluations"]["b"].values()) == {"the site is gone"}
    assert all(len(job.results[site]) == 4 for site in "acd")


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan")], ids=repr)
def test_a_metric_that_is_no_number_is_null_with_a_reason(value: Any) -> None:
    """JSON has no NaN; the other metrics count."""
    job = run(EvalJob({"a": 1}, evaluate=lambda *_: metrics(loss=value, accuracy=0.5)))

    assert json.loads(json_text(job.results)) == {"a": {"a": {"loss": None, "accuracy": 0.5}}}
    assert job.gaps["evaluations"] == {"a": {"a": f"loss is {float(value)}"}}


@pytest.mark.parametrize(
    "answer", [FLModel(), FLModel(metrics={}), FLModel(params={"w": 1.0})], ids=["nothing", "none", "a model"]
)
def test_an_answer_without_metrics_is_a_gap(answer: FLModel) -> None:
    """Whatever else is in it."""
    job = run(EvalJob({"a": 1}, evaluate=lambda *_: answer))

    assert job.results == {}
    assert job.gaps["evaluations"] == {"a": {"a": "it answered without metrics"}}


def test_numbers_of_numpy_are_numbers() -> None:
    """Also those in an array; texts and truth values are what they are."""
    odd = {"f": np.float32(0.5), "i": np.int64(3), "one": np.array([2.0]), "b": True, "s": "good", "n": 7}
    job = run(EvalJob({"a": 1}, evaluate=lambda *_: metrics(**odd)))

    assert job.results["a"]["a"] == {"f": 0.5, "i": 3, "one": 2.0, "b": True, "s": "good", "n": 7}
    assert [type(value) for value in job.results["a"]["a"].values()] == [float, int, float, bool, str, int]


def test_a_filter_that_fails_on_the_way_out_leaves_gaps() -> None:
    """No site gets the models, and the job goes on."""

    class Filtered(EvalJob):
        def broadcast(self, task: Any, **how: Any) -> Any:
            if how.get("fetch", True):
                raise FilterFailed("my.Filter", "raised ValueError: no")
            return super().broadcast(task, **how)

    job = run(Filtered({"a": 1, "b": 2}))

    assert job.results == {}
    assert set(job.gaps["evaluations"]["a"].values()) == {"filter my.Filter raised ValueError: no"}
    assert job.held == []


def test_what_was_found_before_an_abort_is_in_the_report() -> None:
    """And no model is held any longer."""

    def evaluate(site: str, number: float) -> FLModel:
        if number == 20:
            raise JobAborted("user")
        return metrics(v=number)

    job = EvalJob({"a": 1, "b": 2, "c": 3}, SERVED, evaluate)
    with pytest.raises(JobAborted):
        run(job)

    assert job.results["a"].keys() == {"a", "b", "c"}
    assert job.held == []


@pytest.mark.parametrize("name", ["submit_model_timeout", "validation_timeout", "memory_budget"])
@pytest.mark.parametrize("value", [0, -1, math.nan, "5", None])
def test_settings_are_numbers_above_zero(name: str, value: Any) -> None:
    """A job that was edited by hand is refused when it is read."""
    with pytest.raises(ConfigError, match=name):
        CrossSiteEval(**{name: value})
