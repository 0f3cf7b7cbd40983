"""Turns: many scripts in one process, one of them at work.

A script keeps its turn while it computes and gives it up only while it waits in the Client API, so what belongs to the
whole process can belong to the script that has the turn: ``sys.argv``, the working directory, ``sys.path``, the module
``__main__``, the modules beside the script and the random generators. They are exchanged when the turn goes to another
script, not before: a script that comes back to an idle process finds everything in place.

Turns are served in the order of asking. Each waiting thread sleeps on a lock of its own, which whoever gives up the
turn opens: nothing polls, and one hand-over wakes one thread.

What is *not* exchanged: ``os.environ`` and modules from elsewhere; the scripts of a process share them.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import ModuleType, TracebackType

from flarebus.client.engine import Seat
from flarebus.site.randomness import RandomStates

__all__ = ["Away", "Place", "Turn", "Turnstile"]


class Place:
    """What is process-wide and belongs to one script while it has the turn.

    Args:
        argv: its ``sys.argv``.
        folder: its working directory; must exist.
        path: its ``sys.path``. Modules that lie directly in its first folder are the script's siblings: scripts of that
            folder share them, scripts of other folders have their own of the same names.
        main: the module that is ``__main__``.
        seat: whose code runs, for threads that cannot be told apart otherwise; None where there is no script.
        site: whose code runs without a seat; "" for the process itself.
    """

    __slots__ = ("argv", "closed", "folder", "main", "path", "random", "seat", "site", "source")

    def __init__(
        self, argv: list[str], folder: str, path: list[str], main: ModuleType, seat: Seat | None, site: str = ""
    ) -> None:
        self.argv = argv
        self.folder = folder
        self.path = path
        self.main = main
        self.seat = seat
        self.site = site if seat is None else seat.engine.site_name
        self.source = path[0] if path else ""
        self.random = RandomStates()
        self.closed = False


class Away:
    """The context in which a script waits: its turn is given up on entry and taken again on exit.

    A script is away as soon as one of its threads is, and has the turn again as soon as one of them is back.
    """

    __slots__ = ("_place", "_turnstile")

    def __init__(self, turnstile: Turnstile, place: Place) -> None:
        self._turnstile = turnstile
        self._place = place

    def __enter__(self) -> None:
        self._turnstile.give_up(self._place)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._turnstile.take(self._place)


class Turn:
    """The context in which code that is no script has the turn. May be entered again and again, until it leaves."""

    __slots__ = ("_place", "_turnstile")

    def __init__(self, turnstile: Turnstile, place: Place) -> None:
        self._turnstile = turnstile
        self._place = place

    def __enter__(self) -> None:
        try:
            self._turnstile.take(self._place)
        except OSError:
            self._turnstile.give_up(self._place)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._turnstile.give_up(self._place)

    def leave(self) -> None:
        """There is nothing more to do for it."""
        self._turnstile.leave(self._place)


class Turnstile:
    """Hands the one turn of this process from script to script, first come, first served.

    What is installed in the process when the turnstile is made comes back when the last script has left.

    Args:
        on_turn: told the name of the site whose turn begins, "" when nobody has it. Called at every hand-over, by
            whichever thread does it, so it must be quick, must not raise and must not call the turnstile.
    """

    def __init__(self, on_turn: Callable[[str], None] | None = None) -> None:
        self._on_turn = on_turn
        self._mutex = threading.Lock()
        self._queue: deque[tuple[Place, threading.Lock]] = deque()
        self._holder: Place | None = None
        # The gate that opened with the turn, until a thread of the holder has come to take it.
        self._untaken: threading.Lock | None = None
        self._base = Place(sys.argv, os.getcwd(), sys.path, sys.modules["__main__"], None)
        self._base.source = ""  # modules that lie beside the host's own program are for all
        self._installed = self._base
        self._siblings = _Siblings()

    @property
    def base_path(self) -> list[str]:
        """A copy of the ``sys.path`` that the process has without any script."""
        return list(self._base.path)

    @property
    def holder(self) -> Place | None:
        """Who has the turn now, or None."""
        return self._holder

    def holder_seat(self) -> Seat | None:
        """The script that has the turn; the fallback of `flarebus.client.engine.set_fallback`."""
        holder = self._holder
        return None if holder is None else holder.seat

    def place_for(self, site: str, folder: str, source: str) -> Place:
        """A place for code of `site` that is no script: as the process is, but for its folder and its first imports."""
        return Place(list(self._base.argv), folder, [source, *self._base.path], self._base.main, None, site)

    def away(self, place: Place) -> Away:
        """The context in which `place` waits for something else than its turn; may be entered again and again."""
        return Away(self, place)

    def take(self, place: Place) -> None:
        """Wait for the turn and make the process this script's; returns at once if it has the turn or has left.

        Raises:
            OSError: its working directory is gone. It has the turn all the same.
        """
        with self._mutex:
            if place.closed:
                return
            if self._holder is None:  # then nobody waits either
                self._give_to(place)
            if self._holder is place:
                self._untaken = None
                self._install(place)
                return
            gate = threading.Lock()
            gate.acquire()
            self._queue.append((place, gate))
        gate.acquire()
        with self._mutex:
            if self._holder is place:  # else the turn was taken away before this thread ran
                self._untaken = None
                self._install(place)

    def line_up(self, place: Place, gate: threading.Lock) -> None:
        """Open `gate` when `place` has the turn: a thread that waits for something else is then woken once, not first
        by that and again by its turn. It still has to `take` the turn, which it gets at once. Any thread may call.
        """
        with self._mutex:
            if self._holder is None and not place.closed:
                self._give_to(place)
                self._untaken = gate
            if place.closed or self._holder is place:
                gate.release()
            else:
                self._queue.append((place, gate))

    def stand_back(self, place: Place, gate: threading.Lock) -> None:
        """Nobody waits at `gate` any more: take it out of the line, or give up the turn that it brought."""
        with self._mutex:
            if (place, gate) in self._queue:
                self._queue.remove((place, gate))
            elif self._untaken is gate:
                self._pass_on()

    def give_up(self, place: Place) -> None:
        """Pass the turn on; does nothing if `place` does not have it."""
        with self._mutex:
            if self._holder is place:
                self._pass_on()

    def leave(self, place: Place) -> None:
        """Give up the turn for good: threads of this script that are still away will not wait for it any more."""
        with self._mutex:
            place.closed = True
            if self._holder is place:
                self._pass_on()
            if self._holder is None and self._installed is place:
                self._install(self._base)

    def abort(self) -> None:
        """Take the turn from a script that does not give it up, so that the others can come to their end.

        They still come one at a time. The script that lost the turn goes on without it until it next waits in the
        Client API; its working directory and the like are then others'. So first end the job (`Engine.ended`), which
        makes every waiting script return from the Client API, and use this only when one keeps computing.
        """
        with self._mutex:
            if self._holder is not None:
                self._pass_on()

    def _pass_on(self) -> None:
        self._holder = self._untaken = None
        while self._queue and self._holder is None:
            place, gate = self._queue.popleft()
            if not place.closed:
                self._give_to(place)
                self._untaken = gate
            gate.release()
        if self._holder is None:
            self._tell("")

    def _give_to(self, place: Place) -> None:
        self._holder = place
        self._tell(place.site)

    def _tell(self, site: str) -> None:
        if self._on_turn is not None:
            self._on_turn(site)

    def _install(self, new: Place) -> None:
        old = self._installed
        if old is new:
            return
        folder = _working_folder(old.folder)
        if folder != new.folder:
            os.chdir(new.folder)  # first: the one step that can fail
        old.folder, old.argv, old.path = folder, sys.argv, sys.path
        old.random.save()
        new.random.install()
        if old.source != new.source:
            self._siblings.swap(old.source, new.source)
        sys.argv, sys.path = new.argv, new.path
        sys.modules["__main__"] = new.main
        self._installed = new


def _working_folder(default: str) -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # the script removed the folder it is in
        return default


class _Siblings:
    """The modules that lie beside scripts: taken out of ``sys.modules`` when the turn goes to a script elsewhere."""

    def __init__(self) -> None:
        self._before = frozenset(name.partition(".")[0] for name in sys.modules)
        self._aside: dict[str, dict[str, ModuleType]] = {}
        self._names: dict[str, list[str]] = {}
        self._n_modules = -1

    def swap(self, old: str, new: str) -> None:
        """Put the siblings of folder `old` aside and those of folder `new` in place."""
        # Looking through all modules costs some 100 us; it is needed only if something was imported meanwhile.
        if len(sys.modules) != self._n_modules or old not in self._names:
            self._names[old] = self._find(old)
        self._aside[old] = {name: sys.modules.pop(name) for name in self._names[old] if name in sys.modules}
        sys.modules.update(self._aside.pop(new, {}))
        self._n_modules = len(sys.modules)

    def _find(self, folder: str) -> list[str]:
        tops: dict[str, bool] = {}
        names = list(sys.modules)  # a thread of the host, such as a tracker's, may import something meanwhile
        for name in names:
            top = name.partition(".")[0]
            if top not in tops:
                tops[top] = top not in self._before and _lies_in(sys.modules.get(top), folder)
        return [name for name in names if tops.get(name.partition(".")[0], False)]


def _lies_in(module: ModuleType | None, folder: str) -> bool:
    """Whether a top-level module is a file, a package or a namespace directly in `folder`."""
    spec = getattr(module, "__spec__", None)
    if spec is None:
        return False
    places = spec.submodule_search_locations
    found = next(iter(places), "") if places is not None else (spec.origin or "")
    return bool(folder) and os.path.dirname(found) == folder
