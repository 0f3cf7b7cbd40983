"""Find a workflow plug-in by its name or by a dotted path. Nothing here knows any workflow.

Names come from the entry-point group `flarebus.workflows`; a dotted path is for a job that brings its own code.
"""

from __future__ import annotations

import difflib
import importlib
from importlib import metadata

from flarebus.errors import ConfigError

__all__ = ["WORKFLOW_GROUP", "known_workflows", "load_workflow"]

WORKFLOW_GROUP = "flarebus.workflows"


def known_workflows() -> dict[str, str]:
    """Name of each installed workflow, with where it comes from: `module:Class (distribution version)`."""
    found: dict[str, list[str]] = {}
    for entry in metadata.entry_points(group=WORKFLOW_GROUP):
        owner = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "unknown distribution"
        origins = found.setdefault(entry.name, [])
        # An editable install beside a build folder lists one entry point twice.
        if f"{entry.value} ({owner})" not in origins:
            origins.append(f"{entry.value} ({owner})")
    return {name: ", ".join(origins) for name, origins in sorted(found.items())}


def load_workflow(name: str) -> type:
    """Return the class of workflow `name`.

    Args:
        name: an entry-point name such as `fedavg`, or a path such as `my_package.my_module:MyWorkflow`.

    Raises:
        ConfigError: nothing of that name is installed (the message lists what is, and where from), two distributions
            claim it, or it cannot be imported or is no class; the cause is chained.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError("workflow", name, "the name of a workflow")
    values = {entry.value for entry in metadata.entry_points(group=WORKFLOW_GROUP) if entry.name == name}
    if len(values) > 1:
        raise ConfigError("workflow", name, f"claimed more than once: {known_workflows()[name]}; uninstall one")
    if values:
        return _import_class(name, values.pop())
    if ":" in name or "." in name:
        return _import_class(name, name)
    known = known_workflows()
    listed = "; ".join(f"{each} from {origin}" for each, origin in known.items()) or "none is installed"
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError("workflow", name, f"{hint}known workflows: {listed}; or give a path 'package.module:Class'")


def _import_class(name: str, path: str) -> type:
    module, colon, attribute = path.partition(":")
    if not colon:
        module, _, attribute = path.rpartition(".")
    try:
        found: object = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError("workflow", name, f"cannot load {path}: {error}") from error
    if not isinstance(found, type):
        raise ConfigError("workflow", name, f"{path} is a {type(found).__name__}, not a class")
    return found
