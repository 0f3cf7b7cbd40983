"""SimEnv: its parameters, what it hands to the simulation, and what it does with the handle."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from flarebus.errors import ConfigError, JobAborted, JobFailed
from flarebus.recipe import SimEnv
from flarebus.recipe.workspace import ROOT_VARIABLE


class FakeSimulation:
    """A simulation that ends when the test says so."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.reason: str | None = None
        self.state = "running"
        self.ended = threading.Event()

    def status(self) -> str:
        return self.state

    def wait(self, timeout: float | None) -> bool:
        return self.ended.wait(timeout)

    def abort(self, by: str) -> None:
        self.end("aborted", by)

    def end(self, state: str, reason: str | None = None) -> None:
        self.state, self.reason = state, reason
        self.ended.set()


@pytest.fixture
def started(monkeypatch):
    """What was started: a list of (arguments, simulation). The real one is put in place of the pool."""
    found: list[tuple[dict[str, Any], FakeSimulation]] = []

    def start(self: SimEnv, job, run_dir: Path) -> FakeSimulation:
        found.append(({"job": job, "env": self}, FakeSimulation(run_dir)))
        return found[-1][1]

    monkeypatch.setattr(SimEnv, "_start", start)
    yield found
    for _, simulation in found:
        simulation.ended.set()


def _env(tmp_path: Path, **changes: Any) -> SimEnv:
    return SimEnv(**({"num_clients": 3, "workspace_root": tmp_path / "runs"} | changes))


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({}, "num_clients", "at least one site"),
    ({"num_clients": -1}, "num_clients", "whole number from 0"),
    ({"num_clients": True}, "num_clients", "whole number from 0"),
    ({"clients": []}, "clients", "at least one"),
    ({"clients": "site-1"}, "clients", "a list"),
    ({"clients": ["a", "b"], "num_clients": 3}, "num_clients", "contradicts the 2 names"),
    ({"clients": ["a", "b", "a"]}, "clients", "each site once"),
    ({"clients": ["Site", "site"]}, "clients", "each site once"),
    ({"clients": ["a b"]}, "clients", "letters"),
    ({"clients": ["a.b"]}, "clients", "letters"),
    ({"clients": [".."]}, "clients", "letters"),
    ({"clients": ["x" * 300]}, "clients", "letters"),
    ({"clients": ["server"]}, "clients", "reserved"),
    ({"clients": ["Server"]}, "clients", "reserved"),
    ({"clients": ["@ALL"]}, "clients", "reserved"),
    ({"clients": [3]}, "clients", "letters"),
    ({"num_clients": 2, "num_threads": 3}, "num_threads", "number of sites, 2"),
    ({"num_clients": 2, "num_threads": 0}, "num_threads", "whole number from 1"),
    ({"num_clients": 2, "gpu_config": "[0,1"}, "gpu_config", "GPU numbers"),
    ({"num_clients": 2, "gpu_config": ""}, "gpu_config", "GPU numbers"),
    ({"num_clients": 2, "gpu_config": "0;1"}, "gpu_config", "GPU numbers"),
    ({"num_clients": 2, "gpu_config": "[0,0]"}, "gpu_config", "twice"),
    ({"num_clients": 2, "gpu_config": 0}, "gpu_config", "a string"),
    ({"num_clients": 2, "gpu_config": "0,1,2"}, "gpu_config", "there are 2 sites"),
    ({"num_clients": 2, "gpu_config": "0,1", "num_threads": 1}, "num_threads", "number of groups in gpu_config, 2"),
    ({"num_clients": 2, "debug": 1}, "debug", "True or False"),
    ({"num_clients": 2, "debug": True, "num_threads": 2}, "num_threads", "debug=True"),
    ({"num_clients": 2, "debug": True, "gpu_config": "0,1"}, "gpu_config", "debug=True"),
    ({"num_clients": 2, "log_config": "loud"}, "log_config", "CRITICAL"),
    ({"num_clients": 2, "log_config": "missing.json"}, "log_config", "JSON file"),
    ({"num_clients": 2, "workspace_root": ""}, "workspace_root", "path of a folder"),
    ({"num_clients": 2, "workspace_root": 3}, "workspace_root", "path of a folder"),
    ({"num_clients": 2, "extra": [1]}, "extra", "a dict"),
]


@pytest.mark.parametrize(("given", "parameter", "said"), WRONG, ids=[f"{p}-{i}" for i, (_, p, _) in enumerate(WRONG)])
def test_wrong_parameter_is_named_with_its_value_and_what_is_allowed(given, parameter, said):
    """A wrong parameter is refused at construction, by name."""
    with pytest.raises(ConfigError) as caught:
        SimEnv(**given)

    assert caught.value.parameter == parameter
    assert said in str(caught.value)


def test_sites_are_numbered_or_named():
    """Sites are `site-1` to `site-n`, or have the names given; a number that agrees with the names is accepted."""
    assert SimEnv(num_clients=3).sites == ("site-1", "site-2", "site-3")
    assert SimEnv(clients=["b", "a"], num_clients=2).sites == ("b", "a")


@pytest.mark.parametrize(
    ("given", "threads", "groups"),
    [
        ({}, 4, None),
        ({"num_threads": 8}, 8, None),
        ({"gpu_config": "0,1"}, 2, ["0", "1"]),
        ({"gpu_config": "[0,1],[2]"}, 2, ["0,1", "2"]),
        ({"gpu_config": " [0, 1] , 2 ", "num_threads": 2}, 2, ["0,1", "2"]),
        ({"gpu_config": "0,0"}, 2, ["0", "0"]),
        ({"debug": True}, 1, None),
    ],
    ids=str,
)
def test_workers(monkeypatch, given, threads, groups):
    """The number of workers is what was asked for, one per GPU group, or one per processor."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)

    env = SimEnv(num_clients=20, **given)

    assert (env.num_threads, env.gpu_groups) == (threads, groups)


def test_no_more_workers_than_sites(monkeypatch):
    """Few sites on a big machine get one worker each."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)

    assert SimEnv(num_clients=2).num_threads == 2


def test_root_given_goes_before_the_environment_variable(monkeypatch, tmp_path):
    """`workspace_root` decides; without it the environment variable does."""
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "variable"))

    assert SimEnv(num_clients=1).workspace_root == tmp_path / "variable"
    assert SimEnv(num_clients=1, workspace_root=tmp_path / "given").workspace_root == tmp_path / "given"


def test_log_config_is_checked_and_its_file_made_absolute(tmp_path, monkeypatch):
    """A layout or level stays as it is; a file's path holds wherever a worker runs."""
    tmp_path.joinpath("log.json").write_text('{"version": 1}')
    monkeypatch.chdir(tmp_path)

    assert SimEnv(num_clients=1, log_config="full").log_config == "full"
    assert SimEnv(num_clients=1, log_config="DEBUG").log_config == "DEBUG"
    assert SimEnv(num_clients=1, log_config="log.json").log_config == str(tmp_path / "log.json")


def test_deploy_hands_over_everything(monkeypatch, make, tmp_path):
    """The simulation gets the job under a new id, the sites, the workers, the folder and all settings."""
    seen: dict[str, Any] = {}

    def start_simulation(**arguments: Any) -> FakeSimulation:
        seen.update(arguments)
        simulation = FakeSimulation(arguments["run_dir"])
        simulation.end("completed")
        return simulation

    monkeypatch.setattr("flarebus.server.simulation.start_simulation", start_simulation)
    env = _env(tmp_path, gpu_config="0,1", log_config="info", extra={"key": 1})
    recipe = make(name="mine")

    run = recipe.start(env)

    job = seen.pop("job")
    assert len(job.job_id) == 32
    assert job.job_id == run.get_job_id()
    assert job == recipe.definition
    assert recipe.definition.job_id == ""
    assert seen == {
        "sites": ["site-1", "site-2", "site-3"],
        "num_workers": 2,
        "gpu_groups": ["0", "1"],
        "run_dir": tmp_path / "runs" / "mine",
        "log_config": "info",
        "debug": False,
        "extra": {"key": 1},
    }
    assert seen["run_dir"].is_dir()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min_clients": 4}, "min_clients=4: needs more sites than there are: 3"),
        ({"clients_per_round": 4}, "clients_per_round=4: asks for more sites than there are: 3"),
        ({"per_site_config": {"site-9": {}}}, r"per_site_config\['site-9'\].*did you mean 'site-"),
        ({"per_site_config": {"site-1": {}}}, "site-2 has no entry"),
        ({"aggregation_weights": {"site1": 2.0}}, r"aggregation_weights\['site1'\].*did you mean 'site-1'"),
    ],
    ids=str,
)
def test_job_that_does_not_fit_is_refused_before_anything_starts(make, tmp_path, started, changes, said):
    """A job that cannot run on these sites leaves nothing started and nothing written."""
    with pytest.raises(ConfigError, match=said):
        make(**changes).start(_env(tmp_path))

    assert started == []
    assert not tmp_path.joinpath("runs").exists()


def test_status_result_and_reason_are_those_of_the_simulation(make, tmp_path, started):
    """A run in a simulation has a status while it runs and a folder when it ended, failed or not."""
    run = make().start(_env(tmp_path))
    assert run.get_status() == "running"
    assert run.get_result(timeout=0.001) is None

    started[0][1].end("failed", "no site answered")

    assert run.get_result() == str(tmp_path / "runs" / "fedavg")
    assert run.get_status() == "failed"
    assert Path(run.get_result() or "").is_dir()


def test_abort_reaches_the_simulation(make, tmp_path, started):
    """A simulation can be aborted, and says by whom."""
    run = make().start(_env(tmp_path))

    run.abort()

    assert run.get_result() is not None
    assert run.get_status() == "aborted"


@pytest.mark.parametrize(("state", "error"), [("failed", JobFailed), ("aborted", JobAborted)])
def test_execute_raises_what_the_simulation_says(make, tmp_path, started, monkeypatch, state, error):
    """`execute` turns the end of the simulation into an error with its reason."""
    start = SimEnv._start

    def start_and_end(self: SimEnv, job, run_dir: Path) -> FakeSimulation:
        simulation = start(self, job, run_dir)
        simulation.end(state, "the reason")
        return simulation

    monkeypatch.setattr(SimEnv, "_start", start_and_end)

    with pytest.raises(error, match="the reason"):
        make().execute(_env(tmp_path))


def test_folder_is_locked_while_the_job_runs_and_free_at_once_after(make, tmp_path, started, monkeypatch):
    """Two live runs of one name are refused; as soon as the result is there, the name is free."""
    # The thread that frees it when nobody asks may be late.
    monkeypatch.setattr("flarebus.recipe.sim_env._close_at_end", lambda simulation, folder: None)
    env = _env(tmp_path)
    run = make().start(env)
    with pytest.raises(ConfigError, match=f"process {os.getpid()} is running"):
        make().start(_env(tmp_path))
    other = make(name="other").start(env)

    started[0][1].end("completed")
    env.get_job_result(run.get_job_id())

    again = make().start(env)
    assert {each.get_status() for each in (again, other)} == {"running"}


def test_folder_is_free_after_the_end_even_if_nobody_asks(make, tmp_path, started):
    """A run whose handle was thrown away does not keep its name for ever."""
    make().start(_env(tmp_path))
    started[0][1].end("completed")
    for thread in threading.enumerate():
        if thread.name == "flarebus-run-folder":
            thread.join(10)

    make().start(_env(tmp_path))

    assert len(started) == 2


def test_failed_start_frees_the_folder(make, tmp_path, monkeypatch):
    """If the pool cannot start, the error reaches the caller and the name is free."""

    def broken(self: SimEnv, job, run_dir: Path) -> FakeSimulation:
        raise OSError("no more processes")

    monkeypatch.setattr(SimEnv, "_start", broken)
    for _ in range(2):
        with pytest.raises(OSError, match="no more processes"):
            make().start(_env(tmp_path))


def test_stop_leaves_running_jobs_and_folders_alone(make, tmp_path, started):
    """`stop` frees what ended jobs hold; it ends no job and removes no folder."""
    env = _env(tmp_path)
    one, two = make(name="one").start(env), make(name="two").start(env)
    started[0][1].end("completed")

    env.stop(clean_up=True)

    assert two.get_status() == "running"
    with pytest.raises(ConfigError, match="is running a job of this name"):
        make(name="two").start(env)
    assert Path(one.get_result() or "").is_dir()


def test_unknown_job_is_an_error(tmp_path):
    """Asking for a job of another environment says so."""
    with pytest.raises(ConfigError, match="no job of this environment"):
        _env(tmp_path).get_job_status("job-1")
