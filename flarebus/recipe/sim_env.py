"""SimEnv: the whole system on this machine. Parameters, run folder and handles on what runs; not the pool itself."""

from __future__ import annotations

import os
import re
import threading
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flarebus.client.log_config import LogConfig
from flarebus.errors import ConfigError
from flarebus.job.checks import check_flag, check_int, check_mapping, check_text, nearest
from flarebus.job.definition import JobDefinition
from flarebus.recipe.env import ExecEnv
from flarebus.recipe.validate import check_site_name
from flarebus.recipe.workspace import RunFolder, default_root

__all__ = ["SimEnv", "Simulation"]

_GPU_GROUP = r"\[\s*\d+(?:\s*,\s*\d+)*\s*\]|\d+"
_GPU_CONFIG = re.compile(rf"\s*(?:{_GPU_GROUP})(?:\s*,\s*(?:{_GPU_GROUP}))*\s*")


class Simulation(Protocol):
    """A simulated job that has been started. Thread-safe."""

    run_dir: Path
    reason: str | None

    def status(self) -> str:
        """`running`, `completed`, `failed` or `aborted`."""
        ...

    def wait(self, timeout: float | None) -> bool:
        """Wait for the end, at most `timeout` seconds; whether it has come."""
        ...

    def abort(self, by: str) -> None:
        """Ask the job to end."""
        ...

    def kill(self) -> None:
        """End its processes now, whatever they do."""
        ...


@dataclass(frozen=True, slots=True)
class _Started:
    simulation: Simulation
    folder: RunFolder


class SimEnv(ExecEnv):
    """Simulated sites on this machine: the real bus, and a pool of worker processes that take turns at being sites.

    Several jobs of different names may run in one environment at once. A run keeps its folder,
    `<workspace_root>/<job name>`, until the next run of that name.

    Args:
        num_clients: number of sites, called `site-1`, `site-2`, ...
        clients: names of the sites instead; give one of the two, or both if they agree.
        num_threads: worker processes, that is, sites that compute at once: 1 to the number of sites. None takes the
            number of GPU groups, or else one per processor but no more than sites: the scripts of more sites than
            there are processors only slow each other down, and every worker costs the memory of one model.
        gpu_config: GPUs of each worker: `"0,1"` for one each, `"[0,1],[2]"` for groups.
        log_config: of the sites' logs: a layout (`concise full verbose msg_only`), a level (`debug info warning error
            critical`), or the path of a JSON file in the form of `logging.config.dictConfig`. None for `concise`.
        workspace_root: where run folders go. None takes the environment variable FLAREBUS_SIMULATION_ROOT, or else
            `flarebus/simulation` in the user's cache folder.
        extra: further settings of the environment, by name.
        debug: run everything in this process, one site after the other, so that breakpoints work.

    Raises:
        ConfigError: a parameter is wrong; names it, its value and what is allowed.
    """

    def __init__(
        self,
        *,
        num_clients: int = 0,
        clients: list[str] | None = None,
        num_threads: int | None = None,
        gpu_config: str | None = None,
        log_config: str | None = None,
        workspace_root: str | os.PathLike[str] | None = None,
        extra: dict[str, Any] | None = None,
        debug: bool = False,
    ) -> None:
        self.sites = _check_sites(num_clients, clients)
        self.debug = check_flag("debug", debug)
        self.gpu_groups = None if gpu_config is None else _gpu_groups(gpu_config)
        self.num_threads = _check_threads(num_threads, self.gpu_groups, len(self.sites), self.debug)
        self.log_config = _check_log_config(log_config)
        self.workspace_root = _check_root(workspace_root)
        self.extra = dict(check_mapping("extra", {} if extra is None else extra))
        self._lock = threading.Lock()
        self._started: dict[str, _Started] = {}

    def deploy(self, job: JobDefinition) -> str:
        """Start `job` and return its id, without waiting for its end.

        Raises:
            ConfigError: the job does not fit the sites, or its run folder is in use or cannot be written. Nothing was
                started.
        """
        job.check_sites(self.sites)
        folder = RunFolder.open(self.workspace_root, job.name, self.sites)
        job = job.with_id(uuid.uuid4().hex)
        simulation = None
        try:
            simulation = self._start(job, folder.path)
            with self._lock:
                self._started[job.job_id] = _Started(simulation, folder)
            # The folder is free again when the job ends, even if nobody ever asks for the result.
            threading.Thread(
                target=_close_at_end, args=(simulation, folder), name="flarebus-run-folder", daemon=True
            ).start()
        except BaseException:
            if simulation is not None:  # an interrupt: the caller will never have a handle on it
                simulation.abort("user")
            folder.close()
            raise
        return job.job_id

    def get_job_status(self, job_id: str) -> str | None:
        """`running`, `completed`, `failed` or `aborted`."""
        return self._find(job_id).simulation.status()

    def get_job_reason(self, job_id: str) -> str | None:
        """Why the job failed or who aborted it."""
        return self._find(job_id).simulation.reason

    def get_job_result(self, job_id: str, timeout: float = 0.0) -> str | None:
        """Wait for the end and return the run folder, of a failed job too; None when it has not ended in time.

        Args:
            timeout: seconds; 0 for as long as it takes.
        """
        started = self._find(job_id)
        if not started.simulation.wait(timeout if timeout > 0 else None):
            return None
        started.folder.close()  # before the caller goes on: he may start the same job again at once
        return str(started.simulation.run_dir)

    def abort_job(self, job_id: str) -> None:
        """Ask the job to end; returns before it has."""
        self._find(job_id).simulation.abort("user")

    def stop(self, clean_up: bool = False) -> None:
        """Free the run folders of jobs that have ended, for the next run. Running jobs go on, and no folder is removed.

        Args:
            clean_up: makes no difference here: what a simulation leaves is its result.
        """
        with self._lock:
            started = list(self._started.values())
        for each in started:
            if each.simulation.wait(0.0):
                each.folder.close()

    def kill(self) -> bool:
        """End what runs here at once, for a process that is about to leave: no worker or socket outlives it.

        Returns:
            Whether anything ran. Its threads may not have noticed yet.
        """
        running = [each.simulation for each in list(self._started.values()) if not each.simulation.wait(0.0)]
        for simulation in running:
            simulation.kill()
        return bool(running)

    def _start(self, job: JobDefinition, run_dir: Path) -> Simulation:
        # Only now: building a recipe or an environment needs no socket and no worker pool.
        from flarebus.server.simulation import start_simulation

        return start_simulation(
            job=job,
            sites=list(self.sites),
            num_workers=self.num_threads,
            gpu_groups=self.gpu_groups,
            run_dir=run_dir,
            log_config=self.log_config,
            debug=self.debug,
            extra=dict(self.extra),
        )

    def _find(self, job_id: str) -> _Started:
        with self._lock:
            found = self._started.get(job_id)
            known = list(self._started)
        if found is None:
            raise ConfigError("job_id", job_id, f"no job of this environment; {nearest(known, job_id)}")
        return found


def _close_at_end(simulation: Simulation, folder: RunFolder) -> None:
    simulation.wait(None)
    folder.close()


def _check_sites(num_clients: object, clients: object) -> tuple[str, ...]:
    count = check_int("num_clients", num_clients, 0)
    if clients is None:
        if count == 0:
            raise ConfigError("num_clients", count, "at least one site: give num_clients or clients")
        return tuple(f"site-{index}" for index in range(1, count + 1))
    if isinstance(clients, str) or not isinstance(clients, Iterable):
        raise ConfigError("clients", clients, "a list of site names")
    names: dict[str, str] = {}
    for name in clients:
        check_site_name("clients", name)
        # Each site has a folder of its name, and some file systems do not tell upper from lower case.
        if name.lower() in names:
            raise ConfigError("clients", name, f"each site once; there is {names[name.lower()]!r} already")
        names[name.lower()] = name
    if not names:
        raise ConfigError("clients", clients, "at least one site name")
    if count not in (0, len(names)):
        raise ConfigError("num_clients", count, f"contradicts the {len(names)} names in clients; leave it out")
    return tuple(names.values())


def _gpu_groups(gpu_config: object) -> list[str]:
    """One string per worker, in the form of CUDA_VISIBLE_DEVICES."""
    text = check_text("gpu_config", gpu_config)
    if not _GPU_CONFIG.fullmatch(text):
        raise ConfigError("gpu_config", text, 'GPU numbers such as "0,1", or groups of them such as "[0,1],[2]"')
    groups = [re.findall(r"\d+", group) for group in re.findall(_GPU_GROUP, text)]
    for group in groups:
        if len(set(group)) < len(group):
            raise ConfigError("gpu_config", text, f"GPU named twice in the group [{','.join(group)}]")
    return [",".join(group) for group in groups]


def _check_threads(num_threads: object, gpu_groups: list[str] | None, n_sites: int, debug: bool) -> int:
    if gpu_groups is not None and len(gpu_groups) > n_sites:
        raise ConfigError("gpu_config", gpu_groups, f"at most one group per site; there are {n_sites} sites")
    if num_threads is not None:
        threads = check_int("num_threads", num_threads, 1)
    elif gpu_groups is not None:
        threads = len(gpu_groups)
    else:
        threads = 1 if debug else min(n_sites, os.cpu_count() or 1)
    if threads > n_sites:
        raise ConfigError("num_threads", threads, f"at most the number of sites, {n_sites}")
    if gpu_groups is not None and threads != len(gpu_groups):
        raise ConfigError("num_threads", threads, f"must be the number of groups in gpu_config, {len(gpu_groups)}")
    if debug and threads != 1:
        parameter = "num_threads" if num_threads is not None else "gpu_config"
        raise ConfigError(parameter, threads, "only one with debug=True, which runs everything in this process")
    return threads


def _check_log_config(log_config: object) -> str | None:
    if log_config is None:
        return None
    text = check_text("log_config", log_config)
    # A file is named for the workers, which have working directories of their own.
    return os.path.abspath(text) if LogConfig.parse(text).source else text


def _check_root(workspace_root: object) -> Path:
    if workspace_root is None:
        return default_root()
    if not isinstance(workspace_root, (str, os.PathLike)) or not os.fspath(workspace_root):
        raise ConfigError("workspace_root", workspace_root, "the path of a folder, or None")
    return Path(workspace_root).expanduser().absolute()
