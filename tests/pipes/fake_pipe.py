"""A pipe whose other end is the test: what comes in is put in a queue, what goes out is looked at."""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from flarebus.pending import Pending
from flarebus.pipes import ExportMode, Message, Mode, Pipe, Topic

__all__ = ["LIMIT_S", "FakePipe", "FakeTime"]

LIMIT_S = 30.0


class FakeTime:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Monotonic seconds."""
        return self.now


class FakePipe(Pipe):
    """One end; no real time passes in it."""

    def __init__(self, mode: Mode | str = Mode.PASSIVE) -> None:
        super().__init__(mode)
        self.inbox: SimpleQueue[Message | BaseException | None] = SimpleQueue()
        """What `receive` returns or raises next; None means that nothing came in time."""
        self.waits: SimpleQueue[float | None] = SimpleQueue()
        """The timeouts of the calls of `receive`."""
        self.sent: SimpleQueue[Message] = SimpleQueue()
        """What was sent, each try, without heartbeats."""
        self.heartbeats: SimpleQueue[float | None] = SimpleQueue()
        """The timeout of each heartbeat that was sent."""
        self.timeouts: list[float | None] = []
        self.take: Callable[[Message], bool] = lambda message: True
        """Stands for the other end: whether it reads a message."""
        self.begin_with: Callable[[Message], Pending[bool] | None] = lambda message: None
        """Stands for a pipe that sends without waiting."""
        self.to: Callable[[Message], None] | None = None
        """To whom the handler has messages delivered."""
        self.resendable = True
        self.released: SimpleQueue[Message] = SimpleQueue()
        self.moved = 0
        self.active_at = 0.0
        self.closed = 0

    def open(self, name: str) -> None:
        """Nothing to do."""

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Note the message; `take` says whether it was read."""
        if message.topic == Topic.HEARTBEAT:
            self.heartbeats.put(timeout)
            return True
        self.timeouts.append(timeout)
        self.sent.put(message)
        return self.take(message)

    def begin(self, message: Message, timeout: float | None = None) -> Pending[bool] | None:
        """As the test says."""
        return self.begin_with(message)

    def deliver(self, to: Callable[[Message], None]) -> bool:
        """The test calls it."""
        self.to = to
        return True

    def receive(self, timeout: float | None = None) -> Message | None:
        """What the test puts in next, however long that takes."""
        self.waits.put(timeout)
        item = self.inbox.get(timeout=LIMIT_S)
        if isinstance(item, BaseException):
            raise item
        return item

    def clear(self) -> None:
        """Drop what waits."""
        while True:
            try:
                self.inbox.get_nowait()
            except Empty:
                return

    def close(self) -> None:
        """Wake the reader."""
        self.closed += 1
        self.inbox.put(BrokenPipeError("closed"))

    def export(self, side: ExportMode) -> tuple[str, dict[str, Any]]:
        """Of no use here."""
        return "", {}

    def can_resend(self) -> bool:
        """As the test says."""
        return self.resendable

    def release_send_cache(self, message: Message) -> None:
        """Note it, unless it is a heartbeat."""
        if message.topic != Topic.HEARTBEAT:
            self.released.put(message)

    def get_last_peer_active_time(self) -> float:
        """As the test says."""
        return self.active_at

    def moved_bytes(self) -> int:
        """As the test says."""
        return self.moved
