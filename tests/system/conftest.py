"""Fixtures of the system tests: a place for sockets that must be empty afterwards, and a mark on every process."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.observed import ObservedRun, marked_processes


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of this test where runs make their sockets."""
    # Not below tmp_path: the name of a socket may have little more than 100 bytes.
    folder = Path(tempfile.mkdtemp(prefix="fb-"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A text in the environment of every process that this test starts; those left at its end are killed."""
    text = f"FLAREBUS_TEST_MARK={uuid.uuid4().hex}"
    monkeypatch.setenv(*text.split("="))
    yield text
    for pid in marked_processes(text):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def observed(tmp_path: Path, sockets: Path, mark: str) -> Iterator[ObservedRun]:
    """A run to be started by the test; aborted if the test leaves it running."""
    run = ObservedRun(tmp_path, sockets, mark)
    yield run
    if run.run is not None and run.run.get_status() == "running":
        run.run.abort()
        run.run.get_result(30)
