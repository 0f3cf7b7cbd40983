"""Fixtures of the recipe tests: a training script, recipes around it, and an environment that runs nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flarebus.job.definition import JobDefinition
from flarebus.recipe import ExecEnv, FedAvgRecipe


class FakeEnv(ExecEnv):
    """Keeps what it is asked to do; a job ends when the test calls `end`."""

    def __init__(self) -> None:
        self.jobs: list[JobDefinition] = []
        self.calls: list[str] = []
        self.state = "running"
        self.reason: str | None = None
        self.broken = False
        self.ended = threading.Event()
        self.waiting = threading.Semaphore(0)

    def end(self, state: str, reason: str | None = None) -> None:
        self.state, self.reason = state, reason
        self.ended.set()

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.broken:
            raise OSError("the environment is broken")

    def deploy(self, job: JobDefinition) -> str:
        self._called("deploy")
        self.jobs.append(job)
        return "job-1"

    def get_job_status(self, job_id: str) -> str | None:
        self._called("status")
        return self.state

    def get_job_result(self, job_id: str, timeout: float = 0.0) -> str | None:
        self._called("result")
        self.waiting.release()
        return "/runs/job-1" if self.ended.wait(timeout or None) else None

    def abort_job(self, job_id: str) -> None:
        self._called("abort")
        self.end("aborted", "user")

    def stop(self, clean_up: bool = False) -> None:
        self._called(f"stop {clean_up}")

    def get_job_reason(self, job_id: str) -> str | None:
        return self.reason


@pytest.fixture
def env() -> FakeEnv:
    return FakeEnv()


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A folder with a training script, a module and a package beside it."""
    folder = tmp_path / "code"
    (folder / "layers").mkdir(parents=True)
    folder.joinpath("client.py").write_text("import model\n")
    folder.joinpath("model.py").write_text(
        "import numpy as np\n\n\nclass Net(dict):\n"
        "    def __init__(self, size=2):\n        super().__init__(w=np.full(size, 7.0, np.float32))\n"
    )
    folder.joinpath("layers", "__init__.py").write_text("SIZE = 2\n")
    folder.joinpath("notes.txt").write_text("not code")
    return folder


@pytest.fixture
def make(code: Path) -> Callable[..., FedAvgRecipe]:
    """A recipe with everything it needs; keyword arguments go on top."""

    def made(**changes: Any) -> FedAvgRecipe:
        basic = {"min_clients": 1, "train_script": str(code / "client.py"), "model": [1.0, 2.0]}
        return FedAvgRecipe(**(basic | changes))

    return made
