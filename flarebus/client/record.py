"""From what a script logs to a metric record: the checks, and plain values for what NumPy and PyTorch put around them.

A loop may log thousands of records a second, so what is right as it is passes with a look at its type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flarebus.errors import ConfigError
from flarebus.metric import MAX_KEY, AnalyticsDataType

__all__ = ["TRACKERS", "hand_over"]

TRACKERS = ("tensorboard", "mlflow", "wandb")
"""What ``writer`` of a record may be: whose writer made it."""

_MIN_INT, _MAX_INT = -(1 << 63), (1 << 63) - 1
_NUMBER = frozenset({float, int, bool})
_TEXT = frozenset({str})
_PLAIN = _NUMBER | _TEXT | {type(None)}
_SCALAR_KINDS = (AnalyticsDataType.SCALAR, AnalyticsDataType.METRIC)
# Kinds of text for people: what is no plain value becomes its text.
_WORDED_KINDS = (
    AnalyticsDataType.PARAMETER,
    AnalyticsDataType.PARAMETERS,
    AnalyticsDataType.TAG,
    AnalyticsDataType.TAGS,
)
_DICT_KINDS = (
    AnalyticsDataType.SCALARS,
    AnalyticsDataType.METRICS,
    AnalyticsDataType.PARAMETERS,
    AnalyticsDataType.TAGS,
)
_AS_IT_IS: dict[AnalyticsDataType, frozenset[type]] = {
    kind: _NUMBER
    if kind in _SCALAR_KINDS
    else frozenset()
    if kind in _DICT_KINDS
    else _TEXT
    if kind is AnalyticsDataType.TEXT
    else _PLAIN
    for kind in AnalyticsDataType
}


def hand_over(
    log: Callable[..., None], key: str, value: Any, data_type: AnalyticsDataType, fields: dict[str, Any]
) -> None:
    """Check one record and give it to `log`, an engine's.

    Args:
        fields: further arguments of the script, such as ``global_step``; rewritten, and the engine's afterwards.

    Raises:
        ConfigError: an argument is wrong.
    """
    if type(data_type) is not AnalyticsDataType:
        data_type = _kind(data_type)
    if type(key) is not str or not 0 < len(key) <= MAX_KEY or not key.isascii():
        _check_key(key)
    if type(value) not in _AS_IT_IS[data_type]:
        value = _fitted(value, data_type)
    for name, item in fields.items():
        if type(item) is not int or not _MIN_INT <= item <= _MAX_INT:
            fields[name] = _field(name, item)
    log(key, value, data_type, fields)


def _kind(data_type: Any) -> AnalyticsDataType:
    try:
        return AnalyticsDataType(data_type)
    except ValueError:
        raise ConfigError("data_type", data_type, "one of AnalyticsDataType") from None


def _check_key(key: Any) -> None:
    if isinstance(key, str) and 0 < len(key) <= MAX_KEY and _is_text(key):
        return
    raise ConfigError("key", key, f"a name of 1 to {MAX_KEY} characters")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return True


def _fitted(value: Any, kind: AnalyticsDataType) -> Any:
    if kind in _DICT_KINDS:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise ConfigError("value", value, f"a dict with names as its keys, for {kind.value}")
        return {str(name): _plain(item, kind) for name, item in value.items()}
    value = _plain(value, kind)
    if kind in _SCALAR_KINDS and type(value) not in _NUMBER:
        raise ConfigError("value", value, f"a number, or an array or tensor of one, for {kind.value}")
    if kind is AnalyticsDataType.TEXT and type(value) is not str:
        raise ConfigError("value", value, f"a string, for {kind.value}")
    return value


def _plain(value: Any, kind: AnalyticsDataType | None = None) -> Any:
    if type(value) in _PLAIN:
        return value
    # Here and not above: NumPy is loaded by the time that there is something of it to log.
    from flarebus.client.convert import plain_scalar, to_arrays

    value = plain_scalar(value)
    if kind in _WORDED_KINDS and type(value) not in _PLAIN:
        return str(value)
    return to_arrays(value)


def _field(name: str, value: Any) -> Any:
    if name == "writer":
        if value not in TRACKERS:
            raise ConfigError("writer", value, f"one of {', '.join(TRACKERS)}")
        return value
    value = _plain(value)
    if name == "global_step" and value is not None and (type(value) is not int or not _MIN_INT <= value <= _MAX_INT):
        raise ConfigError("global_step", value, "a whole number of 64 bits, or None")
    return value
