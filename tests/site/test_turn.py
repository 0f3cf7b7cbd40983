"""Turns: who has the process, and what goes with it."""

from __future__ import annotations

import os
import queue
import random
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flarebus.client.engine import Seat
from flarebus.site.turn import Place, Turn, Turnstile
from tests.client.fake_engine import LIMIT_S, FakeEngine


@pytest.fixture
def turnstile() -> Iterator[Turnstile]:
    """A turnstile; whatever a test leaves behind, the process is as it was."""
    before = (sys.argv, os.getcwd(), sys.path, sys.modules["__main__"])
    yield Turnstile()
    sys.argv, sys.path, sys.modules["__main__"] = before[0], before[2], before[3]
    os.chdir(before[1])


def place(name: str, folder: Path, source: Path | None = None) -> Place:
    folder.mkdir(exist_ok=True)
    path = [str(source or folder), *sys.path]
    return Place([name], str(folder), path, types.ModuleType("__main__"), Seat(FakeEngine(name)))


class Visitor:
    """A thread that takes the turn, reports, and gives it up when told."""

    def __init__(self, turnstile: Turnstile, its_place: Place, arrivals: queue.SimpleQueue[str]) -> None:
        self.go_on = threading.Semaphore(0)
        self._turnstile, self._place, self._arrivals = turnstile, its_place, arrivals
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._turnstile.take(self._place)
        self._arrivals.put(self._place.argv[0])
        self.go_on.acquire(timeout=LIMIT_S)
        self._turnstile.leave(self._place)

    def join(self) -> None:
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()


def wait_for_queue(turnstile: Turnstile, length: int) -> None:
    """Until so many threads wait; a thread is about to wait and tells nobody, so this one gives way to it."""
    while len(turnstile._queue) < length:
        os.sched_yield()


def test_state_of_the_process_goes_with_the_turn(turnstile: Turnstile, tmp_path: Path) -> None:
    """Arguments, working directory, import path and __main__ are each script's own, changes included."""
    a, b = place("a", tmp_path / "a"), place("b", tmp_path / "b")
    turnstile.take(a)
    assert (sys.argv, os.getcwd(), sys.path[0]) == (["a"], str(tmp_path / "a"), str(tmp_path / "a"))
    assert sys.modules["__main__"] is a.main
    sys.argv.append("--more")
    sys.path.insert(0, "/of/a")
    os.chdir(tmp_path)
    turnstile.give_up(a)
    turnstile.take(b)
    assert (sys.argv, os.getcwd(), sys.path[0]) == (["b"], str(tmp_path / "b"), str(tmp_path / "b"))
    turnstile.give_up(b)
    turnstile.take(a)

    assert (sys.argv, os.getcwd(), sys.path[0]) == (["a", "--more"], str(tmp_path), "/of/a")
    turnstile.leave(a)


def test_process_is_as_before_when_all_have_left(turnstile: Turnstile, tmp_path: Path) -> None:
    """The host finds its own arguments, directory and path again."""
    before = (sys.argv, os.getcwd(), sys.path, sys.modules["__main__"])
    a, b = place("a", tmp_path / "a"), place("b", tmp_path / "b")
    turnstile.take(a)
    turnstile.give_up(a)
    turnstile.take(b)
    turnstile.leave(b)
    turnstile.leave(a)

    assert (sys.argv, os.getcwd(), sys.path, sys.modules["__main__"]) == before


def test_turns_are_served_in_the_order_of_asking(turnstile: Turnstile, tmp_path: Path) -> None:
    """First come, first served, and never two at once."""
    arrivals: queue.SimpleQueue[str] = queue.SimpleQueue()
    host = place("host", tmp_path)
    turnstile.take(host)
    visitors = []
    for number in range(6):
        visitors.append(Visitor(turnstile, place(str(number), tmp_path), arrivals))
        wait_for_queue(turnstile, number + 1)
    turnstile.give_up(host)
    for number, visitor in enumerate(visitors):
        assert arrivals.get(timeout=LIMIT_S) == str(number)
        assert arrivals.empty()
        assert turnstile.holder is not None
        visitor.go_on.release()
    for visitor in visitors:
        visitor.join()

    assert turnstile.holder is None


def test_away_lets_others_work_and_comes_back(turnstile: Turnstile, tmp_path: Path) -> None:
    """While a script is away another one has the turn; after it the script has it again."""
    a, b = place("a", tmp_path), place("b", tmp_path)
    turnstile.take(a)
    with turnstile.away(a):
        turnstile.take(b)
        assert turnstile.holder is b
        turnstile.give_up(b)

    assert turnstile.holder is a
    turnstile.leave(a)


def test_a_gate_opens_with_the_turn(turnstile: Turnstile, tmp_path: Path) -> None:
    """Who lines up is not woken before its turn has come; then everything of it is in place once it takes the turn."""
    first, second = place("first", tmp_path / "1"), place("second", tmp_path / "2")
    gates = [threading.Lock() for _ in range(3)]
    for gate in gates:
        gate.acquire()
    turnstile.take(first)
    turnstile.line_up(first, gates[0])
    turnstile.line_up(second, gates[1])
    assert [gate.locked() for gate in gates] == [False, True, True]

    turnstile.give_up(first)
    assert not gates[1].locked()
    assert turnstile.holder is second
    turnstile.take(second)
    assert sys.argv == ["second"]
    turnstile.leave(second)
    turnstile.line_up(second, gates[2])
    assert not gates[2].locked()
    assert turnstile.holder is None


def test_a_gate_opens_at_once_if_nobody_has_the_turn(turnstile: Turnstile, tmp_path: Path) -> None:
    """The turn is reserved for whoever lined up, and it does not go to others before that thread has come."""
    first, second = place("first", tmp_path / "1"), place("second", tmp_path / "2")
    gate, late = threading.Lock(), threading.Lock()
    gate.acquire()
    late.acquire()
    turnstile.line_up(first, gate)
    turnstile.line_up(second, late)

    assert (gate.locked(), late.locked()) == (False, True)
    turnstile.take(first)
    assert sys.argv == ["first"]
    turnstile.leave(first)
    assert not late.locked()
    turnstile.leave(second)


def test_who_stands_back_is_out_of_the_line_or_passes_the_turn_on(turnstile: Turnstile, tmp_path: Path) -> None:
    """A gate at which nobody waits any more must not keep the turn from the others."""
    first, second, third = (place(name, tmp_path / name) for name in ("1", "2", "3"))
    gates = [threading.Lock() for _ in range(2)]
    for gate in gates:
        gate.acquire()
    turnstile.take(first)
    turnstile.line_up(second, gates[0])
    turnstile.line_up(third, gates[1])
    turnstile.stand_back(second, gates[0])
    turnstile.give_up(first)
    assert turnstile.holder is third

    turnstile.stand_back(third, gates[1])
    assert turnstile.holder is None
    turnstile.take(first)
    gates[0].acquire(blocking=False)
    turnstile.line_up(first, gates[0])
    turnstile.stand_back(first, gates[0])
    assert turnstile.holder is first, "the turn that another thread of it has is not given up"
    for each in (first, second, third):
        turnstile.leave(each)


def test_coming_back_by_error_takes_the_turn_as_well(turnstile: Turnstile, tmp_path: Path) -> None:
    """A wait that ends with an exception does not leave the script without its turn."""
    a = place("a", tmp_path)
    turnstile.take(a)
    with suppress(KeyError), turnstile.away(a):
        raise KeyError

    assert turnstile.holder is a
    turnstile.leave(a)


def test_taking_twice_is_taking_once(turnstile: Turnstile, tmp_path: Path) -> None:
    """A second thread of the script that has the turn does not wait for it."""
    a = place("a", tmp_path)
    turnstile.take(a)
    turnstile.take(a)
    turnstile.give_up(a)

    assert turnstile.holder is None
    turnstile.leave(a)


def test_script_that_has_left_does_not_wait(turnstile: Turnstile, tmp_path: Path) -> None:
    """A thread left behind neither gets the turn nor keeps others from it, not even if it waits already."""
    arrivals: queue.SimpleQueue[str] = queue.SimpleQueue()
    a, b = place("a", tmp_path), place("b", tmp_path)
    turnstile.take(b)
    left_behind = Visitor(turnstile, a, arrivals)
    wait_for_queue(turnstile, 1)
    turnstile.leave(a)
    turnstile.leave(b)
    assert turnstile.holder is None
    left_behind.go_on.release()
    left_behind.join()
    turnstile.take(a)

    assert turnstile.holder is None


def test_abort_takes_the_turn_from_who_keeps_it(turnstile: Turnstile, tmp_path: Path) -> None:
    """The others come one after the other; the one that lost it waits in line when it comes back."""
    arrivals: queue.SimpleQueue[str] = queue.SimpleQueue()
    stuck = place("stuck", tmp_path)
    turnstile.take(stuck)
    visitors = [Visitor(turnstile, place(str(number), tmp_path), arrivals) for number in range(3)]
    wait_for_queue(turnstile, 3)
    turnstile.abort()
    seen = []
    while len(seen) < 3:
        seen.append(arrivals.get(timeout=LIMIT_S))
        assert arrivals.empty()
        visitors[int(seen[-1])].go_on.release()
    for visitor in visitors:
        visitor.join()
    assert sorted(seen) == ["0", "1", "2"]
    turnstile.give_up(stuck)

    turnstile.take(stuck)
    assert turnstile.holder is stuck
    turnstile.leave(stuck)


def test_missing_folder_is_an_error_with_the_turn_in_hand(turnstile: Turnstile, tmp_path: Path) -> None:
    """A script whose folder is gone gets the error, and can pass the turn on."""
    a = place("a", tmp_path / "a")
    (tmp_path / "a").rmdir()
    with pytest.raises(FileNotFoundError):
        turnstile.take(a)

    assert turnstile.holder is a
    turnstile.leave(a)
    assert turnstile.holder is None


def test_removed_working_directory_stops_nobody_else(turnstile: Turnstile, tmp_path: Path) -> None:
    """A script that removes the folder it is in does not keep the next one from its turn."""
    a, b = place("a", tmp_path / "a"), place("b", tmp_path / "b")
    turnstile.take(a)
    (tmp_path / "a").rmdir()
    turnstile.give_up(a)
    turnstile.take(b)

    assert os.getcwd() == str(tmp_path / "b")
    turnstile.leave(b)
    turnstile.leave(a)


def test_host_hears_whose_turn_it_is(tmp_path: Path, turnstile: Turnstile) -> None:
    """Every hand-over is told, and that nobody has the turn."""
    told: list[str] = []
    telling = Turnstile(told.append)
    a, b = place("a", tmp_path), place("b", tmp_path)
    telling.take(a)
    telling.give_up(a)
    telling.take(b)
    telling.leave(b)
    telling.leave(a)

    assert told == ["a", "", "b", ""]
    assert telling.holder_seat() is None


def draw() -> list[float]:
    return [random.random(), np.random.rand(), float(torch.rand(()))]


def seed() -> None:
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)


def test_code_that_is_no_script_has_its_turns_too(tmp_path: Path) -> None:
    """In the folder of its site, with its own code first; the host hears of the site, and finds all as it was."""
    before = (sys.argv, os.getcwd(), sys.path, sys.modules["__main__"])
    told: list[str] = []
    turnstile = Turnstile(told.append)
    (tmp_path / "site").mkdir()
    turn = Turn(turnstile, turnstile.place_for("site-1", str(tmp_path / "site"), str(tmp_path / "code")))

    for _ in range(2):
        with turn:
            assert (os.getcwd(), sys.path[0]) == (str(tmp_path / "site"), str(tmp_path / "code"))
            assert sys.modules["__main__"] is before[3]
            assert turnstile.holder_seat() is None
        assert turnstile.holder is None
    turn.leave()

    assert told == ["site-1", "", "site-1", ""]
    assert (sys.argv, os.getcwd(), sys.path, sys.modules["__main__"]) == before


def test_turn_without_a_folder_is_given_up(turnstile: Turnstile, tmp_path: Path) -> None:
    """The next one gets it."""
    turn = Turn(turnstile, turnstile.place_for("site-1", str(tmp_path / "gone"), str(tmp_path)))

    with pytest.raises(FileNotFoundError), turn:
        pass

    assert turnstile.holder is None


def test_random_generators_are_each_scripts_own(turnstile: Turnstile, tmp_path: Path) -> None:
    """What a seeded script draws does not depend on who works in between."""
    turnstile.take(alone := place("alone", tmp_path))
    seed()
    expected = [draw(), draw()]
    turnstile.leave(alone)
    seen: dict[str, list[Any]] = {"a": [], "b": []}
    places = {name: place(name, tmp_path) for name in seen}
    for name in places:
        turnstile.take(places[name])
        seed()
        turnstile.give_up(places[name])
    for _ in range(2):
        for name in places:
            turnstile.take(places[name])
            seen[name].append(draw())
            turnstile.give_up(places[name])
    for name in places:
        turnstile.leave(places[name])

    assert seen == {"a": expected, "b": expected}


def test_unseeded_scripts_begin_as_fresh_processes(turnstile: Turnstile, tmp_path: Path) -> None:
    """PyTorch starts with its fixed seed; the other generators start with entropy."""
    drawn = []
    for name in ("a", "b"):
        turnstile.take(its := place(name, tmp_path))
        drawn.append(draw())
        turnstile.leave(its)

    assert drawn[0][2] == drawn[1][2] == float(torch.rand((), generator=torch.Generator()))
    assert drawn[0][0] != drawn[1][0]
    assert drawn[0][1] != drawn[1][1]


def test_modules_beside_scripts_are_those_of_their_folder(turnstile: Turnstile, tmp_path: Path) -> None:
    """Two folders with a module, a package and a namespace of the same names do not mix; one folder shares them."""
    places = {}
    for name in ("a", "b"):
        source = tmp_path / f"src_{name}"
        (source / "beside_package" / "inner").mkdir(parents=True)
        (source / "beside_space").mkdir()
        for file in (
            "beside.py",
            "beside_package/__init__.py",
            "beside_package/inner/__init__.py",
            "beside_space/leaf.py",
        ):
            (source / file).write_text(f"WHO = {name!r}\n")
        places[name] = place(name, tmp_path / name, source)
    places["a2"] = place("a2", tmp_path / "a2", tmp_path / "src_a")
    seen = {}
    for _ in range(2):
        for name in ("a", "b", "a2"):
            turnstile.take(places[name])
            import beside
            import beside_package.inner
            import beside_space.leaf

            seen[name] = (beside, beside.WHO, beside_package.inner.WHO, beside_space.leaf.WHO)
            turnstile.give_up(places[name])
    for name in places:
        turnstile.leave(places[name])

    assert seen["a"][1:] == ("a", "a", "a")
    assert seen["b"][1:] == ("b", "b", "b")
    assert seen["a2"][0] is seen["a"][0]
    assert "beside" not in sys.modules
