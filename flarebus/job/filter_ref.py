"""FilterRef: a filter named by its class, with the tasks it is for. Written into a job, built where the job runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flarebus.errors import ConfigError
from flarebus.job.checks import check_keys, check_mapping
from flarebus.job.class_ref import ClassRef

__all__ = ["FilterRef", "check_tasks"]


@dataclass(frozen=True, slots=True)
class FilterRef:
    """A filter and what it is for.

    Args:
        ref: its class and arguments.
        tasks: names of the tasks whose models go through it; None for all.
    """

    ref: ClassRef
    tasks: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; the tasks only where they are limited."""
        return self.ref.to_json() | ({} if self.tasks is None else {"tasks": list(self.tasks)})

    @classmethod
    def from_json(cls, data: object, parameter: str) -> FilterRef:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: a key is unknown or missing, or a value is wrong.
        """
        found: Mapping[str, Any] = check_mapping(parameter, data)
        check_keys(found, ("class_path", "args", "tasks"), ("class_path",), parameter)
        ref = ClassRef.parse({key: value for key, value in found.items() if key != "tasks"}, parameter)
        return cls(ref, check_tasks(f"{parameter}['tasks']", found.get("tasks")))


def check_tasks(parameter: str, value: object) -> tuple[str, ...] | None:
    """Names of tasks, at least one; None for all tasks."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) and name for name in value):
        raise ConfigError(parameter, value, "a list of names of tasks, or None for all tasks")
    return tuple(value)
