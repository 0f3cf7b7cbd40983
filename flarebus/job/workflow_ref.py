"""WorkflowRef: one more workflow of a job, which runs after those before it: by name, with settings."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flarebus.errors import ConfigError
from flarebus.job.checks import check_keys, check_mapping, check_text
from flarebus.job.class_ref import code_folder_first
from flarebus.job.plugins import load_workflow
from flarebus.plugins import is_path

__all__ = ["WorkflowRef"]


@dataclass(frozen=True, slots=True)
class WorkflowRef:
    """A workflow that is used.

    Args:
        workflow: entry-point name or dotted path.
        settings: its keyword arguments: JSON values.
    """

    workflow: str
    settings: Mapping[str, Any]

    def make(self, code_dir: Path) -> Any:
        """Load the workflow, from the code of the job if it is there, and build it.

        Raises:
            ConfigError: there is none of this name, or it does not take these settings.
        """
        try:
            with code_folder_first(code_dir) if is_path(self.workflow) else nullcontext():
                return load_workflow(self.workflow)(**self.settings)
        except TypeError as error:
            raise ConfigError(f"settings of {self.workflow}", sorted(self.settings), str(error)) from error

    def to_json(self) -> dict[str, Any]:
        """Plain data; goes into a job folder."""
        return {"workflow": self.workflow, "settings": dict(self.settings)}

    @classmethod
    def from_json(cls, data: object, parameter: str) -> WorkflowRef:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: a key is unknown or missing, or a value has a wrong type.
        """
        found = check_mapping(parameter, data)
        check_keys(found, ("workflow", "settings"), ("workflow", "settings"), parameter)
        name = check_text(f"{parameter}['workflow']", found["workflow"])
        return cls(name, check_mapping(f"{parameter}['settings']", found["settings"]))
