"""SiteHost: runs the scripts of one or more sites in this process, by turns, over one cell.

In a simulation it hosts many sites; in a deployment a client job hosts one. What the host holds of a model is one copy,
however many sites it runs; the script that has the turn holds its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flarebus.cell import Cell
from flarebus.client.config import ClientConfig
from flarebus.client.engine import Assignment, Engine, set_fallback
from flarebus.client.log_config import LogConfig
from flarebus.client.metrics import MetricOutbox
from flarebus.delivery import Delivery
from flarebus.errors import DecodeError, FlarebusError, LinkError, UsageError
from flarebus.job.site_config import SiteConfig
from flarebus.message import Buffer
from flarebus.pending import Pending
from flarebus.site.client_config import make_client_config
from flarebus.site.engine import SharedModel, SiteEngine
from flarebus.site.external import HUNG_S, ExternalSite
from flarebus.site.halves import SiteHalves
from flarebus.site.inside import InsideTrainer
from flarebus.site.job import JobFacts
from flarebus.site.launcher import TrainerExit
from flarebus.site.outbox import ResultOutbox
from flarebus.site.output import SiteLogs
from flarebus.site.script import CodeCache, Outcome, SiteScript
from flarebus.site.ticket import Ticket
from flarebus.site.tracking import SiteTracking
from flarebus.site.trainer import Ground
from flarebus.site.turn import Turnstile
from flarebus.site.work import Work
from flarebus.slab import SlabPool
from flarebus.tracking.group import TrackingPlan
from flarebus.wire import MAX_CARRIED_BYTES
from flarebus.workflow.filter import FilterChain

__all__ = ["HostedSite", "SiteHost"]

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
        facts: about the job.
        sites: whose scripts to run.
        log_config: layout and level of the sites' logs.
        console: show output on the console as well, for debugging.
        on_turn: told the name of the site whose turn begins.
        endpoint: of the router, for trainers in processes of their own.
        trainer_keys: CURVE keys for them, or None where connections are not encrypted.
        tracking: what each site tracks by itself; None for nothing.
    """

    def __init__(
        self,
        cell: Cell,
        facts: JobFacts,
        sites: Sequence[HostedSite],
        log_config: LogConfig | None = None,
        console: bool = False,
        on_turn: Callable[[str], None] | None = None,
        endpoint: str = "",
        trainer_keys: Mapping[str, str] | None = None,
        tracking: TrackingPlan | None = None,
    ) -> None:
        self._cell = cell
        self._facts = facts
        self._server, self._job_id = facts.server, facts.job_id
        self._metrics = MetricOutbox(self._send_records)
        self._results = ResultOutbox(cell, facts.server)
        self._models = SlabPool()
        self._logs = SiteLogs(log_config, console=console)
        folders = {site.name: site.folder for site in sites}
        self._tracking = None if tracking is None else SiteTracking(tracking, folders)
        self._over = threading.Event()
        # How the job ended, for trackers; "" while it runs.
        self._state = ""
        self._turnstile = Turnstile(on_turn)
        self._codes = CodeCache()
        self._engines: dict[str, SiteEngine] = {}
        self._scripts: dict[str, SiteScript] = {}
        self._externals: dict[str, ExternalSite] = {}
        # Sites without a script.
        self._others: list[str] = []
        log_text = None if log_config is None else log_config.text
        ground = Ground(cell, facts.job_id, endpoint, trainer_keys, log_text, self._send_records)
        self._halves = SiteHalves(facts, cell, self._turnstile)
        for site in sites:
            self._logs.add(site.name, site.folder / "log.txt")
            filters = self._filters(site)
            self._halves.add(site.name, site.folder, site.config.executors, self._code_dir(site), filters)
            if not site.config.train_script:
                self._others.append(site.name)
            elif site.config.is_external:
                self._add_external(site, filters, ground)
            else:
                self._add(site, filters)
        cell.inbox("task", "assign", self._assign, room=self._room)
        cell.on("task", "cancel", self._cancel)
        cell.on("task", "refused", self._refused)
        cell.on("task", "end", self._told_end)
        cell.on_link_lost(self._lost)

    def _add(self, site: HostedSite, filters: tuple[FilterChain, FilterChain]) -> None:
        name = site.name
        engine = SiteEngine(
            name,
            self._job_id,
            make_client_config(name, self._job_id, site.config),
            self._cell,
            self._metrics,
            self._results,
            lambda text: self._logs.note(name, "WARNING", text),
            filters,
        )
        self._engines[name] = engine
        engine.line = self._scripts[name] = self._make_script(site, engine, lambda: engine.has_task, self._script_ended)

    def _add_external(self, site: HostedSite, filters: tuple[FilterChain, FilterChain], ground: Ground) -> None:
        def run_inside(config: ClientConfig, on_exit: Callable[[TrainerExit], None]) -> InsideTrainer:
            return InsideTrainer(config, partial(self._make_script, site), on_exit)

        self._externals[site.name] = ExternalSite(
            site.name,
            site.folder,
            site.config,
            make_client_config(site.name, self._job_id, site.config),
            filters,
            ground,
            self._logs,
            run_inside,
        )

    def _filters(self, site: HostedSite) -> tuple[FilterChain, FilterChain]:
        return (
            FilterChain.build(site.config.input_filters, self._code_dir(site)),
            FilterChain.build(site.config.output_filters, self._code_dir(site)),
        )

    def _code_dir(self, site: HostedSite) -> Path:
        """Where classes named by path are looked for first."""
        script = site.config.train_script
        return Path(script).parent if script else Path(self._facts.code_dir)

    def _make_script(
        self, site: HostedSite, engine: Engine, task_waiting: Callable[[], bool], on_end: Callable[[Outcome], None]
    ) -> SiteScript:
        return SiteScript(
            engine,
            site.config.train_script,
            site.config.train_args,
            site.folder,
            turnstile=self._turnstile,
            codes=self._codes,
            logs=self._logs,
            task_waiting=task_waiting,
            on_end=on_end,
        )

    def _send_records(self, fields: Mapping[str, Any]) -> Pending[Any]:
        if self._tracking is not None:
            self._tracking.records(fields)
        return self._cell.request(self._server, "metric", "records", dict(fields))

    def run(self) -> None:
        """Join the server, serve until the job ends, and let the scripts come to their end.

        Raises:
            LinkError: the server is not there.
        """
        with self._logs:
            set_fallback(self._turnstile.holder_seat)
            try:
                for external in self._externals.values():
                    external.start()
                fields = {
                    "sites": sorted([*self._engines, *self._externals, *self._others]),
                    "external": sorted(self._externals),
                    # Trainers fetch their models themselves: what comes along would only lie here.
                    "takes": MAX_CARRIED_BYTES if self._engines else 0,
                }
                self._cell.request(self._server, "task", "join", fields).result()
                self._over.wait()
            finally:
                self.end("the host was stopped")
                self._farewell()
                set_fallback(None)

    def end(self, reason: str, aborted: bool = False) -> None:
        """No more work: scripts that wait hear it now, and `run` returns. From any thread.

        Args:
            reason: why.
            aborted: nobody waits for trainers that are busy.
        """
        if not self._state:
            self._state = "completed" if reason == "completed" else "aborted" if aborted else "failed"
        for engine in self._engines.values():
            engine.end(reason)
        for external in self._externals.values():
            external.end(reason, aborted)
        self._halves.end(reason)
        self._over.set()

    def _told_end(self, delivery: Delivery) -> None:
        fields = delivery.plain()
        if delivery.source == self._server:
            self.end(fields["reason"], fields["aborted"])

    def _room(self, nbytes: int) -> SlabPool | None:
        # A task at a time, and no more of it than was announced: there is always room.
        return self._models if nbytes <= MAX_CARRIED_BYTES else None

    def _assign(self, delivery: Delivery) -> None:
        # On the bus thread, so that the model is on its way at once and the scripts are woken by its last byte.
        try:
            task: Mapping[str, Any] = delivery.plain()
            ticket, sites = Ticket.of(task, delivery.source), task["sites"]
        except (DecodeError, KeyError, TypeError) as error:
            delivery.fail(error)
            return
        if not self._halves.may_give(delivery.source):
            delivery.fail(UsageError(f"{delivery.source} may not give tasks to sites of this job"))
            return
        if not ticket.owner:
            self._results.credit.grant(ticket.credit)
        name, round = task["task"], task["round"]
        to_halves = [site for site in sites if self._halves.takes(site, name)]
        to_scripts = [site for site in sites if site in self._engines and site not in to_halves]
        if ticket.resumes:
            to_scripts = [site for site in to_scripts if not self._engines[site].resume(name, round, ticket)]
        for site in sites:
            if site in self._externals and site not in to_halves:
                fields = {"name": name, "round": round, "total_rounds": task["total_rounds"]}
                self._externals[site].assign(Work(ticket, fields, task["model"], delivery))
        for site in sites:
            if site in self._others and site not in to_halves:
                reason = f"{site} has no script, and no executor for tasks named {name!r}"
                self._cell.request(ticket.target, "task", "result", ticket.result(site, b"", reason))
        if to_scripts or to_halves:
            delivery.pull(self._models).on_done(
                lambda buffers: self._hand_out(delivery, task, ticket, to_scripts, to_halves, buffers)
            )
        else:
            delivery.reply()

    def _hand_out(
        self,
        delivery: Delivery,
        task: Mapping[str, Any],
        ticket: Ticket,
        to_scripts: Sequence[str],
        to_halves: Sequence[str],
        buffers: Pending[Sequence[Buffer]],
    ) -> None:
        try:
            model = SharedModel(task["model"], buffers.result(), len(to_scripts) + len(to_halves))
            for site in to_halves:
                self._halves.call(site, ticket, task, model)
        except FlarebusError as error:
            delivery.fail(error)
            return
        task_id = f"{ticket.owner}/{ticket.number}"
        for site in to_scripts:
            assignment = Assignment(task_id, task["task"], task["round"], task["total_rounds"], model.take)
            self._engines[site].assign(assignment, model, ticket)
            self._scripts[site].wake()
        delivery.reply()

    def _cancel(self, delivery: Delivery) -> None:
        fields = delivery.plain()
        if not self._halves.may_give(delivery.source):
            return
        key = fields["owner"], fields["number"]
        for site in fields["sites"]:
            self._halves.cancel(site, key)
            if site in self._engines:
                self._engines[site].cancel(key)
            elif site in self._externals:
                self._externals[site].cancel(key)

    def _refused(self, delivery: Delivery) -> None:
        fields = delivery.plain()
        if delivery.source != self._server:
            return
        engine = self._engines.get(fields["site"])
        if engine is not None:
            engine.note_refused(fields["reason"])

    def _script_ended(self, outcome: Outcome) -> None:
        self._engines[outcome.site].script_ended(outcome.cause, outcome.n_received > 0)

    def _lost(self, error: LinkError) -> None:
        self.end(f"the server cannot be reached: {error}")

    def _farewell(self) -> None:
        longest = max((external.leave_s for external in self._externals.values()), default=0.0)
        deadline = time.monotonic() + max(FAREWELL_S, longest + HUNG_S)
        for external in self._externals.values():
            external.wait_ended(max(0.0, deadline - time.monotonic()))
        self._halves.wait_ended(deadline)
        for script in self._scripts.values():
            script.wait_ended(max(0.0, deadline - time.monotonic()))
        self._metrics.close(max(0.0, deadline - time.monotonic()))
        if self._tracking is not None:
            self._tracking.end(self._state)
