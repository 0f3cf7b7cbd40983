"""Message: one immutable unit on the bus.

Tuples, not dataclasses: thousands are made each second, and a named tuple is as immutable and four times as quick to
make.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

__all__ = ["Buffer", "Bundle", "Kind", "Manifest", "Message", "Payload"]

Buffer = bytes | bytearray | memoryview


class Kind(IntEnum):
    """What a message is for."""

    REQUEST = 1
    REPLY = 2
    ERROR = 3
    EVENT = 4


class Manifest(NamedTuple):
    """What a holder offers: the buffers of one message that were too big to ride in it."""

    transfer: bytes
    """16 random bytes; knowing them is not enough, the holder also checks who asks."""
    holder: str
    """Address of the cell that serves the bytes; whoever forwards the message leaves it as it is."""
    lengths: tuple[int, ...]
    """Bytes of each buffer, in the order in which the body refers to them."""

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers together."""
        return sum(self.lengths)


class Bundle(NamedTuple):
    """Buffers that are small enough to ride in their message: one frame, each begins on a multiple of 64 bytes."""

    lengths: tuple[int, ...]
    """Bytes of each buffer, in the order in which the body refers to them."""
    data: Buffer


class Payload(NamedTuple):
    """A value encoded once for any number of messages; made by `Cell.share`.

    Small buffers were copied and ride in every message. Big ones are referenced until `Cell.withdraw`: whoever shares
    arrays leaves them alone that long.
    """

    body: bytes
    bundle: Bundle | None
    manifest: Manifest | None

    @property
    def nbytes(self) -> int:
        """Bytes of all its buffers."""
        carried = self.manifest or self.bundle
        return 0 if carried is None else sum(carried.lengths)


class Message(NamedTuple):
    """One unit on the bus: header fields, a msgpack body, and a bundle of its buffers or a manifest of them."""

    target: str
    source: str
    kind: Kind
    id: int
    """Unique among what `source` sends; repeated only when the same message is sent again."""
    answers: int = 0
    """Id of the request that a REPLY or ERROR answers."""
    channel: str = ""
    topic: str = ""
    ttl_s: float = 0.0
    """Seconds the asker still waits, counted from sending; 0 is for ever. Clocks of two machines are never compared."""
    manifest: Manifest | None = None
    body: bytes = b""
    bundle: Bundle | None = None
