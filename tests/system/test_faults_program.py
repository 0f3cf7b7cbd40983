"""The program as a process that somebody interrupts, kills, starts twice or gives nonsense."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from flarebus.site.import_path import import_path
from tests.system.observed import GONE_S, LIMIT_S, ONE, marked_processes, wait_until
from workflows._program import main

ADD = ONE.format(body="")
# One that adds one and never answers in the third round.
STUCK = ONE.format(
    body="""
    import threading
    if model.current_round == 2:
        open("stuck", "w").close()
        threading.Event().wait()
"""
)
# The same, and not even another thread of the process can run, as in a library that does not let go of Python's lock.
STUCK_IN_C = STUCK.replace("threading.Event().wait()", "__import__('ctypes').PyDLL(None).pause()")
# One that goes on with the third round when a file is there.
GATE = ONE.format(
    body="""
    import os, time
    while model.current_round == 2 and not os.path.exists("../../../gate"):
        time.sleep(0.01)
"""
)


class Program:
    """`python -m workflows.fedavg` in a process group of its own, as a terminal would have it."""

    def __init__(self, folder: Path, script: str, *argv: str, stdout: int = subprocess.DEVNULL) -> None:
        name = argv[argv.index("--name") + 1] if "--name" in argv else "fedavg"
        self.run_dir = folder / "runs" / name
        self._err: list[str] = []
        script_path, model = folder / "client.py", folder / "zeros.npz"
        script_path.write_text(script)
        np.savez(model, w=np.zeros(4, np.float32))
        self.argv = ["--train-script", str(script_path), "--initial-ckpt", str(model), "--clients", "2"]
        self.argv += ["--threads", "2", "--key-metric", "loss", "--workspace", str(folder / "runs"), *argv]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workflows.fedavg", *self.argv],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **import_path(os.environ)},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._err.append(line)

    @property
    def err(self) -> str:
        """What it has said on standard error so far."""
        return "".join(self._err)

    def wait_for(self, text: str) -> None:
        """Wait until it says this."""
        wait_until(lambda: text in self.err or self.process.poll() is not None, text)
        assert text in self.err

    def wait_for_output(self, text: str) -> None:
        """Read its standard output up to a line with this."""
        assert self.process.stdout is not None
        assert any(text in line for line in self.process.stdout), self.err

    def wait_for_file(self, *names: str) -> None:
        """Wait for a file below its run folder."""
        path = self.run_dir.joinpath(*names)
        wait_until(lambda: path.exists() or self.process.poll() is not None, str(path))
        assert path.exists(), self.err

    def wait_for_rounds(self, number: int) -> None:
        """Wait until so many rounds are committed, their lines of metrics included."""
        self.wait_for_file("server", "metrics.jsonl")
        path = self.run_dir / "server/metrics.jsonl"
        wait_until(lambda: path.read_text().count("\n") >= number, f"{number} rounds")

    def interrupt(self) -> None:
        """Press Ctrl-C: a terminal signals the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, limit_s: float = LIMIT_S) -> int:
        """Wait for its end; its exit code."""
        code = self.process.wait(limit_s)
        self._reader.join(LIMIT_S)
        return code

    def committed(self) -> tuple[int, str]:
        """How many rounds are committed and how the job ended; the model is that of the last one."""
        with contextlib.closing(sqlite3.connect(self.run_dir / "server/rounds.sqlite")) as journal:
            assert journal.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            rounds = [row[0] for row in journal.execute("SELECT number FROM rounds ORDER BY number")]
            state = journal.execute("SELECT state FROM job").fetchone()[0]
        assert rounds == list(range(len(rounds)))
        model = load_file(self.run_dir / "server/models/FL_global_model.safetensors")
        assert model["w"].tolist() == [float(len(rounds))] * 4
        return len(rounds), state

    def close(self) -> None:
        """See that it is gone."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.end()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture
def start(tmp_path: Path, sockets: Path, mark: str) -> Iterator[type[Program]]:
    """Starts programs; they are gone at the end of the test."""
    started: list[Program] = []

    def begin(script: str, *argv: str, **options: int) -> Program:
        started.append(Program(tmp_path, script, *argv, **options))
        return started[-1]

    yield begin
    for program in started:
        program.close()


def gone(mark: str) -> None:
    """All processes of the test end soon."""
    wait_until(lambda: not marked_processes(mark), "all processes are gone", GONE_S)


def test_ctrl_c(start, sockets: Path, mark: str) -> None:
    """Ctrl-C ends the job in an orderly way: code 130, what was committed is kept, and nothing else is left."""
    program = start(ADD, "--rounds", "100000")
    program.wait_for_rounds(1)

    program.interrupt()

    assert program.end() == 130, program.err
    gone(mark)
    rounds, state = program.committed()
    assert rounds >= 1
    assert state == "aborted"
    assert len((program.run_dir / "server/metrics.jsonl").read_text().splitlines()) == rounds
    assert "interrupt again to leave at once" in program.err
    assert "stopped: Ctrl-C" in program.err
    assert "Traceback" not in program.err
    assert "aborted by user" in (program.run_dir / "server/log.txt").read_text()
    assert list(sockets.iterdir()) == []


def test_ctrl_c_twice(start, sockets: Path, mark: str) -> None:
    """A second Ctrl-C does not wait for a script that does not come to its end; nothing but the model is left."""
    program = start(STUCK, "--rounds", "4", "--json")
    program.wait_for_file("site-1", "stuck")
    program.wait_for_rounds(2)

    program.interrupt()
    program.wait_for("interrupt again to leave at once")
    program.interrupt()
    begin = time.monotonic()

    assert program.end() == 130, program.err
    assert time.monotonic() - begin < 2
    gone(mark)
    assert program.committed()[0] == 2
    assert "Traceback" not in program.err
    assert list(sockets.iterdir()) == []


def test_ctrl_c_twice_while_the_job_cannot_look_up(start, tmp_path: Path, sockets: Path, mark: str) -> None:
    """A second Ctrl-C does not even wait for a job that is held up by the disk."""
    program = start(GATE, "--rounds", "4", stdout=subprocess.PIPE)
    program.wait_for_rounds(2)
    # For 5 s nobody else can write to it; then the job would fail.
    journal = sqlite3.connect(program.run_dir / "server/rounds.sqlite", isolation_level=None)
    journal.execute("BEGIN IMMEDIATE")
    (tmp_path / "gate").touch()
    program.wait_for_output("round 3/4")

    program.interrupt()
    program.wait_for("interrupt again to leave at once")
    program.interrupt()
    begin = time.monotonic()

    assert program.end() == 130, program.err
    assert time.monotonic() - begin < 2
    journal.close()
    gone(mark)
    assert list(sockets.iterdir()) == []


@pytest.mark.parametrize("script", [STUCK, STUCK_IN_C] if sys.platform == "linux" else [STUCK], ids=["idle", "in C"])
def test_killed(start, script: str, sockets: Path, mark: str) -> None:
    """When the program is killed its workers end at once; the next run cleans up and may have the same folder."""
    program = start(script, "--rounds", "4")
    program.wait_for_file("site-2", "stuck")
    program.wait_for_rounds(2)

    program.process.kill()

    assert program.end() == -signal.SIGKILL
    gone(mark)
    assert program.committed() == (2, "running")
    (left,) = sockets.iterdir()
    long_ago = time.time() - 3600
    os.utime(left, (long_ago, long_ago))
    again = start(ADD, "--rounds", "3")
    assert again.end() == 0, again.err
    assert again.committed() == (3, "completed")
    assert list(sockets.iterdir()) == []


def test_nobody_reads_its_output(start, sockets: Path, mark: str) -> None:
    """When its standard output is closed, as by `head`, the job ends with that reason instead of running on unseen."""
    program = start(ADD, "--rounds", "100000", stdout=subprocess.PIPE)
    assert program.process.stdout.readline().startswith("2 sites")

    program.process.stdout.close()

    assert program.end() == 1, program.err
    gone(mark)
    assert "nobody reads the output any more" in program.err
    assert "Traceback" not in program.err
    assert program.committed()[1] == "failed"
    assert list(sockets.iterdir()) == []


def test_two_runs_in_one_workspace(start, capfd: pytest.CaptureFixture[str]) -> None:
    """A second run of the same name is refused and names the process of the first; one of another name is welcome."""
    program = start(STUCK, "--rounds", "4")
    program.wait_for_file("site-1", "stuck")

    assert main(program.argv) == 2

    err = capfd.readouterr().err
    assert f"--name 'fedavg': process {program.process.pid} is running a job of this name" in err
    assert "Traceback" not in err
    other = start(ADD, "--rounds", "2", "--name", "other")
    assert other.end() == 0, other.err
    assert other.committed() == (2, "completed")
    assert program.process.poll() is None
    program.interrupt()
    assert program.end() == 130, program.err
    assert program.committed() == (2, "aborted")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--min-clients", "3"], "--min-clients 3: needs more sites than there are: 2"),
        (["--clients", "a b,c"], "--clients 'a b': a name is"),
        (["--clients", "a.b,c"], "--clients 'a.b': a name is"),
        (["--clients", "..,c"], "--clients '..': a name is"),
        (["--clients", "x" * 300 + ",c"], "a name is 1 to 63 letters"),
        (["--initial-ckpt", "{folder}/missing.npz"], "missing.npz': cannot be read: No such file or directory"),
        (["--initial-ckpt", "{folder}/cut.npz"], "cut.npz': is damaged, or not what its name says"),
        (["--initial-ckpt", "{folder}/cut.npy"], "cut.npy': is damaged, or not what its name says"),
        (["--initial-ckpt", "{folder}/cut.safetensors"], "cut.safetensors': not a whole safetensors file"),
        (["--initial-ckpt", "{folder}/cut.pt", "--framework", "pytorch"], "cut.pt': holds more than weights, or is"),
        (["--initial-ckpt", "{folder}/empty.npz"], "empty.npz': holds no parameters"),
        (["--workspace", "{folder}/client.py/runs"], "--workspace"),
        (["--workspace", "/proc/runs"], "--workspace '/proc/runs': cannot write there"),
    ],
)
def test_what_cannot_work(
    tmp_path: Path, mark: str, sockets: Path, capfd: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    """A mistake in what was asked for ends with code 2 and one line that names it; no process is started."""
    (tmp_path / "client.py").write_text(ADD)
    np.savez(tmp_path / "zeros.npz", w=np.zeros(4, np.float32))
    np.savez(tmp_path / "empty.npz")
    whole = (tmp_path / "zeros.npz").read_bytes()
    for suffix in ("npz", "npy", "safetensors", "pt"):
        (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    asked = ["--train-script", str(tmp_path / "client.py"), "--clients", "2", "--workspace", str(tmp_path / "runs")]
    asked += ["--initial-ckpt", str(tmp_path / "zeros.npz"), "--json"]

    assert main([*asked, *(text.replace("{folder}", str(tmp_path)) for text in argv)]) == 2

    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert json.loads(out)["state"] == "failed"
    assert marked_processes(mark) == {}
    assert list(sockets.iterdir()) == []
