"""Records: body and buffers of a message as one run of bytes, for a pipe that carries them itself. Pure.

    magic, bytes of the name, bytes of the body, number of buffers     a struct, 16 bytes
    name of what holds the buffers, or nothing when they follow here
    lengths of the buffers                                             8 bytes each
    body
    the buffers, each from a multiple of 64 bytes on                   only without a name

Numbers are little-endian. Everything that a record claims is checked against the bytes that are there before anything
is made from it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flarebus.errors import ConfigError, DecodeError
from flarebus.message import Buffer
from flarebus.wire import ALIGNMENT, MAX_BODY_BYTES, MAX_INLINE_BYTES

__all__ = ["MAX_RECORD_BYTES", "Record", "aligned", "byte_views", "cut", "pack", "room_for", "unpack"]

_MAGIC = b"FBP1"
_HEAD = struct.Struct("<4sHxxII")
# Far more tensors than any model has; their lengths are two megabytes.
_MAX_BUFFERS = 256 * 1024
_MAX_NAME_BYTES = 255
# More than any machine maps; sums of honest lengths stay far below.
_MAX_TOTAL_BYTES = 1 << 48

MAX_RECORD_BYTES = _HEAD.size + _MAX_NAME_BYTES + 8 * _MAX_BUFFERS + MAX_BODY_BYTES + ALIGNMENT + MAX_INLINE_BYTES
"""The longest record there is; whoever reads one looks at its length first."""


class Record(NamedTuple):
    """What a record says."""

    body: bytes
    lengths: tuple[int, ...]
    """Bytes of each buffer."""
    name: str
    """Of what holds the buffers; "" when they were in the record."""
    buffers: Sequence[memoryview]
    """The buffers that were in the record: views of its bytes."""


def byte_views(buffers: Sequence[Buffer]) -> list[memoryview]:
    """The buffers as bytes, not copied.

    Raises:
        ConfigError: there are too many.
    """
    if len(buffers) > _MAX_BUFFERS:
        raise ConfigError("buffers", len(buffers), f"at most {_MAX_BUFFERS} in one message")
    views = [memoryview(buffer) for buffer in buffers]
    # An empty view of an array with a zero in its shape cannot be cast.
    return [view.cast("B") if view.nbytes else memoryview(b"") for view in views]


def room_for(lengths: Sequence[int]) -> int:
    """Bytes that buffers of these lengths take, each from a multiple of 64 on."""
    return sum(length + -length % ALIGNMENT for length in lengths)


def cut(memory: memoryview, lengths: Sequence[int]) -> list[memoryview]:
    """Views of these lengths, one after another, each from a multiple of 64 bytes on."""
    found, begin = [], 0
    for length in lengths:
        found.append(memory[begin : begin + length])
        begin += length + -length % ALIGNMENT
    return found


def aligned(nbytes: int) -> memoryview:
    """Writable memory from a multiple of 64 bytes on; contents are arbitrary."""
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + nbytes].data


def pack(body: bytes, views: Sequence[memoryview], name: str = "") -> bytes:
    """A record of a body and of buffers that lie in what has this name; without a name they are copied into it.

    Raises:
        ConfigError: the body is too long.
    """
    if len(body) > MAX_BODY_BYTES:
        raise ConfigError("body", f"{len(body)} bytes", f"at most {MAX_BODY_BYTES} bytes; put the rest into buffers")
    lengths = [view.nbytes for view in views]
    word = name.encode()
    head = _HEAD.pack(_MAGIC, len(word), len(body), len(views))
    parts: list[Buffer] = [head, word, struct.pack(f"<{len(lengths)}Q", *lengths), body]
    if views and not name:
        parts.append(bytes(-sum(map(len, parts)) % ALIGNMENT))
        for view in views:
            parts += (view, bytes(-view.nbytes % ALIGNMENT))
    return b"".join(parts)


def unpack(data: memoryview) -> Record:
    """What is in a record. Buffers in it are views of `data`: aligned and writable if it is.

    Raises:
        DecodeError: it does not hold what it claims.
    """
    if len(data) < _HEAD.size:
        raise DecodeError(f"a record of {len(data)} bytes is none")
    magic, name_bytes, body_bytes, count = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise DecodeError("not a record of this version")
    body_at = _HEAD.size + name_bytes + 8 * count
    end = body_at + body_bytes
    if count > _MAX_BUFFERS or body_bytes > MAX_BODY_BYTES or end > len(data):
        raise DecodeError(f"a record claims {count} buffers and {body_bytes} bytes in {len(data)} bytes")
    lengths = struct.unpack_from(f"<{count}Q", data, body_at - 8 * count)
    total = room_for(lengths)
    if total > _MAX_TOTAL_BYTES:
        raise DecodeError(f"a record claims buffers of {total} bytes")
    try:
        name = str(data[_HEAD.size : _HEAD.size + name_bytes], "ascii")
    except UnicodeDecodeError as error:
        raise DecodeError("a record has a name that is none") from error
    begin = end
    if count and not name:
        begin += -end % ALIGNMENT
        end = begin + total
    if end != len(data):
        raise DecodeError(f"a record of {len(data)} bytes claims {end}")
    inside = cut(data[begin:end], lengths) if not name else []
    return Record(bytes(data[body_at : body_at + body_bytes]), lengths, name, inside)
