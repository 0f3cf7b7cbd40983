"""PipeTrial: the bench on which a pipe is checked. Makes ends, calls them, never waits for ever, cleans up.

Each end is called as the contract says it will be: by one thread that sends, one that receives, and a third for the
rest. A call that does not return, or raises what the contract does not know, is a broken promise of its method.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from flarebus.errors import DeadlineExceeded, LinkError
from flarebus.message import Buffer
from flarebus.pending import Pending
from flarebus.pipes.message import Message
from flarebus.pipes.pipe import ExportMode, Mode, Pipe
from flarebus.testing.peer_process import PeerProcess

__all__ = ["Call", "End", "PipeTrial", "PromiseBroken"]

# Extra time for calls that have a timeout of their own; and what a pipe may take to let go of what it held.
PATIENCE_S = 30.0
BIG_BYTES = 64 * 1024 * 1024
GREETING = "hello"


class PromiseBroken(AssertionError):
    """A pipe does not do what the contract promises.

    Args:
        pipe: its class.
        method: the method of the promise.
        promise: what was promised, and what happened instead.
    """

    def __init__(self, pipe: type[Pipe], method: str, promise: str) -> None:
        self.pipe = pipe
        self.method = method
        self.promise = promise
        super().__init__(f"{pipe.__module__}.{pipe.__qualname__}.{method}: {promise}")


class Call:
    """One call of a method of an end, on its way or done."""

    def __init__(self, end: End, method: str, outcome: Pending[Any], limit: float) -> None:
        self._end = end
        self._method = method
        self._outcome = outcome
        self._limit = limit

    @property
    def is_done(self) -> bool:
        """Whether it has returned or raised."""
        return self._outcome.is_done

    def returns_within(self, seconds: float) -> bool:
        """Wait until it has returned or raised, but not longer than that."""
        try:
            self._outcome.result(seconds)
        except DeadlineExceeded:
            pass
        except Exception:  # whoever asks for the outcome gets it
            return True
        return self._outcome.is_done

    def on_done(self, callback: Callable[[], None]) -> None:
        """Call `callback` when it has returned or raised, or now if it has."""
        self._outcome.on_done(lambda _: callback())

    @property
    def has_failed(self) -> bool:
        """Whether it has raised, so far."""
        return self._outcome.is_done and self._outcome.error() is not None

    def outcome(self, *allowed: type[Exception], why: str = "") -> Any:
        """What it returned, or what it raised if that is one of `allowed`.

        Raises:
            PromiseBroken: it raised something else, or does not return; `why` says when that is.
        """
        when = f" {why}" if why else ""
        if not self.returns_within(self._limit):
            raise self._end.broken(self._method, f"does not return within {self._limit:g} s{when}")
        error = self._outcome.error()
        if error is None:
            return self._outcome.result()
        if isinstance(error, allowed):
            return error
        text = f"raised {type(error).__name__}: {error}".removesuffix(": ")
        if allowed:
            text += f", not {' or '.join(each.__name__ for each in allowed)}"
        raise self._end.broken(self._method, f"{text}{when}") from error

    def result(self, why: str = "") -> Any:
        """What it returned; raising anything is a broken promise."""
        return self.outcome(why=why)

    def raises(self, expected: type[Exception], why: str) -> Exception:
        """The exception that it had to raise.

        Raises:
            PromiseBroken: it returned, or raised something else.
        """
        found = self.outcome(expected, why=why)
        if not isinstance(found, expected):
            raise self._end.broken(
                self._method, f"has to raise {expected.__name__} {why}, but returned {_shown(found)}"
            )
        return found


class End:
    """One end under trial: the methods of `Pipe`, called on threads of their own."""

    def __init__(self, trial: PipeTrial, pipe: Pipe) -> None:
        self.pipe = pipe
        self.mode = pipe.mode
        self._trial = trial
        self._lanes: dict[str, SimpleQueue[tuple[Pending[Any], Callable[[], Any]] | None]] = {}

    def begin(self, method: str, *args: Any) -> Call:
        """Start a call, on the thread that this method has in real life."""
        outcome: Pending[Any] = Pending()
        bound = getattr(self.pipe, method)
        self._lane(method).put((outcome, lambda: bound(*args)))
        timeout = args[-1] if method in ("send", "receive") and isinstance(args[-1], int | float) else 0
        return Call(self, method, outcome, self._trial.patience + timeout)

    def open(self, channel: str) -> Self:
        """Open it; returns itself."""
        self.begin("open", channel).result()
        return self

    def send(self, message: Message, timeout: float | None = None) -> Call:
        """Start to send."""
        return self.begin("send", message, self._trial.patience if timeout is None else timeout)

    def receive(self, timeout: float | None = None) -> Call:
        """Start to receive."""
        return self.begin("receive", self._trial.patience if timeout is None else timeout)

    def next(self, why: str = "") -> Message:
        """The next message.

        Raises:
            PromiseBroken: there is none.
        """
        return self.message_of(self.receive(), why)

    def message_of(self, receiving: Call, why: str = "") -> Message:
        """The message that a receive returns.

        Raises:
            PromiseBroken: there is none.
        """
        message = receiving.result(why)
        if not isinstance(message, Message):
            raise self.broken("receive", f"returned {_shown(message)}, not the message that was sent {why}".rstrip())
        return message

    def content(self, message: Message) -> list[Buffer]:
        """The buffers of a message that came in, wherever they are; complete.

        Raises:
            PromiseBroken: they cannot be had.
        """
        found = self.content_if_there(message)
        if found is None:
            raise self.broken("pull", "the buffers of a message whose sender lives cannot be had")
        return found

    def content_if_there(self, message: Message) -> list[Buffer] | None:
        """The buffers of a message, or None if their holder is gone."""
        pulled = self.begin("pull", message).result()
        try:
            found: Sequence[Buffer] = pulled.result(self._trial.patience)
        except DeadlineExceeded:
            raise self.broken(
                "pull", f"neither brings the buffers within {self._trial.patience:g} s nor fails"
            ) from None
        except LinkError:
            return None
        return list(found)

    def close(self) -> None:
        """Close it."""
        self.begin("close").result()

    def export(self, side: ExportMode) -> tuple[str, dict[str, Any]]:
        """Whose constructor is asked for, checked to be a path and arguments."""
        found = self.begin("export", side).result()
        match found:
            case (str(path), dict(args)):
                return path, args
        raise self.broken("export", f"has to return a class path and a dict of arguments, not {_shown(found)}")

    def broken(self, method: str, promise: str) -> PromiseBroken:
        """The error for a promise that this end broke."""
        return PromiseBroken(type(self.pipe), method, promise)

    def dismiss(self) -> None:
        """Close it whatever it does, and let its threads go."""
        self.begin("close").returns_within(self._trial.patience)
        for lane in self._lanes.values():
            lane.put(None)

    def _lane(self, method: str) -> SimpleQueue[tuple[Pending[Any], Callable[[], Any]] | None]:
        name = method if method in ("send", "receive") else "close" if method == "close" else "owner"
        if name not in self._lanes:
            lane = self._lanes[name] = SimpleQueue()
            threading.Thread(target=_work, args=(lane,), name=f"pipe-trial-{name}", daemon=True).start()
        return self._lanes[name]


def _work(lane: SimpleQueue[tuple[Pending[Any], Callable[[], Any]] | None]) -> None:
    while (job := lane.get()) is not None:
        outcome, call = job
        try:
            outcome.set(call())
        except BaseException as error:  # whatever a pipe raises belongs to whoever called it
            outcome.fail(error)
        # Nothing of a message may live on here while the lane waits.
        del job, outcome, call


class PipeTrial:
    """What one check of a pipe needs. Use it in a `with` statement: it closes all ends and kills all processes.

    Args:
        make: makes an end of the mode it is given; ends belong together when they are opened on one channel.
        leftovers: names what the pipe left behind outside the process (files, segments, sockets); asked when all ends
            are closed or dead. Without it that promise is not checked.
        context: what a client job tells constructors that ask for it by name (`cell`, `root_url`, ...), for ends that
            are made from what `export` says; see `flarebus.pipes.loading.make_pipe`.
        patience: seconds that any call may take, beyond a timeout that it was given.
        big_bytes: how big a big message is.
    """

    def __init__(
        self,
        make: Callable[[Mode], Pipe],
        *,
        leftovers: Callable[[], list[str]] = list,
        context: Mapping[str, Any] | None = None,
        patience: float = PATIENCE_S,
        big_bytes: int = BIG_BYTES,
    ) -> None:
        self._make = make
        self.leftovers = leftovers
        self.context = dict(context or {})
        self.patience = patience
        self.big_bytes = big_bytes
        self._channels = (f"check-{number}" for number in itertools.count(1))
        self._ends: list[End] = []
        self._processes: list[PeerProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        for end in self._ends:
            end.dismiss()

    def channel(self) -> str:
        """The name of a channel that was not used yet."""
        return next(self._channels)

    def end(self, mode: Mode) -> End:
        """A new end, not open."""
        return self.adopt(self._make(mode))

    def adopt(self, pipe: Pipe) -> End:
        """An end that a check made itself; it is closed with the others."""
        end = End(self, pipe)
        self._ends.append(end)
        return end

    def pair(self, channel: str = "") -> tuple[End, End]:
        """Both ends of a channel, open and acquainted: the client job's, and the trainer's."""
        channel = channel or self.channel()
        here, there = self.end(Mode.PASSIVE).open(channel), self.end(Mode.ACTIVE).open(channel)
        self.greet(here, there)
        return here, there

    def greet(self, here: End, there: End, why: str = "as the first message of the ACTIVE end") -> None:
        """Say the first word, which is the trainer's: it may be how the client job's end gets to know it."""
        self.exchange(there, here, Message(GREETING), why)

    @property
    def modes_here(self) -> tuple[Mode, ...]:
        """Modes of an end in this process whose peer can be in another: a client job's cell cannot go there."""
        asks_for_cell = "cell" in inspect.signature(type(self._make(Mode.PASSIVE))).parameters
        return (Mode.PASSIVE,) if asks_for_cell else tuple(Mode)

    def process(self, exported: tuple[str, dict[str, Any]], channel: str) -> PeerProcess:
        """A process with the end that was exported, open on `channel`.

        Raises:
            PeerFailed: it could not be made or opened there.
        """
        process = PeerProcess(*exported, channel=channel, patience=self.patience)
        self._processes.append(process)
        process.wait_open()
        return process

    def exchange(self, sender: End, receiver: End, message: Message, why: str = "") -> Message:
        """Send a message and receive it; both must succeed."""
        sending, receiving = sender.send(message), receiver.receive()
        something = threading.Event()
        sending.on_done(something.set)
        receiving.on_done(something.set)
        something.wait(2 * self.patience)
        if sending.has_failed:
            # Otherwise the blame would be on the receive that waits in vain.
            sending.result(why)
        received = receiver.message_of(receiving, why)
        if received.msg_id != message.msg_id:
            raise receiver.broken("receive", f"returned another message than the one that was sent {why}".rstrip())
        if sending.result(why) is not True:
            raise sender.broken(
                "send", f"has to be True once the peer's receive has returned the message {why}".rstrip()
            )
        return received


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
