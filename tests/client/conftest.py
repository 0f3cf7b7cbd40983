"""A script's seat in the test's own thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from flarebus.client.engine import Seat, sit
from tests.client.fake_engine import FakeEngine

Sit = Callable[..., FakeEngine]


@pytest.fixture
def sit_down() -> Iterator[Sit]:
    """Makes the test the script of a site with the given ``TASK_EXCHANGE`` section."""
    with ExitStack() as stack:

        def enter(**section: Any) -> FakeEngine:
            engine = FakeEngine(config={"TASK_EXCHANGE": section})
            stack.enter_context(sit(Seat(engine), {}))
            return engine

        yield enter


@pytest.fixture
def engine(sit_down: Sit) -> FakeEngine:
    """The engine of a script that works with arrays."""
    return sit_down()
