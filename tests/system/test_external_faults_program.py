"""The program with trainers in processes of their own, interrupted by a person."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.observed import LIMIT_S, ONE
from tests.system.test_faults_program import Program, gone

ADD = ONE.format(body="")
# Never answers in the third round, and does not let go of Python either.
STUCK = ONE.format(
    body="""
    import ctypes, signal
    if model.current_round == 2:
        signal.signal(signal.SIGTERM, lambda *_: None)
        open("stuck", "w").close()
        while True:
            ctypes.PyDLL(None).sleep(1000)
"""
)


@pytest.fixture
def program(tmp_path: Path, sockets: Path, mark: str, request: pytest.FixtureRequest) -> Iterator[Program]:
    """A program with two trainers and a script that is the parameter; gone at the end of the test."""
    script, rounds = request.param
    started = Program(tmp_path, script, "--external", "--rounds", rounds)
    yield started
    started.close()


def nothing_is_left(program: Program, sockets: Path, mark: str) -> None:
    """No process, socket or secret."""
    gone(mark)
    assert list(sockets.iterdir()) == []
    assert list(program.run_dir.glob("*/config")) == []
    assert "Traceback" not in program.err


@pytest.mark.parametrize("program", [(ADD, "100000")], indirect=True)
def test_ctrl_c(program: Program, sockets: Path, mark: str) -> None:
    """Ctrl-C ends the job in an orderly way: code 130, what was committed is kept, and nothing else is left."""
    program.wait_for_rounds(1)

    program.interrupt()

    assert program.end() == 130, program.err
    nothing_is_left(program, sockets, mark)
    rounds, state = program.committed()
    assert rounds >= 1
    assert state == "aborted"
    log = (program.run_dir / "site-1/log.txt").read_text()
    assert "no more tasks: the job has ended: aborted by user" in log


@pytest.mark.parametrize("program", [(STUCK, "4")], indirect=True)
def test_ctrl_c_while_trainers_hang(program: Program, sockets: Path, mark: str) -> None:
    """One Ctrl-C is enough, whatever the trainers do: they are made to end."""
    program.wait_for_file("site-1", "stuck")
    program.wait_for_rounds(2)

    program.interrupt()

    assert program.end(LIMIT_S / 2) == 130, program.err
    nothing_is_left(program, sockets, mark)
    assert program.committed() == (2, "aborted")
    assert "was killed by SIGKILL after it was told to end" in (program.run_dir / "site-1/log.txt").read_text()


@pytest.mark.parametrize("program", [(STUCK, "4")], indirect=True)
def test_ctrl_c_twice(program: Program, sockets: Path, mark: str) -> None:
    """A second Ctrl-C waits for nobody; trainers that hang and their secrets are gone all the same."""
    program.wait_for_file("site-1", "stuck")
    program.wait_for_rounds(2)

    program.interrupt()
    program.wait_for("interrupt again to leave at once")
    program.interrupt()
    begin = time.monotonic()

    assert program.end() == 130, program.err
    assert time.monotonic() - begin < 3
    nothing_is_left(program, sockets, mark)
    assert program.committed()[0] == 2
