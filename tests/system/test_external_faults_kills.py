"""Trainers and client jobs that are killed, in every phase of a round: the job goes on to the same model."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from flarebus.transfer import Pull
from tests.system.observed import ONE, ObservedRun, marked_processes, wait_until

KILLED = "its trainer process was killed by SIGKILL"

# Kills itself where a test wants it to: once, or each time it comes there.
SCRIPT = """
import os, signal
import flarebus.client as flare

def at(place):
    if place == {place!r} and os.path.basename(os.getcwd()) == "site-1" and ({always} or not os.path.exists("killed")):
        open("killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)

at("start")
flare.init()
at("init")
while flare.is_running():
    at("is_running")
    model = flare.receive()
    if model is None:
        break
    open("trained", "a").write(str(model.current_round))
    at("training")
    flare.send(flare.FLModel(params={{"w": model.params["w"] + 1}}, metrics={{"loss": 1.0}}))
    at("sent")
"""


def complete(observed: ObservedRun, rounds: int = 2) -> None:
    """The run ends well, and no site missed a round."""
    assert observed.end() == "completed", observed.reason
    assert set(observed.model()) == {float(rounds)}
    assert [line["accepted"] for line in observed.rounds()] == [["site-1", "site-2"]] * rounds
    assert observed.journal() == (list(range(rounds)), "completed")
    assert observed.complaints() == {}


def use(pipe: str) -> Any:
    """Have all trainers of a recipe talk through this pipe."""
    return lambda recipe: recipe.add_client_config({"pipe": pipe})


@pytest.mark.parametrize(
    ("place", "pipe"),
    [
        *((place, "cell") for place in ("start", "init", "is_running", "training", "sent")),
        *((place, pipe) for place in ("training", "sent") for pipe in ("file", "shm")),
    ],
)
def test_killed_once(observed: ObservedRun, place: str, pipe: str) -> None:
    """A trainer that is killed is started again for the task that is open, and its site misses nothing."""
    observed.start(SCRIPT.format(place=place, always=False), launch_external_process=True, prepare=use(pipe))

    complete(observed)
    assert KILLED in observed.log("site-1")
    if place == "sent":  # not once more for what was here already
        assert (observed.run_dir / "site-1/trained").read_text() == "01"


@pytest.mark.parametrize("place", ["start", "training"])
def test_killed_every_time(observed: ObservedRun, place: str) -> None:
    """A site whose trainer does not survive a task twice is given up in that round, with the reason."""
    observed.start(SCRIPT.format(place=place, always=True), launch_external_process=True, min_clients=1)

    assert observed.end() == "completed", observed.reason
    assert observed.model() == [2.0] * 4
    assert [line["accepted"] for line in observed.rounds()] == [["site-2"]] * 2
    assert observed.complaints() == {"site-1": f"{KILLED}, 2 times"}
    assert f"site-1 failed: {KILLED}, 2 times" in observed.log("server")
    assert observed.log("site-1").count(f"{KILLED}; it is started again for the same task") == 2


def test_killed_in_the_middle_of_an_upload(observed: ObservedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result of which only a part came is never used: a second trainer makes it again."""
    killed = []
    arrived = Pull.arrived

    def kill_at_first_chunk(pull: Pull, first: int, now: float) -> None:
        arrived(pull, first, now)
        if pull.manifest.holder.startswith("site-1.") and not killed:
            killed.append(int((observed.run_dir / "site-1/pid").read_text()))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(Pull, "arrived", kill_at_first_chunk)
    body = "open('pid', 'w').write(str(__import__('os').getpid()))"
    observed.start(ONE.format(body=body), size=4_000_000, launch_external_process=True)

    complete(observed)
    assert killed
    assert KILLED in observed.log("site-1")


# Trains for ever the first time.
PAUSE = """
    import os, threading
    if os.path.basename(os.getcwd()) == "site-1" and not os.path.exists("paused"):
        open("pausing", "w").write(str(os.getpid()))
        os.rename("pausing", "paused")  # never there without its content
        threading.Event().wait()
"""


@pytest.mark.parametrize("pipe", ["cell", "file", "shm"])
def test_the_client_job_is_killed(observed: ObservedRun, pipe: str) -> None:
    """When a client job is killed its trainer ends with it; the next one does the task again."""
    observed.start(ONE.format(body=PAUSE), launch_external_process=True, prepare=use(pipe))
    trainer = Path("/proc", observed.wait_for_file("site-1", "paused").read_text())

    observed.kill("worker-1")

    wait_until(lambda: not trainer.exists(), "the trainer ends", 3.0)
    complete(observed)
    assert "was killed by SIGKILL" in observed.log("server")


# Does not go by itself, and neither does what it started in a session of its own.
STUBBORN = """
    import os, signal, subprocess, sys, threading
    signal.signal(signal.SIGTERM, lambda *_: None)
    code = "import signal; signal.signal(signal.SIGTERM, lambda *_: None); open('child', 'w').close()"
    code += chr(10) + "while True: signal.pause()"
    subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while True:
        {hang}
"""


@pytest.mark.parametrize(
    ("hang", "pipe"),
    [
        ("threading.Event().wait(0.1)", "cell"),
        ("__import__('ctypes').PyDLL(None).sleep(1000)", "cell"),
        ("__import__('ctypes').PyDLL(None).sleep(1000)", "file"),
        ("__import__('ctypes').PyDLL(None).sleep(1000)", "shm"),
    ],
)
def test_an_abort_while_a_trainer_computes(observed: ObservedRun, hang: str, pipe: str) -> None:
    """An aborted job ends within seconds, whatever its trainers do: they are asked, then made to, with all they
    started."""
    observed.start(ONE.format(body=STUBBORN.format(hang=hang)), launch_external_process=True, prepare=use(pipe))
    for site in ("site-1", "site-2"):
        observed.wait_for_file(site, "child")
    assert sum("client.py" in line for line in marked_processes(observed.mark).values()) == 2

    observed.run.abort()

    assert observed.run.get_result(10) is not None
    assert observed.end() == "aborted"
    assert "was killed by SIGKILL after it was told to end" in observed.log("site-1")
    assert list(observed.run_dir.glob("site-*/pipe")) == []


def test_an_abort_while_a_trainer_waits(observed: ObservedRun) -> None:
    """A script that waits for its next task when the job is aborted hears that, and comes to its own end."""
    body = "open('came', 'w').close()"
    script = ONE.format(body=body) + "\nprint('goodbye')\n"
    gate = observed.folder / "gate"
    observed.on("round_committed", lambda fields: wait_until(gate.exists, "the gate opens"))
    observed.start(script, launch_external_process=True, num_rounds=100)
    observed.wait_for_file("site-1", "came")

    observed.run.abort()
    gate.touch()

    assert observed.end() == "aborted"
    assert "goodbye" in observed.log("site-1")
    assert "no more tasks: the job has ended: aborted by user" in observed.log("site-1")


def test_a_trainer_for_each_task_is_killed(observed: ObservedRun) -> None:
    """What holds for a trainer of the whole job holds for those that do one task each."""
    observed.start(
        SCRIPT.format(place="training", always=False), launch_external_process=True, launch_once=False, num_rounds=3
    )

    complete(observed, 3)
    assert (observed.run_dir / "site-1/trained").read_text() == "0012"


def test_the_quorum_needs_a_trainer_that_does_not_survive(observed: ObservedRun) -> None:
    """Without enough others the job fails with how the process ended."""
    observed.start(SCRIPT.format(place="training", always=True), launch_external_process=True)

    assert observed.end() == "failed"
    assert f"1 usable result, 2 needed (site-1: {KILLED}, 2 times" in observed.reason
