"""Workflows and executors, by name or by a dotted path, and whether they are what they should be."""

from __future__ import annotations

import inspect

from flarebus.errors import ConfigError
from flarebus.plugins import PluginKind, origin_of
from flarebus.workflow.controller import Controller
from flarebus.workflow.executor import Executor
from flarebus.workflow.site_controller import SiteController

__all__ = ["EXECUTORS", "WORKFLOWS", "WORKFLOW_GROUP", "known_workflows", "load_executor_class", "load_workflow"]

WORKFLOW_GROUP = "flarebus.workflows"
WORKFLOWS = PluginKind("workflow", WORKFLOW_GROUP)
EXECUTORS = PluginKind("executor", "flarebus.executors")


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
    _check_contract("workflow", name, found, (Controller,))
    return found


def load_executor_class(name: str) -> type[Executor | SiteController]:
    """Return the class of executor or site controller `name`; as `load_workflow`."""
    found = EXECUTORS.load(name)
    _check_contract("executor", name, found, (Executor, SiteController))
    return found


def _check_contract(noun: str, name: str, found: type, bases: tuple[type, ...]) -> None:
    path = origin_of(found)
    if not issubclass(found, bases):
        wanted = " or ".join(origin_of(base) for base in bases)
        raise ConfigError(noun, name, f"{path} is no {noun}: derive it from {wanted}")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise ConfigError(noun, name, f"{path} does not implement {missing}")
