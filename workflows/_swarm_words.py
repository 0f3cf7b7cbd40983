"""What the halves of a swarm say to each other: names of tasks, and keys of meta."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

__all__ = [
    "CONFIGURE",
    "GIVE_BEST",
    "GIVE_LAST",
    "KEEP_BEST",
    "KEEP_LAST",
    "LEAD",
    "SETTINGS",
    "SPREAD_BEST",
    "TERM",
    "Course",
]

CONFIGURE = "configure"
"""From the server, at first. The answer says with which round the site's last model begins, if it has one."""
LEAD = "lead"
"""From the server, or from the leader of the round before: aggregate this round. Answered at once."""
TERM = "term"
"""From the server: another site has taken the lead over; who led before does so no more."""
GIVE_LAST, GIVE_BEST = "give_last", "give_best"
"""From the server: your last model, or your best."""
KEEP_LAST, KEEP_BEST = "keep_last", "keep_best"
"""From the last leader, and from the keeper of the best model: this is it."""
SPREAD_BEST = "spread_best"
"""From the last leader to the keeper of the best model: give it to everybody."""

SETTINGS = "settings"
"""Key of meta: the settings of the workflow, with every task, for a site may be new to it or have died meanwhile."""
_COURSE = "course"


@dataclass(frozen=True, slots=True)
class Course:
    """What a leader hands over with the model.

    Args:
        term: grows each time the server has the lead taken over; who holds an older one leads no more.
        resumes: the round was begun by another leader.
        best: the best value of the key metric so far, or None.
        best_keeper: the site that keeps the model with it, or "".
    """

    term: int = 0
    resumes: bool = False
    best: float | None = None
    best_keeper: str = ""

    def to_meta(self) -> dict[str, Any]:
        """As meta of a task."""
        return {_COURSE: asdict(self)}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self:
        """From meta of a task.

        Raises:
            KeyError, TypeError: there is none in it.
        """
        return cls(**meta[_COURSE])
