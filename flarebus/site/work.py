"""Work: a task on its way through a client job to its trainer and back, and words for what may go wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flarebus.cell import Payload
from flarebus.codec import decode
from flarebus.delivery import Delivery
from flarebus.errors import Closed, FlarebusError, NoRoute
from flarebus.message import Buffer
from flarebus.model import FLModel
from flarebus.pending import Pending
from flarebus.pipes import Message
from flarebus.site.launcher import TrainerExit
from flarebus.site.ticket import Ticket

__all__ = ["Work", "cause_of", "model_of", "real_error"]


class Work:
    """A task as it came.

    Args:
        ticket: where its answer goes.
        fields: name, round, total_rounds.
        body: the encoded model.
        delivery: the message that it came with, which leads to its buffers.
    """

    __slots__ = (
        "body",
        "delivery",
        "fields",
        "filtered",
        "given",
        "lives",
        "number",
        "offer",
        "result",
        "spared",
        "ticket",
        "unsent",
    )

    def __init__(self, ticket: Ticket, fields: Mapping[str, Any], body: bytes, delivery: Delivery) -> None:
        self.ticket = ticket
        self.number = 0
        """What its trainer knows it by: they grow, whoever gives the tasks."""
        self.fields = dict(fields)
        self.body = body
        self.delivery = delivery
        self.filtered: tuple[bytes, Sequence[Buffer]] | None = None
        """The model as a filter that looks at values has left it: all ranks and lives get the same one."""
        self.offer: Payload | None = None
        """Its arrays, for a trainer that fetches them from here; withdrawn when the task is closed."""
        self.lives = 0
        self.given: set[int] = set()
        """The ranks of this life of its trainer that it was given to: once is enough."""
        self.spared = False
        """Whether it was left behind, unseen, by a life that ended, once: a second time is no accident."""
        self.result: Message | None = None
        """What the trainer answered, on its way to whoever gave the task."""
        self.unsent: Any = None
        """The answer, ready to be sent, if whoever gave the task is gone."""

    def resumes(self, before: Work) -> bool:
        """Whether it is the task `before`, for somebody who took it over."""
        mine, its = (self.fields["name"], self.fields["round"]), (before.fields["name"], before.fields["round"])
        return self.ticket.resumes and mine == its


def model_of(body: bytes, buffers: Sequence[Buffer], *, copy: bool) -> FLModel:
    """The model in a body and its buffers.

    Args:
        copy: whether it gets memory of its own.

    Raises:
        FlarebusError: it is none.
    """
    model = decode(body, buffers, copy=copy)
    if type(model) is not FLModel:
        raise FlarebusError("it is not an FLModel")
    return model


def cause_of(end: TrainerExit, described: str, lost: str) -> str:
    """Why a task was not answered, by the end of the process that had it and the reason why its pipe was lost."""
    if end.code != 0:
        return described
    return f"{described}; it did not answer its task" + (f", for its pipe was lost: {lost}" if lost else "")


def real_error(sent: Pending[bool]) -> BaseException | None:
    """Why a message did not get through, unless the end of its pipe says that already."""
    error = sent.error()
    return None if isinstance(error, NoRoute | Closed) else error
