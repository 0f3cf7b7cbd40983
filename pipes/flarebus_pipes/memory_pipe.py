"""MemoryPipe: both ends in one process. For a training script that runs inside the client job, and for tests.

A send puts its message in the inbox of the other end and waits; the receiver copies the buffers, once, and lets the
sender go. Ends find each other by token and channel; whoever comes first makes the channel, whoever leaves last drops
it. An end that nobody refers to any more has left too.
"""

from __future__ import annotations

import threading
import time
import weakref
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

from flarebus.errors import UsageError
from flarebus.pipes import ExportMode, Message, Mode, Pipe
from flarebus.slab import SlabPool

__all__ = ["MemoryPipe"]

# Process-wide, so that slabs are used again from task to task whichever end received them.
_POOL = SlabPool()


class MemoryPipe(Pipe):
    """A pipe within one process.

    Args:
        mode: ACTIVE or PASSIVE.
        token: ends with equal tokens and channels belong together; by default the id of the job.
    """

    same_process = True
    _channels: ClassVar[dict[tuple[str, str], _Channel]] = {}
    # Reentrant: an end that is garbage collected leaves on whatever thread that happens, even one that holds it.
    _table: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, mode: Mode | str, token: str = "") -> None:
        super().__init__(mode)
        self.token = token
        self._seat: _Seat | None = None

    def open(self, name: str) -> None:
        """Take this end's place on channel `name`.

        Raises:
            UsageError: it is open already, or another live end of the same mode has this place.
        """
        if self._seat is not None:
            raise UsageError(f"this MemoryPipe is open already, on channel {self._seat.key[1]!r}")
        key = (self.token, name)
        with self._table:
            channel = self._channels.get(key) or _Channel()
            if channel.seats[self.mode] is not None:
                raise UsageError(f"another {self.mode.value} MemoryPipe is open on channel {name!r} of this token")
            seat = channel.seats[self.mode] = _Seat(key, self.mode, channel)
            channel.seen.add(self.mode)
            # Last: the other end may have been collected, and the channel dropped, while this one sat down.
            self._channels[key] = channel
        seat.leave_once = weakref.finalize(self, self._leave, seat)
        seat.leave_once.atexit = False
        self._seat = seat

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Hand a message over; see `Pipe.send`. Waits for the other end if it is not there yet.

        Raises:
            BrokenPipeError: this end is closed, or the other end is.
        """
        seat = self._open_seat()
        letter = _Letter(message)
        seat.sending.add(letter)
        try:
            seat.channel.inbox[seat.peer].put(letter)
            # Looked at after the letter is in: whoever leaves refuses what is in by then.
            if (seat.is_closed or seat.channel.has_lost(seat.peer)) and letter.claim():
                letter.settle(None)
            if not letter.wait(timeout) and letter.claim():
                return False
            letter.wait(None)
        finally:
            seat.sending.discard(letter)
        if letter.taken is None:
            raise self._broken(seat)
        return letter.taken

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message, with buffers of its own; see `Pipe.receive`.

        Raises:
            BrokenPipeError: this end is closed, or the other end is.
        """
        seat = self._open_seat()
        deadline = None if timeout is None else time.monotonic() + timeout
        inbox = seat.channel.inbox[seat.mode]
        while True:
            if seat.is_closed or seat.channel.has_lost(seat.peer):
                raise self._broken(seat)
            try:
                letter = inbox.get(timeout=None if deadline is None else max(deadline - time.monotonic(), 0))
            except Empty:
                return None
            if letter is None or not letter.claim():
                continue
            try:
                message = _copied(letter.message)
            except BaseException:
                letter.settle(False)
                raise
            letter.settle(True)
            return message

    def clear(self) -> None:
        """Drop what waits to be received; the sender hears that nobody took it."""
        seat = self._seat
        if seat is not None:
            seat.channel.refuse(seat.mode, False)

    def close(self) -> None:
        """Leave; both ends' waiting calls return with BrokenPipeError."""
        seat, self._seat = self._seat, None
        if seat is not None and seat.leave_once is not None:
            seat.leave_once()

    def export(self, side: ExportMode) -> tuple[str, dict[str, Any]]:
        """The class path and arguments of this end or its peer's; they find each other within this process only."""
        mode = self.mode if side is ExportMode.SELF else _OTHER[self.mode]
        return f"{type(self).__module__}.{type(self).__qualname__}", {"mode": mode.value, "token": self.token}

    def can_resend(self) -> bool:
        """Yes: what was not taken was withdrawn."""
        return True

    def _open_seat(self) -> _Seat:
        seat = self._seat
        if seat is None:
            raise BrokenPipeError("this MemoryPipe is not open")
        return seat

    def _broken(self, seat: _Seat) -> BrokenPipeError:
        if seat.is_closed:
            return BrokenPipeError("this MemoryPipe was closed")
        return BrokenPipeError(f"the {seat.peer.value} end of this MemoryPipe is gone")

    @classmethod
    def _leave(cls, seat: _Seat) -> None:
        """Give a seat up. May run inside the garbage collector: every step is harmless wherever it cuts in."""
        with cls._table:
            channel = seat.channel
            seat.is_closed = True
            channel.seats[seat.mode] = None
            if not any(channel.seats.values()) and cls._channels.get(seat.key) is channel:
                del cls._channels[seat.key]
        for letter in tuple(seat.sending):
            if letter.claim():
                letter.settle(None)
        channel.refuse(seat.mode, None)
        for inbox in channel.inbox.values():
            inbox.put(None)


_OTHER = {Mode.ACTIVE: Mode.PASSIVE, Mode.PASSIVE: Mode.ACTIVE}


class _Letter:
    """A message on its way; whoever claims it first says what becomes of it."""

    __slots__ = ("_claim", "_settled", "message", "taken")

    def __init__(self, message: Message) -> None:
        self.message = message
        self.taken: bool | None = None
        """Whether the receiver has it; None when an end left."""
        self._claim = threading.Lock()
        self._settled = threading.Lock()
        self._settled.acquire()

    def claim(self) -> bool:
        return self._claim.acquire(blocking=False)

    def settle(self, taken: bool | None) -> None:
        self.taken = taken
        self._settled.release()

    def wait(self, timeout: float | None) -> bool:
        if not self._settled.acquire(timeout=-1 if timeout is None else max(timeout, 0)):
            return False
        self._settled.release()
        return True


class _Channel:
    """What the two ends of a channel share."""

    def __init__(self) -> None:
        self.inbox: dict[Mode, SimpleQueue[_Letter | None]] = {mode: SimpleQueue() for mode in Mode}
        self.seats: dict[Mode, _Seat | None] = dict.fromkeys(Mode)
        self.seen: set[Mode] = set()

    def has_lost(self, mode: Mode) -> bool:
        """Whether there was an end of this mode, and is none."""
        return mode in self.seen and self.seats[mode] is None

    def refuse(self, mode: Mode, taken: bool | None) -> None:
        """Settle all that waits for the end of this mode."""
        while True:
            try:
                letter = self.inbox[mode].get_nowait()
            except Empty:
                break
            if letter is not None and letter.claim():
                letter.settle(taken)
        # A wake-up may have been among them.
        self.inbox[mode].put(None)


class _Seat:
    """The place of one open end."""

    def __init__(self, key: tuple[str, str], mode: Mode, channel: _Channel) -> None:
        self.key = key
        self.mode = mode
        self.peer = _OTHER[mode]
        self.channel = channel
        self.is_closed = False
        self.sending: set[_Letter] = set()
        self.leave_once: weakref.finalize[..., MemoryPipe] | None = None


def _copied(message: Message) -> Message:
    """The message as the receiver gets it: same ids, buffers of its own."""
    places = _POOL.take([memoryview(buffer).nbytes for buffer in message.buffers]) if message.buffers else []
    for place, buffer in zip(places, message.buffers, strict=True):
        place[:] = memoryview(buffer).cast("B")
    return Message(message.topic, message.body, places, type=message.type, req_id=message.req_id, msg_id=message.msg_id)
