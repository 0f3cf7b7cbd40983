"""Executor: what does a site's tasks in place of a training script. And how a site builds one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from flarebus.errors import ConfigError
from flarebus.job.class_ref import ClassRef
from flarebus.model import FLModel
from flarebus.workflow.site_controller import SiteController

__all__ = ["Executor", "SiteTask", "load_executor"]


@dataclass(frozen=True, slots=True)
class SiteTask:
    """A task as an executor gets it.

    Args:
        name: of the task.
        round: from 0.
        total_rounds: rounds of the job, or None.
        model: what came with it; its arrays are the executor's own.
        site: whose executor it is.
        job_id: the job.
        folder: of the site; files go here.
    """

    name: str
    round: int
    total_rounds: int | None
    model: FLModel
    site: str
    job_id: str
    folder: Path


class Executor(ABC):
    """Does tasks at a site. Each site makes its own, which gets its tasks one after the other."""

    @abstractmethod
    def execute(self, task: SiteTask) -> FLModel:
        """Do `task` and return the answer. Whatever it raises is the reason why there is none."""


def load_executor(ref: ClassRef, code_dir: Path, parameter: str = "executor") -> Executor | SiteController:
    """Import the class, `code_dir` first, and make one.

    Raises:
        ConfigError: it is not there, raised, or is neither an executor nor a site controller.
    """
    made = ref.build(code_dir, parameter)
    if not isinstance(made, Executor | SiteController):
        allowed = f"a subclass of Executor (execute) or SiteController (run); {type(made).__name__} is neither"
        raise ConfigError(parameter, ref.class_path, allowed)
    return made
