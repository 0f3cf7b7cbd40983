"""Handlers under test: above a fake pipe, or two at the ends of a real one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flarebus_pipes.memory_pipe import MemoryPipe

from flarebus.pipes import Mode, Pipe
from flarebus.pipes.handler import PipeHandler
from tests.pipes.fake_pipe import FakePipe
from tests.pipes.told import Make, Told


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes started handlers, which are stopped at the end."""
    made: list[PipeHandler] = []

    def start(pipe: Pipe, begin: bool = True, **given: Any) -> tuple[PipeHandler, Told]:
        told = Told()
        given = {"on_message": told.on_message, "on_status": told.on_status, **given}
        handler = PipeHandler(pipe, **given)
        made.append(handler)
        if begin:
            handler.start()
        return handler, told

    yield start
    for handler in made:
        handler.stop()


@pytest.fixture
def pair(make: Make) -> tuple[tuple[PipeHandler, Told], tuple[PipeHandler, Told]]:
    """Two handlers at the ends of one pipe: the client job's, and the trainer's."""
    ends = []
    for mode in (Mode.PASSIVE, Mode.ACTIVE):
        pipe = MemoryPipe(mode, "handler-test")
        pipe.open("task")
        ends.append(make(pipe))
    return ends[0], ends[1]


@pytest.fixture
def fake() -> FakePipe:
    """A pipe whose other end is the test."""
    return FakePipe()
