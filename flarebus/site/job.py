"""HostedJob: one site's part in a job, as its executor or controller sees it (`SiteJob`). With a thread of its own.

What a site steers goes through the same desk as what a server does. The thread begins with the first call.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flarebus.cell import Cell
from flarebus.errors import Closed, FlarebusError, JobAborted
from flarebus.job.kinds import FrameworkType
from flarebus.model import FLModel
from flarebus.site.call import SiteCall
from flarebus.site.shelf import Shelf
from flarebus.site.turn import Turn
from flarebus.tasks.agenda import Agenda
from flarebus.tasks.desk import Desk
from flarebus.tasks.open_task import OpenTask
from flarebus.tasks.parcels import Packer
from flarebus.tasks.roster import Roster
from flarebus.tasks.turns import Turns
from flarebus.workflow.controller import Result, Task
from flarebus.workflow.executor import Executor, SiteTask
from flarebus.workflow.site_controller import SiteController

__all__ = ["HostedJob", "JobFacts"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JobFacts:
    """What a host knows of the job.

    Args:
        name: of the job.
        job_id: identity of this run.
        server: address of the server job.
        best_stem: name of the best model's file, without suffix.
        framework: of the job, as its text.
        code_dir: folder of its code.
    """

    name: str
    job_id: str
    server: str
    best_stem: str
    framework: str
    code_dir: str


class HostedJob:
    """The part of one site.

    Args:
        facts: about the job.
        site: its name.
        folder: of the site.
        code_dir: where classes of the job are looked for first.
        half: its executor or controller.
        cell: the host's.
        roster: who is where, as the server tells; kept by the owner, on this thread.
        turn: of this process, taken while an executor computes.
        numbers: for tasks that the site gives out.
    """

    def __init__(
        self,
        facts: JobFacts,
        site: str,
        folder: Path,
        code_dir: Path,
        half: Executor | SiteController,
        cell: Cell,
        roster: Roster,
        turn: Turn,
        numbers: Iterator[int],
    ) -> None:
        self.site = site
        self.folder = folder
        self.code_dir = code_dir
        self._facts = facts
        self._half = half
        self._cell = cell
        self._roster = roster
        self._turn = turn
        self._agenda = Agenda()
        self._calls: deque[SiteCall] = deque()
        packer = Packer(cell, roster, facts.job_id, site, keeps=True)
        self.desk = Desk(cell, roster, self._agenda, self, packer, numbers, site)
        self._turns = Turns(self.desk, roster, self._agenda, self)
        self._shelf: Shelf | None = None
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name=f"flarebus job of {site}", daemon=True)

    # -- what a controller calls; see `SiteJob` --

    @property
    def name(self) -> str:
        """Name of the job."""
        return self._facts.name

    @property
    def job_id(self) -> str:
        """Identity of this run."""
        return self._facts.job_id

    @property
    def sites(self) -> Sequence[str]:
        """Sites that can be given work now."""
        return self._roster.alive

    def calls(self) -> Iterator[SiteCall]:
        """Tasks as they come; see `SiteJob.calls`."""
        return (call for call in self._unopened() if call.open())

    def _unopened(self) -> Iterator[SiteCall]:
        """The same, not yet through the filters."""
        with suppress(JobAborted):
            while True:
                # First: a task may have been cancelled, or the job ended, since the one before was begun.
                self._agenda.take_waiting()
                if not self._calls:
                    self._agenda.take(None)
                else:
                    yield self._calls.popleft()

    def broadcast(self, task: Task | Mapping[str, Task], **how: Any) -> Iterator[Result]:
        """Give a task out and yield results; see `TaskGiver.broadcast`."""
        results = self.desk.broadcast(task, **how)
        for call in self._calls:  # the last of them may have come just now
            self._interrupt_for(call)
        return results

    def send(self, task: Task, sites: Sequence[str], **how: Any) -> Result:
        """Give a task to the first site that is there; see `TaskGiver.send`."""
        return self._turns.send(task, sites, **how)

    def relay(self, task: Task, sites: Sequence[str], **how: Any) -> Iterator[Result]:
        """Give a task to one site after the other; see `TaskGiver.relay`."""
        return self._turns.relay(task, sites, **how)

    def cancel(self, reason: str) -> None:
        """End what runs now; see `TaskGiver.cancel`."""
        self._turns.cancel(reason)

    @property
    def shelf(self) -> Shelf:
        """The models of this site; see `SiteJob.shelf`."""
        if self._shelf is None:
            self._shelf = Shelf(self.folder, self._facts.best_stem, FrameworkType(self._facts.framework))
        return self._shelf

    def fire(self, event: str, **fields: Any) -> None:
        """Tell the server; see `TaskGiver.fire`. Also what the desk tells of its tasks."""
        report = {"site": self.site, "event": event, "fields": fields}
        self._cell.notify(self._facts.server, "task", "report", report)

    def task_closed(self, open_task: OpenTask) -> None:
        """See `DeskOwner`: what became of each site is in the reports."""

    def site_answered(self, site: str) -> None:
        """See `DeskOwner`: whose worker is taken down too often is the server's business."""

    # -- from the host, on any thread --

    def call(self, call: SiteCall) -> None:
        """A task came."""
        self._agenda.post(lambda: self._take(call))
        self._begin()

    def drop(self, key: tuple[str, int]) -> None:
        """A task is not wanted any more."""

        def leave_out() -> None:
            self._calls = deque(call for call in self._calls if call.key != key)

        self._agenda.post(leave_out)

    def heard(self, event: Callable[[Roster, Desk], None]) -> None:
        """Something is new about the other sites: change the roster, and tell the desk."""
        self._agenda.post(lambda: event(self._roster, self.desk))

    def end(self, reason: str) -> None:
        """The job has ended: what runs is cut short."""
        self._has_ended = True
        if self._thread.is_alive():
            self._agenda.abort(reason)

    def wait_ended(self, timeout: float) -> bool:
        """Wait until the thread has ended; False if the time was up first."""
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _begin(self) -> None:
        with suppress(RuntimeError):  # it has begun
            self._thread.start()

    # -- on its thread --

    def _take(self, call: SiteCall) -> None:
        if not self._agenda.is_over:
            self._calls.append(call)
            self._interrupt_for(call)
        elif not self._has_ended:
            call.fail(f"the {type(self._half).__name__} of {self.site} has come to its end")

    def _run(self) -> None:
        try:
            if isinstance(self._half, Executor):
                self._execute_all(self._half)
            else:
                self._half.run(self)
        except (JobAborted, Closed):
            log.debug("%s: the job has ended", self.site)
        except (Exception, SystemExit) as error:  # somebody else's code; the server hears what it was
            log.exception("the controller of %s failed", self.site)
            reason = str(error) if isinstance(error, FlarebusError) else f"{type(error).__name__}: {error}"
            with suppress(Closed):
                self.fire("controller_failed", reason=reason)
        finally:
            self._close()

    def _interrupt_for(self, call: SiteCall) -> None:
        if isinstance(self._half, SiteController) and self._half.interrupts(call):
            self.desk.cancel(f"{call.name} has come")

    def _execute_all(self, executor: Executor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for call in self._unopened():
            try:
                with self._turn:  # filters too find the site's folder and code, as they do around a script
                    if call.open():
                        call.answer(self._executed(executor, call))
            except (Exception, SystemExit) as error:  # the reason travels; the site goes on
                log.exception("%s: task %s failed", self.site, call.name)
                call.fail(f"{type(self._half).__name__}: {type(error).__name__}: {error}")

    def _executed(self, executor: Executor, call: SiteCall) -> FLModel:
        facts = (self.site, self.job_id, self.folder)
        answer = executor.execute(SiteTask(call.name, call.round, call.total_rounds, call.model, *facts))
        if not isinstance(answer, FLModel):
            raise TypeError(f"execute() returned an object of type {type(answer).__name__}, not an FLModel")
        return answer

    def _close(self) -> None:
        self._turn.leave()
        self.desk.close()
        self._agenda.close()
        for call in self._calls:
            self._take(call)
        if self._shelf is not None:
            try:
                self._shelf.close()
            except (FlarebusError, OSError) as error:
                log.error("the models of %s could not be left behind: %s", self.site, error)
