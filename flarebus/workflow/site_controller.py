"""SiteController: the site's half of a workflow in which sites steer, and what it may call (`SiteJob`).

It has the vocabulary of a server's `Controller`, addressed to other sites, and besides it answers calls: tasks that the
server or another site gives to it, not to the script.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from flarebus.model import FLModel
from flarebus.workflow.controller import TaskGiver

__all__ = ["Call", "Shelf", "SiteController", "SiteJob"]


class Call(Protocol):
    """A task for this controller. It is answered once."""

    @property
    def name(self) -> str:
        """Of the task."""

    @property
    def round(self) -> int:
        """Its round."""

    @property
    def total_rounds(self) -> int | None:
        """Rounds of the job, or None."""

    @property
    def source(self) -> str:
        """The site that gave it; "" for the server."""

    @property
    def model(self) -> FLModel:
        """What came with it; its arrays are the controller's own."""

    def answer(self, model: FLModel | None = None) -> None:
        """Answer; returns at once. Arrays of `model` must not change until the next call comes."""

    def fail(self, reason: str) -> None:
        """Say why there is no answer."""


class Shelf(Protocol):
    """The models of one site, on its own disk. What is kept last and best lies in the folder of the site at the end."""

    @property
    def round(self) -> int | None:
        """The round that begins with the model kept last, also before this process began; None: there is none."""

    @property
    def params(self) -> dict[str, Any]:
        """The model kept last; empty when none was."""

    @property
    def best_params(self) -> dict[str, Any]:
        """The best model; empty when none was kept."""

    def pages(self, params: dict[str, Any]) -> dict[str, Any]:
        """Writable arrays like those in `params`, on the pages of the next model file: write the new model there."""

    def keep(self, params: dict[str, Any], round: int) -> None:
        """`params` are the last model, with which `round` begins; durable before anything else is kept."""

    def keep_best(self, params: dict[str, Any]) -> None:
        """`params` are the best model."""


class SiteJob(TaskGiver, Protocol):
    """What a site controller may call. What it fires goes to the server, as a small message without a promise that it
    arrives; tasks that it gives out are answered by the scripts of the sites, or by their controllers."""

    @property
    def site(self) -> str:
        """The name of this site."""

    @property
    def folder(self) -> Path:
        """The folder of this site."""

    @property
    def code_dir(self) -> Path:
        """Where classes of the job are looked for first."""

    def calls(self) -> Iterator[Call]:
        """Tasks for this controller as they come, to the end of the job."""

    @property
    def shelf(self) -> Shelf:
        """The models that this site keeps."""


class SiteController(ABC):
    """The site's half of a workflow in which sites steer. Each site makes its own."""

    @abstractmethod
    def run(self, job: SiteJob) -> None:
        """Serve to the end of `job.calls()`. Whatever it raises ends the job, with that reason."""

    def interrupts(self, call: Call) -> bool:
        """Whether a call that has come, and waits for its turn, ends the broadcast that runs: nobody wants its results
        any more. Asked on the thread of `run`; never, unless a controller says otherwise."""
        return False
