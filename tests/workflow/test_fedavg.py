"""FedAvg on a job in memory: what it asks for, what it makes of the answers, and when it stops."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest

from flarebus.errors import ConfigError, JobFailed, QuorumNotReached, UpdateRefused
from flarebus.model import FLModel
from flarebus.workflow.aggregator import ModelAggregator
from tests.workflow.fake_job import FakeJob, update
from workflows import fedavg
from workflows.fedavg import FedAvg

ZEROS = {"w": np.zeros(3, np.float32)}


def run(job: FakeJob, rounds: int = 1, **settings: Any) -> FakeJob:
    FedAvg(**{"num_rounds": rounds, "min_clients": 1, **settings}).run(job)
    return job


def weights(job: FakeJob) -> list[float]:
    found: list[float] = job.model["w"].tolist()
    return found


# --- what sites are given


def test_hyper_params_go_out_beside_every_model() -> None:
    """Scripts find them in what they receive, in the first round alone; they are no part of any model."""
    seen: list[dict[str, Any]] = []

    def answer(site: str, number: int, params: dict[str, Any]) -> FLModel:
        seen.append({name: value if name != "w" else value.tolist() for name, value in params.items()})
        return update(number)

    told = {"loss": "hinge", "n": 2, "rate": 0.5, "warm": True, "weight": None}
    job = run(FakeJob(answer, ["a"]), rounds=2, hyper_params=told, key_metric="")

    assert seen == [told, {"w": [0.0] * 3, **told}]
    assert job.model.keys() == {"w"}


# --- the mean


def test_sites_weigh_as_much_as_their_steps() -> None:
    """The new model is the mean of the answers, each weighted with the steps that its site reports."""
    job = run(FakeJob(lambda site, *_: update(0, 1) if site == "a" else update(4, 3), params=ZEROS))

    assert weights(job) == [3.0] * 3
    assert job.model["w"] is job.pages_given["w"]
    assert ZEROS["w"].tolist() == [0.0] * 3


def test_without_steps_all_weigh_the_same() -> None:
    """A site that reports no steps weighs one."""
    job = run(FakeJob(lambda site, *_: FLModel(params={"w": np.full(3, ord(site) - 97.0, np.float32)}), params=ZEROS))

    assert weights(job) == [0.5] * 3


@pytest.mark.parametrize("steps", [3, 3.0, np.int64(3), np.float32(3)], ids=lambda value: type(value).__name__)
def test_aggregation_weights_multiply_the_steps(steps: Any) -> None:
    """The recipe's factor counts for the sites it names, whatever type of number the steps are."""
    job = FakeJob(lambda site, *_: update(0, steps) if site == "a" else update(1, 3), params=ZEROS)

    assert weights(run(job, aggregation_weights={"a": 3.0})) == [0.25] * 3


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (-1, "weight -"),
        (math.nan, "weight nan"),
        (math.inf, "weight inf"),
        (1e308, "weight "),
        (10**400, "weight inf"),
        (True, "type bool"),
        ("7", "type str"),
        (None, "type NoneType"),
        ([1], "type list"),
        (1j, "type complex"),
    ],
    ids=str,
)
@pytest.mark.parametrize("factors", [None, {"a": 2.0}], ids=["plain", "with factor"])
def test_silly_steps_are_refused_and_the_round_goes_on(steps: Any, said: str, factors: Any) -> None:
    """A site whose steps make no sense is left out with the reason; the others are averaged."""
    job = FakeJob(lambda site, *_: update(9, steps) if site == "a" else update(1), params=ZEROS)
    run(job, aggregation_weights=factors)

    assert weights(job) == [1.0] * 3
    assert list(job.rounds_done[0].refused) == ["a"]
    assert said in job.rounds_done[0].refused["a"]


def test_a_factor_of_zero_leaves_a_site_out() -> None:
    """A site with the factor 0 takes part but does not count; if that holds for all, there is nothing to average."""
    job = FakeJob(lambda site, *_: update(9 if site == "a" else 1), params=ZEROS)
    assert weights(run(job, aggregation_weights={"a": 0.0})) == [1.0] * 3

    with pytest.raises(QuorumNotReached, match="weight 0"):
        run(job, aggregation_weights={"a": 0.0, "b": 0.0})


def test_excluded_variables_keep_their_value() -> None:
    """Parameters in whose name the expression is found stay those of the model, whatever the sites send."""
    model = {"body.w": np.zeros(2, np.float32), "head.w": np.full(2, 5, np.float32)}

    def answer(site: str, round: int, params: dict[str, Any]) -> FLModel:
        return FLModel(params={name: np.full(2, 9, np.float32) for name in params})

    job = run(FakeJob(answer, params=model), rounds=2, exclude_vars=r"^head\.")
    assert {name: value.tolist() for name, value in job.model.items()} == {"body.w": [9, 9], "head.w": [5, 5]}


def test_differences_are_added_to_the_model() -> None:
    """Sites that send differences move the model by their mean, round after round."""
    job = FakeJob(lambda site, *_: update(1 if site == "a" else 3, kind="DIFF"), params={"w": np.full(3, 10.0, "f4")})

    assert weights(run(job, rounds=3)) == [16.0] * 3


def test_whole_models_and_differences_never_meet_in_one_mean() -> None:
    """The first usable answer decides the kind; one of the other kind is refused."""
    job = FakeJob(lambda site, *_: update(1, kind="FULL" if site == "a" else "DIFF"), params=ZEROS)
    run(job, deterministic=True)

    assert weights(job) == [1.0] * 3
    assert job.rounds_done[0].refused == {"b": "DIFF in a round of FULL results"}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"w": np.full(3, math.nan, np.float32)}, "'w': NaN or Inf"),
        ({"w": np.zeros(4, np.float32)}, "'w': shape (4,)"),
        ({"w": np.zeros(3, np.float32), "x": np.zeros(1)}, "'x'"),
        ({"v": np.zeros(3, np.float32)}, "'v'"),
        ({"w": np.zeros(3, np.complex64)}, "'w'"),
        ({"w": "text"}, "'w'"),
        ({}, "'w'"),
    ],
    ids=str,
)
def test_bad_updates_are_refused_and_the_round_goes_on(bad: dict[str, Any], said: str) -> None:
    """An update that does not fit the model is refused with the name of the parameter, and not used at all."""
    job = FakeJob(lambda site, *_: FLModel(params=bad) if site == "b" else update(2), "abc", ZEROS)

    assert weights(run(job, min_clients=2)) == [2.0] * 3
    assert list(job.rounds_done[0].refused) == ["b"]
    assert said in job.rounds_done[0].refused["b"]
    assert "b:" not in job.rounds_done[0].refused["b"]
    with pytest.raises(QuorumNotReached, match="2 usable results, 3 needed"):
        run(job, min_clients=3)


def test_a_round_without_usable_answers_commits_nothing() -> None:
    """If nobody's answer can be used the job ends, and the model of the round before is the last."""
    job = FakeJob(lambda site, round, _: update(1) if round == 0 else update(math.inf), params=ZEROS)

    with pytest.raises(QuorumNotReached, match="NaN or Inf"):
        run(job, rounds=3)
    assert [(done.task.round, done.best) for done in job.rounds_done] == [(0, False), (1, None)]
    assert job.rounds_done[0].params["w"].tolist() == [1.0] * 3


def test_nested_models_and_numbers() -> None:
    """A model may be nested and hold numbers and text: numbers are averaged, the rest stays."""
    model = {"net": {"w": np.zeros(2)}, "scale": 1.0, "note": "text", "none": None}

    def answer(site: str, round: int, params: dict[str, Any]) -> FLModel:
        up = 1 if site == "a" else 3
        return FLModel(params={**params, "net": {"w": params["net"]["w"] + up}, "scale": params["scale"] * up})

    job = run(FakeJob(answer, params=model), rounds=2)
    assert job.model["net"]["w"].tolist() == [4.0, 4.0]
    assert (job.model["scale"], job.model["note"], job.model["none"]) == (4.0, "text", None)


def test_the_mean_of_a_thousand_is_exact() -> None:
    """The mean of 1000 sites' random float32 updates with random weights is within one unit in the last place."""
    random = np.random.default_rng(20)
    sites = [f"site-{number}" for number in range(1000)]
    scale = np.float32(10.0) ** np.arange(-6, 6, dtype=np.float32)
    values = (random.normal(size=(1000, 12)).astype(np.float32) + np.float32(0.25)) * scale
    steps = random.integers(1, 100_000, 1000).tolist()
    found = {}
    for order in range(2):
        job = FakeJob(
            lambda site, *_: FLModel(
                params={"w": values[int(site[5:])].copy()}, meta={"NUM_STEPS_CURRENT_ROUND": steps[int(site[5:])]}
            ),
            sites,
            {"w": np.zeros(12, np.float32)},
            order=order,
        )
        found[order] = run(job, min_clients=1000).model["w"]

    # Each product of a float32 and such a weight is exact in a float64; fsum rounds once.
    exact = [math.fsum(step * float(value) for step, value in zip(steps, column, strict=True)) for column in values.T]
    expected = np.array([total / sum(steps) for total in exact])
    for mean in found.values():
        assert np.all(np.abs(mean - expected) <= np.spacing(np.abs(mean)))


# --- what is asked of whom


def test_settings_reach_the_broadcast() -> None:
    """Quorum, grace, deadline and order are what the settings say; the task carries model and rounds."""
    job = run(
        FakeJob(lambda *_: update(1), params=ZEROS),
        rounds=2,
        min_clients=2,
        wait_time_after_min_received=5.0,
        round_timeout=60.0,
        deterministic=True,
    )

    how = {"min_responses": 2, "wait_time_after_min_received": 5.0, "timeout": 60.0, "in_order": True}
    assert [done.how for done in job.rounds_done] == [how] * 2
    assert [(done.task.name, done.task.round, done.task.total_rounds) for done in job.rounds_done] == [
        ("train", 0, 2),
        ("train", 1, 2),
    ]
    sent = [done.task.model.params for done in job.rounds_done]
    assert [params["w"].tolist() for params in sent if params] == [[0.0] * 3, [1.0] * 3]
    assert run(FakeJob(lambda *_: update(1), params=ZEROS)).rounds_done[0].how == {
        "min_responses": 1,
        "wait_time_after_min_received": None,
        "timeout": None,
        "in_order": False,
    }


def test_committed_rounds_are_not_run_again() -> None:
    """A job that is resumed goes on with the first round that is not committed, from the committed model."""
    job = run(FakeJob(lambda site, round, params: update(params["w"][0] + 1), params=ZEROS, first_round=2), rounds=4)

    assert [done.task.round for done in job.rounds_done] == [2, 3]
    assert weights(job) == [2.0] * 3


def drawn(seed: int, sites: list[str], per_round: int = 3, rounds: int = 5) -> list[list[str]]:
    job = FakeJob(lambda *_: update(1), sites, ZEROS)
    job.sites = sites
    return [done.sites for done in run(job, rounds, clients_per_round=per_round, seed=seed).rounds_done]


def test_sites_are_drawn_from_the_seed_and_the_round() -> None:
    """The same seed draws the same sites, in whatever order they are listed; rounds and seeds differ."""
    sites = [f"site-{number:02}" for number in range(20)]
    found = drawn(7, sites)

    assert found == drawn(7, sites[::-1])
    assert found != drawn(8, sites)
    assert len({tuple(names) for names in found}) == 5
    assert all(names == sorted(set(names)) and len(names) == 3 for names in found)
    assert set().union(*drawn(7, sites, rounds=60)) == set(sites)


@pytest.mark.parametrize("per_round", [None, 2, 3])
def test_all_sites_take_part_when_there_are_not_more(per_round: int | None) -> None:
    """Without a number, or with one that is not below the number of sites, everybody is asked."""
    job = run(FakeJob(lambda *_: update(1), "ab", ZEROS), clients_per_round=per_round)

    assert job.rounds_done[0].sites == ["a", "b"]


def test_memory_is_given_back_every_so_many_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server cleans up after every n-th round and never without being told to."""
    cleaned: list[int] = []
    job = FakeJob(lambda *_: update(1), params=ZEROS)
    monkeypatch.setattr(fedavg, "release_memory", lambda: cleaned.append(len(job.rounds_done)))
    run(job, rounds=5, memory_gc_rounds=2)
    assert cleaned == [2, 4]

    run(FakeJob(lambda *_: update(1), params=ZEROS), rounds=3)
    assert cleaned == [2, 4]


def test_aggregation_is_told_before_and_after() -> None:
    """Whoever listens hears when all results are in, before the model is made, and when it is."""
    moments: list[tuple[str, Any]] = []

    class Watched(FedAvg):
        def update_model(self, job: Any, model: dict[str, Any], mean: Any) -> dict[str, Any]:
            moments.append(("update", None))
            return super().update_model(job, model, mean)

    job = FakeJob(lambda site, *_: update(1, loss=2.0), params=ZEROS)
    job.events = moments
    Watched(num_rounds=2, min_clients=2).run(job)

    assert moments == [
        (event, fields)
        for round in range(2)
        for event, fields in (
            ("before_aggregation", {"round": round, "metrics": {"loss": 2.0}}),
            ("update", None),
            ("after_aggregation", {"round": round}),
        )
    ]


# --- metrics, the best model, and the end


def by_round(name: str, *values: float | None) -> FakeJob:
    """Sites report these values of one metric, round by round."""

    def answer(site: str, round: int, _: Any) -> FLModel:
        value = values[round]
        return update(1, **({} if value is None else {name: value}))

    return FakeJob(answer, params=ZEROS)


def test_metrics_are_averaged_like_the_model() -> None:
    """The metrics of a round are the weighted mean of those that came, each over the sites that report it."""
    job = run(
        FakeJob(
            lambda site, *_: update(0, 1, loss=1.0, f1=0.5) if site == "a" else update(0, 3, loss=5.0), params=ZEROS
        )
    )

    assert job.rounds_done[0].metrics == {"loss": 4.0, "f1": 0.5}


def test_refused_updates_do_not_report() -> None:
    """The metrics of an update that was refused do not count."""
    job = FakeJob(
        lambda site, *_: update(math.nan if site == "a" else 1, loss=9.0 if site == "a" else 1.0), "ab", ZEROS
    )

    assert run(job).rounds_done[0].metrics == {"loss": 1.0}


@pytest.mark.parametrize(
    ("name", "mode", "values", "best"),
    [
        ("accuracy", None, [0.1, 0.3, 0.3, 0.2, 0.4], [True, True, False, False, True]),
        ("val_loss", None, [0.5, 0.7, 0.2, 0.2], [True, False, True, False]),
        ("score", "min", [0.5, 0.7, 0.2], [True, False, True]),
        ("loss", "max", [0.5, 0.7, 0.2], [True, True, False]),
        ("accuracy", None, [None, math.nan, 0.0, 0.1], [False, False, True, True]),
    ],
)
def test_the_best_model_is_the_one_that_entered_its_round(
    name: str, mode: str | None, values: list[Any], best: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    """Metrics judge the model that was received, so the very first may be the best; losses count downwards."""
    caplog.set_level(logging.ERROR)
    job = run(by_round(name, *values), rounds=len(values), key_metric=name, key_metric_mode=mode)

    assert [done.best for done in job.rounds_done] == best


def test_without_a_key_metric_there_is_no_best() -> None:
    """No key metric, no best model."""
    job = run(by_round("accuracy", 0.1, 0.2), rounds=2, key_metric="")

    assert [done.best for done in job.rounds_done] == [False, False]


def test_it_stops_when_the_condition_is_met() -> None:
    """The round whose metrics meet the condition is committed and is the last."""
    job = run(by_round("accuracy", 0.1, 0.5, 0.8, 0.9), rounds=4, stop_cond="accuracy >= 0.8")

    assert [done.metrics["accuracy"] for done in job.rounds_done] == [0.1, 0.5, 0.8]
    assert job.rounds_done[-1].best


def test_it_stops_when_patience_is_at_its_end() -> None:
    """So many rounds without a better value of the condition's metric end the job."""
    values = [0.1, 0.3, 0.2, 0.3, 0.9, 0.9]
    job = run(by_round("accuracy", *values), rounds=6, stop_cond="accuracy >= 2", patience=2)

    assert len(job.rounds_done) == 4
    with pytest.raises(ConfigError, match="patience"):
        run(by_round("accuracy", 0.1), patience=2)


def test_the_best_model_is_sought_in_the_direction_of_the_condition() -> None:
    """A condition on the key metric says which way is better, unless the mode does."""
    job = run(by_round("score", 0.5, 0.7, 0.2), rounds=3, key_metric="score", stop_cond="score < 0")
    assert [done.best for done in job.rounds_done] == [True, False, True]

    job = run(by_round("loss", 0.5, 0.7, 0.2), rounds=3, key_metric="loss", stop_cond="score > 0")
    assert [done.best for done in job.rounds_done] == [True, False, True]


# --- no model to begin with


def test_a_job_may_begin_without_a_model() -> None:
    """Without a model the first answers make it; what nobody received cannot be the best."""
    job = FakeJob(lambda site, round, params: update(1 if not params else params["w"][0] + 1, accuracy=0.9 - round))
    run(job, rounds=2)

    assert [bool(done.task.model.params) for done in job.rounds_done] == [False, True]
    assert weights(job) == [2.0] * 3
    assert [done.best for done in job.rounds_done] == [False, True]


def test_differences_need_a_model() -> None:
    """Differences to nothing are refused with that reason."""
    with pytest.raises(QuorumNotReached, match="no model yet"):
        run(FakeJob(lambda *_: update(1, kind="DIFF")))


# --- custom aggregators


class Sum(ModelAggregator):
    """Adds up what it gets, as whole model or as difference."""

    def __init__(self, kind: str = "FULL") -> None:
        self.kind = kind
        self.calls: list[str] = []

    def reset_stats(self) -> None:
        self.calls.append("reset")
        self.total = np.zeros(3, np.float32)

    def accept_model(self, model: FLModel) -> None:
        assert model.params is not None
        self.calls.append(model.meta["client_name"])
        if model.params["w"][0] < 0:
            raise UpdateRefused("negative", "w")
        self.total += model.params["w"]

    def aggregate_model(self) -> FLModel:
        self.calls.append("aggregate")
        return FLModel(self.kind, {"w": self.total})


@pytest.mark.parametrize(("kind", "expected"), [("FULL", 3.0), ("DIFF", 16.0)])
def test_a_custom_aggregator_replaces_the_mean(kind: str, expected: float) -> None:
    """The aggregator sees each round's results and gives the model, or what to add to it; metrics are averaged."""
    aggregator = Sum(kind)
    job = FakeJob(
        lambda site, *_: update(1, 1, acc=0.0) if site == "a" else update(2, 3, acc=1.0),
        params={"w": np.full(3, 10.0, np.float32)},
    )
    run(job, rounds=2, aggregator=aggregator, deterministic=True)

    assert weights(job) == [expected] * 3
    assert job.model["w"].dtype == np.float32
    assert [done.metrics for done in job.rounds_done] == [{"acc": 0.75}] * 2
    assert aggregator.calls == ["reset", "a", "b", "aggregate"] * 2


def test_a_custom_aggregator_may_refuse() -> None:
    """What it refuses is told the site and does not count towards the quorum."""
    job = FakeJob(lambda site, *_: update(-1 if site == "a" else 2), params=ZEROS)

    assert weights(run(job, aggregator=Sum())) == [2.0] * 3
    assert job.rounds_done[0].refused == {"a": "'w': negative"}
    with pytest.raises(QuorumNotReached):
        run(job, aggregator=Sum(), min_clients=2)


def test_what_an_aggregator_raises_ends_the_job() -> None:
    """A fault in the user's own code is shown as it is; an aggregator without a model is one as well."""

    class Broken(Sum):
        def aggregate_model(self) -> Any:
            return None

    with pytest.raises(JobFailed, match=r"Broken.aggregate_model\(\) gave no FLModel with params"):
        run(FakeJob(lambda *_: update(1), params=ZEROS), aggregator=Broken())
    with pytest.raises(KeyError, match="w"):
        run(FakeJob(lambda *_: FLModel(params={"v": np.zeros(1)}), params=ZEROS), aggregator=Sum())
