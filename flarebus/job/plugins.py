"""Workflow plug-ins, by name or by a dotted path. Nothing here knows any workflow."""

from __future__ import annotations

from flarebus.plugins import PluginKind

__all__ = ["WORKFLOW_GROUP", "known_workflows", "load_workflow"]

WORKFLOW_GROUP = "flarebus.workflows"
_WORKFLOWS = PluginKind("workflow", WORKFLOW_GROUP)


def known_workflows() -> dict[str, str]:
    """Name of each installed workflow, with where it comes from: `module:Class (distribution version)`."""
    return _WORKFLOWS.known()


def load_workflow(name: str) -> type:
    """Return the class of workflow `name`.

    Args:
        name: an entry-point name such as `fedavg`, or a path such as `my_package.my_module:MyWorkflow`.

    Raises:
        ConfigError: as `PluginKind.load`.
    """
    return _WORKFLOWS.load(name)
