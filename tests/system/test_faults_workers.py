"""Worker processes that die, in every phase of a round: the job goes on to the same model."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import pytest

from flarebus.server import simulation
from flarebus.transfer import Pull
from tests.system.observed import ONE, ObservedRun

# Stands still where a test wants it to, the first time it comes there.
PAUSE = """
    import os, threading
    if flare.get_site_name() == "site-1" and model.current_round == {round} and not os.path.exists("paused"):
        open("paused", "w").close()
        threading.Event().wait()
"""


def complete(observed: ObservedRun, rounds: int = 2) -> None:
    """The run ends well, and no site missed a round."""
    assert observed.end() == "completed", observed.reason
    assert observed.model() == [float(rounds)] * 4
    assert [line["accepted"] for line in observed.rounds()] == [["site-1", "site-2"]] * rounds
    assert observed.journal() == (list(range(rounds)), "completed")
    assert "worker-1" in observed.log("server")
    assert "was killed by SIGKILL" in observed.log("server")


class KillOnce:
    """Kills worker-1 when it is called for the first time."""

    def __init__(self, observed: ObservedRun) -> None:
        self.observed = observed
        self.done = False

    def __call__(self, *_: Any) -> None:
        if not self.done:
            self.done = True
            self.observed.kill("worker-1")


def test_killed_before_it_joined(observed: ObservedRun) -> None:
    """A worker that is killed before it joined is started again, and its site misses nothing."""
    observed.on("workers_started", KillOnce(observed))
    observed.start(ONE.format(body=""))

    complete(observed)


def test_killed_while_its_script_computes(observed: ObservedRun) -> None:
    """A site whose worker is killed in the middle of its work gets the task again."""
    observed.start(ONE.format(body=PAUSE.format(round=1)))
    observed.wait_for_file("site-1", "paused")

    observed.kill("worker-1")

    complete(observed)


def test_killed_in_the_middle_of_an_upload(observed: ObservedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result of which only a part came is never used: its site makes it again."""
    kill = KillOnce(observed)
    arrived = Pull.arrived

    def kill_at_first_chunk(pull: Pull, first: int, now: float) -> None:
        arrived(pull, first, now)
        if pull.manifest.holder.startswith("worker-1."):
            kill()

    monkeypatch.setattr(Pull, "arrived", kill_at_first_chunk)
    observed.start(ONE.format(body=""), size=4_000_000)

    assert observed.end() == "completed", observed.reason
    assert kill.done
    assert set(observed.model()) == {2.0}
    assert [line["accepted"] for line in observed.rounds()] == [["site-1", "site-2"]] * 2
    assert observed.complaints() == {}


@pytest.mark.parametrize("size", [4, 1_000_000])
def test_killed_after_its_upload(observed: ObservedRun, size: int) -> None:
    """A result that is here counts, though its worker dies before the round is over."""
    gate = observed.folder / "gate"
    os.mkfifo(gate)
    body = f"""
    if flare.get_site_name() == "site-2" and model.current_round == 0:
        open({str(gate)!r}).read()
    open("trained", "a").write(".")
"""

    def kill_and_go_on(fields: dict[str, Any]) -> None:
        if fields["site"] == "site-1" and fields["round"] == 0:
            observed.kill("worker-1")
            gate.write_text("")  # returns when site-2 has come there

    observed.on("result_accepted", kill_and_go_on)
    observed.start(ONE.format(body=body), size=size)

    assert observed.end() == "completed", observed.reason
    assert set(observed.model()) == {2.0}
    assert [line["accepted"] for line in observed.rounds()] == [["site-1", "site-2"]] * 2
    assert (observed.run_dir / "site-1/trained").read_text() == ".."  # not once more for what was here already


def test_killed_between_rounds(observed: ObservedRun) -> None:
    """A worker that is killed while it has nothing to do is there for the next round."""
    observed.on("round_committed", KillOnce(observed))
    observed.start(ONE.format(body=""))

    complete(observed)


def test_killed_while_idle_many_times(observed: ObservedRun) -> None:
    """A site is not given up because its worker was killed while the site did nothing."""
    observed.on("round_committed", lambda _: observed.kill("worker-1"))
    observed.start(ONE.format(body=""), num_rounds=6)

    complete(observed, 6)


def test_killed_when_it_is_not_needed_any_more(observed: ObservedRun) -> None:
    """A job whose last result is here does not wait for a worker that is being started again."""
    observed.on("round_committed", KillOnce(observed))
    observed.start(ONE.format(body=""), num_rounds=1)
    begin = time.monotonic()

    assert observed.end() == "completed", observed.reason
    # It would be the 15 s that workers have to come to their end.
    assert time.monotonic() - begin < 10


# What takes the process down with it.
CRASH = """
    import ctypes, os
    if flare.get_site_name() == "exits":
        os.write(2, b"out of memory\\n")
        os._exit(7)
    if flare.get_site_name() == "crashes":
        ctypes.string_at(0)
"""


def test_scripts_that_take_their_worker_down(observed: ObservedRun) -> None:
    """A site is given up when its script took the worker down three times; others of that worker miss nothing."""
    observed.start(
        ONE.format(body=CRASH), ["exits", "good", "crashes", "better"], min_clients=2, env={"num_threads": 1}
    )

    assert observed.end() == "completed", observed.reason
    assert observed.model() == [2.0] * 4
    assert [line["accepted"] for line in observed.rounds()] == [["better", "good"]] * 2
    complaints = observed.complaints()
    assert complaints["exits"] == "its worker process ended with exit code 7 (last output: out of memory), 3 times"
    assert complaints["crashes"] == "its worker process was killed by SIGSEGV, 3 times"
    assert observed.rounds()[0]["refused"] == complaints
    ends = [line for line in observed.log("server").splitlines() if "worker-1." in line]
    assert (sum("exit code 7" in line for line in ends), sum("SIGSEGV" in line for line in ends)) == (3, 3)


def test_without_enough_others_the_job_says_what_became_of_the_process(observed: ObservedRun) -> None:
    """If the quorum needs a site that takes its worker down, the job fails with exit code and site."""
    observed.start(ONE.format(body=CRASH), ["good", "exits"])

    assert observed.end() == "failed"
    assert "1 usable result, 2 needed (exits: its worker process ended with exit code 7" in observed.reason
    assert observed.journal() == ([], "failed")


def test_workers_that_do_not_start(observed: ObservedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no worker gets as far as to join, the job fails soon, with what the last one said."""
    broken = observed.folder / "python"
    broken.write_text("#!/bin/sh\necho no such interpreter >&2\nexit 3\n")
    broken.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(broken))
    # More than fits into a pipe: the worker dies while it is being told what to do.
    observed.start(ONE.format(body=""), [f"site-{number}" for number in range(500)], env={"num_threads": 2})

    assert observed.end() == "failed"
    assert "its worker process ended with exit code 3 (last output: no such interpreter)" in observed.reason


def test_what_a_script_started_ends_with_its_worker(observed: ObservedRun) -> None:
    """Processes that a script left behind are gone when its worker is, however that ended."""
    body = """
    import subprocess
    if model.current_round == 0:
        subprocess.Popen(["sleep", "1000"])
"""
    observed.on("round_committed", KillOnce(observed))
    observed.start(ONE.format(body=body))

    complete(observed)


def test_one_worker_does_not_start(observed: ObservedRun) -> None:
    """If the quorum needs the sites of a worker that never gets ready, the reason is what became of that worker."""
    observed.on("workers_started", lambda _: observed.kill("worker-2"))
    observed.start(ONE.format(body=""))

    assert observed.end() == "failed"
    assert observed.reason.startswith("0 usable results, 2 needed")
    assert "site-2: its worker process was killed by SIGKILL" in observed.reason


def test_a_script_that_does_not_let_go_of_python(observed: ObservedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site whose script keeps its whole process from answering, for however long, misses nothing."""
    # Over a network it would be held to be dead by then.
    monkeypatch.setattr(simulation, "SILENCE_S", 0.5)
    body = """
    if model.current_round == 1 and flare.get_site_name() == "site-1":
        __import__("ctypes").PyDLL(None).sleep(2)
"""
    observed.start(ONE.format(body=body), num_rounds=3)

    assert observed.end() == "completed", observed.reason
    assert observed.model() == [3.0] * 4
    assert [line["accepted"] for line in observed.rounds()] == [["site-1", "site-2"]] * 3
    assert observed.log("server").count("WARNING") == 0
