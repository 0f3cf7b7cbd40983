"""Address: the dotted name of a cell, and the one grammar for every name that becomes part of a path.

`server`, `server.<job>`, `site-1`, `site-1.<job>`, `site-1.<job>.0`: each segment is a *name*.
"""

from __future__ import annotations

import re
from pathlib import Path

from flarebus.errors import ConfigError

__all__ = ["Address", "check_name", "safe_path"]

# ASCII only: look-alike letters, blanks, dots, slashes and control codes never reach a path or a log.
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?")
_RULE = "1 to 63 letters, digits, '-' or '_', beginning and ending with a letter or digit"
# Names that mean something else to the bus or to a file system.
_RESERVED = frozenset({"con", "prn", "aux", "nul"})


def check_name(name: object, parameter: str = "name") -> str:
    """Return `name` if it may stand in an address and in a path.

    Raises:
        ConfigError: it may not; says which parameter and what is allowed.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(parameter, name, f"a name is {_RULE}")
    if name.lower() in _RESERVED:
        raise ConfigError(parameter, name, "this name is reserved by operating systems")
    return name


def safe_path(root: Path, *names: str) -> Path:
    """Join checked names below `root`; the only way from a name to a path.

    Raises:
        ConfigError: a name breaks the grammar, or the result would leave `root` through a link.
    """
    path = root.joinpath(*(check_name(name) for name in names))
    if not path.resolve().is_relative_to(root.resolve()):
        raise ConfigError("path", str(path), f"must stay below {root}")
    return path


class Address(str):
    """The dotted name of a cell; a `str`, so that it costs nothing to compare and send."""

    __slots__ = ()

    MAX_SEGMENTS = 4

    def __new__(cls, text: str) -> Address:
        segments = text.split(".")
        if len(segments) > cls.MAX_SEGMENTS:
            raise ConfigError("address", text, f"at most {cls.MAX_SEGMENTS} segments")
        for segment in segments:
            check_name(segment, "address")
        return super().__new__(cls, text)

    @property
    def segments(self) -> tuple[str, ...]:
        """The names between the dots, outermost first."""
        return tuple(self.split("."))

    @property
    def parent(self) -> Address | None:
        """The address one level up, or None for a top-level cell."""
        head, dot, _ = self.rpartition(".")
        return Address(head) if dot else None

    def child(self, name: str) -> Address:
        """The address of `name` one level below."""
        return Address(f"{self}.{name}")

    def is_under(self, other: str) -> bool:
        """Whether this address is `other` or lies below it."""
        return self == other or self.startswith(f"{other}.")
