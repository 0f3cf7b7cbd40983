"""A simulated run that a test watches and disturbs: real worker processes, real scripts, every wait bounded.

Nothing here sleeps to let things happen: a test acts on an event of the job, on a file that a script wrote, or on a
process that has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from flarebus.recipe import FedAvgRecipe, FrameworkType, Run, SimEnv

__all__ = ["LIMIT_S", "ONE", "ObservedRun", "marked_processes", "wait_until", "worker_of"]

LIMIT_S = 60.0
# A process that was told to end is gone within this.
GONE_S = 3.0

ONE = """
import flarebus.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    {body}
    flare.send(flare.FLModel(params={{"w": model.params["w"] + 1}}, metrics={{"loss": 1.0}}))
"""
"""A script that adds one to every weight; `body` runs in each round before it answers."""


def wait_until(is_true: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> None:
    """Return as soon as `is_true()` holds; fail the test with `what` when it does not in time."""
    deadline = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.005)


def marked_processes(mark: str) -> dict[int, str]:
    """pid -> command line of every process with `mark` in the environment it was started with, zombies left out."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in folder.joinpath("environ").read_bytes():
                found[int(folder.name)] = folder.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


class ObservedRun:
    """One simulated job, with its events.

    Args:
        folder: for the script and the workspace.
        sockets: where the run makes its sockets; watched for leftovers.
        mark: in the environment of all its processes.
    """

    def __init__(self, folder: Path, sockets: Path, mark: str) -> None:
        self.folder = folder
        self.sockets = sockets
        self.mark = mark
        self.run_dir = folder / "runs" / "job"
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.pids: dict[str, int] = {}
        self.run: Run | None = None
        self._on: dict[str, Callable[[dict[str, Any]], None]] = {}
        self._changed = threading.Condition()

    def on(self, event: str, act: Callable[[dict[str, Any]], None]) -> None:
        """Call `act(fields)` on the job's thread at each such event: the job stands still meanwhile."""
        self._on[event] = act

    def start(
        self,
        script: str,
        sites: Sequence[str] = ("site-1", "site-2"),
        *,
        size: int = 4,
        env: Any = None,
        prepare: Callable[[FedAvgRecipe], None] | None = None,
        kind: type[FedAvgRecipe] = FedAvgRecipe,
        **given: Any,
    ) -> Run:
        """Start a job with `script` on `sites`, one worker for each of two sites, from a model of zeros.

        Args:
            script: text of the training script.
            sites: their names.
            size: weights of the model.
            env: settings of the environment.
            prepare: called with the recipe before it is started.
            kind: of recipe.
            given: parameters of the recipe.
        """
        path = self.folder / "client.py"
        path.write_text(script)
        recipe = kind(
            **{
                "name": "job",
                "model": {"w": np.zeros(size, np.float32)},
                "min_clients": len(sites),
                "num_rounds": 2,
                "train_script": str(path),
                "framework": FrameworkType.NUMPY,
                "key_metric": "",
                **given,
            }
        )
        if prepare is not None:
            prepare(recipe)
        self.run = recipe.start(
            SimEnv(
                **{
                    "clients": list(sites),
                    "num_threads": min(2, len(sites)),
                    "workspace_root": self.folder / "runs",
                    "extra": {"on_event": self._note},
                    **(env or {}),
                }
            )
        )
        return self.run

    def _note(self, event: str, fields: dict[str, Any]) -> None:
        if event == "workers_started":
            self.pids = {address.partition(".")[0]: pid for address, pid in fields["pids"].items()}
        if event in self._on:
            self._on[event](fields)
        with self._changed:
            self.events.append((event, fields))
            self._changed.notify_all()

    def wait_for(self, event: str, **fields: Any) -> dict[str, Any]:
        """Wait for an event with these fields."""

        def found() -> dict[str, Any] | None:
            for name, its in self.events:
                if name == event and fields.items() <= its.items():
                    return its
            return None

        with self._changed:
            assert self._changed.wait_for(lambda: found() is not None, LIMIT_S), f"no {event} {fields}: {self.events}"
            event_fields = found()
        assert event_fields is not None
        return event_fields

    def wait_for_file(self, *names: str) -> Path:
        """Wait for a file below the run folder."""
        path = self.run_dir.joinpath(*names)
        wait_until(path.exists, str(path))
        return path

    def end(self) -> str:
        """Wait for the end of the job; its status. Whatever it was, everything is cleaned up."""
        assert self.run is not None
        assert self.run.get_result(LIMIT_S) is not None, f"the job hangs: {self.events}"
        self.check_clean()
        status = self.run.get_status()
        assert status is not None
        return status

    @property
    def reason(self) -> str:
        """Why it failed."""
        assert self.run is not None
        return self.run.exec_env.get_job_reason(self.run.get_job_id()) or ""

    def check_clean(self) -> None:
        """No process, socket, turn file or secret is left; the journal agrees with the model."""
        wait_until(lambda: not marked_processes(self.mark), f"processes end: {marked_processes(self.mark)}", GONE_S)
        assert list(self.sockets.iterdir()) == []
        assert list(self.run_dir.glob("server/*.turn")) == []
        assert list(self.run_dir.glob("*/config")) == []

    def complaints(self, event: str = "site_failed") -> dict[str, str]:
        """site -> why it failed (or was refused), of the last time."""
        return {fields["site"]: fields["reason"] for name, fields in self.events if name == event}

    def kill(self, worker: str) -> None:
        """Kill a worker the hard way."""
        os.kill(self.pids[worker], signal.SIGKILL)

    # -- what it left --

    def model(self) -> list[float]:
        """The committed model."""
        return [float(value) for value in load_file(self.run_dir / "server/models/FL_global_model.safetensors")["w"]]

    def rounds(self) -> list[dict[str, Any]]:
        """The lines of metrics."""
        return [json.loads(line) for line in (self.run_dir / "server/metrics.jsonl").read_text().splitlines()]

    def journal(self) -> tuple[list[int], str]:
        """The committed rounds, and how the job ended."""
        db = sqlite3.connect(self.run_dir / "server/rounds.sqlite")
        with contextlib.closing(db):
            assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            rounds = [row[0] for row in db.execute("SELECT number FROM rounds ORDER BY number")]
            return rounds, db.execute("SELECT state FROM job").fetchone()[0]

    def log(self, site: str) -> str:
        """The log of a site, or of the server."""
        path = self.run_dir / site / "log.txt"
        return path.read_text() if path.exists() else ""


def worker_of(number: int) -> str:
    """The name of the worker of the nth site, with as many workers as sites."""
    return f"worker-{number}"
