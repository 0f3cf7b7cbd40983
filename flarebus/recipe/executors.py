"""An executor as a job can carry it: by the path of its class, with arguments; loaded once to see that it is one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flarebus.errors import ConfigError
from flarebus.job.executor_ref import ExecutorRef
from flarebus.job.filter_ref import check_tasks
from flarebus.recipe.described import describe
from flarebus.workflow.executor import load_executor
from flarebus.workflow.site_controller import SiteController

__all__ = ["check_executor"]


def check_executor(value: object, tasks: Sequence[str], code_dir: Path) -> ExecutorRef:
    """A description of an executor or of a site controller.

    Args:
        value: `{"class_path", "args"}`, or an instance that keeps its constructor's arguments as attributes.
        tasks: what goes to it.
        code_dir: folder of the job's code.

    Raises:
        ConfigError: it cannot be described or made, or is neither.
    """
    names = check_tasks("tasks", tasks)
    if names is None:
        raise ConfigError("tasks", None, "a list of names of tasks")
    made = load_executor(describe(value, "executor", code_dir), code_dir)
    return ExecutorRef(describe(value, "executor", code_dir), names, isinstance(made, SiteController))
