"""Pipes that break one promise each. What they do right they inherit from a pipe that does everything right."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from pathlib import Path
from typing import Any, ClassVar

from flarebus_pipes.memory_pipe import MemoryPipe

from flarebus.errors import UsageError
from flarebus.pending import Pending
from flarebus.pipes import ExportMode, Message, Mode
from tests.pipes.socket_pipe import SocketPipe

__all__ = ["GIVE_UP", "TRACES", "leftovers"]

TRACES: list[str] = []
"""What the pipes left behind."""
GIVE_UP = threading.Event()
"""Lets the calls go that hang."""


def leftovers() -> list[str]:
    """What is left of the pipes in this process."""
    return list(TRACES)


def changed(message: Message, **fields: Any) -> Message:
    """The message with other fields."""
    given = {name: getattr(message, name) for name in ("topic", "body", "buffers", "type", "req_id", "msg_id")}
    return Message(**{**given, **fields})


class Changing(MemoryPipe):
    """Does something to each message that comes in."""

    def receive(self, timeout: float | None = None) -> Message | None:
        """As it should be, but for `change`."""
        message = super().receive(timeout)
        return message if message is None else self.change(message)

    def change(self, message: Message) -> Message:
        """What comes of a message."""
        return message


# -- life --


class TouchesDisk(MemoryPipe):
    """Its constructor makes something."""

    def __init__(self, mode: Mode | str, token: str = "") -> None:
        super().__init__(mode, token)
        TRACES.append("a file")


class AnotherMode(MemoryPipe):
    """Is always the same end."""

    def __init__(self, mode: Mode | str, token: str = "") -> None:
        super().__init__(Mode.ACTIVE, token)


class WorksUnopened(MemoryPipe):
    """Says that nobody took it, instead of that it is not open."""

    was_open = False

    def open(self, name: str) -> None:
        """As it should be."""
        self.was_open = True
        super().open(name)

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Too friendly before it is opened."""
        return super().send(message, timeout) if self.was_open else False


class WorksClosed(WorksUnopened):
    """Says that nothing came, instead of that it was closed."""

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """As it should be."""
        return MemoryPipe.send(self, message, timeout)

    def receive(self, timeout: float | None = None) -> Message | None:
        """Too friendly after it was closed."""
        return None if self.was_open and self._seat is None else super().receive(timeout)


class OpensTwice(MemoryPipe):
    """Opening it again moves it."""

    def open(self, name: str) -> None:
        """Without a word."""
        self.close()
        super().open(name)


class SharesItsPlace(MemoryPipe):
    """A second end of one mode is quietly put somewhere else."""

    def open(self, name: str) -> None:
        """Without a word."""
        if self._seat is not None:
            raise UsageError("open already")
        with contextlib.suppress(UsageError):
            return super().open(name)
        return super().open(f"{name}-2")


class ClosesOnce(MemoryPipe):
    """Complains about a second close."""

    def close(self) -> None:
        """Only an open one."""
        if self._seat is None:
            raise RuntimeError("not open")
        super().close()


class SleepsInReceive(MemoryPipe):
    """Nothing wakes a receive."""

    def receive(self, timeout: float | None = None) -> Message | None:
        """Sleeps for as long as it may."""
        if timeout is None:
            GIVE_UP.wait()
        return super().receive(timeout)


class SleepsInSend(MemoryPipe):
    """Nothing wakes a send."""

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Sleeps for as long as it may."""
        if timeout is None:
            GIVE_UP.wait()
        return super().send(message, timeout)


class TrueToNobody(MemoryPipe):
    """Takes a closed peer for one that has read everything."""

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """True whatever happens to an open end."""
        with contextlib.suppress(BrokenPipeError):
            return super().send(message, timeout)
        return True


class OpensOnce(MemoryPipe):
    """Cannot be used again."""

    openings = 0

    def open(self, name: str) -> None:
        """The first time only."""
        self.openings += 1
        if self.openings > 1:
            raise OSError("used up")
        super().open(name)


class KeepsOldMessages(MemoryPipe):
    """What nobody read comes out when the channel is opened again."""

    unread: ClassVar[list[Message]] = []

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Remembers what was not read."""
        try:
            return super().send(message, timeout)
        except BrokenPipeError:
            self.unread.append(message)
            raise

    def receive(self, timeout: float | None = None) -> Message | None:
        """The old ones first."""
        return self.unread.pop() if self.unread else super().receive(timeout)


class NeedsItsPeer(MemoryPipe):
    """The other end has to be there first."""

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Breaks at once."""
        seat = self._open_seat()
        if seat.channel.seats[seat.peer] is None:
            raise BrokenPipeError("nobody there")
        return super().send(message, timeout)


class RaisesTimeout(MemoryPipe):
    """Nothing in time is an error to it."""

    def receive(self, timeout: float | None = None) -> Message | None:
        """Raises instead of returning None."""
        message = super().receive(timeout)
        if message is None:
            raise TimeoutError
        return message


class ReturnsEarly(MemoryPipe):
    """Has no patience."""

    def receive(self, timeout: float | None = None) -> Message | None:
        """Waits for a hundredth of the time."""
        return super().receive(None if timeout is None else timeout / 100)


class SendRaisesTimeout(MemoryPipe):
    """Nobody in time is an error to it."""

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Raises instead of returning False."""
        if not super().send(message, timeout):
            raise TimeoutError
        return True


class SendWaitsForEver(MemoryPipe):
    """Knows no timeout."""

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Waits without limit."""
        return super().send(message, None)


class SendsOnlyOnce(MemoryPipe):
    """A message that was tried is taken for sent."""

    def __init__(self, mode: Mode | str, token: str = "") -> None:
        super().__init__(mode, token)
        self.tried: set[str] = set()

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """True the second time."""
        if message.msg_id in self.tried:
            return True
        self.tried.add(message.msg_id)
        return super().send(message, timeout)


class ClearsNothing(MemoryPipe):
    """Its clear is empty."""

    def clear(self) -> None:
        """Nothing."""


class ExportsObjects(MemoryPipe):
    """Exports what is no JSON."""

    def export(self, side: ExportMode) -> tuple[str, dict[str, Any]]:
        """With an object in it."""
        path, args = super().export(side)
        return path, {**args, "folder": Path("/")}


class ExportsItself(MemoryPipe):
    """Always describes its own end."""

    def export(self, side: ExportMode) -> tuple[str, dict[str, Any]]:
        """The same for both."""
        return super().export(ExportMode.SELF)


class ExportsNoClass(MemoryPipe):
    """The class that it names does not exist."""

    def export(self, side: ExportMode) -> tuple[str, dict[str, Any]]:
        """With a path that leads nowhere."""
        return "tests.pipes.bad_pipes.Nothing", super().export(side)[1]


class ExportsTooLittle(MemoryPipe):
    """The peer that it describes goes elsewhere."""

    def export(self, side: ExportMode) -> tuple[str, dict[str, Any]]:
        """Without the token."""
        path, args = super().export(side)
        return path, {"mode": args["mode"]}


class CountsInWords(MemoryPipe):
    """Its count is none."""

    def moved_bytes(self) -> int:
        """A word."""
        return "many"  # type: ignore[return-value]


class LivesInTheFuture(MemoryPipe):
    """Mistakes the clock."""

    def get_last_peer_active_time(self) -> float:
        """Far ahead."""
        return 1e18


class LeavesTraces(MemoryPipe):
    """Does not clean up."""

    def close(self) -> None:
        """Leaves something."""
        TRACES.append("a segment")
        super().close()


# -- messages --


class Repeats(MemoryPipe):
    """Every seventh message comes twice."""

    def __init__(self, mode: Mode | str, token: str = "") -> None:
        super().__init__(mode, token)
        self.numbers = itertools.count(1)
        self.last: Message | None = None

    def receive(self, timeout: float | None = None) -> Message | None:
        """Now and then the last one."""
        if next(self.numbers) % 7 == 0:
            return self.last
        self.last = super().receive(timeout)
        return self.last


class Loses(MemoryPipe):
    """The thousandth message is lost."""

    def __init__(self, mode: Mode | str, token: str = "") -> None:
        super().__init__(mode, token)
        self.numbers = itertools.count(1)

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Now and then nothing."""
        return True if next(self.numbers) % 1000 == 0 else super().send(message, timeout)


class BeginsInTheDark(MemoryPipe):
    """Says at once that a message was read."""

    def begin(self, message: Message, timeout: float | None = None) -> Pending[bool]:
        """As if somebody had been asked."""
        read: Pending[bool] = Pending()
        read.set(True)
        return read


class DeliversTwice(Changing):
    """Gives a message to both who want it."""

    def deliver(self, to: Any) -> bool:
        """As it should be, were it the only way."""
        self.change = lambda message: to(message) or message  # type: ignore[method-assign]
        return True


class LowersTopics(Changing):
    """Changes topics."""

    def change(self, message: Message) -> Message:
        """In lower case."""
        return changed(message, topic=message.topic.lower())


class ForgetsIds(Changing):
    """Gives messages new ids."""

    def change(self, message: Message) -> Message:
        """Another id."""
        return changed(message, msg_id="")


class DropsEmptyBuffers(Changing):
    """Takes an empty buffer for none."""

    def change(self, message: Message) -> Message:
        """Only those with something in them."""
        return changed(message, buffers=[buffer for buffer in message.buffers if len(buffer)])


class TakesAHundredBuffers(Changing):
    """Has a table that is too short."""

    def change(self, message: Message) -> Message:
        """The first ones."""
        return changed(message, buffers=message.buffers[:100])


class ZerosTheEnd(Changing):
    """What is beyond a megabyte is not what it was."""

    def change(self, message: Message) -> Message:
        """With zeros at the end of a big one."""
        for buffer in message.buffers:
            if len(buffer) > 1024 * 1024:
                memoryview(buffer)[-10:] = bytes(10)
        return message


class OneDirectionAtATime(MemoryPipe):
    """Whoever sends keeps everybody from receiving."""

    line: ClassVar[dict[tuple[str, Mode], threading.Lock]] = {}

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Holds the end."""
        with self.line.setdefault((self._open_seat().key[1], self.mode), threading.Lock()):
            return super().send(message, timeout)

    def receive(self, timeout: float | None = None) -> Message | None:
        """Wants the end."""
        with self.line.setdefault((self._open_seat().key[1], self.mode), threading.Lock()):
            return super().receive(timeout)


class TrueTooEarly(MemoryPipe):
    """Takes a message that is on its way for one that was read."""

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Leaves the message to a thread."""
        self._open_seat()
        threading.Thread(target=self._send_later, args=(message,), daemon=True).start()
        return True

    def _send_later(self, message: Message) -> None:
        with contextlib.suppress(BrokenPipeError):
            super().send(message, None)


class NoPatience(MemoryPipe):
    """Takes no timeout for no time."""

    def receive(self, timeout: float | None = None) -> Message | None:
        """Looks once."""
        return super().receive(timeout or 0.0)


class OneChannel(MemoryPipe):
    """All its channels are one."""

    def open(self, name: str) -> None:
        """Whatever the name."""
        super().open("channel")


class ReadOnly(Changing):
    """Its buffers cannot be written."""

    def change(self, message: Message) -> Message:
        """As bytes."""
        return changed(message, buffers=[bytes(buffer) for buffer in message.buffers])


class Misaligned(Changing):
    """Its buffers lie anywhere."""

    def change(self, message: Message) -> Message:
        """One byte further."""
        buffers = []
        for buffer in message.buffers:
            begin = 1
            place = memoryview(bytearray(len(buffer) + begin))[begin:]
            place[:] = buffer
            buffers.append(place)
        return changed(message, buffers=buffers)


class SharesMemory(MemoryPipe):
    """Hands the sender's own memory out."""

    handed: ClassVar[dict[str, Message]] = {}

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """With a copy where the contract looks first."""
        self.handed[message.msg_id] = message
        return super().send(message, timeout)

    def receive(self, timeout: float | None = None) -> Message | None:
        """The sender's buffers, if they are big."""
        message = super().receive(timeout)
        if message is not None and message.nbytes > 1024 * 1024:
            return changed(message, buffers=[memoryview(each) for each in self.handed[message.msg_id].buffers])
        return message


class UsesMemoryAgain(Changing):
    """Has room for one message."""

    def __init__(self, mode: Mode | str, token: str = "") -> None:
        super().__init__(mode, token)
        self.room = memoryview(bytearray(1024 * 1024))

    def change(self, message: Message) -> Message:
        """Always in the same place."""
        places, begin = [], 0
        for buffer in message.buffers:
            places.append(self.room[begin : begin + len(buffer)])
            places[-1][:] = buffer
            begin += len(buffer)
        return changed(message, buffers=places)


# -- processes --


class ExportsAnotherSite(SocketPipe):
    """The peer that it describes waits elsewhere."""

    def export(self, side: ExportMode) -> tuple[str, dict[str, Any]]:
        """With another name."""
        path, args = super().export(side)
        return path, {**args, "site_name": f"not-{self.site_name}"}


class TakesHalfForWhole(SocketPipe):
    """The end of a connection is the end of a message to it."""

    def fill(self, at: Any, place: memoryview) -> None:
        """As much as came."""
        with contextlib.suppress(EOFError, OSError):
            super().fill(at, place)

    def receive(self, timeout: float | None = None) -> Message | None:
        """Whether or not anybody waits for the answer."""
        message: list[Message] = []
        whole = self.read_message
        self.read_message = lambda at: message.append(whole(at)) or message[0]  # type: ignore[method-assign, func-returns-value]
        try:
            return super().receive(timeout)
        except BrokenPipeError:
            if message:
                return message[0]
            raise
        finally:
            self.read_message = whole  # type: ignore[method-assign]


class TrueOnceWritten(SocketPipe):
    """What is in the buffer of a socket was read, to it."""

    def wait_for(self, at: Any, deadline: float | None, closing: threading.Event) -> bool:
        """Does not wait for the answer."""
        return True if at is self.outgoing else super().wait_for(at, deadline, closing)

    def read_line(self, at: Any) -> bytes:
        """Makes the answer up."""
        return self.sending.msg_id.encode() if at is self.outgoing else super().read_line(at)

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Remembers what it sends."""
        self.sending = message
        return super().send(message, timeout)


class RaisesWhatItGets(SocketPipe):
    """Passes the errors of its sockets on."""

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Without translating them."""
        try:
            return super().send(message, timeout)
        except BrokenPipeError as error:
            raise error.__cause__ or error from None


class KeepsALockFile(SocketPipe):
    """Marks its place with a file, which nobody removes for a dead one."""

    def lock(self) -> Path:
        """Where it is: the name of the site is a folder."""
        return Path(self.site_name, f"{self.name}.{self.mode.value}")

    def open(self, name: str) -> None:
        """Only if the file is not there."""
        super().open(name)
        try:
            os.close(os.open(self.lock(), os.O_CREAT | os.O_EXCL))
        except FileExistsError as error:
            super().close()
            raise UsageError("another end of this mode has this place") from error

    def close(self) -> None:
        """Removes the file."""
        if self.closing is not None:
            self.lock().unlink()
        super().close()
