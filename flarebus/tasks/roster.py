"""Roster: which site lives at which host, and whether that host is there. Pure.

A *host* is the cell that runs the scripts of one or more sites: a client job, or a worker of a simulation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["Roster"]


class Roster:
    """Sites and their hosts, as the hosts announced them."""

    def __init__(self) -> None:
        self._host_of: dict[str, str] = {}
        self._present: set[str] = set()
        self._dead: dict[str, str] = {}
        self._external: set[str] = set()
        self._takes: dict[str, int] = {}

    def join(self, host: str, sites: Iterable[str], external: Iterable[str] = (), takes: int = 0) -> None:
        """`host` is there and runs `sites`, those of `external` in processes of their own.

        Args:
            takes: bytes of arrays that it takes along with a task.
        """
        self._present.add(host)
        self._takes[host] = takes
        for site in sites:
            self._host_of[site] = host
            self._dead.pop(site, None)
        self._external.difference_update(sites)
        self._external.update(external)

    def leave(self, host: str) -> None:
        """`host` went away; it may come back."""
        self._present.discard(host)

    def bury(self, site: str, reason: str) -> None:
        """`site` will not come back."""
        self._dead[site] = reason

    def host_of(self, site: str) -> str | None:
        """The host of `site` if it is there now."""
        host = self._host_of.get(site)
        return host if host in self._present else None

    def runs(self, host: str, site: str) -> bool:
        """Whether `host` may speak for `site`."""
        return self._host_of.get(site) == host

    def takes(self, host: str) -> int:
        """Bytes of arrays that `host` takes along with a task."""
        return self._takes.get(host, 0)

    def is_external(self, site: str) -> bool:
        """Whether the script of `site` runs in a trainer."""
        return site in self._external

    @property
    def external(self) -> list[str]:
        """All sites whose scripts run in trainers, sorted."""
        return sorted(self._external)

    def sites_of(self, host: str) -> list[str]:
        """The sites that `host` announced, sorted."""
        return sorted(site for site, its in self._host_of.items() if its == host)

    def is_alive(self, site: str) -> bool:
        """Whether `site` is there or may come back."""
        return site in self._host_of and site not in self._dead

    def why_not(self, site: str) -> str:
        """Why `site`, which is not alive, will not come."""
        return self._dead.get(site, "no such site")

    @property
    def hosts(self) -> list[str]:
        """All hosts that are there, sorted."""
        return sorted(self._present)

    @property
    def alive(self) -> list[str]:
        """Sites that are there or may come back, sorted."""
        return sorted(site for site in self._host_of if site not in self._dead)

    @property
    def dead(self) -> dict[str, str]:
        """site -> why it will not come back."""
        return dict(self._dead)

    def by_host(self, sites: Iterable[str]) -> dict[str, list[str]]:
        """The present hosts of `sites`, each with those of them that it runs."""
        found: dict[str, list[str]] = {}
        for site in sites:
            host = self.host_of(site)
            if host is not None:
                found.setdefault(host, []).append(site)
        return found

    def to_plain(self) -> dict[str, Any]:
        """All of it, for a message."""
        return {
            "hosts": {
                host: {
                    "sites": self.sites_of(host),
                    "external": [site for site in self.sites_of(host) if site in self._external],
                    "takes": self.takes(host),
                }
                for host in self.hosts
            },
            "dead": self.dead,
        }
