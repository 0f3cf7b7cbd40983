"""A trainer that a test watches: its lines and its end, each to be waited for."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from flarebus.site import launcher
from flarebus.site.launcher import TrainerExit, TrainerProcess

__all__ = ["LIMIT_S", "Launch", "Launched", "changed_guardian"]

LIMIT_S = 60.0


class Launched:
    """A trainer that was started.

    Args:
        command: program and arguments; or Python code to run, with `os`, `signal`, `subprocess`, `sys` and `time`.
        folder: its working directory.
        environ: instead of that of the test.
        on_line: called for each line before it is noted.
    """

    def __init__(
        self,
        command: str | Sequence[str],
        folder: Path,
        environ: Mapping[str, str] | None = None,
        on_line: Callable[[str, str], None] | None = None,
    ) -> None:
        self.lines: list[tuple[str, str]] = []
        self.exits: list[TrainerExit] = []
        self._on_line = on_line
        self._changed = threading.Condition()
        if isinstance(command, str):
            command = [sys.executable, "-c", f"import os, signal, subprocess, sys, time\n{command}"]
        self.process = TrainerProcess(
            command,
            folder=folder,
            environ=os.environ if environ is None else environ,
            on_line=self._note_line,
            on_exit=self._note_exit,
        )

    def _note_line(self, stream: str, line: str) -> None:
        if self._on_line is not None:
            self._on_line(stream, line)
        with self._changed:
            self.lines.append((stream, line))
            self._changed.notify_all()

    def _note_exit(self, ended: TrainerExit) -> None:
        with self._changed:
            self.exits.append(ended)
            self._changed.notify_all()

    def wait_line(self, begin: str) -> str:
        """Wait for a line that begins so; what comes after."""

        def found() -> list[str]:
            return [line for _, line in self.lines if line.startswith(begin)]

        with self._changed:
            assert self._changed.wait_for(lambda: found() or self.exits, LIMIT_S), self.lines
            assert found(), f"it ended before: {self.exits}, {self.lines}"
            return found()[0].removeprefix(begin).strip()

    def wait_exit(self) -> TrainerExit:
        """Wait for its end, and for that of all it started; there is just one."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.exits, LIMIT_S), f"it does not end: {self.lines}"
        assert self.process.wait(LIMIT_S)
        assert not self.process.is_running
        (ended,) = self.exits
        return ended

    @property
    def out(self) -> list[str]:
        """The lines of its standard output."""
        return [line for stream, line in self.lines if stream == "stdout"]


Launch = Callable[..., Launched]


def changed_guardian(folder: Path, monkeypatch: pytest.MonkeyPatch, *changes: tuple[str, str]) -> None:
    """Have trainers started by a guardian whose source was changed: each change is what stands there once, and what
    shall stand there."""
    source = launcher._GUARDIAN.read_text()
    for before, after in changes:
        assert source.count(before) == 1
        source = source.replace(before, after)
    path = folder / "changed_guardian.py"
    path.write_text(source)
    monkeypatch.setattr(launcher, "_GUARDIAN", path)
