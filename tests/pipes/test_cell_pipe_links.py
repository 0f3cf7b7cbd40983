"""A client job that has one trainer after another: who belongs to an earlier link is not taken for the next one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from flarebus_pipes.cell_pipe import CellPipe

from flarebus.cell import Cell
from flarebus.loop import Loop
from flarebus.pipes import ExportMode, Message, Mode
from flarebus.router import Router

LIMIT_S = 30.0


@pytest.fixture
def endpoint() -> Iterator[str]:
    """Where the router of a test listens: in a folder with a short name, for the path of a socket has a limit."""
    with tempfile.TemporaryDirectory(prefix="fb-") as folder:
        yield f"ipc://{folder}/bus"


@pytest.fixture
def host(endpoint: str) -> Iterator[Cell]:
    """The cell of a client job for site-1 in job j, at its router."""
    loop = Loop("test bus")
    router = Router(loop)
    router.bind(endpoint)
    cell = Cell.attach("worker-1.j", router, loop, ["site-1.j"])
    yield cell
    cell.close()
    router.close()
    loop.stop()


def test_a_trainer_of_an_earlier_link_is_not_heard(host: Cell, endpoint: str) -> None:
    """What a trainer of the link before says neither arrives nor takes the place of the right one."""
    waiting = CellPipe(Mode.PASSIVE, "site-1", "j", endpoint, False, cell=host, link="second")
    old = CellPipe(Mode.ACTIVE, "site-1", "j", endpoint, False, link="first")
    new = CellPipe(Mode.ACTIVE, "site-1", "j", endpoint, False, link="second", rank=1)
    for pipe in (waiting, old, new):
        pipe.open("task")
    try:
        assert not old.send(Message("old"), timeout=0.1)
        with ThreadPoolExecutor() as threads:
            sent = threads.submit(new.send, Message("new"), LIMIT_S)  # returns when it was received
            message = waiting.receive(LIMIT_S)
            assert sent.result(LIMIT_S)
        assert message is not None
        assert message.topic == "new"
        assert waiting.peer == str(new._cell.address)
    finally:
        for pipe in (old, new, waiting):
            pipe.close()


def test_the_link_goes_with_the_arguments(host: Cell, endpoint: str) -> None:
    """Whoever is made from what a pipe exports for its peer belongs to the same link."""
    waiting = CellPipe(Mode.PASSIVE, "site-1", "j", endpoint, False, cell=host, link="third")

    assert waiting.export(ExportMode.PEER)[1]["link"] == "third"
