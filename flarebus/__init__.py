"""flarebus: a message bus for federated learning.

A training script imports `flarebus.client`; whoever runs a job imports `flarebus.recipe`. This module itself holds the
version and a few words everybody needs, found when they are first used: importing it costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flarebus.errors import FlarebusError
    from flarebus.model import FLModel, ParamsType

__all__ = ["FLModel", "FlarebusError", "ParamsType", "__version__"]

__version__ = "0.1.0"

_HOMES = {"FLModel": "flarebus.model", "FlarebusError": "flarebus.errors", "ParamsType": "flarebus.model"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'flarebus' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
