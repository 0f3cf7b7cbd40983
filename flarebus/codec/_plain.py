"""Handlers of the builtin types: containers, long strings, big integers, complex numbers, dates and times.

Containers walk their items; each notes its key on the trail when one of them is refused, so that the path costs
nothing until it is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from typing import Any

from flarebus.codec import _ids
from flarebus.codec._decoder import Decoder, check_keys
from flarebus.codec._encoder import NATIVE, Encoder, step
from flarebus.codec._registry import DecodeHandler, EncodeHandler, Malformed, Refused, Registry

__all__ = ["add_plain"]

_MICROSECOND = timedelta(microseconds=1)
_FEW = 16  # items from which asking for the set of their types is faster than looking at each


def add_plain(registry: Registry) -> None:
    """Register the builtin types."""
    entries: tuple[tuple[int, tuple[type, ...], EncodeHandler | None, DecodeHandler], ...] = (
        (_ids.FOLDED, (), None, _decode_folded),
        (_ids.LIST, (list,), _items_encoder(_ids.LIST), _decode_list),
        (_ids.TUPLE, (tuple,), _items_encoder(_ids.TUPLE), _decode_tuple),
        (_ids.SET, (set,), _items_encoder(_ids.SET), _set_decoder(set)),
        (_ids.FROZENSET, (frozenset,), _items_encoder(_ids.FROZENSET), _set_decoder(frozenset)),
        (_ids.DICT, (dict,), _dict_encoder(_ids.DICT), _decode_dict),
        (_ids.ORDERED_DICT, (OrderedDict,), _dict_encoder(_ids.ORDERED_DICT), _decode_ordered),
        (_ids.BIG_INT, (int,), _encode_native, _decode_big_int),
        (_ids.BYTES, (bytes,), _encode_bytes, _decode_bytes),
        (_ids.STR, (str,), _encode_str, _decode_str),
        (_ids.BYTEARRAY, (bytearray,), _encode_bytearray, _decode_bytearray),
        (_ids.COMPLEX, (complex,), _encode_complex, _decode_complex),
        (_ids.DATETIME, (datetime,), _encode_datetime, _decode_datetime),
        (_ids.DATE, (date,), _encode_date, _decode_date),
        (_ids.TIME, (time,), _encode_time, _decode_time),
        (_ids.TIMEDELTA, (timedelta,), _encode_timedelta, _decode_timedelta),
    )
    for type_id, types, encode, decode in entries:
        registry.add_handlers(type_id, types, encode, decode)


def _encode_native(value: Any, sink: Encoder, depth: int) -> Any:
    return value


# -- containers ---------------------------------------------------------------------------------------------------


def _items_encoder(tag: int) -> EncodeHandler:
    def encode(value: Any, sink: Encoder, depth: int) -> Any:
        sink.charge(len(value), depth)
        if len(value) >= _FEW and set(map(type, value)) <= NATIVE:
            return sink.fold([tag, *value])
        node: list[Any] = [tag]
        append = node.append
        try:
            for item in value:
                kind = type(item)
                if kind in NATIVE or (kind is str and len(item) < sink.long):
                    append(item)
                else:
                    append(sink.plain(item, depth + 1))
        except Exception:
            sink.trail.append(f"[{len(node) - 1}]")
            raise
        return sink.fold(node) if len(node) > _ids.FOLD_LENGTH else node

    return encode


def _dict_encoder(tag: int) -> EncodeHandler:
    def encode(value: Any, sink: Encoder, depth: int) -> Any:
        sink.charge(2 * len(value), depth)
        node: list[Any] = [tag]
        append = node.append
        plain, long, native, deeper = sink.plain, sink.long, NATIVE, depth + 1
        key = None
        try:
            for key, item in value.items():
                if type(key) is str and len(key) < long:
                    append(key)
                else:
                    append(plain(key, deeper))
                kind = type(item)
                if kind in native or (kind is str and len(item) < long):
                    append(item)
                else:
                    append(plain(item, deeper))
        except Exception:
            sink.trail.append(step(key))
            raise
        return sink.fold(node) if len(node) > _ids.FOLD_LENGTH else node

    return encode


def _decode_folded(node: list[Any], source: Decoder, depth: int) -> Any:
    flat: list[Any] = []
    for part in node[1:]:
        if type(part) is not list:
            raise Malformed("a part of a long container that is no list")
        flat += part
    if flat and flat[0] == _ids.FOLDED:
        raise Malformed("a long container in parts of parts")
    return source.value(flat, depth)


def _check_depth(depth: int) -> None:
    if depth > _ids.MAX_DEPTH:
        raise Malformed(f"nested deeper than {_ids.MAX_DEPTH} levels")


def _decode_list(node: list[Any], source: Decoder, depth: int) -> list[Any]:
    _check_depth(depth)
    items = node[1:]
    if list in set(map(type, items)):
        at = 0
        try:
            for at, item in enumerate(items):
                if type(item) is list:
                    items[at] = source.value(item, depth + 1)
        except Exception:
            source.trail.append(f"[{at}]")
            raise
    return items


def _decode_tuple(node: list[Any], source: Decoder, depth: int) -> tuple[Any, ...]:
    return tuple(_decode_list(node, source, depth))


def _set_decoder(build: Callable[[list[Any]], set[Any] | frozenset[Any]]) -> DecodeHandler:
    def decode(node: list[Any], source: Decoder, depth: int) -> Any:
        items = _decode_list(node, source, depth)
        check_keys(items)
        found = build(items)
        if len(found) != len(items):
            raise Malformed("an item stands twice in a set")
        return found

    return decode


def _decode_dict(node: list[Any], source: Decoder, depth: int) -> dict[Any, Any]:
    _check_depth(depth)
    keys = node[1::2]
    items = node[2::2]
    if len(keys) != len(items):
        raise Malformed("a key without an item")
    try:
        check_keys(keys)
        found = dict(zip(keys, items, strict=True))
    except TypeError:  # a list, which is the wire form of what msgpack does not know: tuples, dates, ...
        keys = [source.value(key, depth + 1) for key in keys]
        check_keys(keys)
        found = dict(zip(keys, items, strict=True))
    if len(found) != len(keys):
        raise Malformed("a key stands twice in a dict")
    key = None
    try:
        for key, item in found.items():
            if type(item) is list:
                found[key] = source.value(item, depth + 1)
    except Exception:
        source.trail.append(step(key))
        raise
    return found


def _decode_ordered(node: list[Any], source: Decoder, depth: int) -> OrderedDict[Any, Any]:
    return OrderedDict(_decode_dict(node, source, depth))


# -- strings and integers -----------------------------------------------------------------------------------------


def _encode_str(value: str, sink: Encoder, depth: int) -> Any:
    if 0 < len(value) < sink.long:
        return value
    try:
        data = value.encode()
    except UnicodeEncodeError:
        raise Refused("a string with a lone surrogate", "it is no Unicode text; send bytes") from None
    return [_ids.STR, sink.add_text(value, data), len(data)] if data else value


def _encode_bytes(value: bytes, sink: Encoder, depth: int) -> Any:
    return value if len(value) < sink.long else [_ids.BYTES, sink.add_text(value, value), len(value)]


def _encode_bytearray(value: bytearray, sink: Encoder, depth: int) -> Any:
    short = len(value) < sink.long
    return [_ids.BYTEARRAY, bytes(value)] if short else [_ids.BYTEARRAY, sink.add(value), len(value)]


def _decode_str(node: list[Any], source: Decoder, depth: int) -> Any:
    _, reference, n_bytes = node
    return source.text(reference, n_bytes, as_str=True)


def _decode_bytes(node: list[Any], source: Decoder, depth: int) -> Any:
    _, reference, n_bytes = node
    return source.text(reference, n_bytes, as_str=False)


def _decode_bytearray(node: list[Any], source: Decoder, depth: int) -> bytearray:
    if len(node) == 2:
        return bytearray(_typed(node[1], bytes))
    _, reference, n_bytes = node
    if source.is_used(reference):
        raise Malformed("two bytearrays in one buffer")
    return bytearray(source.whole(reference, n_bytes))


def _decode_big_int(node: list[Any], source: Decoder, depth: int) -> int:
    _, data = node
    return int.from_bytes(_typed(data, bytes), "little", signed=True)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise Malformed(f"something else where {kind.__name__} belongs")
    return value


# -- numbers, dates, times ----------------------------------------------------------------------------------------
# Each field is named on the way in: with one argument, the constructors of dates take bytes for a pickled state.


def _encode_complex(value: complex, sink: Encoder, depth: int) -> Any:
    return [_ids.COMPLEX, value.real, value.imag]


def _decode_complex(node: list[Any], source: Decoder, depth: int) -> complex:
    _, real, imag = node
    return complex(_typed(real, float), _typed(imag, float))


def _zone(zone: tzinfo | None) -> list[Any]:
    """Return offset in microseconds and name; neither for a naive time."""
    if zone is None:
        return []
    if type(zone) is not timezone:
        raise Refused(
            f"a time zone of type {type(zone).__qualname__}", "its rules do not travel; use value.astimezone(UTC)"
        )
    offset = zone.utcoffset(None)
    name = zone.tzname(None)
    return [offset // _MICROSECOND, None if name == timezone(offset).tzname(None) else name]


def _read_zone(fields: list[Any]) -> timezone | None:
    if not fields:
        return None
    microseconds, name = fields
    offset = timedelta(microseconds=_typed(microseconds, int))
    return timezone(offset) if name is None else timezone(offset, _typed(name, str))


def _encode_datetime(value: datetime, sink: Encoder, depth: int) -> Any:
    day = (value.year, value.month, value.day)
    clock = (value.hour, value.minute, value.second, value.microsecond, value.fold)
    return [_ids.DATETIME, *day, *clock, *_zone(value.tzinfo)]


def _decode_datetime(node: list[Any], source: Decoder, depth: int) -> datetime:
    year, month, day, hour, minute, second, microsecond, fold = node[1:9]
    return datetime(year, month, day, hour, minute, second, microsecond, _read_zone(node[9:]), fold=fold)


def _encode_date(value: date, sink: Encoder, depth: int) -> Any:
    return [_ids.DATE, value.year, value.month, value.day]


def _decode_date(node: list[Any], source: Decoder, depth: int) -> date:
    year, month, day = node[1:]
    return date(year, month, day)


def _encode_time(value: time, sink: Encoder, depth: int) -> Any:
    return [_ids.TIME, value.hour, value.minute, value.second, value.microsecond, value.fold, *_zone(value.tzinfo)]


def _decode_time(node: list[Any], source: Decoder, depth: int) -> time:
    hour, minute, second, microsecond, fold = node[1:6]
    return time(hour, minute, second, microsecond, _read_zone(node[6:]), fold=fold)


def _encode_timedelta(value: timedelta, sink: Encoder, depth: int) -> Any:
    return [_ids.TIMEDELTA, value.days, value.seconds, value.microseconds]


def _decode_timedelta(node: list[Any], source: Decoder, depth: int) -> timedelta:
    days, seconds, microseconds = node[1:]
    return timedelta(days, seconds, microseconds)
