"""Ticket: where the answer to a task goes, and who may fetch it. Kept: an answer that its site keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flarebus.message import Buffer
from flarebus.slab import SlabPool

__all__ = ["Kept", "Ticket"]


@dataclass(frozen=True, slots=True)
class Ticket:
    """Of one task.

    Args:
        target: the cell that gave it.
        number: it is the so-manyth of whoever gave it.
        owner: the site that gave it; "" for the server.
        readers: addresses whose cells may fetch the answer, for it may be passed on or asked for again: the site keeps
            it, and its script does not wait. Empty: the target alone fetches it, at once.
        stays: it is not fetched now: the site keeps it until it is released, and nobody waits for that meanwhile.
        credit: bytes of arrays that may come with answers before anybody has asked for them: with this one if it is
            kept, else with all of its host.
        resumes: an answer to the task of this name and round that another one was given, or will be, is this answer.
    """

    target: str
    number: int
    owner: str = ""
    readers: tuple[str, ...] = ()
    stays: bool = False
    credit: int = 0
    resumes: bool = False

    @classmethod
    def of(cls, fields: Mapping[str, Any], source: str) -> Ticket:
        """The ticket of a task that came from `source`.

        Raises:
            KeyError, TypeError: it is none.
        """
        number, owner, readers = fields["number"], fields["owner"], fields.get("readers", ())
        if type(number) is not int or type(owner) is not str or not all(type(each) is str for each in readers):
            raise TypeError("a task without a number or an owner")
        credit = fields.get("credit", 0)
        if type(credit) is not int:
            raise TypeError("a credit that is no number of bytes")
        stays, resumes = bool(fields.get("stays", False)), bool(fields.get("resumes", False))
        return cls(source, number, owner, tuple(readers), stays, credit, resumes)

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from all other tasks."""
        return self.owner, self.number

    def result(self, site: str, body: bytes, error: str | None = None) -> dict[str, Any]:
        """The fields of an answer's message."""
        return {"site": site, "number": self.number, "owner": self.owner, "error": error, "model": body}


class Kept:
    """An answer in memory of its own, so that the script may go on with its arrays.

    Args:
        task: name and round of its task.
        body: the encoded model.
        buffers: copied here.
        pool: has the memory.

    Raises:
        MemoryError: there is not so much of it.
    """

    def __init__(self, task: tuple[str, int | None], body: bytes, buffers: Sequence[Buffer], pool: SlabPool) -> None:
        self.task = task
        self.body = body
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        self.buffers: list[memoryview] = pool.take([view.nbytes for view in views]) if views else []
        for here, view in zip(self.buffers, views, strict=True):
            here[:] = view
