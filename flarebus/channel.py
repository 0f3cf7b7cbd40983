"""Channels: requests and what answers them. Pure: ids, deadlines and duplicates; no threads, no sockets, no clock.

`Requests` is the asking side: it knows which request waits for whom and until when. `Answered` is the answering
side: it knows what was asked before, so that a request that was sent again (its answer was lost with a connection)
has its effect once and gets the same answer.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Generic, NamedTuple, TypeVar

from flarebus.message import Buffer

__all__ = ["Answered", "Requests", "Waiting"]

Token = TypeVar("Token")

# Answers remembered for requests that are sent again. A neighbour that reconnects repeats only what was not
# answered, so this has to cover what can be in flight on one connection, not history.
REMEMBERED = 4096
REMEMBERED_BYTES = 4 * 1024 * 1024
# Deadlines of answered requests to put up with before they are swept out; sweeping must stay rare.
SPARE_DEADLINES = 1024


class Waiting(NamedTuple, Generic[Token]):
    """A request without an answer."""

    target: str
    deadline: float | None
    token: Token
    """What the shell resolves when the answer comes."""
    frames: Sequence[Buffer]
    """The message, to be sent again over a new connection."""


class Requests(Generic[Token]):
    """The requests of one cell that wait for an answer.

    Args:
        first_id: where ids start; random, so that a cell that came back does not repeat those of the one it replaces.
    """

    def __init__(self, first_id: int) -> None:
        self._ids = itertools.count(first_id)
        self._waiting: dict[int, Waiting[Token]] = {}
        self._deadlines: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def new_id(self) -> int:
        """An id for a message; each is given out once, on whatever thread."""
        return next(self._ids)

    def begin(self, number: int, target: str, token: Token, deadline: float | None, frames: Sequence[Buffer]) -> None:
        """Request `number` waits for `target` from now on."""
        self._waiting[number] = Waiting(target, deadline, token, frames)
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, number))
            # What was answered leaves its deadline behind; without this it would stay until that passes.
            if len(self._deadlines) > 2 * len(self._waiting) + SPARE_DEADLINES:
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self._waiting]
                heapq.heapify(self._deadlines)

    def answer(self, number: int, source: str) -> Token | None:
        """The token of the request that `source` answers; None if nothing waits for that (late, twice, or made up)."""
        waiting = self._waiting.get(number)
        if waiting is None or waiting.target != source:
            return None
        del self._waiting[number]
        return waiting.token

    def fail(self, number: int) -> Token | None:
        """The token of request `number`, which nobody will answer; None if it was answered before."""
        waiting = self._waiting.pop(number, None)
        return None if waiting is None else waiting.token

    def lost(self, gone: Collection[str]) -> list[Waiting[Token]]:
        """Take out all that wait for cells that are gone."""
        numbers = [number for number, waiting in self._waiting.items() if waiting.target in gone]
        return [self._waiting.pop(number) for number in numbers]

    def waiting(self) -> list[Waiting[Token]]:
        """All that wait, oldest first."""
        return list(self._waiting.values())

    def tick(self, now: float) -> list[Waiting[Token]]:
        """Take out all whose deadline has passed."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            waiting = self._waiting.pop(heapq.heappop(self._deadlines)[1], None)
            if waiting is not None:
                late.append(waiting)
        return late

    def next_event(self) -> float | None:
        """When the next deadline passes, or None."""
        while self._deadlines and self._deadlines[0][1] not in self._waiting:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None


class Answered:
    """What one cell was asked, and what it said."""

    _NOT_YET: Sequence[Buffer] = ()

    def __init__(self) -> None:
        # Apart from the answers: a task is open for hours, and the answers of those hours must not push it out.
        self._open: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._answers: OrderedDict[tuple[str, int], Sequence[Buffer]] = OrderedDict()
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._open) + len(self._answers)

    def seen(self, source: str, number: int) -> Sequence[Buffer] | None:
        """None if this request is new (it is remembered from now on); else its answer, empty while there is none."""
        key = (source, number)
        if key in self._open:
            return self._NOT_YET
        found = self._answers.get(key)
        if found is None:
            self._open[key] = None
            if len(self._open) > REMEMBERED:
                self._open.popitem(last=False)
        return found

    def answered(self, source: str, number: int, frames: Sequence[Buffer]) -> None:
        """Remember the answer, the first one only; frames are kept by reference, so they must not change any more."""
        key = (source, number)
        if key not in self._open:
            return
        del self._open[key]
        self._answers[key] = frames
        self._nbytes += sum(len(frame) for frame in frames)
        while len(self._answers) > REMEMBERED or (self._nbytes > REMEMBERED_BYTES and len(self._answers) > 1):
            _, forgotten = self._answers.popitem(last=False)
            self._nbytes -= sum(len(frame) for frame in forgotten)
