"""WorkerPool: real processes that do as the test says, how their ends are told, and how all of them are ended."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flarebus
from flarebus.server import pool as server_pool
from flarebus.server.pool import MAX_RESTARTS, MAX_STILLBIRTHS, HostEnd, WorkerPool, share_cores, spread

LIMIT_S = 30.0
# What stands in for a worker: it reads its configuration as one does, and runs the code that it finds there.
STAND_IN = """
import json, os, signal, sys, time
config = json.loads(sys.stdin.buffer.readline())
def turn(text):
    with open(config["turn_file"], "r+b") as file:
        file.write(text.encode())
exec(config["code"])
"""
WAIT_FOR_END = "print('ready', flush=True); sys.stdin.buffer.read()"


class Pool:
    """A pool of stand-ins, and the ends it tells of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ends: queue.SimpleQueue[HostEnd] = queue.SimpleQueue()
        self.pool = WorkerPool(folder, self.ends.put)

    def start(self, code: str, name: str = "worker-1", **environ: str) -> None:
        sites = [{"name": f"{name}-site-{number}"} for number in (1, 2)]
        self.pool.start({"address": f"{name}.job", "sites": sites, "code": code}, environ)

    def end(self) -> HostEnd:
        return self.ends.get(timeout=LIMIT_S)

    def said(self, name: str = "worker-1") -> list[str]:
        return (self.folder / f"{name}.log").read_text().splitlines()

    def ready(self, *names: str) -> None:
        """Wait until these have said so."""
        deadline = time.monotonic() + LIMIT_S
        for name in names or ("worker-1",):
            while "ready" not in self.said(name):
                assert time.monotonic() < deadline, name
                os.sched_yield()


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """A pool; its processes are gone at the end."""
    popen = subprocess.Popen

    def stand_in(arguments: list[str], **how: Any) -> subprocess.Popen[bytes]:
        assert arguments == [sys.executable, "-m", "flarebus.site.worker"]
        return popen([sys.executable, "-S", "-c", STAND_IN], **how)

    monkeypatch.setattr(server_pool.subprocess, "Popen", stand_in)
    pool = Pool(tmp_path)
    yield pool
    pool.pool.kill()
    assert pool.pool.wait(LIMIT_S)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


# --- the beginning


def test_workers_get_configuration_and_environment(made: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration comes through standard input and nothing of it stands in the arguments; flarebus is found."""
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    made.start(
        "print(config['address'], sys.argv, os.environ['CUDA_VISIBLE_DEVICES'], os.environ['PYTHONPATH'])",
        CUDA_VISIBLE_DEVICES="3",
    )
    made.end()

    source = Path(flarebus.__file__).parent.parent
    places = os.pathsep.join((str(source), str(source / "pipes"), "/somewhere"))
    assert made.said() == [f"worker-1.job ['-c'] 3 {places}"]


def test_a_worker_leads_a_group_of_its_own(made: Pool) -> None:
    """A Ctrl-C in the terminal does not reach the workers, and what they start can be ended with them."""
    made.start("print(os.getpgid(0) == os.getpid()); " + WAIT_FOR_END)
    made.ready()

    assert made.said()[0] == "True"
    assert list(made.pool.pids) == ["worker-1.job"]
    assert os.getpgid(made.pool.pids["worker-1.job"]) == made.pool.pids["worker-1.job"]


def test_sites_are_dealt_out_evenly() -> None:
    """No worker has two sites more than another, and each site has one."""
    assert spread(["a", "b", "c", "d", "e"], 2) == [["a", "c", "e"], ["b", "d"]]
    assert spread(["a"], 1) == [["a"]]


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker's libraries get their part of the machine, unless the user decided."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)
    assert share_cores(3) == {"OMP_NUM_THREADS": "2", "TF_NUM_INTRAOP_THREADS": "2"}
    assert share_cores(100) == {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}

    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert share_cores(3) == {"TF_NUM_INTRAOP_THREADS": "2"}


# --- ends


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("sys.exit(3)", "its worker process ended with exit code 3"),
        ("os._exit(0)", "its worker process ended with exit code 0"),
        ("print('one'); print('  the last  '); sys.exit(1)", "ended with exit code 1 (last output: the last)"),
        ("print('x' * 5000); sys.exit(1)", f"ended with exit code 1 (last output: {'x' * 300})"),
        ("os.write(1, b'\\xff\\xfe bytes'); os._exit(1)", "ended with exit code 1 (last output: \ufffd\ufffd bytes)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "its worker process was killed by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "its worker process was killed by SIGSEGV"),
        (f"os.kill(os.getpid(), {int(signal.SIGRTMIN) + 1})", "its worker process was killed by signal 35"),
    ],
    ids=["code", "zero", "words", "many words", "bytes", "SIGKILL", "SIGSEGV", "real-time signal"],
)
def test_an_end_is_told_in_words(made: Pool, code: str, reason: str) -> None:
    """Whoever dies is reported at once, with how it ended and what it said last."""
    made.start(code)
    end = made.end()

    assert (end.address, end.sites) == ("worker-1.job", ("worker-1-site-1", "worker-1-site-2"))
    assert reason in end.reason
    assert made.pool.pids == {}


@pytest.mark.parametrize(("noted", "culprit"), [("worker-1-site-2", "worker-1-site-2"), ("-", None), ("", None)])
def test_whose_turn_it_was_is_told(made: Pool, noted: str, culprit: str | None) -> None:
    """The site that had the turn is named; nobody, if nobody had it or the worker never got ready."""
    made.start(f"turn({noted!r}); sys.exit(1)")

    assert made.end().culprit == culprit


def test_what_an_end_left_behind_is_ended(made: Pool) -> None:
    """Processes that a script started and left do not outlive its worker."""
    child = "import subprocess; left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    made.start(child + "print(left.pid, flush=True); os._exit(1)")
    made.end()

    deadline = time.monotonic() + LIMIT_S
    while not is_gone(int(made.said()[0])):
        assert time.monotonic() < deadline


def lives(made: Pool, code: str) -> int:
    """Start a worker again for as long as that is worth it; how often it lived."""
    made.start(code)
    for number in range(1, 100):
        if not made.end().will_restart:
            return number
        made.pool.restart("worker-1.job")
    raise AssertionError("for ever")


def test_one_that_never_gets_ready_is_given_up_soon(made: Pool) -> None:
    """A worker that cannot even start is tried a few times only, and its last words are those of its last life."""
    assert lives(made, "print('cannot import'); sys.exit(1)") == MAX_STILLBIRTHS + 1
    assert made.said() == ["cannot import"] * (MAX_STILLBIRTHS + 1)


def test_one_that_is_killed_while_idle_is_started_again_for_long(made: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that had been ready is started again, though not for ever."""
    monkeypatch.setattr(server_pool, "MAX_RESTARTS", 4)
    assert MAX_RESTARTS > 4

    assert lives(made, "turn('-'); sys.exit(1)") == 5


def test_a_site_that_takes_its_worker_down_is_not_the_pools_to_give_up(
    made: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends while a site had the turn are counted by the job, for that site; the worker is started again."""
    monkeypatch.setattr(server_pool, "MAX_RESTARTS", 2)
    made.start("turn('worker-1-site-1'); sys.exit(1)")
    for _ in range(6):
        assert made.end().will_restart
        made.pool.restart("worker-1.job")


def test_words_of_an_earlier_life_are_not_told_again(made: Pool) -> None:
    """What a worker said before it was started again does not explain its second end."""
    made.start(
        "first = not os.path.exists('mark'); open('mark', 'w').close(); print('once') if first else 0; sys.exit(1)"
    )
    os.path.exists("mark")
    first = made.end()
    made.pool.restart("worker-1.job")
    second = made.end()
    Path("mark").unlink()

    assert first.reason.endswith("(last output: once)")
    assert second.reason == "its worker process ended with exit code 1"


# --- the end of all


def test_those_who_were_told_end_by_themselves(made: Pool) -> None:
    """A worker that knows of the end is left to it; nothing is reported, and no turn file is left."""
    made.start("turn('-'); print('ready', flush=True); time.sleep(0.05); print('in peace', flush=True)")
    made.ready()
    made.pool.stop(["worker-1.job"], LIMIT_S)

    assert made.said() == ["ready", "in peace"]
    assert made.ends.empty()
    assert made.pool.pids == {}
    assert list(made.folder.glob("*.turn")) == []


def test_those_who_were_not_told_are_ended_at_once(made: Pool) -> None:
    """A worker that is not there any more is told to end, while the others still take their time."""
    made.start("turn('-'); print('ready', flush=True); time.sleep(0.05); print('in peace', flush=True)")
    made.start("print('ready', flush=True); time.sleep(600)", "worker-2")
    made.ready("worker-1", "worker-2")
    begin = time.monotonic()
    made.pool.stop(["worker-1.job"], LIMIT_S)

    assert time.monotonic() - begin < LIMIT_S / 2
    assert made.said() == ["ready", "in peace"]
    assert made.pool.pids == {}


def test_those_who_do_not_end_are_made_to(made: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience, then TERM, then KILL: whatever a script does, its process is gone in bounded time."""
    monkeypatch.setattr(server_pool, "TERM_S", 0.2)
    made.start("signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)")
    made.start(
        "signal.signal(signal.SIGTERM, lambda *_: (print('TERM', flush=True), os._exit(0)));"
        "print('ready', flush=True); time.sleep(600)",
        "worker-2",
    )
    made.ready("worker-1", "worker-2")
    pids = made.pool.pids
    made.pool.stop(list(pids), 0.0)

    assert made.pool.pids == {}
    assert all(is_gone(pid) for pid in pids.values())
    assert made.said("worker-2") == ["ready", "TERM"]


def test_kill_ends_all_at_once(made: Pool) -> None:
    """From any thread and without waiting: nothing is left of any worker."""
    for name in ("worker-1", "worker-2"):
        made.start(WAIT_FOR_END, name)
    made.ready("worker-1", "worker-2")
    made.pool.kill()

    assert made.pool.wait(LIMIT_S)
    assert made.ends.empty()
    made.pool.stop((), 0.0)


def test_workers_hear_that_their_parent_is_gone(made: Pool) -> None:
    """Standard input stays open for as long as the parent lives, and no longer."""
    made.start("print('ready', flush=True); sys.stdin.buffer.read(); print('alone', flush=True)")
    made.ready()
    assert not made.pool.wait(0.05)
    process = made.pool._workers["worker-1.job"].process
    assert process.stdin is not None
    process.stdin.close()

    assert made.end().reason.endswith("(last output: alone)")
