"""Pipe: the link between a client job and its trainer, as a plug-in implements it.

A pipe moves messages between two ends and does nothing else: whether the other end lives, what to send again and what
came twice is the business of `PipeHandler`, in one place for all pipes. An end is made by its constructor, which must
not touch anything outside; `open` is where sockets, files and memory come from. One thread sends and another receives,
at the same time; `close` may come from a third.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, ClassVar

from flarebus.errors import ConfigError, UsageError
from flarebus.message import Buffer
from flarebus.pending import Pending
from flarebus.pipes.message import Message

__all__ = ["ExportMode", "Mode", "Pipe"]


class Mode(str, Enum):
    """Which end of a pipe: the trainer's is ACTIVE, the client job's PASSIVE."""

    ACTIVE = "ACTIVE"
    PASSIVE = "PASSIVE"


class ExportMode(str, Enum):
    """Whose constructor `Pipe.export` describes."""

    SELF = "SELF"
    PEER = "PEER"


class Pipe(ABC):
    """One end of a link for one channel.

    Args:
        mode: ACTIVE or PASSIVE, or their strings.

    A constructor may ask for any of these by name and gets them from the client job, in both modes unless noted:
    ``site_name``; ``token``, the id of the job; ``root_url``, the endpoint of the router; ``workspace_dir``, the site's
    folder; ``secure_mode``, whether connections are encrypted. Everything else comes from ``ARG`` in the configuration.

    Raises:
        ConfigError: `mode` is neither.
    """

    passes_manifests: ClassVar[bool] = False
    """Whether a message may carry a manifest: the peer then pulls the buffers from their holder, over the bus."""
    same_process: ClassVar[bool] = False
    """Whether both ends have to be in one process: the training script then runs inside the client job."""

    def __init__(self, mode: Mode | str) -> None:
        try:
            self.mode = Mode(mode)
        except ValueError:
            raise ConfigError("mode", mode, "ACTIVE or PASSIVE") from None

    @abstractmethod
    def open(self, name: str) -> None:
        """Get ready to send and receive on channel `name` (letters, digits, '-', '_'); a closed pipe may be reopened.

        The other end need not be there yet. A trainer makes one pipe for each channel, with the same arguments.

        Raises:
            UsageError: it is open already, or another live end of the same mode has this place.
            OSError: what it needs is not there or not allowed; says what and where.
        """

    @abstractmethod
    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Hand a message over; True once the peer's `receive` has returned it, False if that took too long.

        After False the message is withdrawn where the pipe can do that; `can_resend` says whether the same message may
        then be sent again (the peer may get it twice, and its handler drops the second).

        Args:
            timeout: seconds; None waits for as long as the pipe is open.

        Raises:
            BrokenPipeError: this end is closed or was never opened, or the other end is known to be gone.
            OSError: there is no room for its buffers; says how many bytes.
        """

    @abstractmethod
    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message, in the order of sending; None if none came in time. It wakes up by itself when one comes.

        The buffers of a message are writable, aligned to 64 bytes, and belong to the caller until it drops them; a
        pipe may use their memory again after that.

        Raises:
            BrokenPipeError: this end is closed or was never opened, or the other end is known to be gone.
            DecodeError: what came is no message; it was dropped.
        """

    @abstractmethod
    def clear(self) -> None:
        """Drop what waits to be received."""

    @abstractmethod
    def close(self) -> None:
        """Release everything; calls that wait return with BrokenPipeError. Idempotent; never hangs.

        Nothing is left behind once both ends are closed; what dead ends left goes when somebody opens in their place.
        """

    @abstractmethod
    def export(self, side: ExportMode) -> tuple[str, dict[str, Any]]:
        """The dotted class path and the arguments, as JSON values, that make this end, or the peer's."""

    def begin(self, message: Message, timeout: float | None = None) -> Pending[bool] | None:
        """Like `send`, from any thread and without waiting: what that would return or raise comes later.

        None, and nothing is sent, where it would have to wait; a pipe that always has to leaves this as it is. Of this
        and `send` one call at a time is on its way, but for signs of life.
        """
        return None

    def deliver(self, to: Callable[[Message], None]) -> bool:
        """Call `to` with each message as it comes, on a thread of the pipe, which `to` must not hold up.

        Messages still come one at a time and in order, each as if `receive` had returned it. `receive` goes on: it
        returns what cannot be delivered so, and raises. `to` must not close the pipe. False, and nothing changes, for
        a pipe that cannot do that.
        """
        return False

    def can_resend(self) -> bool:
        """Whether a message whose `send` was False may be sent again."""
        return False

    def release_send_cache(self, message: Message) -> None:
        """`message` is settled (answered, or given up): nothing of it is needed any more."""
        return

    def get_last_peer_active_time(self) -> float:
        """When the peer last gave a sign of life, in monotonic seconds; 0.0 if that is not known."""
        return 0.0

    def pull(self, message: Message) -> Pending[Sequence[Buffer]]:
        """Bring the buffers of a message that came through this pipe here, if they are elsewhere."""
        if message.manifest is not None:
            raise UsageError(f"{type(self).__name__} carries no manifests")
        here: Pending[Sequence[Buffer]] = Pending()
        here.set(message.buffers)
        return here

    def moved_bytes(self) -> int:
        """A count that grows while buffers are moving, for whoever waits for them to have moved."""
        return 0
