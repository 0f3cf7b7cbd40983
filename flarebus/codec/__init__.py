"""The codec: any value that may travel, as a small msgpack body and the buffers of its arrays, and back.

What travels: None, bool, int, float, complex, str, bytes, bytearray; list, tuple, set, frozenset, dict, OrderedDict;
datetime, date, time, timedelta; NumPy arrays and scalars; torch tensors and parameters; TensorFlow tensors and
variables, those of Keras included; `FLModel`; and what is registered here. It is not pickle: everything else is
refused, with the path to it, and nothing that comes in causes a name to be looked up or code to be run. Subclasses are
never taken for their base class.

Strings, bytes and arrays from `externalise_from` bytes on leave the body as buffers, which are not copied. Arrays and
tensors that share memory still share it on the other side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

from flarebus.codec._decoder import decode_with
from flarebus.codec._edit import edit_model_with, has_params
from flarebus.codec._encoder import Encoded, encode_with
from flarebus.codec._ids import MAX_BODY, MAX_DEPTH
from flarebus.codec._model import add_model
from flarebus.codec._numpy import add_numpy
from flarebus.codec._plain import add_plain
from flarebus.codec._records import DataclassDecomposer, EnumDecomposer
from flarebus.codec._registry import DEFAULT, Decomposer, Sink, Source
from flarebus.codec._tensorflow import add_tensorflow
from flarebus.codec._torch import add_torch
from flarebus.message import Buffer
from flarebus.model import FLModel

__all__ = [
    "MAX_BODY",
    "MAX_DEPTH",
    "Decomposer",
    "Encoded",
    "Sink",
    "Source",
    "decode",
    "edit_model",
    "encode",
    "has_params",
    "register",
    "register_dataclass",
    "register_enum",
]

add_plain(DEFAULT)
add_numpy(DEFAULT)
add_torch(DEFAULT)
add_tensorflow(DEFAULT)
add_model(DEFAULT)


def encode(value: Any, *, externalise_from: int = 1024) -> Encoded:
    """Encode `value`; any thread may call.

    Args:
        value: read, not changed. Its arrays are referenced by the buffers returned, not copied, save those with gaps in
            memory (copied once), those on other devices, and the smallest (copied into the body).
        externalise_from: strings and bytes at least this long, in characters or bytes, become buffers; arrays from half
            of it, or 512 bytes, whichever is less.

    Raises:
        EncodeError: something in it may not travel; says where, what was found and what to do.
    """
    return encode_with(DEFAULT, value, externalise_from)


def decode(body: Buffer, buffers: Iterable[Buffer], *, copy: bool = False) -> Any:
    """Decode what `encode` made; any thread may call. All bytes must be there already.

    Args:
        body: as it came, at most `MAX_BODY` bytes.
        buffers: bytes-like and contiguous, in order. Arrays lie on a writable and aligned buffer itself and keep it
            alive; a read-only or misaligned one is copied once. Short arrays share a copy of their own.
        copy: copy every buffer, so that nothing refers to `buffers` afterwards.

    Returns:
        The value. Its arrays are writable and aligned, and nobody else's if the buffers are not.

    Raises:
        DecodeError: the bytes do not hold what they claim; says where, and nothing of the content.
    """
    return decode_with(DEFAULT, body, buffers, copy=copy)


def edit_model(
    body: Buffer, edit: Callable[[FLModel], FLModel], beside: Mapping[str, Any] | None = None
) -> bytes | None:
    """Change metrics, meta and rounds of an encoded `FLModel` without its parameters, which stay where they are.

    Args:
        body: as `encode` made it, or as it came.
        edit: gets a model with metrics, meta and rounds only, its own to change, and returns the one whose metrics,
            meta and rounds take their place. What it raises passes through.
        beside: more parameters, small ones; where the model has one of the same name, these count.

    Returns:
        The new body, for the same buffers. None when metrics or meta hold arrays or long strings: those are not all in
        the body, so the model has to be decoded whole; `edit` was not called then.

    Raises:
        DecodeError: the body is not that of an FLModel.
        EncodeError: what `edit` returned may not travel, or does not fit into the body.
    """
    return edit_model_with(DEFAULT, body, edit, beside or {})


def register(decomposer: Decomposer) -> None:
    """Let a type travel from now on, in this process. The other end needs the same registration.

    Raises:
        ConfigError: its id or one of its types is wrong or taken.
    """
    DEFAULT.add(decomposer)


def register_enum(cls: type[Enum], type_id: int) -> None:
    """Let the members of an enum travel, by name (flags by value); see `register`."""
    DEFAULT.add(EnumDecomposer(cls, type_id))


def register_dataclass(cls: type, type_id: int) -> None:
    """Let the instances of a dataclass travel, as the dict of their fields; see `register`.

    At the other end the class is called with the fields as keyword arguments: its checks run there.
    """
    DEFAULT.add(DataclassDecomposer(cls, type_id))
