"""SiteHost: runs the scripts of one or more sites in this process, by turns, over one cell.

In a simulation it hosts many sites; in a deployment a client job hosts one. What the host holds of a model is one copy,
however many sites it runs; the script that has the turn holds its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flarebus.cell import Cell
from flarebus.client.engine import Assignment, set_fallback
from flarebus.client.metrics import MetricOutbox
from flarebus.delivery import Delivery
from flarebus.errors import DecodeError, LinkError
from flarebus.job.kinds import ExchangeFormat, FrameworkType
from flarebus.job.site_config import SiteConfig
from flarebus.message import Buffer
from flarebus.pending import Pending
from flarebus.site.engine import SharedModel, SiteEngine
from flarebus.site.log_config import LogConfig
from flarebus.site.outbox import ResultOutbox
from flarebus.site.output import SiteLogs
from flarebus.site.script import CodeCache, Outcome, SiteScript
from flarebus.site.turn import Turnstile

__all__ = ["HostedSite", "SiteHost"]

# What a script of each framework works with.
_EXCHANGE_FORMAT = {
    FrameworkType.NUMPY: ExchangeFormat.NUMPY,
    FrameworkType.PYTORCH: ExchangeFormat.PYTORCH,
    FrameworkType.TENSORFLOW: ExchangeFormat.NUMPY,
    FrameworkType.RAW: ExchangeFormat.RAW,
}
# How long scripts may take to come to their end once there is no more work, and metrics to reach the server.
FAREWELL_S = 10.0


@dataclass(frozen=True, slots=True)
class HostedSite:
    """One site of a host: its name, its folder (working directory and log), and what it runs."""

    name: str
    folder: Path
    config: SiteConfig


class SiteHost:
    """All sites of this process.

    Args:
        cell: the host's; closed by its owner.
        server: address of the server job.
        job_id: the job.
        sites: whose scripts to run.
        log_config: layout and level of the sites' logs.
        console: show output on the console as well, for debugging.
        on_turn: told the name of the site whose turn begins.
    """

    def __init__(
        self,
        cell: Cell,
        server: str,
        job_id: str,
        sites: Sequence[HostedSite],
        log_config: LogConfig | None = None,
        console: bool = False,
        on_turn: Callable[[str], None] | None = None,
    ) -> None:
        self._cell = cell
        self._server = server
        self._metrics = MetricOutbox(lambda fields: cell.request(server, "metric", "records", fields))
        self._logs = SiteLogs(log_config, console=console)
        self._over = threading.Event()
        self._turnstile = Turnstile(on_turn)
        codes = CodeCache()
        self._engines: dict[str, SiteEngine] = {}
        self._scripts: dict[str, SiteScript] = {}
        for site in sites:
            self._add(site, job_id, codes)
        cell.inbox("task", "assign", self._assign)
        cell.on("task", "cancel", self._cancel)
        cell.on("task", "refused", self._refused)
        cell.on("task", "end", lambda delivery: self.end(delivery.value()["reason"]))
        cell.on_link_lost(self._lost)

    def _add(self, site: HostedSite, job_id: str, codes: CodeCache) -> None:
        name = site.name
        self._logs.add(name, site.folder / "log.txt")
        engine = SiteEngine(
            name,
            job_id,
            _client_config(name, job_id, site.config),
            self._cell,
            self._server,
            self._metrics,
            self._results,
            lambda text: self._logs.note(name, "WARNING", text),
        )
        self._engines[name] = engine
        engine.line = self._scripts[name] = SiteScript(
            engine,
            site.config.train_script,
            site.config.train_args,
            site.folder,
            turnstile=self._turnstile,
            codes=codes,
            logs=self._logs,
            task_waiting=lambda: engine.has_task,
            on_end=self._script_ended,
        )

    def run(self) -> None:
        """Join the server, serve until the job ends, and let the scripts come to their end.

        Raises:
            LinkError: the server is not there.
        """
        with self._logs:
            set_fallback(self._turnstile.holder_seat)
            try:
                self._cell.request(self._server, "task", "join", {"sites": sorted(self._engines)}).result()
                self._over.wait()
            finally:
                self.end("the host was stopped")
                self._farewell()
                set_fallback(None)

    def end(self, reason: str) -> None:
        """No more work: scripts that wait hear it now, and `run` returns. From any thread."""
        for engine in self._engines.values():
            engine.end(reason)
        self._over.set()

    def _assign(self, delivery: Delivery) -> None:
        # On the bus thread, so that the model is on its way at once and the scripts are woken by its last byte.
        try:
            task: Mapping[str, Any] = delivery.plain()
        except DecodeError as error:
            delivery.fail(error)
            return
        delivery.pull().on_done(lambda buffers: self._hand_out(delivery, task, buffers))

    def _hand_out(self, delivery: Delivery, task: Mapping[str, Any], buffers: Pending[Sequence[Buffer]]) -> None:
        error = buffers.error()
        if error is not None:
            delivery.fail(error)
            return
        sites = [site for site in task["sites"] if site in self._engines]
        model = SharedModel(task["model"], buffers.result(), len(sites))
        assignment = Assignment(str(task["number"]), task["task"], task["round"], task["total_rounds"], model.take)
        for site in sites:
            self._engines[site].assign(assignment, model)
            self._scripts[site].wake()
        delivery.reply()

    def _cancel(self, delivery: Delivery) -> None:
        fields = delivery.value()
        for site in fields["sites"]:
            if site in self._engines:
                self._engines[site].cancel(fields["number"])

    def _refused(self, delivery: Delivery) -> None:
        fields = delivery.value()
        engine = self._engines.get(fields["site"])
        if engine is not None:
            engine.note_refused(fields["reason"])

    def _script_ended(self, outcome: Outcome) -> None:
        self._engines[outcome.site].script_ended(outcome.cause, outcome.n_received > 0)

    def _lost(self, error: LinkError) -> None:
        self.end(f"the server cannot be reached: {error}")

    def _farewell(self) -> None:
        deadline = time.monotonic() + FAREWELL_S
        for script in self._scripts.values():
            script.wait_ended(max(0.0, deadline - time.monotonic()))
        self._metrics.close(max(0.0, deadline - time.monotonic()))


def _client_config(site: str, job_id: str, config: SiteConfig) -> dict[str, Any]:
    """What `flare.get_config()` shows, in the words of the client configuration file."""
    return {
        "SITE_NAME": site,
        "JOB_ID": job_id,
        "TASK_EXCHANGE": {
            "train_with_eval": True,
            "exchange_format": _EXCHANGE_FORMAT[config.framework].value,
            "server_expected_format": config.server_expected_format.value,
            "transfer_type": config.params_transfer_type.value,
            "train_task_name": "train",
            "eval_task_name": "validate",
            "submit_model_task_name": "submit_model",
            "memory_gc_rounds": config.memory_gc_rounds,
            "cuda_empty_cache": config.cuda_empty_cache,
        },
    }
