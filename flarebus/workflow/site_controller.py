"""SiteController: the site's half of a workflow in which sites steer, and what it may call (`SiteJob`).

It has the vocabulary of a server's `Controller`, addressed to other sites, and besides it answers calls: tasks that the
server or another site gives to it, not to the script.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from flarebus.model import FLModel
from flarebus.workflow.controller import Result, Task

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


class SiteJob(Protocol):
    """What a site controller may call. It runs on one thread."""

    @property
    def name(self) -> str:
        """Name of the job."""

    @property
    def job_id(self) -> str:
        """Identity of this run of it."""

    @property
    def site(self) -> str:
        """The name of this site."""

    @property
    def sites(self) -> Sequence[str]:
        """All sites that can be given work now, this one included, sorted."""

    @property
    def folder(self) -> Path:
        """The folder of this site."""

    @property
    def code_dir(self) -> Path:
        """Where classes of the job are looked for first."""

    def calls(self) -> Iterator[Call]:
        """Tasks for this controller as they come, to the end of the job."""

    def broadcast(
        self,
        task: Task | Mapping[str, Task],
        *,
        sites: Sequence[str] | None = None,
        min_responses: int = 0,
        wait_time_after_min_received: float | None = None,
        timeout: float | None = None,
        in_order: bool = False,
        newcomers: bool = False,
        fetch: bool = True,
        most_staged: int | None = None,
        staging_timeout: float | None = None,
        on_failed: Callable[[str, str], None] | None = None,
        resumes: bool = False,
    ) -> Iterator[Result]:
        """Give a task to sites; see `Job.broadcast`. Their scripts answer, or their controllers.

        Args:
            resumes: a site that has answered the task of this name and round before, or works on it, for another site,
                gives that answer.
        """

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
        """Give a task to the first of `sites` that is there; see `Job.send`."""

    def relay(
        self,
        task: Task,
        sites: Sequence[str],
        *,
        assignment_timeout: float | None = None,
        timeout: float | None = None,
    ) -> Iterator[Result]:
        """Give a task to one site after the other; see `Job.relay`."""

    def cancel(self, reason: str) -> None:
        """End the broadcast or relay that runs now, from any thread; see `Job.cancel`."""

    @property
    def shelf(self) -> Shelf:
        """The models that this site keeps."""

    def fire(self, event: str, **fields: Any) -> None:
        """Tell the server that something happened; a small message, no promise that it arrives."""


class SiteController(ABC):
    """The site's half of a workflow in which sites steer. Each site makes its own."""

    @abstractmethod
    def run(self, job: SiteJob) -> None:
        """Serve to the end of `job.calls()`. Whatever it raises ends the job, with that reason."""

    def interrupts(self, call: Call) -> bool:
        """Whether a call that has come, and waits for its turn, ends the broadcast that runs: nobody wants its results
        any more. Asked on the thread of `run`; never, unless a controller says otherwise."""
        return False
