"""The wire: a message as frames, and frames as a message. Pure; nothing is allocated from a number that came in.

    [target][source][header][body][bundle]?          an application message
    [target][source][header][body][bytes]*           one that brings along what its manifest names
    [target][source][PULL  ][request]                please send these bytes of a transfer
    [target][source][CHUNK ][place][bytes]*          here they are
    [target][source][DONE  ][transfer]               I have all I want; you may forget me
    [target][source][ORDER ][]                       from now on send me what is one chunk before I ask for it
    [      ][      ][link verb][names]               between neighbours only: see `link`

The four transfer headers are constants, so that the busiest frames are recognised by one comparison and never parsed.
Header, positionally: version, kind, id, answers, channel, topic, ttl_s, [transfer, holder, lengths] or nil, lengths
of the buffers in the bundle or nil. Lengths are a letter, I or Q, and that many unsigned integers of 4 or 8 bytes. A
bundle is those buffers end to end, each padded with zeros to a multiple of 64 bytes. A kind with `CARRIES` added says
that all bytes of the manifest follow, in the frames of a chunk: only to whoever granted credit for them, and good for
nothing more than sparing him the pull.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgpack

from flarebus.errors import DecodeError, UsageError
from flarebus.message import Buffer, Bundle, Kind, Manifest, Message

__all__ = [
    "CARRIES",
    "CHUNK",
    "DONE",
    "MAX_BODY_BYTES",
    "MAX_CARRIED_BYTES",
    "MAX_FRAME_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_INLINE_BYTES",
    "NOT_OFFERED",
    "ORDER",
    "PLACE",
    "PULL",
    "REQUEST",
    "TRANSFER_ID_BYTES",
    "VERSION",
    "bundle",
    "carry",
    "decode_message",
    "encode_message",
    "is_carrying",
]

VERSION = 1

MAX_HEADER_BYTES = 64 * 1024
MAX_BODY_BYTES = 1024 * 1024
# Buffers that are small together ride in the message: a round trip for a transfer costs more than copying this much.
MAX_INLINE_BYTES = 256 * 1024
# The largest frame anybody may send: a chunk with room to spare. Sockets refuse more before allocating it.
MAX_FRAME_BYTES = 8 * 1024 * 1024
# The most that a message brings along beside a bundle: one chunk, so that control messages never wait for more.
MAX_CARRIED_BYTES = 1024 * 1024
# The longest list in a header. Lists are allocated by what they claim to hold, also a thousand deep in each other, so
# lengths are not a list: 64 KiB of claims would cost 70 MB.
MAX_FIELDS = 9
# A cache line: arrays may lie in the bundle as they lie in memory, whatever their dtype.
ALIGNMENT = 64
MAX_ADDRESS_BYTES = 255
# Channel and topic are words of a protocol, never data.
MAX_WORD = 64
MAX_TRANSFER_BYTES = 1 << 48

# Added to the kind.
CARRIES = 16

PULL = b"\xf1"
CHUNK = b"\xf2"
DONE = b"\xf3"
ORDER = b"\xf4"

TRANSFER_ID_BYTES = 16
REQUEST = struct.Struct("!16sQI")
"""Body of PULL: transfer, first byte, number of bytes."""
PLACE = struct.Struct("!16sQ")
"""Body of CHUNK: transfer, first byte."""
NOT_OFFERED = (1 << 64) - 1
"""First byte of a CHUNK that says: I do not hold that, or not for you."""

# In the bytes of a header: a list of 9, version, kind; each of these takes one byte.
_LIST_OF_FIELDS, _KIND_AT = 0x90 + MAX_FIELDS, 2
_PADDING = [bytes(-n % ALIGNMENT) for n in range(ALIGNMENT)]
_WIDTHS = {"I": 4, "Q": 8}
_KINDS = {int(kind): kind for kind in Kind}


def bundle(buffers: Sequence[memoryview]) -> Bundle | None:
    """`buffers` (byte views) copied into one frame; None if they are too many bytes to ride in a message."""
    lengths = tuple(buffer.nbytes for buffer in buffers)
    if sum(lengths) > MAX_INLINE_BYTES or len(lengths) * ALIGNMENT > MAX_INLINE_BYTES:
        return None
    parts: list[Buffer] = []
    for buffer, length in zip(buffers, lengths, strict=True):
        parts.append(buffer)
        if length % ALIGNMENT:
            parts.append(_PADDING[length % ALIGNMENT])
    return Bundle(lengths, b"".join(parts))


def encode_message(message: Message) -> list[Buffer]:
    """The frames of `message`, its bundle by reference.

    Raises:
        UsageError: header, body or a name is larger than the protocol allows.
    """
    if max(len(message.channel), len(message.topic)) > MAX_WORD:
        names = f"{message.channel:.80}/{message.topic:.80}"
        raise UsageError(f"{names}: channel and topic have at most {MAX_WORD} letters each")
    manifest = message.manifest
    header = msgpack.packb(
        (
            VERSION,
            int(message.kind),
            message.id,
            message.answers,
            message.channel,
            message.topic,
            message.ttl_s,
            None if manifest is None else (manifest.transfer, manifest.holder, _pack_lengths(manifest.lengths)),
            None if message.bundle is None else _pack_lengths(message.bundle.lengths),
        )
    )
    if len(header) > MAX_HEADER_BYTES:
        raise UsageError(
            f"header of {len(header)} bytes for {message.channel}/{message.topic}: at most {MAX_HEADER_BYTES}; "
            f"{0 if manifest is None else len(manifest.lengths)} separate tensors are too many for one message"
        )
    if len(message.body) > MAX_BODY_BYTES:
        raise UsageError(
            f"body of {len(message.body)} bytes for {message.channel}/{message.topic}: at most {MAX_BODY_BYTES}; "
            "put bulk data into arrays"
        )
    frames: list[Buffer] = [message.target.encode(), message.source.encode(), header, message.body]
    if message.bundle is not None:
        frames.append(message.bundle.data)
    return frames


def carry(frames: Sequence[Buffer], chunk: Sequence[Buffer]) -> list[Buffer]:
    """The message in `frames`, bringing along the bytes of its manifest; `frames` are left as they are.

    Args:
        frames: from `encode_message`, of a message with a manifest of at most `MAX_CARRIED_BYTES`.
        chunk: the frames of the only chunk of that transfer.
    """
    header = bytearray(frames[2])
    header[_KIND_AT] |= CARRIES
    return [*frames[:2], bytes(header), *frames[3:], *chunk]


def is_carrying(header: bytes) -> bool:
    """Whether bytes of the manifest follow the body, as far as can be seen without decoding."""
    return len(header) > _KIND_AT and header[0] == _LIST_OF_FIELDS and header[_KIND_AT] & ~0xF == CARRIES


def decode_message(frames: Sequence[Buffer], is_whole: bool = True) -> Message:
    """The message in `frames`; its bundle is the last frame itself.

    Args:
        is_whole: False: the first four frames are all there is; the message is returned without its bundle.

    Raises:
        DecodeError: anything is not as `encode_message` makes it. What a message carries beside a bundle is not looked
            at.
    """
    carries = len(frames) > 3 and is_carrying(bytes(frames[2]))
    if len(frames) < 4 or (len(frames) > 5 and not carries):
        raise DecodeError(f"message of {len(frames)} frames: 4 or 5 belong to it")
    target, source, header, body = map(bytes, frames[:4])
    if (
        len(target) > MAX_ADDRESS_BYTES
        or len(source) > MAX_ADDRESS_BYTES
        or len(header) > MAX_HEADER_BYTES
        or len(body) > MAX_BODY_BYTES
    ):
        raise DecodeError("address, header or body is over its limit")
    try:
        fields = msgpack.unpackb(header, use_list=False, max_array_len=MAX_FIELDS)
        if not is_whole:
            fields = (*fields[:-1], None)
        data = frames[4] if len(frames) > 4 and not carries else None
        return _message(target.decode("ascii"), source.decode("ascii"), fields, body, data)
    except DecodeError:
        raise
    except Exception as error:  # msgpack and struct raise a dozen kinds for what is one thing: not a header
        raise DecodeError(f"header cannot be read: {type(error).__name__}") from error


def _message(target: str, source: str, fields: Any, body: bytes, data: Buffer | None) -> Message:
    if type(fields) is not tuple or not fields:
        raise DecodeError("header is not a list")
    if fields[0] != VERSION:
        raise DecodeError(f"protocol version {fields[0]!r:.20}: this end speaks {VERSION}")
    _, kind, number, answers, channel, topic, ttl_s, manifest, lengths = fields
    if not (
        type(number) is int
        and type(answers) is int
        and type(channel) is str
        and type(topic) is str
        and type(ttl_s) in (float, int)
        and ttl_s >= 0
        and len(channel) <= MAX_WORD
        and len(topic) <= MAX_WORD
    ):
        raise DecodeError("header field of a wrong type")
    carries = type(kind) is int and kind & CARRIES
    kind = _KINDS.get(kind - carries)
    if kind is None:
        raise DecodeError("message of an unknown kind")
    if carries and manifest is None:
        raise DecodeError("a message carries the bytes of no manifest")
    if manifest is not None:
        manifest = _manifest(manifest)
        if data is not None:
            raise DecodeError("a message carries its buffers or a manifest of them, not both")
        if carries and manifest.nbytes > MAX_CARRIED_BYTES:
            raise DecodeError(f"{manifest.nbytes} bytes brought along; at most {MAX_CARRIED_BYTES} are read")
    carried = _bundle(lengths, data)
    return Message(target, source, kind, number, answers, channel, topic, ttl_s, manifest, body, carried)


def _bundle(lengths: Any, data: Buffer | None) -> Bundle | None:
    if lengths is None and data is None:
        return None
    if lengths is None or data is None:
        raise DecodeError("bundle: lengths and frame do not come together")
    lengths = _unpack_lengths(lengths)
    if sum(n + -n % ALIGNMENT for n in lengths) != len(data) or len(data) > 2 * MAX_INLINE_BYTES:
        raise DecodeError("bundle: its frame has not the length it says")
    return Bundle(lengths, data)


def _manifest(fields: Any) -> Manifest:
    transfer, holder, lengths = fields
    if type(transfer) is not bytes or len(transfer) != TRANSFER_ID_BYTES:
        raise DecodeError("manifest: transfer id is not 16 bytes")
    if type(holder) is not str or not 0 < len(holder) <= MAX_ADDRESS_BYTES:
        raise DecodeError("manifest: holder is not an address")
    lengths = _unpack_lengths(lengths)
    if sum(lengths) > MAX_TRANSFER_BYTES:
        raise DecodeError("manifest: more bytes than a transfer may have")
    return Manifest(transfer, holder, lengths)


def _pack_lengths(lengths: Sequence[int]) -> bytes:
    code = "Q" if max(lengths, default=0) >> 32 else "I"
    return code.encode() + struct.pack(f"!{len(lengths)}{code}", *lengths)


def _unpack_lengths(packed: Any) -> tuple[int, ...]:
    code = packed[:1].decode("ascii") if type(packed) is bytes else ""
    width = _WIDTHS.get(code)
    if width is None or (len(packed) - 1) % width:
        raise DecodeError("lengths are not byte counts")
    return struct.unpack_from(f"!{len(packed) // width}{code}", packed, 1)
