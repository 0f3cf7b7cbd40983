"""What a workflow implements (`Controller`) and what it may call (`Job`).

A controller reads like its algorithm: it takes rounds, sends tasks out, takes results in as they arrive, and
commits. It holds no socket, thread, sleep or file; all of that is behind `Job`, which a server, a simulation or a
test provides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from flarebus.model import FLModel
from flarebus.workflow.held import HeldModel

__all__ = ["Controller", "Job", "Order", "Report", "Result", "Task", "TaskGiver"]

Params = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """A named piece of work for sites.

    Args:
        name: `train`, `validate`, `submit_model`, or what the scripts or executors of the job understand.
        model: goes to every site; its arrays are served from where they lie, so they must not change until the
            broadcast is over. A `HeldModel` is fetched from its holder.
        round: round it belongs to, from 0; reaches the script as `current_round`.
        total_rounds: rounds of the job; reaches the script.
        meta: small extra data for the script.
        beside: plain values that go beside the parameters, into `params`, and are part of no model.
        asks_nbytes: bytes of arrays that it asks for, if they are more than those of `model`: an answer that is many
            times as big is refused.
    """

    name: str
    model: FLModel | HeldModel
    round: int = 0
    total_rounds: int | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    asks_nbytes: int = 0


class Result:
    """One site's answer to a task.

    Args:
        site: who answered.
        round: the round it answers.
        model: what the script sent. Its arrays belong to whoever takes the result, until the next result is asked for;
            who wants them longer keeps them, as `WeightedMean.add` does.
        held: the same where it was made, if it was not fetched; `model` has no parameters then. To be released.
    """

    __slots__ = ("_refuse", "held", "is_refused", "model", "round", "site")

    def __init__(
        self,
        site: str,
        round: int,
        model: FLModel,
        refuse: Callable[[str, str], None],
        held: HeldModel | None = None,
    ) -> None:
        self.site = site
        self.round = round
        self.model = model
        self.held = held
        self.is_refused = False
        self._refuse = refuse

    def refuse(self, reason: object) -> None:
        """Say that this result must not count; the quorum is judged without it."""
        self.is_refused = True
        self._refuse(self.site, str(reason))


@dataclass(frozen=True, slots=True)
class Report:
    """What a controller that watches hears of a site.

    Args:
        site: whose it is.
        event: what a site controller fired, or `controller_failed`; or, of any site, `site_joined`, `site_lost` (it
            may come back), `site_dead`.
        fields: more about it.
    """

    site: str
    event: str
    fields: Mapping[str, Any]


class Order(str, Enum):
    """In which order one site after the other has its turn."""

    FIXED = "FIXED"
    RANDOM = "RANDOM"
    RANDOM_WITHOUT_SAME_IN_A_ROW = "RANDOM_WITHOUT_SAME_IN_A_ROW"


class TaskGiver(Protocol):
    """What whoever steers may call, at the server (`Job`) or at a site (`SiteJob`). On one thread."""

    @property
    def name(self) -> str:
        """Name of the job."""

    @property
    def job_id(self) -> str:
        """Identity of this run of it."""

    @property
    def sites(self) -> Sequence[str]:
        """The sites that can be given work now, sorted; at a site, itself included."""

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
        """Give `task` to sites and yield their results as they arrive. Leaving the loop early takes it back.

        Args:
            task: one for all, or site -> its own, of one name and one round.
            sites: to whom; None is everybody who is there, or who has a task of its own.
            min_responses: usable results that the round needs; 0 is one from every site.
            wait_time_after_min_received: seconds that the others still have from then on; None waits for every site
                that is alive.
            timeout: seconds for all of it; None leaves it to the sites' lives.
            in_order: yield in the order of the sites' names, whatever the order of arrival.
            newcomers: sites that join meanwhile get the task as well; then it has no end of its own but `timeout`,
                the wait for others, `cancel` or leaving the loop. One task for all.
            fetch: False leaves the arrays with the sites, for passing on: see `Result.held`.
            most_staged: results of more than 1 MiB fetched at once; None leaves it to their bytes.
            staging_timeout: seconds that a result may wait to be fetched while others are; then it does not count, and
                its site is told. None for no limit.
            on_failed: told the site and the reason, on the controller's thread, when a site will give no usable
                result. Of those that only take too long it is not told.
            resumes: a site that has answered the task of this name and round before to another site, or works on it for
                one, gives that answer.

        Raises:
            QuorumNotReached: fewer than `min_responses` usable results came, or can come; says why for each site.
            UsageError: newcomers, and a task for each site.
            JobAborted: the job was ended meanwhile.
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
        """Give `task` to the first of `sites` that is there, and return its answer; its arrays are the caller's.

        Args:
            any_order: whoever of them is there first; otherwise each has its turn, one after the other.
            assignment_timeout: seconds of one turn, or of the wait for any; None gives up only who will not come.
            timeout: seconds that the answer may take; None leaves it to the site's life.
            fetch: see `broadcast`.

        Raises:
            QuorumNotReached: none of them took it, or the one that did gave no usable answer.
            JobAborted: the job was ended meanwhile.
        """

    def relay(
        self,
        task: Task,
        sites: Sequence[str],
        *,
        assignment_timeout: float | None = None,
        timeout: float | None = None,
    ) -> Iterator[Result]:
        """Give `task` to one of `sites` after the other, each with the model that the one before made of it.

        What the loop leaves in `Result.model` goes to the next. A site that is not there for `assignment_timeout`
        seconds, or gives no usable answer within `timeout`, is passed over, and `turn_lost` says so.

        Raises:
            QuorumNotReached: not one of them answered.
            JobAborted: the job was ended meanwhile.
        """

    def cancel(self, reason: str) -> None:
        """End the broadcast or relay that runs now, from any thread: its loop comes to its end, whatever the quorum.
        A `send` that runs raises `QuorumNotReached`."""

    def fire(self, event: str, **fields: Any) -> None:
        """Tell whoever listens that something happened.

        These come by themselves: `site_joined`, `site_lost` and `site_dead`; `round_started`, `result_accepted`,
        `result_refused` and `site_failed` of each task; `turn_lost` of a relay; `round_committed`. A workflow that
        aggregates fires `before_aggregation`, when all results of a round are in, and `after_aggregation`, when the new
        model is made.
        """


class Job(TaskGiver, Protocol):
    """What a controller may call. One controller runs at a time."""

    def initial_params(self) -> Params:
        """The last committed model, or the one the job came with; empty when it came without."""

    def models(self) -> Mapping[str, Params]:
        """The models that the server has, by the names of their files: those that the job brought, and, as far as there
        are any, the last one that was committed or kept, and the best. Their arrays lie on the pages of files.

        Raises:
            ConfigError: a model that the job brought cannot be read.
            EncodeError: it holds something that cannot be kept in a file.
            OSError: the disk is full.
        """

    def rounds(self, num_rounds: int) -> Iterator[int]:
        """Round numbers from the first that is not committed; raises `JobAborted` between them once it is wanted."""

    def reports(self, timeout: float | None = None) -> Iterator[Report]:
        """What happens at the sites of a job whose sites steer, as it is heard; ends after `timeout` seconds of
        silence.

        Raises:
            UsageError: no site of this job runs a `SiteController`.
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

    def note_round(self, round: int, metrics: Mapping[str, Any], sites: Sequence[str], *, by: str) -> None:
        """A round was committed at a site, which has the model: keep its metrics.

        Args:
            sites: whose results are in the model.
            by: the site.
        """

    def keep(self, params: Params, *, best: bool = False) -> None:
        """Keep a model that no round of the server made as the last one, or as the best; durable when it returns."""

    def save_report(self, path: str, report: Mapping[str, Any]) -> None:
        """Write a report as JSON into the server's folder of the run, whole or not at all; it replaces an older one.

        Args:
            path: relative to that folder, such as `statistics/report.json`.
            report: NaN and infinities in it become null.

        Raises:
            ConfigError: `path` leads out of the folder.
            OSError: the disk is full.
        """


class Controller(ABC):
    """The server-side half of a workflow."""

    @abstractmethod
    def run(self, job: Job) -> None:
        """Run the workflow to its end.

        Raises:
            JobError: it cannot go on; the message is the reason the job failed.
        """
