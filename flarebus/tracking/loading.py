"""Find a tracker by name, and see that it can be used before anything is started."""

from __future__ import annotations

import importlib.util
import inspect

from flarebus.errors import ConfigError
from flarebus.job.tracking_ref import TrackingRef
from flarebus.plugins import PluginKind
from flarebus.tracking.tracker import Tracker

__all__ = ["TRACKERS", "TRACKER_GROUP", "check_installed", "check_library", "check_tracking", "load_tracker"]

TRACKER_GROUP = "flarebus.trackers"
TRACKERS = PluginKind("tracking_type", TRACKER_GROUP)


def load_tracker(name: str) -> type[Tracker]:
    """The class of tracker `name`; its library is not loaded.

    Args:
        name: an entry-point name such as `mlflow`, or the dotted path of a class that is installed.

    Raises:
        ConfigError: as `PluginKind.load`, or the class is no tracker.
    """
    found = TRACKERS.load(name)
    if not issubclass(found, Tracker):
        raise ConfigError("tracking_type", name, f"{found.__qualname__} is no flarebus.tracking.Tracker")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigError("tracking_type", name, f"{found.__qualname__} lacks the methods {missing}")
    return found


def check_tracking(ref: TrackingRef) -> type[Tracker]:
    """See that the tracker is known and its settings are right.

    Raises:
        ConfigError: see `load_tracker`; or a setting is wrong.
    """
    found = load_tracker(ref.tracker)
    found.check(ref.config)
    return found


def check_installed(ref: TrackingRef) -> None:
    """See that the library of the tracker is installed here; it is looked for, not loaded.

    Raises:
        ConfigError: see `check_tracking`; or it is not, and says how to install it.
    """
    check_tracking(ref)
    check_library(ref.tracker)


def check_library(name: str) -> None:
    """See that the library of tracker `name` is installed here; it is looked for, not loaded.

    Raises:
        ConfigError: see `load_tracker`; or it is not, and says how to install it.
    """
    found = load_tracker(name)
    missing = [module for module in found.requires if not _is_there(module)]
    if missing:
        how = f"pip install 'flarebus[{found.extra}]'" if found.extra else f"pip install {' '.join(missing)}"
        raise ConfigError("tracking_type", name, f"needs {', '.join(missing)}, which is not installed: {how}")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent package is missing, or somebody keeps it from being imported
        return False
