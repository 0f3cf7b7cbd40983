"""Reports of a job: JSON files in the folder of the run, whole or not there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from flarebus.errors import ConfigError
from flarebus.job.journal import json_text

__all__ = ["check_report_path", "write_report"]


def check_report_path(parameter: str, value: object) -> str:
    """The relative path of a JSON file that stays below the folder it is meant for.

    Raises:
        ConfigError: it is no such path.
    """
    path = PurePosixPath(value) if isinstance(value, str) else PurePosixPath()
    if path.suffix != ".json" or path.is_absolute() or ".." in path.parts:
        raise ConfigError(parameter, value, "the relative path of a file ending in .json, without '..'")
    return str(path)


def write_report(folder: Path, path: str, report: Mapping[str, Any]) -> Path:
    """Write a report in place of an older one; a reader sees all of the one or of the other.

    Args:
        folder: absolute.
        path: see `check_report_path`.

    Raises:
        ConfigError: `path` leads out of the folder.
        OSError: it cannot be written; an older one stays.
    """
    target = folder / check_report_path("path", path)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.new")
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(json_text(report) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, target)
    finally:
        fresh.unlink(missing_ok=True)
    return target
