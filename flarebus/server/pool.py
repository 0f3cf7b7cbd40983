"""WorkerPool: the processes that host a simulation's sites. Started, watched by pid, started again, and ended.

What a worker's exit means is decided here in words a person can use: its exit code or signal, the last it said, and
whose turn it was.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flarebus
from flarebus.site.worker import TURN_BYTES, read_turn

__all__ = ["HostEnd", "WorkerPool", "spread"]

log = logging.getLogger(__name__)

# A worker that was killed is started again this often in a job; a fault of the machine should not loop for ever.
MAX_RESTARTS = 20
MAX_STILLBIRTHS = 2
# After the job has ended: first they end by themselves, then they are told to, then they are made to.
END_S = 15.0
TERM_S = 3.0
LAST_WORDS_BYTES = 2000


@dataclass(frozen=True, slots=True)
class HostEnd:
    """How the process of a host ended.

    Args:
        address: of its cell.
        sites: that it ran.
        reason: exit code or signal and the last it said, in one line.
        culprit: the site that had the turn, or None.
        will_restart: whether it is worth starting it again.
    """

    address: str
    sites: tuple[str, ...]
    reason: str
    culprit: str | None
    will_restart: bool


class WorkerPool:
    """The workers of one simulation. `start`, `restart` and `stop` on one thread that outlives them: on Linux a worker
    dies with the thread that started it.

    Args:
        folder: for the workers' own output and turn files.
        on_exit: told of every exit that was not asked for, on a thread of the pool.
    """

    def __init__(self, folder: Path, on_exit: Callable[[HostEnd], None]) -> None:
        self._folder = folder
        self._on_exit = on_exit
        self._workers: dict[str, _Worker] = {}
        self._stopping = False

    def start(self, config: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        """Start a worker.

        Args:
            config: what `flarebus.site.worker` reads, less its turn file.
            environ: environment variables to add.
        """
        self._workers[config["address"]] = worker = _Worker(config, environ, self._folder)
        self._launch(worker)

    def restart(self, address: str) -> None:
        """Start a worker again, as it was."""
        worker = self._workers[address]
        worker.restarts += 1
        self._launch(worker)

    @property
    def pids(self) -> dict[str, int]:
        """address -> process id of each worker that runs."""
        return {address: worker.process.pid for address, worker in self._workers.items() if worker.is_running}

    def wait(self, seconds: float) -> bool:
        """Wait until all have ended; False if the time was up first."""
        deadline = time.monotonic() + seconds
        for worker in self._workers.values():
            worker.gone.wait(max(0.0, deadline - time.monotonic()))
        return all(worker.gone.is_set() for worker in self._workers.values())

    def expect_end(self) -> None:
        """From now on an exit is nothing to report."""
        self._stopping = True

    def stop(self, at_once: bool = False) -> None:
        """See that all end: by themselves, then by TERM, then by KILL to their process groups."""
        self._stopping = True
        if at_once or not self.wait(END_S):
            for number, patience in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, TERM_S)):
                self._signal(number)
                if self.wait(patience):
                    break
        for worker in self._workers.values():
            worker.turn_file.unlink(missing_ok=True)

    def _signal(self, number: signal.Signals) -> None:
        for worker in self._workers.values():
            if worker.is_running:
                try:
                    os.killpg(worker.process.pid, number)
                except ProcessLookupError:
                    continue

    def _launch(self, worker: _Worker) -> None:
        worker.launch()
        thread = threading.Thread(target=self._watch, args=(worker,), name=f"flarebus {worker.name}", daemon=True)
        thread.start()

    def _watch(self, worker: _Worker) -> None:
        code = worker.process.wait()
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        worker.gone.set()
        if not self._stopping:
            self._on_exit(
                HostEnd(
                    worker.address,
                    worker.sites,
                    worker.describe_exit(code),
                    read_turn(worker.turn_file),
                    worker.is_worth_a_restart(),
                )
            )


class _Worker:
    """One process, and what it takes to start it again."""

    def __init__(self, config: Mapping[str, Any], environ: Mapping[str, str], folder: Path) -> None:
        self.address: str = config["address"]
        self.sites = tuple(site["name"] for site in config["sites"])
        self.name = self.address.partition(".")[0]
        self.turn_file = folder / f"{self.name}.turn"
        self.log_file = folder / f"{self.name}.log"
        self.config = {**config, "turn_file": str(self.turn_file)}
        self.environ = environ
        self.restarts = 0
        self.gone = threading.Event()
        self.process: subprocess.Popen[bytes]

    @property
    def is_running(self) -> bool:
        return not self.gone.is_set()

    def launch(self) -> None:
        """Start the process; its configuration goes through standard input, which stays open while we live."""
        self.gone.clear()
        self.turn_file.write_bytes(bytes(TURN_BYTES))
        with open(self.log_file, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flarebus.site.worker"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **_import_path(), **self.environ},
                start_new_session=True,
            )
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(self.config).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it is dead already, and `_watch` will say so
            log.debug("%s died before it could be told what to do", self.name)

    def is_worth_a_restart(self) -> bool:
        """Whether to try again: seldom for one that never came as far as working for a site, it will fail again."""
        has_lived = read_turn(self.turn_file) is not None
        return self.restarts < (MAX_RESTARTS if has_lived else MAX_STILLBIRTHS)

    def describe_exit(self, code: int) -> str:
        """What happened, in one line."""
        if code < 0:
            try:
                what = f"was killed by {signal.Signals(-code).name}"
            except ValueError:
                what = f"was killed by signal {-code}"
        else:
            what = f"ended with exit code {code}"
        words = self._last_words()
        return f"its worker process {what}" + (f" (last output: {words})" if words else "")

    def _last_words(self) -> str:
        with open(self.log_file, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - LAST_WORDS_BYTES))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1].strip()[:300] if lines else ""


def _import_path() -> dict[str, str]:
    """Let the worker import the very flarebus that runs here, installed or not."""
    source = str(Path(flarebus.__file__).parent.parent)
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": source if not before else os.pathsep.join((before, source))}


def spread(sites: Sequence[str], workers: int) -> list[list[str]]:
    """Sites dealt out to workers like cards."""
    return [list(sites[number::workers]) for number in range(workers)]
