"""ExecutorRef: the site's half of a workflow, by its class, with the tasks it is for. Built where the job runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from flarebus.errors import ConfigError
from flarebus.job.checks import check_flag, check_keys, check_mapping
from flarebus.job.class_ref import ClassRef
from flarebus.job.filter_ref import check_tasks

__all__ = ["ExecutorRef"]


@dataclass(frozen=True, slots=True)
class ExecutorRef:
    """What a site runs besides, or instead of, a training script.

    Args:
        ref: its class and arguments: an `Executor`, or a `SiteController`.
        tasks: names of the tasks that go to it and not to the script, or patterns such as `swarm_*`.
        steers: whether it gives tasks to other sites by itself.
    """

    ref: ClassRef
    tasks: tuple[str, ...]
    steers: bool = False

    def takes(self, task: str) -> bool:
        """Whether a task of this name goes to it."""
        return any(fnmatchcase(task, pattern) for pattern in self.tasks)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**self.ref.to_json(), "tasks": list(self.tasks), "steers": self.steers}

    @classmethod
    def from_json(cls, data: object, parameter: str) -> ExecutorRef:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: a key is unknown or missing, or a value is wrong.
        """
        found: Mapping[str, Any] = check_mapping(parameter, data)
        check_keys(found, ("class_path", "args", "tasks", "steers"), ("class_path", "tasks"), parameter)
        ref = ClassRef.parse({key: found[key] for key in ("class_path", "args") if key in found}, parameter)
        tasks = check_tasks(f"{parameter}['tasks']", found["tasks"])
        if tasks is None:
            raise ConfigError(f"{parameter}['tasks']", None, "a list of names of tasks")
        return cls(ref, tasks, check_flag(f"{parameter}['steers']", found.get("steers", False)))
