"""What the tests of pipes between processes share: peers as processes, threads whose outcome is kept, small disks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from flarebus.pipes import ExportMode, Pipe

__all__ = ["LIMIT_S", "InThread", "Peer", "mount_small", "wait_until"]

LIMIT_S = 60.0
ROOT = Path(__file__).parents[2]
T = TypeVar("T")


def wait_until(is_true: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> None:
    """Return as soon as `is_true()` holds; fail the test with `what` when it does not in time."""
    deadline = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.005)


class InThread(Generic[T]):
    """A call on a thread of its own."""

    def __init__(self, call: Callable[..., T], *arguments: Any) -> None:
        self._call = lambda: call(*arguments)
        self._found: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found.append(self._call())
        except BaseException as error:
            self._error = error

    @property
    def is_running(self) -> bool:
        """Whether the call has not returned yet."""
        return self._thread.is_alive()

    def result(self) -> T:
        """What the call returned, or raised."""
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive(), "the call hangs"
        if self._error is not None:
            raise self._error
        return self._found[0]


class Peer:
    """The other end of `pipe`, in a process that does `action`; see `link_peer`."""

    def __init__(
        self, pipe: Pipe, action: str, channel: str = "task", side: ExportMode = ExportMode.PEER, ready: str = "ready"
    ) -> None:
        path, arguments = pipe.export(side)
        # From Python 3.12 on a fork of a process with threads is warned about.
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("link_peer.py"))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "pipes")))}
        self.process = subprocess.Popen(
            [*command, path, json.dumps(arguments), channel, action],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.expect(ready)

    def line(self) -> str:
        """The next line it prints; "" when it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def expect(self, beginning: str) -> str:
        """The next line, which has to begin so."""
        found = self.line()
        assert found.startswith(beginning), found
        return found

    def kill(self) -> None:
        """Kill it the hard way."""
        self.process.kill()
        self.process.wait(LIMIT_S)
        self._close()

    def leave(self) -> None:
        """Let it close its end and go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(LIMIT_S) == 0
        self._close()

    def _close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def mount_small(folder: Path, megabytes: int) -> bool:
    """Mount a file system of this size there; False where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
