"""Simulations in one process (`debug=True`): a recipe, its scripts, and everything between them, without a socket."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from flarebus.errors import ConfigError, JobAborted, JobFailed
from flarebus.job.kinds import FrameworkType
from flarebus.model import FLModel
from flarebus.recipe import FedAvgRecipe, Run, SimEnv
from flarebus.server import simulation
from flarebus.server.simulation import start_simulation
from flarebus.workflow.aggregator import ModelAggregator

LIMIT_S = 30.0
BIG = 100_000
ADD = """
import os
import flarebus.client as flare
import gate

flare.init()
while flare.is_running():
    model = flare.receive()
    site, round = flare.get_site_name(), model.current_round
    gate.at(site, round)
    print(f"{site} trains in process {os.getpid()}")
    flare.log("lr", 0.1 / (1 + round), flare.AnalyticsDataType.SCALAR)
    flare.send(flare.FLModel(params={"w": model.params["w"] + 1}, metrics={"accuracy": 0.5 - abs(round - 1) / 10}))
gate.left(flare.get_site_name())
"""


class Gate(ModuleType):
    """What the scripts of a test import: where they are, and what shall happen there."""

    def __init__(self) -> None:
        super().__init__("gate")
        self.stop_at: tuple[str, int] | None = None
        self.fail_at: tuple[str, int] | None = None
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.gone: list[str] = []

    def at(self, site: str, round: int) -> None:
        if (site, round) == self.stop_at:
            self.reached.set()
            assert self.go_on.wait(LIMIT_S)
        if (site, round) == self.fail_at:
            raise RuntimeError("no more data")

    def left(self, site: str) -> None:
        self.gone.append(site)


class Simulations:
    """Starts jobs with two sites and a small model."""

    def __init__(self, folder: Path, gate: Gate) -> None:
        self.folder = folder
        self.gate = gate
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.runs: list[Run] = []
        folder.joinpath("client.py").write_text(ADD)

    def recipe(self, size: int = 4, **changes: Any) -> FedAvgRecipe:
        basic = {
            "name": "job",
            "model": {"w": np.zeros(size, np.float32)},
            "min_clients": 2,
            "num_rounds": 3,
            "train_script": str(self.folder / "client.py"),
            "framework": FrameworkType.NUMPY,
        }
        return FedAvgRecipe(**(basic | changes))

    def env(self, **changes: Any) -> SimEnv:
        extra = {"on_event": lambda event, fields: self.events.append((event, fields))}
        basic = {"num_clients": 2, "workspace_root": self.folder / "runs", "debug": True, "extra": extra}
        return SimEnv(**(basic | changes))

    def start(self, size: int = 4, **changes: Any) -> Run:
        self.runs.append(self.recipe(size, **changes).start(self.env()))
        return self.runs[-1]

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / "job"

    def model(self, name: str = "FL_global_model") -> list[float]:
        found: list[float] = load_file(self.run_dir / "server/models" / f"{name}.safetensors")["w"].tolist()
        return found

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "server" / name).read_text().splitlines()]

    def log(self, site: str) -> str:
        return (self.run_dir / site / "log.txt").read_text()


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulations]:
    """Simulations; when they are over the process is as it was, and nothing of theirs runs any more."""
    gate = Gate()
    monkeypatch.setitem(sys.modules, "gate", gate)
    threads = set(threading.enumerate())
    before = (os.getcwd(), sys.argv, sys.stdout, logging.getLogger("flarebus").handlers[:])
    made = Simulations(tmp_path, gate)
    yield made
    gate.go_on.set()
    for run in made.runs:
        run.abort()
        assert run.get_result(LIMIT_S) is not None
    for thread in set(threading.enumerate()) - threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive(), thread
    assert (os.getcwd(), sys.argv, sys.stdout, logging.getLogger("flarebus").handlers) == before


# --- a good run


@pytest.mark.parametrize("size", [4, BIG], ids=["inline", "transfer"])
def test_a_run_leaves_its_models_metrics_and_logs(sim: Simulations, capsys: Any, size: int) -> None:
    """A debugging run does all that others do, in this very process, and its folder says so."""
    run = sim.start(size)

    assert run.get_result() == str(sim.run_dir)
    assert run.get_status() == "completed"
    assert sim.model() == [3.0] * size
    assert sim.model("best_FL_global_model") == [1.0] * size
    assert [line["metrics"]["accuracy"] for line in sim.lines("metrics.jsonl")] == [0.4, 0.5, 0.4]
    assert [line["accepted"] for line in sim.lines("metrics.jsonl")] == [["site-1", "site-2"]] * 3
    records = sim.lines("site_metrics.jsonl")
    assert sorted((each["site"], each["round"], each["key"]) for each in records) == [
        (site, round, "lr") for site in ("site-1", "site-2") for round in range(3)
    ]
    for site in ("site-1", "site-2"):
        assert sim.log(site).count(f"{site} trains in process {os.getpid()}") == 3
        assert "no more tasks: completed" in sim.log(site)
    assert "site-1 trains in process" in capsys.readouterr().out
    assert "job completed" in (sim.run_dir / "server/log.txt").read_text()
    assert sorted(sim.gate.gone) == ["site-1", "site-2"]


def test_events_tell_what_happens(sim: Simulations) -> None:
    """Whoever listens hears of the job, its rounds, their results and its end, in this order; and of metrics."""
    sim.start(num_rounds=2).get_result()

    records = [record for event, its in sim.events if event == "site_metrics" for record in its["records"]]
    assert sorted((each["site"], each["round"], each["key"]) for each in records) == [
        (site, round, "lr") for site in ("site-1", "site-2") for round in range(2)
    ]
    assert [event for event, _ in sim.events if event != "site_metrics"] == [
        "job_started",
        *["site_joined"] * 2,
        *[
            *["round_started", "result_accepted", "result_accepted"],
            *["before_aggregation", "after_aggregation", "round_committed"],
        ]
        * 2,
        "bus_traffic",
        "job_ended",
    ]
    told = dict(sim.events)
    assert told["bus_traffic"] == {"bytes_forwarded": 0, "bytes_served": 0}  # small models, all in one process
    assert told["job_started"]["total_rounds"] == 2
    assert told["round_started"] == {"round": 1, "sites": ["site-1", "site-2"]}
    assert told["before_aggregation"] == {"round": 1, "metrics": {"accuracy": 0.5}}
    assert told["round_committed"]["metrics"] == {"accuracy": 0.5}
    assert Path(told["round_committed"]["model_path"]).parent == sim.run_dir / "server/models"
    assert told["job_ended"] == {"state": "completed", "reason": None}


def test_results_may_wait_in_files(sim: Simulations, monkeypatch: pytest.MonkeyPatch) -> None:
    """With disk offload results are put into files, the same model comes out, and no file is left."""
    make, folders = tempfile.TemporaryFile, []

    def noted(dir: Path) -> Any:
        folders.append(dir)
        return make(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", noted)
    sim.start(BIG, enable_tensor_disk_offload=True).get_result()

    assert sim.model() == [3.0] * BIG
    assert set(folders) == {sim.run_dir / "server"}
    assert sorted(path.name for path in (sim.run_dir / "server").iterdir()) == [
        "log.txt",
        "metrics.jsonl",
        "models",
        "rounds.sqlite",
        "site_metrics.jsonl",
    ]


def test_a_job_may_start_without_a_model(sim: Simulations) -> None:
    """With the framework RAW the sites bring the first model."""
    text = ADD.replace('model.params["w"] + 1', 'model.params["w"] + 1 if model.params else numpy.ones(3)')
    sim.folder.joinpath("client.py").write_text("import numpy\n" + text)
    run = sim.start(model=None, framework=FrameworkType.RAW)
    run.get_result()

    assert run.get_status() == "completed"
    assert sim.model() == [3.0] * 3
    assert sim.model("best_FL_global_model") == [1.0] * 3


# --- the handle


def test_a_run_can_be_watched_and_aborted(sim: Simulations) -> None:
    """A job that runs says so; aborted, it ends with what was committed, and its scripts come to their end."""
    sim.gate.stop_at = ("site-1", 1)
    run = sim.start()
    assert sim.gate.reached.wait(LIMIT_S)
    assert run.get_status() == "running"
    assert run.get_result(timeout=0.001) is None

    run.abort()
    sim.gate.go_on.set()
    assert run.get_result() == str(sim.run_dir)
    assert run.get_status() == "aborted"
    assert sim.model() == [1.0] * 4
    assert dict(sim.events)["job_ended"] == {"state": "aborted", "reason": "aborted by user"}
    assert sorted(sim.gate.gone) == ["site-1", "site-2"]
    assert "no more tasks: the job has ended: aborted by user" in sim.log("site-1")


def test_a_run_can_be_aborted_before_it_does_anything(sim: Simulations, monkeypatch: pytest.MonkeyPatch) -> None:
    """An abort that comes before the job has looked up for the first time is heeded."""
    reached, go_on = threading.Event(), threading.Event()

    class Slow(simulation.Archive):
        def __init__(self, *given: Any) -> None:
            reached.set()
            assert go_on.wait(LIMIT_S)
            super().__init__(*given)

    monkeypatch.setattr(simulation, "Archive", Slow)
    run = sim.start()
    assert reached.wait(LIMIT_S)
    run.abort()
    go_on.set()

    assert run.get_result() is not None
    assert run.get_status() == "aborted"
    assert "round_started" not in dict(sim.events)


def test_execute_raises_when_it_was_aborted(sim: Simulations) -> None:
    """Who waits for a run that somebody aborts hears by whom."""
    env = sim.env(extra={"on_event": lambda event, _: event == "round_committed" and env.abort_job(*env._started)})

    with pytest.raises(JobAborted, match="user"):
        sim.recipe().execute(env)


def test_a_big_result_keeps_no_script_when_the_job_is_over(sim: Simulations, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that sends a big result after the abort is answered, and not waited for in vain."""
    monkeypatch.setattr("flarebus.site.host.FAREWELL_S", 20.0)
    sim.gate.stop_at = ("site-1", 1)
    run = sim.start(BIG)
    assert sim.gate.reached.wait(LIMIT_S)
    run.abort()
    sim.gate.go_on.set()

    assert run.get_result(10.0) is not None
    assert sorted(sim.gate.gone) == ["site-1", "site-2"]


# --- a bad run


def test_a_script_that_fails_fails_the_round_by_quorum(sim: Simulations) -> None:
    """With the quorum out of reach the job fails with the cause; what was committed stays."""
    sim.gate.fail_at = ("site-2", 1)
    cause = r"[01] usable results?, 2 needed \(site-2: RuntimeError: no more data \(client.py:10\)"
    with pytest.raises(JobFailed, match=cause):
        sim.recipe().execute(sim.env())

    assert sim.model() == [1.0] * 4
    assert "Traceback" in sim.log("site-2")
    assert re.search(cause, sim.log("site-1"))


def test_a_script_that_fails_does_not_end_a_job_that_can_go_on(sim: Simulations) -> None:
    """With a quorum of one the round goes on, and the failed script is there in the next."""
    sim.gate.fail_at = ("site-2", 1)
    sim.start(min_clients=1).get_result()

    assert sim.model() == [3.0] * 4
    assert [line["accepted"] for line in sim.lines("metrics.jsonl")] == [
        ["site-1", "site-2"],
        ["site-1"],
        ["site-1", "site-2"],
    ]
    assert sim.lines("metrics.jsonl")[1]["refused"] == {"site-2": "RuntimeError: no more data (client.py:10)"}


class Broken(ModelAggregator):
    """An aggregator with a fault."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def reset_stats(self) -> None:
        pass

    def accept_model(self, model: FLModel) -> None:
        raise self.error

    def aggregate_model(self) -> FLModel:
        raise AssertionError("nothing was accepted")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero; the traceback is in"),
        (JobFailed("no majority"), "no majority"),
        (SystemExit(3), "SystemExit: 3; the traceback is in"),
    ],
    ids=str,
)
def test_a_fault_in_a_plug_in_is_told_at_once(sim: Simulations, error: BaseException, said: str) -> None:
    """The user gets one line, the server's log all of it, and no script hangs on the result it has sent."""
    run = sim.start(BIG, aggregator=Broken(error))

    assert run.get_result(9.0) is not None  # less than scripts that hang would be given
    assert run.get_status() == "failed"
    assert said in dict(sim.events)["job_ended"]["reason"]
    log = (sim.run_dir / "server/log.txt").read_text()
    assert ("Traceback" in log) == ("traceback" in said)
    assert sorted(sim.gate.gone) == ["site-1", "site-2"]


def test_what_is_wrong_with_the_model_is_told_before_anything_starts(sim: Simulations) -> None:
    """A model that cannot be had is an error of the call, not of the run."""
    sim.folder.joinpath("bad.npy").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"bad\.npy"):
        sim.recipe(initial_ckpt=str(sim.folder / "bad.npy")).start(sim.env())

    assert sim.events == []
    assert not (sim.run_dir / "server").exists()


@pytest.mark.parametrize(
    ("extra", "said"), [({"transprot": "tcp"}, "known are on_event, transport"), ({"transport": "udp"}, "ipc or tcp")]
)
def test_unknown_extras_are_refused(sim: Simulations, extra: dict[str, Any], said: str) -> None:
    """A setting that nobody reads is not passed over in silence."""
    with pytest.raises(ConfigError, match=said):
        sim.recipe().start(sim.env(extra=extra))


def test_the_disk_failing_at_the_end_fails_the_job(sim: Simulations, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose last round could not be made durable has not completed, and keeps the round before."""
    commit = simulation.Archive._make_durable

    def fail_last(archive: Any, record: dict[str, Any], path: Path) -> None:
        if record["round"] == 2:
            archive._store.take_back()
            raise OSError(28, "No space left on device")
        commit(archive, record, path)

    monkeypatch.setattr(simulation.Archive, "_make_durable", fail_last)
    run = sim.start()
    run.get_result()

    assert run.get_status() == "failed"
    assert dict(sim.events)["job_ended"]["reason"] == "No space left on device"
    assert sim.model() == [2.0] * 4


# --- workers


def test_workers_over_loopback_are_encrypted(sim: Simulations) -> None:
    """With the transport "tcp" real workers reach the same model over CURVE."""
    alone = "class gate:\n    at = left = lambda *_: None\n"
    sim.folder.joinpath("client.py").write_text(ADD.replace("import gate\n", alone))
    job = sim.recipe().definition.with_id("2" * 32)
    sim.run_dir.mkdir(parents=True)
    found = start_simulation(
        job=job,
        sites=["site-1", "site-2"],
        num_workers=2,
        gpu_groups=None,
        run_dir=sim.run_dir,
        log_config=None,
        debug=False,
        extra={"transport": "tcp"},
    )

    assert found.wait(LIMIT_S)
    assert (found.status(), found.reason) == ("completed", None)
    assert sim.model() == [3.0] * 4
