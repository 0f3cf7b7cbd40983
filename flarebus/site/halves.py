"""SiteHalves: the executors and controllers of all sites of a host; brings them their tasks, results, and news."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flarebus.cell import Cell
from flarebus.delivery import Delivery
from flarebus.errors import DecodeError, FlarebusError
from flarebus.job.executor_ref import ExecutorRef
from flarebus.site.call import SiteCall
from flarebus.site.engine import SharedModel
from flarebus.site.job import HostedJob, JobFacts
from flarebus.site.ticket import Ticket
from flarebus.site.turn import Turn, Turnstile
from flarebus.slab import SlabPool
from flarebus.tasks.desk import Desk
from flarebus.tasks.open_task import named
from flarebus.tasks.roster import Roster
from flarebus.workflow.executor import load_executor
from flarebus.workflow.filter import FilterChain

__all__ = ["SiteHalves"]

log = logging.getLogger(__name__)


class SiteHalves:
    """What the sites of one host run besides their scripts.

    Args:
        facts: about the job.
        cell: the host's.
        turnstile: one at a time computes in a process, be it a script or an executor.
    """

    def __init__(self, facts: JobFacts, cell: Cell, turnstile: Turnstile) -> None:
        self._facts = facts
        self._cell = cell
        self._pool = SlabPool()
        self._turnstile = turnstile
        # From anywhere: a worker that was started again must not take an answer to its predecessor for one to itself.
        self._numbers = itertools.count(secrets.randbits(48))
        self._jobs: dict[str, list[tuple[ExecutorRef, HostedJob]]] = {}
        self._filters: dict[str, tuple[FilterChain, FilterChain]] = {}
        # As the server told last; what it tells it may be asked for before a job's own thread has heard it.
        self._peers = frozenset[str]()
        cell.inbox("task", "result", self._result_came, room=self._room)
        cell.inbox("task", "directory", self._directory_came)
        cell.on_gone(self._gone)

    def add(
        self,
        site: str,
        folder: Path,
        refs: Sequence[ExecutorRef],
        code_dir: Path,
        filters: tuple[FilterChain, FilterChain],
    ) -> None:
        """Make what `site` runs.

        Args:
            filters: of the site: what its script would receive and answer goes through them as well.

        Raises:
            ConfigError: a class is not there, raised, or is no executor.
        """
        jobs = self._jobs.setdefault(site, [])
        self._filters[site] = filters
        for ref in refs:
            half = load_executor(ref.ref, code_dir)
            turn = Turn(self._turnstile, self._turnstile.place_for(site, str(folder), str(code_dir)))
            mine = (self._cell, Roster(), turn, self._numbers)
            jobs.append((ref, HostedJob(self._facts, site, folder, code_dir, half, *mine)))

    def may_give(self, source: str) -> bool:
        """Whether the cell `source` may give tasks to sites of this host."""
        return source == self._facts.server or source in self._peers

    def takes(self, site: str, task: str) -> bool:
        """Whether a task of this name is not for the script of `site`."""
        return self._half_for(site, task) is not None

    def call(self, site: str, ticket: Ticket, fields: Mapping[str, Any], model: SharedModel) -> None:
        """Give a task, whose arrays are here, to the half of `site` that takes it.

        Raises:
            FlarebusError: it holds no model.
        """
        job = self._half_for(site, fields["task"])
        assert job is not None
        job.call(SiteCall(self._cell, site, ticket, fields, model.take(), self._pool, self._filters[site]))

    def cancel(self, site: str, key: tuple[str, int]) -> None:
        """The task whose ticket has `key` is not wanted any more: if no half of `site` has begun it, none will."""
        for _, job in self._jobs.get(site, ()):
            job.drop(key)

    def end(self, reason: str) -> None:
        """The job has ended."""
        for job in self._all():
            job.end(reason)

    def wait_ended(self, deadline: float) -> None:
        """Wait until all have come to their ends, to `deadline` at most."""
        for job in self._all():
            job.wait_ended(max(0.0, deadline - time.monotonic()))

    def _all(self) -> list[HostedJob]:
        return [job for jobs in self._jobs.values() for _, job in jobs]

    def _half_for(self, site: str, task: str) -> HostedJob | None:
        for ref, job in self._jobs.get(site, ()):
            if ref.takes(task):
                return job
        return None

    # -- on the bus thread --

    def _result_came(self, delivery: Delivery) -> None:
        try:
            owner, number = named(delivery.plain()["owner"]), delivery.plain()["number"]
        except (DecodeError, KeyError, TypeError) as problem:
            delivery.fail(DecodeError(f"result cannot be read: {problem}"))
            return
        desk = next((job.desk for _, job in self._jobs.get(owner, ()) if job.desk.waits_for(number)), None)
        if desk is None:
            delivery.reply({"accepted": False, "reason": "the round is closed"})
        else:
            desk.result_came(delivery)

    def _room(self, nbytes: int) -> SlabPool | None:
        rooms = (job.desk.room(nbytes) for job in self._all())
        return next((room for room in rooms if room is not None), None)

    def _directory_came(self, delivery: Delivery) -> None:
        if delivery.source != self._facts.server:
            return
        try:
            directory = delivery.plain()
            self._peers = frozenset(directory["hosts"])
        except (FlarebusError, KeyError, TypeError) as problem:
            log.warning("the directory cannot be read: %s", problem)
            return
        self._tell(lambda roster, desk: _update(roster, desk, directory))

    def _gone(self, names: Sequence[str]) -> None:
        def note(roster: Roster, desk: Desk) -> None:
            for name in names:
                roster.leave(name)
                desk.lost(name)

        self._tell(note)

    def _tell(self, event: Callable[[Roster, Desk], None]) -> None:
        for job in self._all():
            job.heard(event)


def _update(roster: Roster, desk: Desk, directory: Mapping[str, Any]) -> None:
    """Bring a roster up to the server's."""
    hosts = directory["hosts"]
    for host in set(roster.hosts) - set(hosts):
        roster.leave(host)
        desk.lost(host)
    for host, about in hosts.items():
        if host not in roster.hosts:
            roster.join(host, about["sites"], about["external"], about["takes"])
            desk.joined(host, about["sites"])
    for site, reason in directory["dead"].items():
        if roster.is_alive(site):
            desk.fail(site, reason)
            roster.bury(site, reason)
