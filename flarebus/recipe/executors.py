"""An executor as a job can carry it: by the path of its class, with arguments; loaded once to see that it is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from flarebus.errors import ConfigError
from flarebus.job.executor_ref import ExecutorRef
from flarebus.job.filter_ref import check_tasks
from flarebus.job.plugins import load_executor_class
from flarebus.plugins import is_path, origin_of
from flarebus.recipe.described import describe
from flarebus.workflow.executor import load_executor
from flarebus.workflow.site_controller import SiteController

__all__ = ["check_executor"]


def check_executor(value: object, tasks: Sequence[str], code_dir: Path) -> ExecutorRef:
    """A description of an executor or of a site controller.

    Args:
        value: `{"class_path", "args"}`, where an installed name may stand for the path; or an instance that keeps its
            constructor's arguments as attributes.
        tasks: what goes to it.
        code_dir: folder of the job's code.

    Raises:
        ConfigError: it cannot be described or made, or is neither.
    """
    names = check_tasks("tasks", tasks)
    if names is None:
        raise ConfigError("tasks", None, "a list of names of tasks")
    ref = describe(_with_path(value), "executor", code_dir)
    return ExecutorRef(ref, names, isinstance(load_executor(ref, code_dir), SiteController))


def _with_path(value: object) -> object:
    """The description with a path where it has a name: what runs a job later need not have the same names."""
    if not isinstance(value, Mapping):
        return value
    name = value.get("class_path")
    if not isinstance(name, str) or is_path(name):
        return value
    return {**value, "class_path": origin_of(load_executor_class(name))}
