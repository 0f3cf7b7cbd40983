"""What a workflow implements (`Controller`) and what it may call (`Job`).

A controller reads like its algorithm: it takes rounds, sends tasks out, takes results in as they arrive, and
commits. It holds no socket, thread, sleep or file; all of that is behind `Job`, which a server, a simulation or a
test provides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flarebus.model import FLModel

__all__ = ["Controller", "Job", "Result", "Task"]

Params = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """A named piece of work for sites.

    Args:
        name: `train`, `validate`, `submit_model`, or what the scripts of the job understand.
        model: goes to every site; its arrays are served from where they lie, so they must not change until the
            broadcast is over.
        round: round it belongs to, from 0; reaches the script as `current_round`.
        total_rounds: rounds of the job; reaches the script.
        meta: small extra data for the script.
    """

    name: str
    model: FLModel
    round: int
    total_rounds: int | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


class Result:
    """One site's answer to a task.

    Args:
        site: who answered.
        round: the round it answers.
        model: what the script sent. Its arrays belong to whoever takes the result, until the next result is asked for;
            who wants them longer keeps them, as `WeightedMean.add` does.
    """

    __slots__ = ("_refuse", "model", "round", "site")

    def __init__(self, site: str, round: int, model: FLModel, refuse: Callable[[str, str], None]) -> None:
        self.site = site
        self.round = round
        self.model = model
        self._refuse = refuse

    def refuse(self, reason: object) -> None:
        """Say that this result must not count; the quorum is judged without it."""
        self._refuse(self.site, str(reason))


class Job(Protocol):
    """What a controller may call. One controller runs at a time, on one thread."""

    @property
    def name(self) -> str:
        """Name of the job."""

    @property
    def job_id(self) -> str:
        """Identity of this run of it."""

    @property
    def sites(self) -> Sequence[str]:
        """The sites that can be given work now, sorted."""

    def initial_params(self) -> Params:
        """The last committed model, or the one the job came with; empty when it came without."""

    def rounds(self, num_rounds: int) -> Iterator[int]:
        """Round numbers from the first that is not committed; raises `JobAborted` between them once it is wanted."""

    def broadcast(
        self,
        task: Task,
        *,
        sites: Sequence[str] | None = None,
        min_responses: int = 0,
        wait_time_after_min_received: float | None = None,
        timeout: float | None = None,
        in_order: bool = False,
    ) -> Iterator[Result]:
        """Give `task` to sites and yield their results as they arrive.

        Args:
            sites: to whom; None is everybody who is there.
            min_responses: usable results that the round needs; 0 is one from every site.
            wait_time_after_min_received: seconds that the others still have from then on; None waits for every site
                that is alive.
            timeout: seconds for all of it; None leaves it to the sites' lives.
            in_order: yield in the order of the sites' names, whatever the order of arrival.

        Raises:
            QuorumNotReached: fewer than `min_responses` usable results came, or can come; says why for each site.
            JobAborted: the job was ended meanwhile.
        """

    def pages(self, params: Params) -> dict[str, Any]:
        """Writable arrays like those in `params`, on the pages of the next model file: write the new model there."""

    def commit(self, round: int, params: Params, metrics: Mapping[str, Any], *, best: bool = False) -> None:
        """End a round: `params` become the model, durably and in order, before the next round is committed.

        Args:
            metrics: averaged over the sites; of the model that *entered* the round.
            best: the model that entered this round is the best so far; it is kept apart.
        """

    def fire(self, event: str, **fields: Any) -> None:
        """Tell whoever listens that something happened."""


class Controller(ABC):
    """The server-side half of a workflow."""

    @abstractmethod
    def run(self, job: Job) -> None:
        """Run the workflow to its end.

        Raises:
            JobError: it cannot go on; the message is the reason the job failed.
        """
