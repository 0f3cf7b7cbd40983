"""What to do instead of sending a value that does not travel: one sentence for the kinds people try first."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np

__all__ = ["hint_for"]

_RULES: tuple[tuple[tuple[type, ...], str], ...] = (
    ((Enum,), "register its class with flarebus.codec.register_enum"),
    ((type,), "classes do not travel; send their name and let the receiver choose"),
    ((Mapping,), "send dict(value)"),
    ((list,), "send list(value)"),
    ((tuple,), "send tuple(value), or register the class"),
    ((str,), "send str(value)"),
    ((bool, int), "send int(value)"),
    ((float,), "send float(value)"),
    ((np.ndarray,), "send numpy.asarray(value)"),
    ((np.generic,), "convert it to one of the common numeric types"),
    ((memoryview,), "send bytes(value)"),
    ((PurePath,), "send str(value)"),
    ((Iterator,), "send list(value)"),
    ((types.ModuleType,), "modules do not travel"),
)


def hint_for(value: Any) -> str:
    """Return what the sender of `value` can do."""
    if is_dataclass(value) and not isinstance(value, type):
        return "register its class with flarebus.codec.register_dataclass"
    for kinds, hint in _RULES:
        if isinstance(value, kinds):
            return hint
    if hasattr(value, "get_weights"):
        return "send its get_weights()"
    if hasattr(value, "state_dict"):
        return "send its state_dict()"
    if callable(value):
        return "functions and other code do not travel"
    return "send plain data, or register a decomposer with flarebus.codec.register"
