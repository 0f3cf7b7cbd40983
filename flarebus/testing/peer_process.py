"""PeerProcess: the other end of a pipe in a process of its own, made from what `Pipe.export` said, to be killed.

What to make and what to do goes in over standard input, one JSON value a line, and what came of it out over standard
output: nothing stands in the arguments of the process. `peer_main` is the other half.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from queue import Empty, SimpleQueue
from typing import Any

from flarebus.errors import FlarebusError

__all__ = ["PeerFailed", "PeerProcess"]


class PeerFailed(FlarebusError):
    """The process could not do what it was asked for; says what it said."""


class PeerProcess:
    """A process with one open end.

    Args:
        class_path, args: as exported.
        channel: to open it on.
        patience: seconds that an answer may take.
    """

    def __init__(self, class_path: str, args: dict[str, Any], *, channel: str, patience: float) -> None:
        self.channel = channel
        self._patience = patience
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flarebus.testing.peer_main"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # It finds the same modules as this process, test code included.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            text=True,
        )
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="peer-process-reader", daemon=True)
        self._reader.start()
        self.say({"class_path": class_path, "args": args, "channel": channel})

    def wait_open(self) -> None:
        """Return when its end is open.

        Raises:
            PeerFailed: it could not be made or opened.
        """
        self.expect("open")

    def say(self, what: dict[str, Any]) -> None:
        """Tell it what to do next: `peer_main` lists what it understands."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerFailed(f"the process is gone: {self._complaint()}") from None

    def expect(self, word: str) -> Any:
        """Wait for it to say `word`, and return what it said with it.

        Raises:
            PeerFailed: it said something else, nothing in time, or it is gone.
        """
        try:
            line = self._lines.get(timeout=self._patience)
        except Empty:
            raise PeerFailed(f"did not say {word!r} within {self._patience:g} s") from None
        if not line:
            raise PeerFailed(f"ended before it said {word!r}: {self._complaint()}")
        said = json.loads(line)
        if said.get("say") != word:
            raise PeerFailed(f"{said.get('what', said)}")
        return said.get("what")

    def kill(self) -> None:
        """Kill it with SIGKILL and wait until it is gone. Idempotent."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except BrokenPipeError:  # unsent words for a dead process
                    continue

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _complaint(self) -> str:
        if self._errors.closed:
            return "killed"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.poll()}"
