"""Turns: tasks for one site at a time: the first that is there (`send`), or one after the other (`relay`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from flarebus.errors import QuorumNotReached
from flarebus.tasks.agenda import Agenda
from flarebus.tasks.desk import Desk, DeskOwner
from flarebus.tasks.roster import Roster
from flarebus.workflow.controller import Result, Task

__all__ = ["Turns"]

_CANCELLED = "the task was cancelled"


class Turns:
    """Gives a desk's tasks to sites by turns. On the agenda's thread, except `cancel`.

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
        # Of what was begun last.
        self._is_cancelled = False

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
        """See `TaskGiver.send`."""
        self._is_cancelled = False
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
        """See `TaskGiver.relay`."""
        self._is_cancelled = False
        lost: dict[str, str] = {}
        n_answers = 0
        for site in sites:
            absent: dict[str, str] = {}
            before = n_answers
            try:
                if self._whoever_is_there([site], assignment_timeout, absent) is None:
                    raise QuorumNotReached(1, 0, absent)
                for result in self._desk.broadcast(task, sites=[site], timeout=timeout):
                    n_answers += 1
                    yield result
                    if not result.is_refused:
                        task = replace(task, model=result.model)
            except QuorumNotReached as error:
                # After an answer it only says that this was refused.
                if n_answers == before and not self._is_cancelled:
                    lost[site] = error.reasons.get(site, str(error))
                    self._owner.fire("turn_lost", round=task.round, site=site, reason=lost[site])
            if self._is_cancelled:
                return
        if not n_answers:
            raise QuorumNotReached(1, 0, lost)

    def cancel(self, reason: str) -> None:
        """End what runs now, from any thread; see `TaskGiver.cancel`."""
        self._is_cancelled = True
        self._desk.cancel(reason)

    def _ask(self, task: Task, site: str, timeout: float | None, fetch: bool) -> Result:
        for result in self._desk.broadcast(task, sites=[site], timeout=timeout, fetch=fetch):
            # The loop lets go of its result with its end; whoever gets this one keeps it.
            return Result(site, result.round, result.model, partial(self._note_refused, task.round), result.held)
        raise QuorumNotReached(1, 0, {site: _CANCELLED})

    def _note_refused(self, round: int, site: str, reason: str) -> None:
        self._owner.fire("result_refused", round=round, site=site, reason=reason)

    def _whoever_is_there(self, sites: Sequence[str], timeout: float | None, absent: dict[str, str]) -> str | None:
        """The first of `sites` that is there, now or within `timeout` seconds; if none is, `absent` says why."""
        deadline = None if timeout is None else self._agenda.clock() + timeout
        self._agenda.take_waiting()
        while not self._is_cancelled:
            for site in sites:
                if self._roster.host_of(site) is not None:
                    return site
            if not any(map(self._roster.is_alive, sites)) or not self._agenda.take(deadline):
                break
        absent.update((site, self._why_absent(site)) for site in sites)
        return None

    def _why_absent(self, site: str) -> str:
        if self._is_cancelled:
            return _CANCELLED
        return "it was not there in time" if self._roster.is_alive(site) else self._roster.why_not(site)
