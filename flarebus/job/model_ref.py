"""ModelRef: a model file that a job brings to its server, or finds there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flarebus.errors import ConfigError
from flarebus.job.checks import check_flag, check_keys, check_mapping, check_text

__all__ = ["ModelRef", "check_model_name", "read_model_refs"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True, slots=True)
class ModelRef:
    """Where a model is.

    Args:
        path: of its file: absolute, or below the job folder in the description there.
        is_bundled: whether it is part of the job, rather than a file that the server has.
    """

    path: Path
    is_bundled: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data; goes into a job folder."""
        return {"path": str(self.path), "is_bundled": self.is_bundled}

    @classmethod
    def from_json(cls, data: object, parameter: str) -> ModelRef:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: a key is unknown or missing, or a value has a wrong type.
        """
        found = check_mapping(parameter, data)
        check_keys(found, ("path", "is_bundled"), ("path", "is_bundled"), parameter)
        path = Path(check_text(f"{parameter}['path']", found["path"]))
        is_bundled = check_flag(f"{parameter}['is_bundled']", found["is_bundled"])
        if not is_bundled and not path.is_absolute():
            raise ConfigError(f"{parameter}['path']", str(path), "an absolute path, unless is_bundled is true")
        return cls(path, is_bundled)


def check_model_name(parameter: str, name: object) -> str:
    """A name that a model may have: one that a file may have.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(parameter, name, "a name of letters, digits, dots, dashes and underscores")
    return name


def read_model_refs(data: Mapping[str, Any]) -> dict[str, ModelRef]:
    """The models in the description of a job, by their names.

    Raises:
        ConfigError: a name is none, or see `ModelRef.from_json`.
    """
    return {
        check_model_name("models", name): ModelRef.from_json(each, f"models[{name!r}]") for name, each in data.items()
    }
