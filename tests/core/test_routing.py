"""Routing tables: one against a plain model, and many in a chain, as routers below routers use them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flarebus.routing import Table
from tests.core.halves import explore, thorough

names = st.sampled_from([f"site-{i}" for i in range(6)])
ports = st.integers(0, 3)


class TableMachine(RuleBasedStateMachine):
    """A table beside a dict that says the same."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Table[int] = Table()
        self.model: dict[str, int] = {}

    @rule(port=ports, joined=st.lists(names, max_size=4))
    def join(self, port: int, joined: list[str]) -> None:
        expected = [name for name in dict.fromkeys(joined) if self.model.get(name, port) != port]
        assert self.table.join(port, joined) == expected
        self.model.update(dict.fromkeys(joined, port))

    @rule(port=ports, left=st.none() | st.lists(names, max_size=4))
    def leave(self, port: int, left: list[str] | None) -> None:
        """Only what is still behind a port goes with it: whoever moved on stays reachable."""
        gone = sorted(name for name, behind in self.model.items() if behind == port and (left is None or name in left))
        assert self.table.leave(port, left) == gone
        for name in gone:
            del self.model[name]

    @rule(port=st.none() | ports)
    def set_upstream(self, port: int | None) -> None:
        self.table.upstream = port

    @invariant()
    def says_what_the_model_says(self) -> None:
        table, model = self.table, self.model
        assert len(table) == len(model)
        assert table.names() == sorted(model)
        for port in range(4):
            assert table.names(port) == sorted(name for name, behind in model.items() if behind == port)
        for name in [*model, "nobody"]:
            assert (name in table) == (name in model)
            for origin in (None, 0, 1, 2, 3):
                unknown = None if origin is not None and origin == table.upstream else table.upstream
                assert table.route(name, origin) == model.get(name, unknown)

    @invariant()
    def a_source_belongs_to_its_port(self) -> None:
        for name in [*self.model, "nobody"]:
            for port in range(4):
                above = port == self.table.upstream and name not in self.model
                assert self.table.owns(port, name) == (self.model.get(name) == port or above)


def test_a_table_is_a_dict_of_ports() -> None:
    """Whatever joins, leaves and moves: a name is behind the port that claimed it last, or nowhere."""
    explore(TableMachine, examples=60, steps=40)


class Router:
    """What a router does with its table when neighbours join and leave, and nothing else."""

    def __init__(self, above: Router | None) -> None:
        self.above = above
        self.table: Table[Any] = Table()
        self.table.upstream = above
        # Announcements wait here, as on a connection: in order, but not at once.
        self.outbox: list[tuple[str, list[str]]] = []

    def join(self, port: Any, names: list[str]) -> None:
        self.table.join(port, names)
        self.outbox.append(("join", names))

    def leave(self, port: Any, names: list[str] | None) -> None:
        if gone := self.table.leave(port, names):
            self.outbox.append(("leave", gone))

    def announce(self) -> bool:
        """One announcement reaches the router above; whether there was one."""
        if not self.outbox:
            return False
        verb, names = self.outbox.pop(0)
        if self.above is not None:
            (self.above.join if verb == "join" else self.above.leave)(self, names)
        return True


def walk(start: Router, target: str, origin: Any) -> tuple[list[Router], Any]:
    """The routers that a message passes, and the cell it ends at; None if somebody answers that nobody is there."""
    path, here, arrived_from = [start], start, origin
    while True:
        port = here.table.route(target, arrived_from)
        if not isinstance(port, Router):
            return path, port
        # Either neighbour is a port of the other's table.
        arrived_from, here = here, port
        path.append(here)
        assert len(path) < 20, "a message goes round in circles"


class Tree(RuleBasedStateMachine):
    """A router with two below it, one of which has two of its own; cells come, move and go while messages are sent."""

    def __init__(self) -> None:
        super().__init__()
        top = Router(None)
        left, right = Router(top), Router(top)
        self.routers = [top, left, right, Router(left), Router(left)]
        self.homes: dict[str, tuple[Router, str]] = {}
        self.seen: set[str] = set()
        self.lives = 0

    def settle(self) -> None:
        """All announcements arrive, from the bottom up."""
        for router in reversed(self.routers):
            while router.announce():
                pass

    @rule(name=names, where=st.integers(0, 4))
    def arrive(self, name: str, where: int) -> None:
        """A cell connects to some router; if it was elsewhere before, its ghost stays there for now.

        Where it was before is known everywhere by then: of two claims the table takes the one that it hears last.
        """
        if name in self.seen:
            self.settle()
        self.seen.add(name)
        self.lives += 1
        cell = f"{name} {self.lives}"
        self.homes[name] = (self.routers[where], cell)
        self.routers[where].join(cell, [name])

    @rule(name=names)
    def depart(self, name: str) -> None:
        if name in self.homes:
            router, cell = self.homes.pop(name)
            router.leave(cell, None)

    @rule(which=st.integers(0, 4))
    def announce(self, which: int) -> None:
        self.routers[which].announce()

    @rule(start=st.integers(0, 4), name=names)
    def send(self, start: int, name: str) -> None:
        """However stale the tables are, a message goes up, then down, and ends."""
        path, _ = walk(self.routers[start], name, "a cell here")
        steps = ["up" if here.above is there else "down" for here, there in pairwise(path)]
        assert steps == sorted(steps, reverse=True)

    def teardown(self) -> None:
        """With all ghosts and announcements gone, everybody is found from everywhere, and nobody else is."""
        for router in self.routers:
            for ghost in [port for port in list(router.table._names_of) if isinstance(port, str)]:
                if ghost not in {cell for _, cell in self.homes.values()}:
                    router.leave(ghost, None)
        self.settle()

        for router in self.routers:
            for name in [f"site-{i}" for i in range(6)]:
                home = self.homes.get(name)
                assert walk(router, name, "a cell here")[1] == (home and home[1])


def test_a_message_never_goes_round_in_circles() -> None:
    """While cells come, move and go in a tree of routers, a message climbs, descends and ends, one way or the other."""
    explore(Tree, examples=80, steps=50)


def test_the_newest_claim_wins() -> None:
    """A cell that came back is reached at once, and when its ghost is buried it stays."""
    table: Table[str] = Table()
    assert table.join("old", ["site-1", "site-2"]) == []
    assert table.join("new", ["site-1"]) == ["site-1"]
    assert table.route("site-1") == "new"
    assert table.leave("old") == ["site-2"]

    assert table.route("site-1") == "new"
    assert table.route("site-2") is None


def test_a_port_may_say_its_names_again() -> None:
    """A neighbour that repeats its hello takes nothing from anybody."""
    table: Table[str] = Table()
    table.join("port", ["site-1"])

    assert table.join("port", ["site-1", "site-2"]) == []
    assert table.names("port") == ["site-1", "site-2"]


def test_nobody_speaks_for_others() -> None:
    """A source is believed only from its own port, or from above when it is not below."""
    table: Table[str] = Table()
    table.upstream = "above"
    table.join("port", ["site-1"])
    table.join("other", ["site-2"])

    assert table.owns("port", "site-1")
    assert not table.owns("other", "site-1")
    assert not table.owns("above", "site-1")
    assert table.owns("above", "server")
    assert not table.owns("port", "server")


@given(st.sets(st.integers(0, 50)), st.sets(st.integers(0, 50)))
@thorough(50)
def test_leaving_tells_who_is_gone(joined: set[int], left: set[int]) -> None:
    """Only names that were there are reported, sorted, and once."""
    table: Table[str] = Table()
    table.join("port", map(str, joined))

    assert table.leave("port", [*map(str, left), *map(str, left)]) == sorted(map(str, joined & left))
    assert table.leave("port") == sorted(map(str, joined - left))
    assert table.leave("port") == []


@pytest.mark.parametrize("origin", [None, "port"])
def test_the_top_knows_everybody(origin: str | None) -> None:
    """Without a router above, an unknown name leads nowhere."""
    table: Table[str] = Table()
    table.join("port", ["site-1"])

    assert table.route("site-2", origin) is None
    assert table.route("site-1", origin) == "port"
