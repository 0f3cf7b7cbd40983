"""A tracker that keeps in memory what it is given, and does wrong where a test wants it to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flarebus.tracking import Point, RunInfo, Tracker
from flarebus.tracking.settings import TEXT, check_settings

__all__ = ["FakeTracker", "MadeTrackers"]


class MadeTrackers:
    """Every tracker that was made, and what the next ones do: `faults` has a function for each method that fails."""

    def __init__(self) -> None:
        self.all: list[FakeTracker] = []
        self.faults: dict[str, Callable[[], Any]] = {}
        self.closed = threading.Event()

    def at(self, method: str) -> None:
        if method in self.faults:
            self.faults[method]()


class FakeTracker(Tracker):
    """Notes its calls in `calls`; made through its class, so all of a test share `made`, which the test sets."""

    made = MadeTrackers()

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.calls: list[tuple[Any, ...]] = []
        self.run: RunInfo | None = None
        self.made.all.append(self)

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        check_settings(config, {"uri": TEXT})

    def open(self, run: RunInfo) -> None:
        self.run = run
        self._note("open")

    def scalars(self, series: str, points: Sequence[Point]) -> None:
        self._note("scalars", series, [point[:4] for point in points])

    def params(self, series: str, values: Mapping[str, Any]) -> None:
        self._note("params", series, dict(values))

    def tags(self, series: str, values: Mapping[str, Any]) -> None:
        self._note("tags", series, dict(values))

    def text(self, series: str, key: str, text: str, step: int, path: str) -> None:
        self._note("text", series, key, text, step, path)

    def image(self, series: str, key: str, png: bytes, step: int) -> None:
        self._note("image", series, key, png[:4], step)

    def artefact(self, path: Path, kind: str) -> None:
        self._note("artefact", path.name, kind)

    def close(self, state: str) -> None:
        self._note("close", state)
        self.made.closed.set()

    def of(self, method: str) -> list[tuple[Any, ...]]:
        """The arguments of all calls of a method."""
        return [call[1:] for call in self.calls if call[0] == method]

    def _note(self, method: str, *arguments: Any) -> None:
        self.made.at(method)
        self.calls.append((method, *arguments))
