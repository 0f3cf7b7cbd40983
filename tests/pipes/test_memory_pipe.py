"""MemoryPipe keeps the promises of a pipe, and what it promises beyond."""

from __future__ import annotations

import gc
import threading

import pytest
from flarebus_pipes.memory_pipe import MemoryPipe

from flarebus.pipes import ExportMode, Message, Mode
from flarebus.testing import PipeCheck, PipeTrial, pipe_checks

LIMIT_S = 30.0


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in pipe_checks(MemoryPipe)])
def test_memory_pipe_keeps_the_contract(check: PipeCheck) -> None:
    """Each check of the conformance kit passes, and leaves no channel in the table."""
    with PipeTrial(lambda mode: MemoryPipe(mode, "kit"), leftovers=channels) as trial:
        check(trial)
    assert channels() == []


def channels() -> list[str]:
    """The channels that the class still knows."""
    return [f"{token}/{name}" for token, name in MemoryPipe._channels]


def pair(token: str = "memory-test") -> tuple[MemoryPipe, MemoryPipe]:
    """Both ends of one channel."""
    ends = MemoryPipe(Mode.PASSIVE, token), MemoryPipe(Mode.ACTIVE, token)
    for end in ends:
        end.open("task")
    return ends


def test_token_keeps_jobs_apart() -> None:
    """Ends with different tokens never meet, whatever their channel is called."""
    here, there = pair("job-1")
    other, _other = pair("job-2")

    assert not here.send(Message("train"), 0.0)
    assert other.receive(0.0) is None

    for end in (here, there, other, _other):
        end.close()


def test_closed_end_breaks_the_pipe_for_the_other() -> None:
    """Whoever waits at the other end hears at once that nobody is there any more."""
    here, there = pair()
    found: list[BaseException] = []

    def wait() -> None:
        try:
            here.receive(None)
        except BrokenPipeError as error:
            found.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    there.close()
    waiting.join(LIMIT_S)

    assert [str(error) for error in found] == ["the ACTIVE end of this MemoryPipe is gone"]
    with pytest.raises(BrokenPipeError, match="ACTIVE end"):
        here.send(Message("train"), None)
    here.close()


def test_end_that_nobody_holds_has_left() -> None:
    """An end that was dropped without being closed is gone for the other, and for the table."""
    here, there = pair()

    del there
    gc.collect()

    with pytest.raises(BrokenPipeError, match="ACTIVE end"):
        here.receive(None)
    here.close()
    assert channels() == []


def test_end_that_comes_back_is_there_again() -> None:
    """A new end takes the place of one that was closed, and the other goes on with it."""
    here, there = pair()
    there.close()
    again = MemoryPipe(Mode.ACTIVE, "memory-test")
    again.open("task")
    sending = threading.Thread(target=here.send, args=(Message("train", b"hello"),))
    sending.start()

    received = again.receive(LIMIT_S)

    sending.join(LIMIT_S)
    assert received is not None
    assert received.body == b"hello"
    for end in (here, again):
        end.close()


def test_export_says_the_other_mode_for_the_peer() -> None:
    """The peer's end has the same token."""
    pipe = MemoryPipe("PASSIVE", "job-1")

    assert pipe.export(ExportMode.SELF)[1] == {"mode": "PASSIVE", "token": "job-1"}
    path, args = pipe.export(ExportMode.PEER)
    assert (path, args) == ("flarebus_pipes.memory_pipe.MemoryPipe", {"mode": "ACTIVE", "token": "job-1"})
