"""A batch of metric records as it travels: one msgpack list of rows, one row for each record.

Numbers, booleans and short texts stand in their row as they are, so that thousands of rows are packed by one call.
Everything else (dicts, arrays, images, long texts) was encoded by the codec when it was logged and stands there as
bytes. Whoever passes a batch on passes on bytes and need not look into them.

    fields of the message   {"records": bytes, "dropped": {site: records that were dropped since the batch before}}
    row                     [time, site, round, key, value, type, step, writer, extra]

A batch may come from anybody: its size is checked before it is read, and what it becomes is bounded by its size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgpack

from flarebus.codec import MAX_BODY, decode, encode
from flarebus.errors import DecodeError
from flarebus.metric import MAX_KEY, AnalyticsDataType

__all__ = [
    "MAX_BATCH_BYTES",
    "MAX_BATCH_RECORDS",
    "MAX_RECORD_BYTES",
    "MAX_TEXT",
    "Row",
    "decode_batch",
    "encode_batch",
    "is_light",
    "pack_value",
]

Row: TypeAlias = tuple[float, str, int | None, str, Any, str, int | None, str | None, bytes | None]
"""time, site, round, key, value, type, step, writer, extra; packed values are bytes."""

MAX_BATCH_RECORDS = 4096
# Packed values of one record: an image or two, no models.
MAX_RECORD_BYTES = 16 << 20
# The largest record goes alone. A row without packed values is at most some 5 KiB, but on average far below 1 KiB.
MAX_BATCH_BYTES = MAX_RECORD_BYTES + (MAX_BATCH_RECORDS << 10)
# Longer texts are packed, and so counted in bytes.
MAX_TEXT = 1024
_MAX_NAME = 255
_MAX_BUFFERS = 1024
# What the codec reads for one message. Value and extra of one record may each fill one of its bodies.
_MAX_BODIES = 2 * MAX_BODY
_MIN_INT, _MAX_INT = -(1 << 63), (1 << 64) - 1
# By the end of the year 5138, somebody will have to look at this; a NaN is not below it either.
_MAX_TIME = 1e11
_TYPES = frozenset(kind.value for kind in AnalyticsDataType)
_FIELDS = 9


def is_light(value: Any) -> bool:
    """Whether `value` may stand in a row as it is."""
    kind = type(value)
    if kind is float or kind is bool or value is None:
        return True
    if kind is int:
        return bool(_MIN_INT <= value <= _MAX_INT)
    return kind is str and len(value) <= MAX_TEXT and value.isascii()


def pack_value(value: Any) -> bytes:
    """Encode a value that is not light; nothing refers to it afterwards.

    Raises:
        EncodeError: something in it may not travel.
    """
    body, buffers = encode(value)
    packed: bytes = msgpack.packb([body, *buffers])
    return packed


def encode_batch(rows: Sequence[Row]) -> bytes:
    """The rows as bytes; at most `MAX_BATCH_RECORDS` of them."""
    packed: bytes = msgpack.packb(rows)
    return packed


def decode_batch(fields: Any) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Read the fields of a message.

    Returns:
        The records, in order, as dicts of ``site``, ``round``, ``time`` (seconds since the epoch at the site), ``key``,
        ``value``, ``type``, ``step``, ``writer`` and, where a script gave more, ``extra``; and how many records each
        site has dropped.

    Raises:
        DecodeError: they are not what `encode_batch` makes; nothing of the batch counts then.
    """
    if type(fields) is not dict or fields.keys() != {"records", "dropped"}:
        raise DecodeError("metric records: not a batch")
    data, dropped = fields["records"], fields["dropped"]
    if type(data) is not bytes or len(data) > MAX_BATCH_BYTES:
        raise DecodeError(f"metric records: no bytes, or more than {MAX_BATCH_BYTES}")
    if type(dropped) is not dict or not all(
        _is_name(site) and type(count) is int and 0 <= count <= _MAX_INT for site, count in dropped.items()
    ):
        raise DecodeError("metric records: what was dropped is no count")
    rows = _unpack(data, MAX_BATCH_RECORDS, MAX_BATCH_RECORDS + 1)
    reader = _Reader()
    return [reader.record(row) for row in rows], dropped


class _Reader:
    """Rows of one batch become records."""

    __slots__ = ("_left",)

    def __init__(self) -> None:
        self._left = _MAX_BODIES

    def record(self, row: Any) -> dict[str, Any]:
        if type(row) is not list or len(row) != _FIELDS:
            raise DecodeError("metric records: a row of another form")
        time, site, round, key, value, kind, step, writer, extra = row
        if not (
            type(time) is float
            and 0.0 <= time < _MAX_TIME
            and _is_name(site)
            and (round is None or type(round) is int)
            and _is_name(key, MAX_KEY)
            and type(kind) is str
            and kind in _TYPES
            and (step is None or type(step) is int)
            and (writer is None or _is_name(writer))
            and (extra is None or type(extra) is bytes)
            and type(value) is not list
        ):
            raise DecodeError("metric records: a field of a row is of another form")
        record = {
            "site": site,
            "round": round,
            "time": time,
            "key": key,
            "value": self._value(value) if type(value) is bytes else value,
            "type": kind,
            "step": step,
            "writer": writer,
        }
        if extra is not None:
            more = self._value(extra)
            if not isinstance(more, Mapping):
                raise DecodeError("metric records: extra fields that are no dict")
            record["extra"] = more
        return record

    def _value(self, packed: bytes) -> Any:
        body, *buffers = _unpack(packed, _MAX_BUFFERS, 1) or [b""]
        if type(body) is not bytes or not all(type(buffer) is bytes for buffer in buffers):
            raise DecodeError("metric records: a value of another form")
        # Small objects take far more memory than their bytes, so these are bounded for the batch as a whole.
        self._left -= len(body)
        if self._left < 0:
            raise DecodeError(f"metric records: values of more than {_MAX_BODIES} bytes beside their arrays")
        return decode(body, buffers)


def _is_name(value: Any, limit: int = _MAX_NAME) -> bool:
    return type(value) is str and 0 < len(value) <= limit


def _unpack(data: bytes, max_items: int, max_lists: int) -> list[Any]:
    """A msgpack list of lists and scalars, of at most so many lists; no map and no extension type is read."""
    left = max_lists

    def count(found: list[Any]) -> list[Any]:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("too many lists")
        return found

    try:
        found = msgpack.unpackb(
            data,
            max_array_len=max_items,
            max_map_len=0,
            max_ext_len=0,
            object_hook=_refuse,
            ext_hook=_refuse,
            list_hook=count,
        )
    except Exception as error:  # whatever a parser says to bytes that anybody may have made
        raise DecodeError(f"metric records: no msgpack of rows ({type(error).__name__})") from error
    if type(found) is not list:
        raise DecodeError("metric records: no list")
    return found


def _refuse(*_: Any) -> None:
    raise ValueError("a map or an extension type")
