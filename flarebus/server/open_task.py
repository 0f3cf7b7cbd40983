"""OpenTask: the broadcast that runs now: which results have arrived, in what order they are used, what is fetched.

A result *arrives* as a message; its arrays are then fetched, which takes room and time; only then it is *here*.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flarebus.cell import Payload
from flarebus.delivery import Delivery
from flarebus.pending import Pending
from flarebus.server.tally import Tally
from flarebus.workflow.controller import Task

__all__ = ["Arrived", "OpenTask"]


class Arrived:
    """A result whose message is here; its arrays may not be yet."""

    __slots__ = ("body", "delivery", "pulled", "site")

    def __init__(self, site: str, delivery: Delivery, body: bytes) -> None:
        self.site = site
        self.delivery = delivery
        self.body = body
        self.pulled: Pending[Sequence[Any]] | None = None

    @property
    def is_here(self) -> bool:
        """Whether nothing more has to be fetched."""
        return self.pulled is not None and self.pulled.is_done

    @property
    def is_whole(self) -> bool:
        """Whether all of it is here, and nobody's death can take it away."""
        return self.pulled is not None and self.pulled.is_done and self.pulled.error() is None

    def answer(self, refused: str | None) -> None:
        """Tell the site what became of it; its `send` returns then."""
        self.delivery.reply({"accepted": refused is None, "reason": refused or ""})


class OpenTask:
    """The broadcast that runs now."""

    def __init__(
        self, number: int, task: Task, tally: Tally, payload: Payload, targets: Sequence[str], in_order: bool
    ) -> None:
        self.number = number
        self.task = task
        self.tally = tally
        self.payload = payload
        self.targets = targets
        self.in_order = in_order
        self.is_closing = False
        self.nbytes = payload.nbytes + len(payload.body)
        self.arrived: dict[str, Arrived] = {}
        self.metrics: dict[str, dict[str, Any]] = {}
        self._done = 0

    def unstaged(self) -> list[Arrived]:
        """What has arrived and is not being pulled, in the order of use."""
        return [arrived for arrived in self._in_turn() if arrived.pulled is None]

    @property
    def is_staging(self) -> bool:
        """Whether a result is being fetched, or is here and not yet taken."""
        return any(arrived.pulled is not None for arrived in self.arrived.values())

    def next_ready(self) -> Arrived | None:
        """A result that is here and whose turn it is."""
        for arrived in self._in_turn():
            if arrived.is_here:
                return arrived
            if self.in_order:
                return None
        return None

    def waits_for(self, site: str) -> bool:
        """Whether an answer of `site` would count, and none has arrived."""
        return site in self.tally.open and site not in self.arrived and not self.is_closing

    def _in_turn(self) -> Iterator[Arrived]:
        """What has arrived, as far as its turn has come."""
        if not self.in_order:
            yield from list(self.arrived.values())
            return
        targets, open_sites = self.targets, self.tally.open
        while self._done < len(targets) and targets[self._done] not in open_sites:
            self._done += 1
        for site in targets[self._done :]:
            if site in self.arrived:
                yield self.arrived[site]
            elif site in open_sites and not self.is_closing:
                return
