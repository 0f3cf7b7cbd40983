"""A simulated run: the server job with its router in this process, and a pool of workers that host the sites.

Nothing listens on a network: the workers connect through a socket file in a folder that only this user may enter. With
`debug` there are no workers and no sockets either; the same host runs the sites in this process, one after the other.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flarebus.address import Address
from flarebus.cell import Cell
from flarebus.client.log_config import LogConfig
from flarebus.errors import ConfigError, FlarebusError, JobAborted, JobError
from flarebus.job.definition import JobDefinition
from flarebus.link import SILENCE_S
from flarebus.loop import Loop
from flarebus.router import Router
from flarebus.security.keys import KeyPair, ListenKeys
from flarebus.server.archive import Archive
from flarebus.server.job import ServerJob
from flarebus.server.pool import HostEnd, WorkerPool, share_cores, spread
from flarebus.server.socket_folder import SocketFolder
from flarebus.server.tracking import JobTracking
from flarebus.site.host import HostedSite, SiteHost
from flarebus.site.job import JobFacts
from flarebus.site.trainer import CONFIG_FILE
from flarebus.tracking.group import FLUSH_S, TrackingPlan
from flarebus.tracking.loading import check_installed

__all__ = ["Simulation", "start_simulation"]

log = logging.getLogger(__name__)

# Starting Python and NumPy takes a fraction of a second; a machine under heavy load may take a hundred times that.
START_S = 120.0
# After the job has ended the workers' scripts come to their end: one that computes may finish, unless nobody wants it.
END_S = 15.0
ABORT_S = 2.0
# The same if they have trainers, which are asked first and then made to.
ABORT_TRAINERS_S = 6.0


def start_simulation(
    *,
    job: JobDefinition,
    sites: Sequence[str],
    num_workers: int,
    gpu_groups: Sequence[str] | None,
    run_dir: Path,
    log_config: str | None,
    debug: bool,
    extra: Mapping[str, Any],
) -> Simulation:
    """Start `job` on simulated `sites`, and return while it runs.

    Args:
        num_workers: processes that compute at once.
        gpu_groups: `CUDA_VISIBLE_DEVICES` of each worker.
        run_dir: an empty folder; the run writes nowhere else.
        extra: `on_event`, a function that is told what happens, on the job's thread; `transport`, "ipc" or "tcp" (over
            loopback, encrypted, to see what that costs).

    Raises:
        ConfigError: the job cannot start; nothing was started.
    """
    options = _Options(extra)
    simulation = Simulation(job, list(sites), num_workers, gpu_groups, run_dir, log_config, debug, options)
    simulation.start()
    return simulation


class _Options:
    """The part of `SimEnv(extra=...)` that is known here."""

    _KNOWN = ("on_event", "transport")

    def __init__(self, extra: Mapping[str, Any]) -> None:
        for name in extra:
            if name not in self._KNOWN:
                raise ConfigError("extra", name, f"known are {', '.join(self._KNOWN)}")
        self.on_event: Callable[[str, dict[str, Any]], None] | None = extra.get("on_event")
        self.transport = extra.get("transport", "ipc")
        if self.transport not in ("ipc", "tcp"):
            raise ConfigError("extra['transport']", self.transport, "ipc or tcp")


class Simulation:
    """A job that was started; a handle on it for any thread. Made by `start_simulation`."""

    def __init__(
        self,
        job: JobDefinition,
        sites: list[str],
        num_workers: int,
        gpu_groups: Sequence[str] | None,
        run_dir: Path,
        log_config: str | None,
        debug: bool,
        options: _Options,
    ) -> None:
        self.run_dir = run_dir
        self.reason: str | None = None
        self._job = job
        self._sites = sites
        self._num_workers = num_workers
        self._gpu_groups = gpu_groups
        self._log_config = log_config
        self._debug = debug
        self._options = options
        self._tracking = JobTracking(job, run_dir / "server")
        self._site_tracking = TrackingPlan.at_sites(job)
        self._state = "running"
        self._over = threading.Event()
        self._server_job: ServerJob | None = None
        self._controllers: list[Any] = []
        self._initial: dict[str, Any] = {}
        self._pool: WorkerPool | None = None
        self._sockets: SocketFolder | None = None
        self._aborted_by: str | None = None
        self._lock = threading.Lock()
        # Not a daemon: a script that starts a job and comes to its end waits for the job.
        self._thread = threading.Thread(target=self._run, name=f"flarebus job {job.name}")

    def start(self) -> None:
        """Check what can be checked now, and start the job's thread."""
        LogConfig.parse(self._log_config)
        for ref in self._job.tracking:
            check_installed(ref)
        self._controllers = self._job.make_workflows()
        self._job.check_models()
        self._initial = self._job.initial_params()
        try:
            self._thread.start()
        except BaseException:  # an interrupt: the thread may run, but nobody will have a handle on it
            self.abort("an interrupt")
            raise

    def status(self) -> str:
        """`running`, `completed`, `failed` or `aborted`."""
        return self._state

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most `timeout` seconds; whether it has come."""
        return self._over.wait(timeout)

    def abort(self, by: str) -> None:
        """Ask the job to end; returns before it has."""
        with self._lock:
            self._aborted_by = self._aborted_by or by
            if self._server_job is not None:
                self._server_job.abort(by)

    def kill(self) -> None:
        """End now what would outlive this process if it left now; returns at once. The job's thread notices later."""
        self.abort("kill")
        with self._lock:
            pool, sockets = self._pool, self._sockets
        if pool is not None:
            pool.kill()
        if sockets is not None:
            sockets.remove()
        self._remove_secrets()

    # -- on the job's thread from here on --

    def _run(self) -> None:
        server_dir = self.run_dir / "server"
        try:
            server_dir.mkdir(mode=0o700, exist_ok=True)
            with _log_file(server_dir / "log.txt"):
                state, reason = self._run_logged(server_dir)
                self._tracking.end(state)
                self._state, self.reason = state, reason
                log.log(logging.INFO if self._state == "completed" else logging.ERROR, "job %s", self._ending())
        except BaseException as error:  # the last boundary: whoever waits gets the reason, whatever it is
            self._state, self.reason = "failed", _in_words(error)
        try:
            self._tell("job_ended", {"state": self._state, "reason": self.reason})
        finally:
            self._over.set()

    def _tell(self, event: str, fields: dict[str, Any]) -> None:
        self._tracking.tell(event, fields)
        if self._options.on_event is not None:
            self._options.on_event(event, fields)

    def _ending(self) -> str:
        return f"{self._state}: {self.reason}" if self.reason else self._state

    def _run_logged(self, server_dir: Path) -> tuple[str, str | None]:
        """Run the job; how it ended, and why."""
        state, reason = "failed", None
        archive = None
        try:
            archive = Archive(server_dir, self._job, self._initial)
            self._initial = {}
            with ExitStack() as stack:
                self._run_job(stack, archive, server_dir)
            state = "completed"
        except JobAborted as error:
            state, reason = "aborted", str(error)
        except (JobError, FlarebusError, OSError, MemoryError) as error:
            reason = _in_words(error)
        except BaseException as error:
            # A fault of a plug-in or ours, a plug-in that calls sys.exit: the log has all of it, the user a line.
            log.exception("job failed")
            reason = f"{_in_words(error)}; the traceback is in {server_dir / 'log.txt'}"
        if archive is not None:
            try:
                archive.close(state, reason)
            except (FlarebusError, OSError) as error:
                log.error("the run could not be closed: %s", error)
                if state == "completed":
                    state, reason = "failed", _in_words(error)
        return state, reason

    def _run_job(self, stack: ExitStack, archive: Archive, server_dir: Path) -> None:
        loop = Loop(f"flarebus bus {self._job.name}")
        stack.callback(loop.stop)
        router = Router(loop, math.inf if self._options.transport == "ipc" else SILENCE_S)
        stack.callback(router.close)
        address = Address("server").child(self._job.job_id)
        cell = Cell.attach(address, router, loop)
        stack.callback(cell.close)
        offload = self._job.workflow_settings.get("enable_tensor_disk_offload", False)
        server_job = ServerJob(self._job, cell, archive, self._tell, staging=server_dir if offload else None)
        with self._lock:
            self._server_job = server_job
            if self._aborted_by is not None:
                server_job.abort(self._aborted_by)
        server_job.fire(
            "job_started",
            job_id=self._job.job_id,
            sites=self._sites,
            run_dir=str(self.run_dir),
            total_rounds=self._job.workflow_settings.get("num_rounds"),
        )
        start = self._start_host if self._debug else self._start_workers
        with start(stack, router, loop, server_job, str(address), server_dir):
            server_job.wait_for_sites(self._sites, START_S)
            for controller in self._controllers:
                controller.run(server_job)
            # What hosts send to each other passes the router; what the server itself serves does not.
            between_hosts, from_here = router.statistics().bytes, cell.statistics().bytes_served
            server_job.fire("bus_traffic", bytes_forwarded=between_hosts, bytes_served=from_here)

    @contextmanager
    def _start_workers(
        self, stack: ExitStack, router: Router, loop: Loop, server_job: ServerJob, server: str, server_dir: Path
    ) -> Iterator[None]:
        endpoint, dial_keys, trainer_keys = self._listen(stack, router)

        def exited(end: HostEnd) -> None:
            server_job.host_died(end, lambda: restart(end.address))

        def restart(address: str) -> None:
            pool.restart(address)
            server_job.fire("workers_started", pids=pool.pids)

        pool = WorkerPool(server_dir, exited)
        with self._lock:
            self._pool = pool
        told: list[str] = []
        try:
            for number, sites in enumerate(spread(self._sites, self._num_workers), start=1):
                address = f"worker-{number}.{self._job.job_id}"
                environ = share_cores(self._num_workers)
                if self._gpu_groups is not None:
                    environ["CUDA_VISIBLE_DEVICES"] = self._gpu_groups[number - 1]
                config = self._worker_config(address, endpoint, dial_keys, server, sites)
                pool.start({**config, "trainer_keys": trainer_keys}, environ)
            server_job.fire("workers_started", pids=pool.pids)
            yield
            told = server_job.end("completed")
        except JobError as error:
            # The scripts are well: let them come to their end, as after the last round.
            told = server_job.end(f"the job has ended: {error}", aborted=isinstance(error, JobAborted))
            raise
        finally:
            pool.stop(told, self._patience_s())
            self._remove_secrets()

    def _remove_secrets(self) -> None:
        """Remove what a host leaves that was killed: the configuration of its trainers."""
        for site in self._sites:
            with suppress(OSError):
                self.run_dir.joinpath(site, CONFIG_FILE).unlink()
                self.run_dir.joinpath(site, CONFIG_FILE).parent.rmdir()

    def _patience_s(self) -> float:
        """How long workers may take to leave by themselves."""
        if self._aborted_by is not None:
            return ABORT_TRAINERS_S if any(self._job.site_config(site).is_external for site in self._sites) else ABORT_S
        flush_s = FLUSH_S if self._site_tracking.refs else 0.0
        return END_S + flush_s + max(self._job.site_config(site).shutdown_timeout for site in self._sites)

    @contextmanager
    def _start_host(
        self, stack: ExitStack, router: Router, loop: Loop, server_job: ServerJob, server: str, server_dir: Path
    ) -> Iterator[None]:
        cell = Cell.attach(f"worker-1.{self._job.job_id}", router, loop, self._aliases(self._sites))
        stack.callback(cell.close)
        sites = self._hosted(self._sites)
        endpoint, trainer_keys = "", None
        if any(site.config.is_external for site in sites):
            endpoint, _, trainer_keys = self._listen(stack, router)
        host = SiteHost(
            cell,
            self._facts(server),
            sites,
            LogConfig.parse(self._log_config),
            console=True,
            endpoint=endpoint,
            trainer_keys=trainer_keys,
            tracking=self._site_tracking,
        )
        thread = threading.Thread(target=_run_host, args=(host,), name="flarebus host", daemon=True)
        thread.start()
        reason, aborted = "the job has ended", False
        try:
            yield
            reason = "completed"
        except JobError as error:
            reason, aborted = f"{reason}: {error}", isinstance(error, JobAborted)
            raise
        finally:
            server_job.end(reason, aborted)
            host.end(reason, aborted)
            thread.join()

    def _listen(self, stack: ExitStack, router: Router) -> tuple[str, dict[str, str] | None, dict[str, str] | None]:
        """Endpoint, keys of workers, keys of trainers."""
        if self._options.transport == "tcp":
            server, worker, trainer = (KeyPair.generate() for _ in range(3))
            admitted = frozenset({worker.public, trainer.public})
            endpoint = router.bind("tcp://127.0.0.1:*", ListenKeys(server, admitted))
            return endpoint, _key_texts(worker, server), _key_texts(trainer, server)
        sockets = SocketFolder()
        with self._lock:
            self._sockets = sockets
        stack.callback(sockets.remove)
        return router.bind(sockets.endpoint), None, None

    def _worker_config(
        self, address: str, endpoint: str, keys: dict[str, str] | None, server: str, sites: Sequence[str]
    ) -> dict[str, Any]:
        return {
            "address": address,
            "aliases": self._aliases(sites),
            "endpoint": endpoint,
            "keys": keys,
            "job": asdict(self._facts(server)),
            "log_config": self._log_config,
            "tracking": self._site_tracking.to_json(),
            "sites": [
                {"name": site.name, "folder": str(site.folder), "config": site.config.to_json()}
                for site in self._hosted(sites)
            ],
        }

    def _facts(self, server: str) -> JobFacts:
        job = self._job
        return JobFacts(job.name, job.job_id, server, job.best_stem, job.framework.value, str(job.code_dir))

    def _aliases(self, sites: Sequence[str]) -> list[str]:
        return [f"{site}.{self._job.job_id}" for site in sites]

    def _hosted(self, sites: Sequence[str]) -> list[HostedSite]:
        return [HostedSite(site, self.run_dir / site, self._job.site_config(site)) for site in sites]


def _key_texts(own: KeyPair, server: KeyPair) -> dict[str, str]:
    keys = {"public": own.public, "secret": own.secret, "server": server.public}
    return {name: key.decode() for name, key in keys.items()}


def _run_host(host: SiteHost) -> None:
    try:
        host.run()
    except FlarebusError as error:  # it came too late to join
        log.warning("the sites could not join: %s", error)


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """What flarebus logs in this process, in a file of the run as well."""
    root = logging.getLogger("flarebus")
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = root.level
    root.addHandler(handler)
    if root.getEffectiveLevel() > logging.INFO:
        root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        with suppress(OSError):  # a full disk: what could not be written is lost
            handler.close()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Leave out what cannot be written: on a full disk the job fails with that reason, without a traceback."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _in_words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = str(error)
    return text if isinstance(error, FlarebusError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
