"""Checks of single values, one per kind of parameter. Each returns the value as it is kept, or raises `ConfigError`.

The error names the parameter as the user wrote it, the value, and what is allowed.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
import shlex
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, TypeVar

from flarebus.errors import ConfigError

__all__ = [
    "check_args",
    "check_enum",
    "check_flag",
    "check_int",
    "check_keys",
    "check_mapping",
    "check_number",
    "check_regex",
    "check_text",
    "nearest",
]

_E = TypeVar("_E", bound=Enum)


def nearest(known: Iterable[str], given: object) -> str:
    """A hint for a wrong name: the known one it resembles, else what there is."""
    names = list(known)
    near = difflib.get_close_matches(str(given), names, 1)
    if near:
        return f"did you mean {near[0]!r}?"
    return "known: " + (", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "none")


def check_keys(data: Mapping[Any, Any], known: Iterable[str], required: Iterable[str], parameter: str) -> None:
    """See that `data` has every required key and no unknown one."""
    names = list(known)
    for key, value in data.items():
        if key not in names:
            raise ConfigError(f"{parameter}[{key!r}]", value, f"unknown key; {nearest(names, key)}")
    for key in required:
        if key not in data:
            raise ConfigError(parameter, sorted(data), f"the key {key!r} is missing")


def check_mapping(parameter: str, value: object) -> dict[Any, Any]:
    """A dict."""
    if not isinstance(value, dict):
        raise ConfigError(parameter, value, f"a dict, not {type(value).__name__}")
    return value


def check_int(parameter: str, value: object, minimum: int) -> int:
    """A whole number from `minimum`; booleans are none."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # that it may be no integer is what is found out here
    except TypeError:
        number = minimum - 1
    if isinstance(value, bool) or number < minimum:
        raise ConfigError(parameter, value, f"a whole number from {minimum}")
    return number


def check_number(parameter: str, value: object, *, above: float | None = None, minimum: float | None = None) -> float:
    """A finite number, at least `minimum` or more than `above`."""
    allowed = "a finite number"
    if above is not None:
        allowed += f" above {above:g}"
    if minimum is not None:
        allowed += f" from {minimum:g}"
    try:
        number = math.nan if isinstance(value, (bool, str, bytes)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or (above is not None and number <= above):
        raise ConfigError(parameter, value, allowed)
    if minimum is not None and number < minimum:
        raise ConfigError(parameter, value, allowed)
    return number


def check_flag(parameter: str, value: object) -> bool:
    """True or False, nothing that merely counts as one of them."""
    if not isinstance(value, bool):
        raise ConfigError(parameter, value, "True or False")
    return value


def check_text(parameter: str, value: object) -> str:
    """A string, perhaps empty."""
    if not isinstance(value, str):
        raise ConfigError(parameter, value, f"a string, not {type(value).__name__}")
    return value


def check_enum(parameter: str, value: object, kind: type[_E]) -> _E:
    """A member of `kind`, or the value of one."""
    try:
        return kind(value)
    except ValueError:
        listed = ", ".join(f"{kind.__name__}.{each.name}" for each in kind)
        raise ConfigError(parameter, value, f"one of {listed}") from None


def check_regex(parameter: str, value: object) -> str:
    """A regular expression that is not empty: an empty one is found in every name."""
    if not isinstance(value, str) or not value:
        raise ConfigError(parameter, value, "a regular expression, or None")
    try:
        re.compile(value)
    except re.error as error:
        raise ConfigError(parameter, value, f"not a regular expression: {error}") from None
    return value


def check_args(parameter: str, value: object) -> str:
    """Arguments of a script in one string that can be split as a shell would."""
    text = check_text(parameter, value)
    try:
        shlex.split(text)
    except ValueError as error:
        raise ConfigError(parameter, text, f"cannot be split into arguments: {error}") from None
    return text
