"""What the tests of `CellPipe` share: a bus with a client job on it, and the ends of its pipes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from flarebus_pipes import _bus
from flarebus_pipes.cell_pipe import CellPipe

from flarebus.cell import Cell
from flarebus.pipes import Mode
from flarebus.security.keys import DialKeys
from tests.core.bus import Bus

__all__ = ["ARRANGEMENTS", "ENV_KEYS", "JOB", "SITE", "KeyedCellPipe", "Setting"]

SITE, JOB = "site-1", "job"
# attached: the client job lives in the router's process, as with debug=True; the others say how its cell connects.
ARRANGEMENTS = ("attached", "ipc", "tcp", "curve")
ENV_KEYS = "FLAREBUS_TEST_KEYS"


class KeyedCellPipe(CellPipe):
    """A CellPipe whose other end, in another process, finds its keys in the environment: an export holds none."""

    # `cell` by name: that is how the kit knows that the client job's end stays in this process.
    def __init__(self, mode: Mode | str, site_name: str, token: str, *, cell: Cell | None = None, **given: Any) -> None:
        super().__init__(mode, site_name, token, cell=cell, keys=json.loads(os.environ[ENV_KEYS]), **given)


class Setting:
    """A router, and a client job's cell that is made when an end needs it."""

    def __init__(self, arrangement: str = "ipc") -> None:
        self._stack = ExitStack()
        self.bus = self._stack.enter_context(Bus("ipc" if arrangement == "attached" else arrangement))
        self.arrangement = arrangement
        self._cell: Cell | None = None

    def __enter__(self) -> Setting:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def cell(self) -> Cell:
        """The client job's."""
        if self._cell is None:
            names = "worker-1.job", [f"{SITE}.{JOB}", f"site-2.{JOB}"]
            if self.arrangement == "attached":
                self._cell = self.bus.attach(names[0], aliases=names[1])
            else:
                self._cell = self.bus.connect(names[0], aliases=names[1])
        return self._cell

    def make(self, mode: Mode | str, **given: Any) -> CellPipe:
        """One end."""
        cls = KeyedCellPipe if self.arrangement == "curve" else CellPipe
        cell = self.cell if Mode(mode) is Mode.PASSIVE else None
        where: Mapping[str, Any] = {"root_url": self.bus.endpoint, "secure_mode": self.arrangement == "curve"}
        return cls(mode, **{"site_name": SITE, "token": JOB, "cell": cell, **where, **given})

    def pair(self, channel: str = "task") -> tuple[CellPipe, CellPipe]:
        """Both ends, open: the client job's, and the trainer's."""
        ends = self.make("PASSIVE"), self.make("ACTIVE")
        for end in ends:
            end.open(channel)
        return ends

    def keys(self) -> str | None:
        """Keys for another process, as `ENV_KEYS` holds them."""
        dial: DialKeys | None = self.bus.dial
        if dial is None:
            return None
        words = {"public": dial.own.public, "secret": dial.own.secret, "server": dial.server}
        return json.dumps({name: word.decode() for name, word in words.items()})

    def leftovers(self) -> list[str]:
        """What closed ends must not leave: listeners, early words, cells that were dialled, offers, requests."""
        found = [f"cell {endpoint[1]}" for endpoint in _bus.dialled._cells]
        cells = [] if self._cell is None else [self._cell]
        for cell in cells:
            hub = _bus.hub_of(cell)
            found += [f"listener {address} {name}" for address, name in hub._ends]
            found += ["early word"] * len(hub._early)
            statistics = cell.statistics()
            found += ["offer"] * statistics.offers_held + ["pull"] * statistics.pulls_running
        return found
