"""What becomes of a trainer and of all it started when something ends: the client job, the trainer, a session."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flarebus.site import launcher
from flarebus.site.guardian import GRACE_S
from tests.site.launched import LIMIT_S, Launch, changed_guardian
from tests.system.observed import GONE_S, marked_processes, wait_until

ROOT = Path(__file__).parents[2]
FOREVER = "while True: time.sleep(60)\n"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
# One process in the trainer's group, one in a session of its own with a child, one that nobody waits for.
FAMILY = f"""
def child(*lines):
    code = "import os, signal, time\\n" + "".join(lines) + {FOREVER!r}
    return [sys.executable, "-c", code]

subprocess.Popen(child())
subprocess.Popen(child({DEAF!r}, "os.fork()\\n"), start_new_session=True)
if os.fork() == 0:
    subprocess.Popen(child(), start_new_session=True)
    os._exit(0)
os.wait()
print("ready", flush=True)
"""
N_FAMILY = 5  # with the trainer

CLIENT_JOB = """
import os, signal, sys, threading
from pathlib import Path
sys.path[:0] = [{root!r}]
from flarebus.site.launcher import TrainerProcess

over = threading.Event()

def say(text):
    os.write(1, text.encode() + b"\\n")  # in one piece

trainer = TrainerProcess(
    [sys.executable, "-c", "import os, signal, subprocess, sys, time\\n" + {code!r}],
    folder=Path({folder!r}), environ=os.environ,
    on_line=lambda stream, line: say(line),
    on_exit=lambda ended: (say(ended.describe()), over.set()),
)
{body}
"""


class ClientJob:
    """A process that has a trainer, to be ended one way or another."""

    def __init__(self, folder: Path, code: str, body: str = "over.wait()") -> None:
        text = CLIENT_JOB.format(root=str(ROOT), code=code, folder=str(folder), body=body)
        self.process = subprocess.Popen(
            [sys.executable, "-c", text],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )

    def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def close(self) -> None:
        """End it if it still runs."""
        self.process.kill()
        with self.process:
            pass


@pytest.fixture
def jobs(mark: str) -> Iterator[list[ClientJob]]:
    """Those that a test puts here are ended after it."""
    made: list[ClientJob] = []
    yield made
    for job in made:
        job.close()


def others(mark: str, *known: int) -> dict[int, str]:
    """The marked processes that are neither guardians nor `known`."""
    return {pid: line for pid, line in marked_processes(mark).items() if "guardian.py" not in line and pid not in known}


@pytest.mark.parametrize(
    ("body", "number"),
    [
        ("over.wait()", signal.SIGKILL),
        ("over.wait()", signal.SIGTERM),
        ("os.kill(os.getpid(), signal.SIGSTOP)", signal.SIGKILL),
        ("sys.stdin.read()", None),
    ],
    ids=["killed", "terminated", "killed while it is stopped", "ended by itself"],
)
def test_nothing_outlives_the_client_job(
    jobs: list[ClientJob], mark: str, tmp_path: Path, body: str, number: signal.Signals | None
) -> None:
    """However it ends, the trainer and everything that came from it are gone in no time."""
    job = ClientJob(tmp_path, FAMILY + FOREVER, body)
    jobs.append(job)
    if "SIGSTOP" not in body:
        assert job.line() == "ready"
    wait_until(lambda: len(others(mark, job.process.pid)) >= N_FAMILY, "all are there")
    if number is None:
        assert job.process.stdin is not None
        job.process.stdin.close()
    else:
        job.process.send_signal(number)
    job.process.wait(LIMIT_S)

    wait_until(lambda: not marked_processes(mark), f"gone: {marked_processes(mark)}", GONE_S)


def test_a_fork_of_the_client_job_does_not_keep_the_trainer_alive(
    jobs: list[ClientJob], mark: str, tmp_path: Path
) -> None:
    """A process that was forked off holds the guardian's input open; the end of the client job counts all the same."""
    body = "fork = os.fork()\nif fork == 0:\n    signal.pause()\nsay(f'fork {fork}')\nover.wait()"
    job = ClientJob(tmp_path, FOREVER, body)
    jobs.append(job)
    fork = int(job.line().removeprefix("fork"))
    wait_until(lambda: others(mark, job.process.pid, fork), "the trainer runs")
    job.process.kill()
    try:
        wait_until(lambda: marked_processes(mark).keys() == {fork}, f"gone: {marked_processes(mark)}", GONE_S)
    finally:
        os.kill(fork, signal.SIGKILL)


def test_the_end_of_its_input_is_the_end(mark: str, tmp_path: Path) -> None:
    """Where no process can be watched, and whatever else this one still does."""
    reports, status = os.pipe()
    guardian = subprocess.Popen(
        [sys.executable, "-I", "-S", launcher._GUARDIAN, str(status)], stdin=subprocess.PIPE, pass_fds=(status,)
    )
    os.close(status)
    order = {"argv": ["sleep", "600"], "folder": str(tmp_path), "environ": dict(os.environ), "parent": os.getpid()}
    with open(reports, "rb") as file, guardian:
        try:
            assert guardian.stdin is not None
            guardian.stdin.write(json.dumps(order).encode() + b"\n")
            guardian.stdin.flush()
            assert json.loads(file.readline()).keys() == {"pid"}
            guardian.stdin.close()
            assert json.loads(file.readline())["signal"] == signal.SIGTERM
            guardian.wait(LIMIT_S)
        finally:
            guardian.kill()


def test_ctrl_c_does_not_reach_the_trainer(jobs: list[ClientJob], tmp_path: Path) -> None:
    """It is the client job's to decide what an interrupt of its process group means."""
    code = "print('ready', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.01)\nprint('alive')"
    body = "signal.signal(signal.SIGINT, lambda *_: say('interrupted'))\nsay('set')\n"
    job = ClientJob(tmp_path, code, body + "over.wait()")
    jobs.append(job)
    assert {job.line(), job.line()} == {"ready", "set"}
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.line() == "interrupted"
    (tmp_path / "go").touch()

    assert job.line() == "alive"
    assert job.line() == "its trainer process ended with exit code 0 (last output: alive)"


@pytest.mark.parametrize("end", ["sys.exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_what_a_trainer_leaves_behind_is_ended(launch: Launch, mark: str, end: str) -> None:
    """Also what has a session of its own and does not hear TERM; once waiting is over there is nothing."""
    trainer = launch(FAMILY + end)
    trainer.wait_exit()

    assert marked_processes(mark) == {}


def test_everything_hears_that_it_shall_end(launch: Launch, mark: str, tmp_path: Path) -> None:
    """TERM goes to each process once, whatever its session, and each has the whole grace, not just the trainer."""
    (tmp_path / "worker.py").write_text(
        "import signal, sys, time\n"
        "def stop(*_):\n"
        "    print('stopping', file=notes, flush=True)\n"
        f"    time.sleep({GRACE_S + 0.5})  # longer than what is left behind would have\n"
        "    sys.exit(print('saved', file=notes, flush=True))\n"
        "notes = open(sys.argv[1], 'w')\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "print(sys.argv[1] + '\\n', end='', flush=True)  # in one piece, also without a buffer\n" + FOREVER
    )
    trainer = launch(
        "for name in 'ab': subprocess.Popen([sys.executable, 'worker.py', name], start_new_session=name == 'a')\n"
        + FOREVER
    )
    for name in "ab":
        trainer.wait_line(name)
    trainer.process.end(10 * LIMIT_S)

    assert trainer.wait_exit().signal == signal.SIGTERM
    assert [(tmp_path / name).read_text() for name in "ab"] == ["stopping\nsaved\n"] * 2
    assert marked_processes(mark) == {}


def test_a_chain_of_processes_is_caught(launch: Launch, mark: str) -> None:
    """Each starts the next and ends: the group is killed in one step, which nobody forks ahead of."""
    trainer = launch(
        "if os.fork() == 0:\n    print('ready', flush=True)\n"
        f"    {DEAF}    while os.fork() == 0: pass\n    os._exit(0)\n" + FOREVER
    )
    trainer.wait_line("ready")
    trainer.process.kill()
    trainer.wait_exit()

    assert marked_processes(mark) == {}


def test_a_guardian_that_is_told_to_end_ends_everything(launch: Launch, mark: str) -> None:
    """Somebody ends it by hand: it does not leave the trainer alone, and reports its end as usual."""
    trainer = launch(FAMILY + FOREVER)
    trainer.wait_line("ready")
    (guardian,) = [pid for pid, line in marked_processes(mark).items() if "guardian.py" in line]
    os.kill(guardian, signal.SIGTERM)
    ended = trainer.wait_exit()

    assert (ended.signal, ended.guardian_end) == (signal.SIGTERM, None)
    assert marked_processes(mark) == {}


# What it does without: see a process's children, reap grandchildren, watch a process that is not its child.
ELSEWHERE = (
    ("    todo = {os.getpid()}\n", "    todo = set()\n"),
    ("    call = ctypes.CDLL(None, use_errno=True).prctl\n", "    return lambda _option, _value: False\n"),
    ("        return os.pidfd_open(pid)\n", "        return None\n"),
)
GROUP = (
    "subprocess.Popen([sys.executable, '-c', 'import signal, time\\n'"
    f"{DEAF!r} 'print(\"ready\", flush=True)\\n' {FOREVER!r}])\n"
)


@pytest.mark.parametrize("how", ["it ended", "it was ended", "it was killed"])
def test_the_process_group_is_ended_where_the_kernel_tells_less(
    launch: Launch, mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Without anything that only Linux has, what is in the trainer's group is still found, and waiting has an end."""
    changed_guardian(tmp_path, monkeypatch, *ELSEWHERE)
    go = "while not os.path.exists('go'): time.sleep(0.01)\n" if how == "it ended" else FOREVER
    trainer = launch(GROUP + go)
    trainer.wait_line("ready")
    if how == "it ended":
        (tmp_path / "go").touch()
    elif how == "it was ended":
        trainer.process.end(0.2)
    else:
        trainer.process.kill()
    ended = trainer.wait_exit()

    expected = {"it ended": (0, None), "it was ended": (None, signal.SIGTERM), "it was killed": (None, signal.SIGKILL)}
    assert (ended.code, ended.signal) == expected[how]
    wait_until(lambda: not marked_processes(mark), f"gone: {marked_processes(mark)}", GONE_S)
