"""Turns: tasks for one site at a time: the first that is there (`send`), or one after the other (`relay`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from flarebus.errors import QuorumNotReached
from flarebus.tasks.agenda import Agenda
from flarebus.tasks.desk import Desk, DeskOwner
from flarebus.tasks.roster import Roster
from flarebus.workflow.controller import Result, Task

__all__ = ["Turns"]


class Turns:
    """Gives a desk's tasks to sites by turns. On the agenda's thread.

    Args:
        desk: what gives them out.
        roster: who is there.
        agenda: where news of the sites come in.
        owner: told whose turn was lost.
    """

    def __init__(self, desk: Desk, roster: Roster, agenda: Agenda, owner: DeskOwner) -> None:
        self._desk = desk
        self._roster = roster
        self._agenda = agenda
        self._owner = owner

    def send(
        self,
        task: Task,
        sites: Sequence[str],
        *,
        any_order: bool = False,
        assignment_timeout: float | None = None,
        timeout: float | None = None,
        fetch: bool = True,
    ) -> Result:
        """See `Job.send`."""
        self._agenda.take_waiting()
        absent: dict[str, str] = {}
        for turn in [list(sites)] if any_order else [[site] for site in sites]:
            site = self._whoever_is_there(turn, assignment_timeout, absent)
            if site is not None:
                return self._ask(task, site, timeout, fetch)
        raise QuorumNotReached(1, 0, absent)

    def relay(
        self,
        task: Task,
        sites: Sequence[str],
        *,
        assignment_timeout: float | None = None,
        timeout: float | None = None,
    ) -> Iterator[Result]:
        """See `Job.relay`."""
        lost: dict[str, str] = {}
        for site in sites:
            try:
                result = self.send(task, [site], assignment_timeout=assignment_timeout, timeout=timeout)
            except QuorumNotReached as error:
                lost[site] = error.reasons.get(site, str(error))
                self._owner.fire("turn_lost", round=task.round, site=site, reason=lost[site])
                continue
            yield result
            if not result.is_refused:
                task = replace(task, model=result.model)
        if len(lost) == len(sites):
            raise QuorumNotReached(1, 0, lost)

    def _ask(self, task: Task, site: str, timeout: float | None, fetch: bool) -> Result:
        for result in self._desk.broadcast(task, sites=[site], timeout=timeout, fetch=fetch):
            # The loop lets go of its result with its end; whoever gets this one keeps it.
            return Result(site, result.round, result.model, self._note_refused, result.held)
        raise QuorumNotReached(1, 0, {site: "the task was cancelled"})

    def _note_refused(self, site: str, reason: str) -> None:
        self._owner.fire("result_refused", site=site, reason=reason)

    def _whoever_is_there(self, sites: Sequence[str], timeout: float | None, absent: dict[str, str]) -> str | None:
        """The first of `sites` that is there, now or within `timeout` seconds."""
        deadline = None if timeout is None else self._agenda.clock() + timeout
        while True:
            for site in sites:
                if self._roster.host_of(site) is not None:
                    return site
            expected = [site for site in sites if self._roster.is_alive(site)]
            if not expected or not self._agenda.take(deadline):
                break
        for site in sites:
            absent[site] = self._roster.dead.get(site, "it was not there in time" if expected else "no such site")
        return None
