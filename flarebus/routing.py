"""Routing: a pure table that answers, for a target, through which port it is reached. No sockets, no time.

A *port* is any hashable thing that stands for one neighbour: a connection, a cell in this process, or the router above.
Names are exact. A newer claim of a name wins, for a process that died and came back must not wait for its ghost;
whoever loses a name that way is told, and where keys are in use the claim was checked against the key before it gets
here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

__all__ = ["Table"]

Port = TypeVar("Port", bound=Hashable)


class Table(Generic[Port]):
    """Which port leads to which name."""

    def __init__(self) -> None:
        self._port_of: dict[str, Port] = {}
        self._names_of: dict[Port, set[str]] = {}
        self.upstream: Port | None = None
        """The port of the router above, or None at the top."""

    def join(self, port: Port, names: Iterable[str]) -> list[str]:
        """Put `names` behind `port`; return those that another port had until now."""
        taken = []
        mine = self._names_of.setdefault(port, set())
        for name in names:
            before = self._port_of.get(name)
            if before is not None and before != port:
                self._names_of[before].discard(name)
                taken.append(name)
            self._port_of[name] = port
            mine.add(name)
        return taken

    def leave(self, port: Port, names: Iterable[str] | None = None) -> list[str]:
        """Take `names` (or all) away from `port`; return those that cannot be reached any more."""
        mine = self._names_of.get(port, set())
        gone = sorted(mine if names is None else mine.intersection(names))
        for name in gone:
            mine.discard(name)
            del self._port_of[name]
        if names is None:
            self._names_of.pop(port, None)
        return gone

    def route(self, target: str, arrived_from: Port | None = None) -> Port | None:
        """The port to forward to, or None when nobody of that name is known.

        What came from above and is not known here does not go back up: that would be a loop.
        """
        port = self._port_of.get(target)
        if port is not None:
            return port
        return self.upstream if self.upstream != arrived_from else None

    def owns(self, port: Port, source: str) -> bool:
        """Whether a message that came through `port` may say that it is from `source`."""
        return self._port_of.get(source) == port or (port == self.upstream and source not in self._port_of)

    def names(self, port: Port | None = None) -> list[str]:
        """All names, or those behind one port, sorted."""
        return sorted(self._port_of if port is None else self._names_of.get(port, ()))

    def __contains__(self, name: object) -> bool:
        return name in self._port_of

    def __len__(self) -> int:
        return len(self._port_of)
