"""WorkerPool: the processes that host a simulation's sites. Started, watched by pid, started again, and ended.

What a worker's exit means is decided here in words a person can use: its exit code or signal, the last it said, and
whose turn it was.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flarebus.site.import_path import import_path
from flarebus.site.worker import TURN_BYTES, read_turn

__all__ = ["HostEnd", "WorkerPool", "share_cores", "spread"]

log = logging.getLogger(__name__)

# A worker that dies while no site has the turn is started again this often in a job: a fault of the machine should not
# loop for ever. One that does not even get ready will not the next time either.
MAX_RESTARTS = 20
MAX_STILLBIRTHS = 2
# How long they may take after TERM before they are killed.
TERM_S = 3.0
LAST_WORDS_BYTES = 2000
# Whose number of threads: NumPy's and PyTorch's libraries, TensorFlow.
_THREAD_COUNTS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")


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
        self._launch(self._workers[address])

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

    def stop(self, told: Collection[str], patience_s: float) -> None:
        """See that all end: by themselves, then by TERM, then by KILL to their process groups.

        Args:
            told: addresses of workers that know that they should; nobody waits for others to end by themselves.
            patience_s: how long these may take.
        """
        self._stopping = True
        if told:
            self._signal(signal.SIGTERM, [worker for worker in self._workers.values() if worker.address not in told])
            self.wait(patience_s)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.wait(0.0):
                break
            self._signal(number, list(self._workers.values()))
            self.wait(TERM_S)
        for worker in self._workers.values():
            worker.turn_file.unlink(missing_ok=True)

    def kill(self) -> None:
        """End all at once, from any thread; `stop` comes nevertheless."""
        self._stopping = True
        self._signal(signal.SIGKILL, list(self._workers.values()))

    @staticmethod
    def _signal(number: signal.Signals, workers: Iterable[_Worker]) -> None:
        for worker in workers:
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
        code = worker.wait()
        turn = read_turn(worker.turn_file)
        worker.gone.set()
        if not self._stopping:
            will_restart = worker.is_worth_a_restart(turn)
            self._on_exit(HostEnd(worker.address, worker.sites, worker.describe_exit(code), turn or None, will_restart))


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
        self._ends = self._stillbirths = self._log_begin = 0
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
            self._log_begin = output.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flarebus.site.worker"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **import_path(os.environ), **self.environ},
                start_new_session=True,
            )
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(self.config).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it is dead already, and `_watch` will say so
            log.debug("%s died before it could be told what to do", self.name)

    def wait(self) -> int:
        """Wait for its end, see that nothing of it is left, and return its exit code."""
        if hasattr(os, "waitid"):
            # Not reaped yet, so that its number cannot be somebody else's when its group is signalled.
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        else:
            self.process.wait()
        # What the scripts started and left behind; the process itself is in the group, but dead.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # what it was not told any more
            self.process.stdin.close()
        return code

    def is_worth_a_restart(self, turn: str | None) -> bool:
        """Whether to try again after this end; a site that had the turn is the job's to give up.

        Args:
            turn: whose it was; "" for nobody's, None if it never got ready.
        """
        self._ends += turn == ""
        self._stillbirths = self._stillbirths + 1 if turn is None else 0
        return self._ends <= MAX_RESTARTS and self._stillbirths <= MAX_STILLBIRTHS

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
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_begin, end - LAST_WORDS_BYTES))  # not those of an earlier life
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1].strip()[:300] if lines else ""


def spread(sites: Sequence[str], workers: int) -> list[list[str]]:
    """Sites dealt out to workers like cards."""
    return [list(sites[number::workers]) for number in range(workers)]


def share_cores(workers: int) -> dict[str, str]:
    """Environment that shares the cores out: each worker's linear algebra would otherwise start a thread for each."""
    share = str(max(1, (os.cpu_count() or 1) // workers))
    return {name: share for name in _THREAD_COUNTS if name not in os.environ}
