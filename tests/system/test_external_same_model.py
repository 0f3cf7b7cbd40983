"""The same script gives the same model, bit for bit, whether it runs inside its client job or in a process of its own,
and whatever pipe is between the two."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from flarebus.errors import ConfigError
from flarebus.pipes.loading import load_pipe_class
from flarebus.recipe import FedAvgRecipe, FrameworkType, SimEnv
from tests.system.observed import LIMIT_S, ObservedRun

SITES = ("site-1", "site-2")

NUMPY = """
import sys
import zlib

import numpy as np

import flarebus.client as flare

flare.init()
name = flare.get_site_name()
rng = np.random.default_rng(zlib.crc32(name.encode()))
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    new = {}
    for key, value in sorted(model.params.items()):
        step = rng.standard_normal(value.shape)
        new[key] = value + step.astype(value.dtype)
    loss = float(sum(np.abs(value.astype(np.float64)).sum() for value in model.params.values()))
    flare.send(flare.FLModel(params=new, metrics={"loss": loss}, meta={"NUM_STEPS_CURRENT_ROUND": len(name) + loss}))
"""

TORCH = """
import zlib

import torch

import flarebus.client as flare

torch.manual_seed(1)
net = torch.nn.Sequential(
    torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.ReLU(), torch.nn.Linear(5, 300_000 // 5, bias=False)
)
flare.init()
data = torch.Generator().manual_seed(zlib.crc32(flare.get_site_name().encode()))
while flare.is_running():
    model = flare.receive()
    net.load_state_dict(model.params)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss = net(torch.randn(4, 6, generator=data)).square().mean()
        loss.backward()
        optimizer.step()
    flare.send(flare.FLModel(params=net.state_dict(), metrics={"loss": float(loss.detach())}))
"""


def numpy_model() -> dict[str, Any]:
    """Several layers of several types, some too big for a message."""
    rng = np.random.default_rng(7)
    return {
        "conv.weight": rng.standard_normal((8, 3, 3, 3)).astype(np.float32),
        "head.weight": rng.standard_normal((300, 700)).astype(np.float32),
        "head.bias": rng.standard_normal(700),
        "half": rng.standard_normal(33).astype(np.float16),
        "scalar": np.float64(1.5) * np.ones(()),
        "empty": np.zeros((0, 4), np.float32),
    }


def torch_model() -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.ReLU(), torch.nn.Linear(5, 300_000 // 5, bias=False)
    )
    found: dict[str, Any] = net.state_dict()
    return found


FRAMEWORKS: dict[str, tuple[str, Any, FrameworkType]] = {
    "numpy": (NUMPY, numpy_model, FrameworkType.NUMPY),
    "torch": (TORCH, torch_model, FrameworkType.PYTORCH),
}


def built_in_pipes() -> list[str]:
    """The pipes of this distribution that can be loaded."""
    names = {each.name for each in entry_points(group="flarebus.pipes") if each.value.startswith("flarebus_pipes.")}
    return sorted(name for name in names if can_be_loaded(name))


def can_be_loaded(name: str) -> bool:
    try:
        load_pipe_class(name)
    except ConfigError:
        return False
    return True


class Trials:
    """Runs jobs, and keeps the models of those that are compared with others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._inside: dict[tuple[str, str], dict[str, Any]] = {}
        self._n = 0

    def inside(self, framework: str, transfer: str) -> dict[str, Any]:
        """The final model of a job whose scripts run inside their client job."""
        key = framework, transfer
        if key not in self._inside:
            self._inside[key] = self.run(framework, transfer)
        return self._inside[key]

    def run(
        self, framework: str, transfer: str, pipe: str = "", env: dict[str, Any] | None = None, **given: Any
    ) -> dict[str, Any]:
        """The final model of one job."""
        script, model, kind = FRAMEWORKS[framework]
        self._n += 1
        folder = self.folder / str(self._n)
        folder.mkdir()
        path = folder / "client.py"
        path.write_text(given.pop("script", script))
        recipe = FedAvgRecipe(
            name="job",
            model=model(),
            min_clients=2,
            num_rounds=3,
            train_script=str(path),
            framework=kind,
            params_transfer_type=transfer,
            deterministic=True,
            key_metric="",
            **given,
        )
        if pipe:
            recipe.add_client_config({"pipe": pipe})
        run = recipe.start(SimEnv(clients=list(SITES), workspace_root=folder / "runs", **(env or {})))
        assert run.get_result(LIMIT_S) is not None, "the job hangs"
        job = run.get_job_id()
        assert run.get_status() == "completed", run.exec_env.get_job_reason(job)
        return dict(load_file(folder / "runs/job/server/models/FL_global_model.safetensors"))


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("trials"))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes(), name


def test_this_distribution_has_pipes() -> None:
    """What is compared below is not nothing."""
    assert {"cell", "file", "memory"} <= set(built_in_pipes())


@pytest.mark.parametrize("transfer", ["FULL", "DIFF"])
@pytest.mark.parametrize("framework", list(FRAMEWORKS))
@pytest.mark.parametrize("pipe", built_in_pipes())
def test_every_pipe_gives_the_model_of_a_script_inside(
    trials: Trials, sockets: Path, pipe: str, framework: str, transfer: str
) -> None:
    """Three rounds over each pipe end with the very bits of three rounds without one."""
    found = trials.run(framework, transfer, pipe, launch_external_process=True)

    assert_same(found, trials.inside(framework, transfer))
    # torch makes itself a folder for what it compiles.
    assert [path for path in sockets.iterdir() if not path.name.startswith("torch")] == []


@pytest.mark.parametrize("transfer", ["FULL", "DIFF"])
@pytest.mark.parametrize("framework", list(FRAMEWORKS))
def test_the_pipe_of_the_example_gives_the_model_of_a_script_inside(
    trials: Trials, sockets: Path, monkeypatch: pytest.MonkeyPatch, framework: str, transfer: str
) -> None:
    """A plug-in that is not part of flarebus, named by its class path, is no different."""
    source = Path(__file__).parents[2] / "examples/custom_pipe/src"
    monkeypatch.setenv("PYTHONPATH", str(source))  # as if it were installed, for workers and trainers
    found = trials.run(framework, transfer, "flarebus_tcp_pipe:TcpPipe", launch_external_process=True)

    assert_same(found, trials.inside(framework, transfer))


@pytest.mark.parametrize(
    ("env", "given"),
    [
        ({"extra": {"transport": "tcp"}}, {}),
        ({"debug": True}, {}),
        ({"debug": True, "extra": {"transport": "tcp"}}, {}),
        ({"num_threads": 1}, {}),
    ],
    ids=["tcp", "debug", "debug-tcp", "one-worker"],
)
def test_the_way_between_makes_no_difference(
    trials: Trials, sockets: Path, env: dict[str, Any], given: dict[str, Any]
) -> None:
    """Encrypted, in this very process, or with both sites in one worker: the same bits."""
    found = trials.run("numpy", "FULL", "cell", env, launch_external_process=True, **given)

    assert_same(found, trials.inside("numpy", "FULL"))


# What a site knows from round to round it cannot keep in memory when each round has a process of its own.
STATELESS = NUMPY.replace("rng = np.random.default_rng(zlib.crc32(name.encode()))\n", "").replace(
    "    new = {}\n",
    "    new = {}\n    rng = np.random.default_rng([zlib.crc32(name.encode()), model.current_round])\n",
)
ONE_SHOT = STATELESS.replace("while flare.is_running():", "for _ in range(1):")


@pytest.mark.parametrize("pipe", built_in_pipes())
def test_a_process_for_every_task_gives_the_same_model(trials: Trials, sockets: Path, pipe: str) -> None:
    """With launch_once=False each round starts the script anew."""
    expected = trials.run("numpy", "FULL", script=STATELESS)
    found = trials.run("numpy", "FULL", pipe, script=STATELESS, launch_external_process=True, launch_once=False)

    assert_same(found, expected)


@pytest.mark.parametrize("launch_once", [True, False])
@pytest.mark.parametrize("pipe", built_in_pipes())
def test_a_script_that_does_one_task_and_ends_serves_every_round(
    trials: Trials, sockets: Path, pipe: str, launch_once: bool
) -> None:
    """As inside the client job, it is run again for the next task, also if that comes while it is still leaving."""
    expected = trials.run("numpy", "FULL", script=ONE_SHOT)
    found = trials.run("numpy", "FULL", pipe, script=ONE_SHOT, launch_external_process=True, launch_once=launch_once)

    assert_same(found, expected)


def test_no_model_goes_through_a_client_job(observed: ObservedRun) -> None:
    """A model of 64 MB, out and back for three rounds, leaves no trace in the memory of the workers between."""
    peaks: dict[str, int] = {}

    def measure(_: dict[str, Any]) -> None:
        for worker, pid in observed.pids.items():
            status = Path(f"/proc/{pid}/status").read_text()
            peaks[worker] = int(status.partition("VmHWM:")[2].split()[0]) // 1024

    observed.on("round_committed", measure)
    script = """
import flarebus.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    model.params["w"] += 1
    flare.send(flare.FLModel(params=model.params))
"""
    observed.start(script, ["site-1"], size=16_000_000, launch_external_process=True, num_rounds=3)

    assert observed.end() == "completed"
    assert set(observed.model()[:3]) == {3.0}
    assert max(peaks.values()) < 64, peaks
