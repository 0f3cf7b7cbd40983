"""What a handler called back with, and what went out of a fake pipe: looked at one by one."""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from flarebus.pipes import Message
from flarebus.pipes.handler import PipeHandler
from tests.pipes.fake_pipe import LIMIT_S

__all__ = ["Make", "Told", "broken", "drained", "the_next"]


class Told:
    """What a handler called back with."""

    def __init__(self) -> None:
        self.messages: SimpleQueue[Message] = SimpleQueue()
        self.statuses: SimpleQueue[tuple[str, str]] = SimpleQueue()
        self.act: Callable[[Message], None] = lambda message: None

    def on_message(self, message: Message) -> None:
        """Note it, and do what the test wants done."""
        self.messages.put(message)
        self.act(message)

    def on_status(self, topic: str, reason: str) -> None:
        """Note it."""
        self.statuses.put((topic, reason))

    def message(self) -> Message:
        """The next message."""
        return self.messages.get(timeout=LIMIT_S)

    def status(self) -> tuple[str, str]:
        """The next status."""
        return self.statuses.get(timeout=LIMIT_S)

    def nothing_more(self) -> bool:
        """Whether nothing was called back with that was not looked at."""
        return self.messages.empty() and self.statuses.empty()


Make = Callable[..., tuple[PipeHandler, Told]]
"""Makes a started handler from a pipe and keyword arguments, and what notes its callbacks."""


def the_next(queue: SimpleQueue[Any]) -> Any:
    """The next entry."""
    return queue.get(timeout=LIMIT_S)


def drained(queue: SimpleQueue[Any]) -> list[Any]:
    """All that is in it."""
    found = []
    while True:
        try:
            found.append(queue.get_nowait())
        except Empty:
            return found


def broken(message: Message) -> bool:
    """An other end that is gone."""
    raise BrokenPipeError("it went away")
