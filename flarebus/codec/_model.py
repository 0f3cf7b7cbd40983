"""Handler of FLModel: its fields in a fixed order, one list."""

from __future__ import annotations

from typing import Any

from flarebus.codec._decoder import Decoder
from flarebus.codec._encoder import Encoder
from flarebus.codec._ids import FLMODEL, PARAMS_TYPE
from flarebus.codec._records import EnumDecomposer
from flarebus.codec._registry import Refused, Registry
from flarebus.model import FLModel, ParamsType

__all__ = ["add_model"]

_DICTS = ("params", "optimizer_params", "metrics", "meta")
_ROUNDS = ("start_round", "current_round", "total_rounds")


def add_model(registry: Registry) -> None:
    """Register FLModel and ParamsType."""
    registry.add_handlers(FLMODEL, (FLModel,), _encode_model, _decode_model)
    registry.add(EnumDecomposer(ParamsType, PARAMS_TYPE), reserved=True)


def _encode_model(value: FLModel, sink: Encoder, depth: int) -> list[Any]:
    sink.charge(1 + len(_DICTS) + len(_ROUNDS), depth)
    kind = value.params_type
    node: list[Any] = [FLMODEL, None if kind is None else ParamsType(kind).value]
    name = ""
    try:
        for name in _DICTS + _ROUNDS:
            item = getattr(value, name)
            if name in _DICTS and item is not None and not isinstance(item, dict):
                raise Refused(f"an object of type {type(item).__qualname__}", "this field of an FLModel is a dict")
            node.append(sink.plain(item, depth + 1))
    except Exception:
        sink.trail.append(f".{name}")
        raise
    return node


def _decode_model(node: list[Any], source: Decoder, depth: int) -> FLModel:
    fields: dict[str, Any] = {}
    name = ""
    try:
        for name, item in zip(_DICTS + _ROUNDS, node[2:], strict=True):
            fields[name] = source.value(item, depth + 1)
    except Exception:
        source.trail.append(f".{name}")
        raise
    # The constructor checks types and rounds.
    return FLModel(node[1], **fields)
