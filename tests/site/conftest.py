"""Fixtures for tests that start trainers: every process of a test is marked, and none may be left."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.site.launched import Launch, Launched
from tests.system.observed import GONE_S, marked_processes, wait_until


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A text in the environment of every process of this test; they must be gone when it ends."""
    text = f"FLAREBUS_TEST_MARK={uuid.uuid4().hex}"
    monkeypatch.setenv(*text.split("="))
    yield text
    try:
        wait_until(lambda: not marked_processes(text), "every process of the test ends", GONE_S)
    finally:
        for pid in marked_processes(text):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def launch(mark: str, tmp_path: Path) -> Iterator[Launch]:
    """Starts trainers; those that still run at the end of the test are killed."""
    started: list[Launched] = []

    def start(command: str | Sequence[str], **given: Any) -> Launched:
        started.append(Launched(command, **{"folder": tmp_path, **given}))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
    assert all(each.process.wait(30) for each in started)
