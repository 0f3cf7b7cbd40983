"""Plug-ins: find a class by its entry-point name or by a dotted path. Nothing here knows any plug-in.

Names come from an entry-point group; a dotted path is for a job that brings its own code. Both come from a job's own
description or a configuration file, never from a message.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass

from flarebus.errors import ConfigError

__all__ = ["Installed", "PluginKind", "is_path", "origin_of"]


@dataclass(frozen=True, slots=True, order=True)
class Installed:
    """A name that an installed distribution gives to a class.

    Args:
        name: the entry point's.
        path: of the class, `module:Class`.
        distribution: who brings it; "" if that is unknown.
        version: of the distribution.
    """

    name: str
    path: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.path} ({self.owner})"

    @property
    def owner(self) -> str:
        """The distribution with its version."""
        return f"{self.distribution} {self.version}" if self.distribution else "unknown distribution"


@dataclass(frozen=True, slots=True)
class PluginKind:
    """One kind of plug-in.

    Args:
        noun: what one is called, such as `workflow`; also the parameter that errors name.
        group: the entry-point group of their names.
    """

    noun: str
    group: str

    def known(self) -> dict[str, str]:
        """Name of each installed one, with where it comes from: `module:Class (distribution version)`."""
        found: dict[str, list[str]] = {}
        for each in self.installed():
            found.setdefault(each.name, []).append(str(each))
        return {name: ", ".join(origins) for name, origins in found.items()}

    def installed(self) -> list[Installed]:
        """Every installed one, sorted; a name that several distributions claim stands there for each of them."""
        # Only who asks for a name pays for it: a training script is handed paths, and its import has a budget.
        from importlib import metadata

        # A set: an editable install beside a build folder lists one entry point twice.
        return sorted(
            {
                Installed(entry.name, entry.value, *((entry.dist.name, entry.dist.version) if entry.dist else ("", "")))
                for entry in metadata.entry_points(group=self.group)
            }
        )

    def load(self, name: str) -> type:
        """The class of plug-in `name`.

        Args:
            name: an entry-point name, or a path: `package.module:Class` or `package.module.Class`.

        Raises:
            ConfigError: nothing of that name is installed (the message lists what is, and where from), two
                distributions claim it, or it cannot be imported or is no class; the cause is chained.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(self.noun, name, f"the name of a {self.noun}")
        if is_path(name):
            # Asked first for names without dots only: reading all entry points takes longer than most imports.
            return self._import_class(name, name)
        values = {each.path for each in self.installed() if each.name == name}
        if len(values) > 1:
            raise ConfigError(self.noun, name, f"claimed more than once: {self.known()[name]}; uninstall one")
        if values:
            return self._import_class(name, values.pop())
        raise ConfigError(self.noun, name, f"{self._nearest(name)}{self._listed()}")

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name.lower(), self.known(), 1)
        return f"did you mean {near[0]!r}? " if near else ""

    def _listed(self) -> str:
        listed = "; ".join(f"{name} from {origin}" for name, origin in self.known().items()) or "none is installed"
        return f"known {self.noun}s: {listed}; or give a path 'package.module:Class'"

    def _import_class(self, name: str, path: str) -> type:
        module, colon, attribute = path.partition(":")
        if not colon:
            module, _, attribute = path.rpartition(".")
        try:
            found: object = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except Exception as error:  # the module is somebody else's: it may raise whatever it likes
            text = f"{error}" if isinstance(error, (ImportError, AttributeError, ValueError)) else f"{error!r}"
            # An installed name was no slip of the pen: which others there are would be no help.
            others = f"; {self._nearest(attribute)}{self._listed()}" if name == path else ""
            raise ConfigError(self.noun, name, f"cannot load {path}: {text}{others}") from error
        if not isinstance(found, type):
            raise ConfigError(self.noun, name, f"{path} is a {type(found).__name__}, not a class")
        return found


def is_path(name: str) -> bool:
    """Whether the name of a plug-in is the path of its class, which need not be installed under a name."""
    return ":" in name or "." in name


def origin_of(cls: type) -> str:
    """The path of a class, as `PluginKind.load` takes it: `package.module.Class`, or with a colon if it is nested."""
    return f"{cls.__module__}{':' if '.' in cls.__qualname__ else '.'}{cls.__qualname__}"
