"""Link: the life of one connection between neighbours. Pure: `now` comes in, what to say comes out.

    dialling end                         listening end (a router)
    HELLO names        ->
                       <-  WELCOME       names are reachable from here on
    JOIN / LEAVE names ->                a router below gained or lost a cell
                       <-  GONE names    cells that went away, so that nobody waits for them
                       <-  JOIN names    cells with a new connection: what was on its way to them is asked for again
    PING               <->  PONG         each end sends one when it has been quiet for an interval
    BYE                <->               leaving on purpose
                       <-  WHO           "I do not know this connection": the dialling end says HELLO again

Any frame from the other end is a sign of life. An end that heard nothing for `silence_s` holds the other to be dead:
the heartbeat runs on the thread that does the work, so that a process that spins or hangs is found out as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum

from flarebus.errors import DecodeError
from flarebus.wire import MAX_ADDRESS_BYTES

__all__ = ["HEARTBEAT_S", "SILENCE_S", "Link", "Verb", "decode_names", "encode_names"]

# Two beats may be lost; the third one that does not come is death.
HEARTBEAT_S = 5.0
SILENCE_S = 15.0

MAX_NAMES = 100_000


class Verb(bytes, Enum):
    """First byte of what neighbours say to each other; target and source frames are empty then."""

    HELLO = b"\xe1"
    WELCOME = b"\xe2"
    JOIN = b"\xe3"
    LEAVE = b"\xe4"
    GONE = b"\xe5"
    PING = b"\xe6"
    PONG = b"\xe7"
    BYE = b"\xe8"
    WHO = b"\xe9"


def encode_names(names: Iterable[str]) -> bytes:
    """The body of a verb that carries names: addresses, with a blank between them."""
    return " ".join(names).encode("ascii")


def decode_names(body: bytes) -> Sequence[str]:
    """Names from the body of a verb.

    Raises:
        DecodeError: it holds anything else, or more than anybody has.
    """
    if not body:
        return []
    # Counted first: many short names cost fifty times what they take on the wire.
    if body.count(b" ") >= MAX_NAMES or not body.isascii():
        raise DecodeError(f"names are not text, or more than {MAX_NAMES}")
    names = body.decode("ascii").split(" ")
    if not all(0 < len(name) <= MAX_ADDRESS_BYTES for name in names):
        raise DecodeError("names are empty or too long")
    return names


class Link:
    """Heartbeat and silence of one connection.

    Args:
        now: monotonic seconds.
        heartbeat_s: say something at least this often.
        silence_s: the other end is dead after this long without a sign of life.
    """

    __slots__ = ("_heard", "_spoke", "heartbeat_s", "silence_s")

    def __init__(self, now: float, heartbeat_s: float = HEARTBEAT_S, silence_s: float = SILENCE_S) -> None:
        self.heartbeat_s = heartbeat_s
        self.silence_s = silence_s
        self._heard = now
        self._spoke = now

    def heard(self, now: float) -> None:
        """Something came from the other end."""
        self._heard = now

    def spoke(self, now: float) -> None:
        """Something was sent to the other end."""
        self._spoke = now

    def is_silent(self, now: float) -> bool:
        """Whether the other end must be held to be dead."""
        return now - self._heard >= self.silence_s

    def should_ping(self, now: float) -> bool:
        """Whether it is time to give a sign of life."""
        return now - self._spoke >= self.heartbeat_s

    def next_event(self) -> float:
        """When to look again, in monotonic seconds."""
        return min(self._spoke + self.heartbeat_s, self._heard + self.silence_s)
