"""Packer: makes messages of tasks, and models of results, with the filters of whoever steers in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flarebus.cell import Cell, Payload
from flarebus.model import FLModel
from flarebus.tasks.open_task import OpenTask, Parcel
from flarebus.tasks.roster import Roster
from flarebus.workflow.controller import Task
from flarebus.workflow.filter import FilterChain, FilterTask
from flarebus.workflow.held import HeldModel

__all__ = ["Packer"]

_NONE = FilterChain.build((), Path())


class Packer:
    """What goes out for a desk, and what comes in.

    Args:
        cell: offers the arrays of what goes out.
        roster: who may fetch them.
        job_id: the job.
        name: whose tasks they are, for filters.
        filters: what models go through on their way out, and what results go through when they are here.
        keeps: whether sites keep their answers, for whoever takes over.
    """

    def __init__(
        self,
        cell: Cell,
        roster: Roster,
        job_id: str,
        name: str,
        filters: tuple[FilterChain, FilterChain] = (_NONE, _NONE),
        keeps: bool = False,
    ) -> None:
        self._cell = cell
        self._roster = roster
        self._job_id = job_id
        self._name = name
        self._outgoing, self._incoming = filters
        self._keeps = keeps

    def pack(self, task: Task | Mapping[str, Task], targets: Sequence[str]) -> list[Parcel]:
        """The task of each target; a model that goes to several of them is encoded once."""
        if isinstance(task, Task):
            return [Parcel(task, self._payload(task), list(targets))]
        of: dict[int, Parcel] = {}
        for site in targets:
            its = task[site]
            if id(its) not in of:
                of[id(its)] = Parcel(its, self._payload(its), [])
            of[id(its)].sites.append(site)
        return list(of.values())

    def admit(self, parcel: Parcel, host: str, sites: Sequence[str]) -> None:
        """Let `host`, and trainers of its `sites`, fetch the arrays."""
        if isinstance(parcel.task.model, HeldModel):
            return  # its holder knows who may
        self._cell.admit(parcel.payload, host)
        self._cell.send_ahead(parcel.payload, host)
        for site in sites:
            if self._roster.is_external(site):
                # Its trainer lives under this address, and fetches the model itself.
                self._cell.admit(parcel.payload, self.trainers_of(site))

    def send_ahead(self, parcel: Parcel, sites: Sequence[str]) -> None:
        """Send small arrays to the trainers of `sites` before they ask, if they mostly do."""
        if not isinstance(parcel.task.model, HeldModel):
            for site in sites:
                if self._roster.is_external(site):
                    self._cell.send_ahead(parcel.payload, self.trainers_of(site))

    def message(self, parcel: Parcel, fetch: bool) -> dict[str, Any]:
        """What a host is told about a task."""
        value = {
            "task": parcel.task.name,
            "round": parcel.task.round,
            "total_rounds": parcel.task.total_rounds,
            "model": parcel.payload.body,
        }
        return {**value, "readers": self.everybody(), "stays": not fetch} if self._keeps or not fetch else value

    def everybody(self) -> list[str]:
        """All addresses that may fetch what is passed on."""
        return [*self._roster.hosts, *(self.trainers_of(site) for site in self._roster.external)]

    def withdraw(self, parcels: Sequence[Parcel]) -> None:
        """Nobody fetches them any more."""
        for parcel in parcels:
            if not isinstance(parcel.task.model, HeldModel):
                # Its pages are next written when another round has ended: no need to wait for it.
                self._cell.withdraw(parcel.payload, wait=False)

    def filtered(self, found: FLModel | HeldModel, open_task: OpenTask, site: str) -> FLModel:
        """A result as the controller gets it; of one that stays with its maker, what is around the parameters.

        Raises:
            FilterFailed: a filter raised, or wants to see the values of what stays with its maker.
        """
        filters = self._incoming.for_task(open_task.name)
        task = FilterTask(open_task.name, open_task.round, site)
        if isinstance(found, FLModel):
            return filters.apply(found, task) if filters else found
        return filters.apply_around(found.around, task) if filters else found.around

    def trainers_of(self, site: str) -> str:
        """The address under which trainers of `site` live."""
        return f"{site}.{self._job_id}"

    def _payload(self, task: Task) -> Payload:
        """The model as the scripts get it."""
        model, filters = task.model, self._outgoing.for_task(task.name)
        filter_task = FilterTask(task.name, task.round, self._name)
        if isinstance(model, HeldModel):
            around = _around(filters.apply_around(model.around, filter_task), task)
            return model.payload_around(around, task.beside)
        model = filters.apply(_with_beside(model, task.beside) if task.beside else model, filter_task)
        around = _around(model, task)
        around.params, around.params_type = model.params, model.params_type
        around.optimizer_params = model.optimizer_params
        return self._cell.share(around, self._roster.hosts)


def _with_beside(model: FLModel, beside: Mapping[str, Any]) -> FLModel:
    return FLModel(
        model.params_type,
        {**(model.params or {}), **beside},
        model.optimizer_params,
        model.metrics,
        model.start_round,
        model.current_round,
        model.total_rounds,
        model.meta,
    )


def _around(model: FLModel, task: Task) -> FLModel:
    return FLModel(
        metrics=model.metrics,
        current_round=task.round,
        total_rounds=task.total_rounds,
        meta={**model.meta, **task.meta},
    )
