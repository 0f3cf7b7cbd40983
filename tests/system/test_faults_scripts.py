"""Scripts that go wrong and results that make no sense: the cause is said where people look, and the others go on."""

from __future__ import annotations

import pytest

from tests.system.observed import ONE, ObservedRun

# Each site goes wrong in the way of its name; the others add one.
SCRIPTS = """
import sys
import numpy as np
import flarebus.client as flare

flare.init()
site = flare.get_site_name()


def boom():
    raise ValueError("the data of this site are broken")


if site == "early":
    boom()
if site == "leaves":
    sys.exit(0)
while flare.is_running():
    if site == "deaf":
        sys.exit(0)
    if site == "hasty":
        flare.send(flare.FLModel(params={"w": np.zeros(4, np.float32)}))
    model = flare.receive()
    if model is None:
        break
    if site == "raises":
        boom()
    if site == "exits":
        sys.exit(3)
    if site == "says":
        sys.exit("no licence")
    if site == "quits":
        break
    if site == "forgets":
        flare.clear()
        break
    if site == "skips":
        flare.clear()
        continue
    if site == "empty":
        flare.send(flare.FLModel())
    if site == "object":
        flare.send(flare.FLModel(params={"w": object()}))
    if site == "not-a-model":
        flare.send({"w": model.params["w"]})
    flare.send(flare.FLModel(params={"w": model.params["w"] + 1}))
    if site == "twice":
        flare.send(flare.FLModel(params={"w": np.zeros(4, np.float32)}))
    if site == "late":
        boom()
"""

SAID = {
    "early": "ValueError: the data of this site are broken (client.py:",
    "leaves": "client.py ended without asking for its task",
    "deaf": "client.py ended without answering its task",
    "hasty": "ClientApiError: flare.send() needs a flare.receive() before it",
    "raises": "ValueError: the data of this site are broken (client.py:",
    "exits": "client.py called sys.exit(3)",
    "says": "sys.exit: no licence",
    "quits": "client.py ended without answering its task",
    "forgets": "the script ended without answering its task",
    "skips": "the script asked for its next task without answering this one",
    "empty": "ClientApiError: the model to send has neither params nor metrics",
    "object": "EncodeError: cannot encode value.params['w']: an object of type object",
    "not-a-model": "EncodeError: cannot encode model: dict is not an FLModel",
}
ENDS_QUIETLY = ("quits", "forgets", "skips")
# Wrong only after the answer: nothing is lost by that.
STILL_GOOD = ("twice", "late")


def test_scripts_that_go_wrong(observed: ObservedRun) -> None:
    """Each failure is reported with its cause, its traceback is in the log of its site alone, and the round goes on."""
    observed.start(SCRIPTS, ["good", *SAID, *STILL_GOOD], min_clients=1 + len(STILL_GOOD), num_rounds=2)

    assert observed.end() == "completed", observed.reason
    assert observed.model() == [2.0] * 4
    assert [line["accepted"] for line in observed.rounds()] == [["good", "late", "twice"]] * 2
    complaints = observed.complaints()
    assert complaints.keys() == SAID.keys()
    for site, said in SAID.items():
        assert said in complaints[site]
        assert f"{site} failed: {complaints[site]}" in observed.log("server")
        assert ("Traceback" in observed.log(site)) == (site not in ENDS_QUIETLY)
    assert "Traceback" not in observed.log("server")
    assert "this task is answered already" in observed.log("twice")
    assert "ValueError: the data of this site are broken" in observed.log("late")


def test_a_job_without_enough_good_scripts(observed: ObservedRun) -> None:
    """The job fails with the causes of the sites that the quorum lacks, and keeps the rounds it has."""
    body = """
    if flare.get_site_name() == "site-1" and model.current_round == 2:
        raise ValueError("the disk of this site is full")
"""
    observed.start(ONE.format(body=body), num_rounds=4)

    assert observed.end() == "failed"
    assert "site-1: ValueError: the disk of this site is full (client.py:" in observed.reason
    assert observed.model() == [2.0] * 4
    assert observed.journal() == ([0, 1], "failed")
    assert observed.reason in observed.log("server")


# Each site sends what its name says.
UPDATES = """
import numpy as np
import flarebus.client as flare

flare.init()
site = flare.get_site_name()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    w = model.params["w"] + 1
    params, meta, metrics = {"w": w}, {"NUM_STEPS_CURRENT_ROUND": 1}, {"loss": 1.0}
    weights = {
        "zero": 0, "negative": -1, "nan-weight": float("nan"), "huge": 1e308, "endless": 10**400, "text": "5",
    }
    meta["NUM_STEPS_CURRENT_ROUND"] = weights.get(site, 1)
    match site:
        case "nan":
            w[2] = np.nan
        case "inf":
            w[2] = -np.inf
        case "shape":
            params["w"] = w.reshape(2, 2)
        case "missing":
            del params["w"]
        case "extra":
            params["v"] = w
        case "dtype":
            params["w"] = w.astype(np.float64)
        case "kind":
            params["w"] = [1.0, 2.0]
        case "metrics":
            metrics = {"loss": float("nan"), "table": [[float("inf"), None]], "array": np.ones(3), "text": "fine"}
        case "names":
            metrics = {3: 1.0}
        case "big":
            params["w"] = np.ones(40_000_000, np.float32)
    flare.log("strange", {"a": [float("nan"), 1]} if site == "metrics" else {"a": 1.0}, flare.AnalyticsDataType.METRICS)
    kind = "DIFF" if site == "difference" else "FULL"
    flare.send(flare.FLModel(params=params, params_type=kind, meta=meta, metrics=metrics))
"""

REFUSED = {
    "nan": "'w': NaN or Inf",
    "inf": "'w': NaN or Inf",
    "shape": "'w': shape (2, 2), the model has (4,)",
    "missing": "'w': missing key 'w'",
    "extra": "'v': key 'v' not in the model",
    "dtype": "'w': dtype float64, the model has float32",
    "kind": "'w': list where the model has an array",
    "difference": "DIFF in a round of FULL results",
    "negative": "weight -1.0; it must be 0, or from",
    "nan-weight": "weight nan; it must be 0, or from",
    "huge": "weight 1e+308; it must be 0, or from",
    "endless": "weight inf; it must be 0, or from",
    "text": "weight of type str; it must be a number",
    "names": "a metric's name must be a string",
}


@pytest.mark.parametrize("deterministic", [False, True])
def test_results_that_make_no_sense(observed: ObservedRun, deterministic: bool) -> None:
    """Each is refused with site, key and reason; the mean is that of the others, and odd metrics are only left out."""
    # The kind of results that a round is of is decided by its first one, so that must be a good one.
    bad = {site: said for site, said in REFUSED.items() if deterministic or site != "difference"}
    observed.start(
        UPDATES,
        ["a-good", *bad, "big", "metrics", "zero"],
        min_clients=3,
        aggregation_weights={"endless": 0.5, "text": 0.5},
        deterministic=deterministic,
        env={"num_threads": 1},
    )

    assert observed.end() == "completed", observed.reason
    assert observed.model() == [2.0] * 4
    refused = observed.complaints("result_refused")
    assert refused.keys() == bad.keys()
    for site, said in bad.items():
        assert refused[site].startswith(said)
        assert f"result of {site} refused: {refused[site]}" in observed.log("server")
    too_big = "result of 160000000 bytes for a model of"
    assert too_big in observed.complaints()["big"]
    for line in observed.rounds():
        assert line["accepted"] == ["a-good", "metrics", "zero"]
        assert line["metrics"] == {"loss": 1.0}
        assert line["sites"]["metrics"]["loss"] is None
        assert line["refused"].keys() == {*bad, "big"}
    assert observed.journal() == ([0, 1], "completed")


def test_nothing_but_bad_results(observed: ObservedRun) -> None:
    """A round without a usable result fails with the reasons and keeps the model."""
    observed.start(UPDATES, ["negative"])

    assert observed.end() == "failed"
    assert "0 usable results, 1 needed (negative: weight -1.0" in observed.reason
    assert observed.journal() == ([], "failed")


def test_weights_of_zero_only(observed: ObservedRun) -> None:
    """A round whose results all have the weight 0 makes no model, and says so."""
    observed.start(UPDATES, ["zero"])

    assert observed.end() == "failed"
    assert "no parameters, or weight 0" in observed.reason


class BrokenAggregator:
    """Goes wrong when it gets its first result."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def accept_model(self, model: object) -> None:
        raise self.error

    def aggregate_model(self) -> None: ...

    def reset_stats(self) -> None: ...


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), SystemExit(3)], ids=repr)
def test_an_aggregator_that_goes_wrong(observed: ObservedRun, error: BaseException) -> None:
    """Whatever a custom aggregator raises, the job ends; the line names the error, the server's log has all of it."""
    observed.start(ONE.format(body=""), aggregator=BrokenAggregator(error))

    assert observed.end() == "failed"
    said = f"{type(error).__name__}: {error}; the traceback is in {observed.run_dir}/server/log.txt"
    assert observed.reason == said
    assert "in accept_model" in observed.log("server")
    assert observed.journal() == ([], "failed")
