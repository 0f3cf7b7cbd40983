"""Settings of trackers: which keys there are, and what their values may be. No value is shown: it may be a secret."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from flarebus.errors import ConfigError
from flarebus.job.checks import nearest
from flarebus.job.secrets import HIDDEN

__all__ = ["FLAG", "NAMES", "TEXT", "VALUES", "check_settings"]

TEXT = "a string"
FLAG = "True or False"
NAMES = "a list of strings"
VALUES = "a dict of name -> string, number, True or False"

Known: TypeAlias = Mapping[str, Any]
"""Key -> what its value may be: one of the above, a tuple of strings for one of them, a dict for further settings."""


def check_settings(config: Mapping[str, Any], known: Known, parameter: str = "tracking_config") -> None:
    """See that settings have known keys and values of the right kind; None is as good as leaving a key out.

    Raises:
        ConfigError: names the key, the nearest known one, or what its value may be.
    """
    for key, value in config.items():
        place = f"{parameter}[{key!r}]"
        if key not in known:
            raise ConfigError(place, HIDDEN, f"unknown key; {nearest(known, str(key))}")
        if value is None:
            continue
        kind = known[key]
        if isinstance(kind, Mapping):
            if not isinstance(value, Mapping):
                raise ConfigError(place, HIDDEN, f"a dict with any of {', '.join(kind)}; it is {type(value).__name__}")
            check_settings(value, kind, place)
        elif isinstance(kind, tuple):
            if value not in kind:
                raise ConfigError(place, HIDDEN, f"one of {', '.join(kind)}")
        elif not _is(kind, value):
            raise ConfigError(place, HIDDEN, f"{kind}; it is {type(value).__name__}")


def _is(kind: str, value: Any) -> bool:
    if kind == TEXT:
        return isinstance(value, str) and value != ""
    if kind == FLAG:
        return isinstance(value, bool)
    if kind == NAMES:
        return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(each, str | int | float | bool) for name, each in value.items()
    )
