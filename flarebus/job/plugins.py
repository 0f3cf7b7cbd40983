"""Workflow plug-ins, by name or by a dotted path, and whether they are what they should be. None is known here."""

from __future__ import annotations

import inspect

from flarebus.errors import ConfigError
from flarebus.plugins import PluginKind, origin_of
from flarebus.workflow.controller import Controller

__all__ = ["WORKFLOWS", "WORKFLOW_GROUP", "known_workflows", "load_workflow"]

WORKFLOW_GROUP = "flarebus.workflows"
WORKFLOWS = PluginKind("workflow", WORKFLOW_GROUP)


def known_workflows() -> dict[str, str]:
    """Name of each installed workflow, with where it comes from: `module:Class (distribution version)`."""
    return WORKFLOWS.known()


def load_workflow(name: str) -> type[Controller]:
    """Return the class of workflow `name`.

    Args:
        name: an entry-point name such as `fedavg`, or a path such as `my_package.my_module:MyWorkflow`.

    Raises:
        ConfigError: as `PluginKind.load`; or the class is no controller, or leaves out a part of one.
    """
    found = WORKFLOWS.load(name)
    path = origin_of(found)
    if not issubclass(found, Controller):
        raise ConfigError("workflow", name, f"{path} is no workflow: derive it from {origin_of(Controller)}")
    if inspect.isabstract(found):
        raise ConfigError("workflow", name, f"{path} does not implement {', '.join(sorted(found.__abstractmethods__))}")
    return found
