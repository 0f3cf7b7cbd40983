"""Starting a trainer, what it says, how it ends, and what is told of that. All with real processes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

import flarebus
from flarebus.client.log_config import MARK
from flarebus.client.settings import ENV_API_TYPE, ENV_CLIENT_CONFIG
from flarebus.site.import_path import import_path
from flarebus.site.launcher import TrainerExit, trainer_environ
from tests.site.launched import LIMIT_S, Launch, Launched, changed_guardian
from tests.system.observed import GONE_S, marked_processes, wait_until

FOREVER = "while True: time.sleep(60)\n"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
READY = "print('ready', os.getpid(), flush=True)\n"


def state_of(pid: int) -> str:
    """The letter of a process's state."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# --- how it ends


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("", "its trainer process ended with exit code 0"),
        ("sys.exit(17)", "its trainer process ended with exit code 17"),
        ("print('almost'); sys.exit(17)", "its trainer process ended with exit code 17 (last output: almost)"),
        ("sys.exit('bad data')", "its trainer process ended with exit code 1 (last output: bad data)"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "its trainer process was killed by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "its trainer process was killed by SIGKILL"),
        ("os.kill(os.getpid(), 40)", "its trainer process was killed by signal 40"),
    ],
)
def test_the_end_is_told_in_words(launch: Launch, code: str, words: str) -> None:
    """Exit code, signal and the last output."""
    ended = launch(code).wait_exit()

    assert ended.describe() == words
    assert not ended.was_ended


def test_the_fields_of_an_end(launch: Launch) -> None:
    """A program reads what a person reads."""
    ended = launch("print('one'); print('two', file=sys.stderr); sys.exit(3)").wait_exit()

    assert (ended.code, ended.signal, ended.start_error, ended.last_words) == (3, None, None, "two")
    assert ended.max_rss_mb is not None
    assert 1 < ended.max_rss_mb < 1000


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["python3x"], "could not be started: python3x: not found; check command"),
        (["./no/such"], "could not be started: ./no/such: not found; check command"),
        (["./plain"], "could not be started: ./plain: not executable; check command"),
        (["./orphan"], "could not be started: ./orphan: the program that its first line names was not found; check"),
        (
            ["./data"],
            "could not be started: ./data: not a program (a script needs a first line with #!); check command",
        ),
        (["true", "a\0b"], "could not be started: true: embedded null byte; check command"),
        ([], "could not be started: its command is empty"),
    ],
)
def test_a_command_that_cannot_be_started(launch: Launch, tmp_path: Path, argv: list[str], words: str) -> None:
    """What is wrong with it and where to look come the same way as any other end."""
    for name, text, mode in (("plain", "", 0o644), ("orphan", "#!/no/such/python\n", 0o755), ("data", "\x7f", 0o755)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    trainer = launch(argv)
    ended = trainer.wait_exit()

    assert ended.describe().startswith(f"its trainer process {words}")
    assert (ended.code, ended.signal, trainer.process.pid) == (None, None, None)


def test_a_folder_that_is_missing(launch: Launch, tmp_path: Path) -> None:
    """The folder is what was not found then, not the program."""
    ended = launch(["true"], folder=tmp_path / "gone").wait_exit()

    assert ended.start_error == f"its folder {tmp_path / 'gone'}: No such file or directory"


def test_a_guardian_that_cannot_be_started(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even then the end comes through `on_exit`, and everything may be called."""
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    trainer = launch(["true"])
    ended = trainer.wait_exit()
    trainer.process.end(1)

    assert ended.start_error == "its guardian process: No such file or directory"


def test_a_script_that_is_no_python(launch: Launch) -> None:
    """Python says so itself, and that is the last output."""
    ended = launch("1 +").wait_exit()

    assert ended.code == 1
    assert ended.describe().endswith("(last output: SyntaxError: invalid syntax)")


def test_a_script_that_runs_out_of_memory(launch: Launch) -> None:
    """A person is pointed to the memory."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))"
    ended = launch(f"{limit}\nbytearray(1 << 30)").wait_exit()

    assert "ended with exit code 1 (out of memory? It had" in ended.describe()
    assert ended.last_words.endswith("\nMemoryError")


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (TrainerExit(signal=9, max_rss_mb=20000), "was killed by SIGKILL (out of memory? It had 20000 MiB)"),
        (TrainerExit(code=137, max_rss_mb=20000), "ended with exit code 137 (out of memory? It had 20000 MiB)"),
        (TrainerExit(signal=9, max_rss_mb=20), "was killed by SIGKILL"),
        (TrainerExit(signal=9, max_rss_mb=20000, was_ended=True), "was killed by SIGKILL after it was told to end"),
        (
            TrainerExit(signal=6, last_words="what():  std::bad_alloc"),
            "was killed by SIGABRT (out of memory?) (last output: what():  std::bad_alloc)",
        ),
        (TrainerExit(code=1, last_words="a\n\x1b[31mb "), r"ended with exit code 1 (last output: \x1b[31mb)"),
        (TrainerExit(code=1, last_words="x" * 999), f"ended with exit code 1 (last output: {'x' * 300})"),
    ],
)
def test_what_an_end_is_called(ended: TrainerExit, words: str) -> None:
    """One line, without control characters, with a hint where one is due."""
    assert ended.describe() == f"its trainer process {words}"


# --- ending it


def test_one_that_does_not_hear_is_killed(launch: Launch) -> None:
    """TERM first, KILL after the grace; telling it again does not make that longer."""
    trainer = launch(DEAF + READY + FOREVER)
    trainer.wait_line("ready")
    assert trainer.process.is_running
    for grace_s in (0.2, 10 * LIMIT_S):
        trainer.process.end(grace_s)
    ended = trainer.wait_exit()

    assert ended.describe() == (
        f"its trainer process was killed by SIGKILL after it was told to end (last output: ready {trainer.process.pid})"
    )
    assert ended.was_ended


def test_one_that_hears_has_time_to_finish(launch: Launch) -> None:
    """What it does and says on TERM counts."""
    trainer = launch(
        "def stop(*_):\n    print('saved'); sys.exit(4)\nsignal.signal(signal.SIGTERM, stop)\n" + READY + FOREVER
    )
    trainer.wait_line("ready")
    trainer.process.end(LIMIT_S)
    ended = trainer.wait_exit()

    assert (ended.code, ended.was_ended) == (4, True)
    assert trainer.out[-1] == "saved"


def test_a_shorter_grace_replaces_a_longer_one(launch: Launch) -> None:
    """Whoever has less patience is heard, and TERM comes once."""
    trainer = launch(
        "signal.signal(signal.SIGTERM, lambda *_: print('no', flush=True))\n" + READY + FOREVER,
    )
    trainer.wait_line("ready")
    trainer.process.end(10 * LIMIT_S)
    trainer.wait_line("no")
    trainer.process.end(0.1)
    ended = trainer.wait_exit()

    assert ended.signal == signal.SIGKILL
    assert trainer.out[1:] == ["no"]


def test_killing_needs_no_grace(launch: Launch) -> None:
    """KILL comes at once, also when it was told to end with a long grace."""
    trainer = launch(DEAF + READY + FOREVER)
    trainer.wait_line("ready")
    trainer.process.end(10 * LIMIT_S)
    trainer.process.kill()

    assert trainer.wait_exit().signal == signal.SIGKILL


def test_one_that_is_stopped_is_ended(launch: Launch) -> None:
    """A trainer that somebody has stopped hears TERM all the same."""
    trainer = launch(READY + FOREVER)
    pid = int(trainer.wait_line("ready"))
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state_of(pid) == "T", "it is stopped")
    trainer.process.end(10 * LIMIT_S)

    assert trainer.wait_exit().signal == signal.SIGTERM


def test_telling_one_that_has_ended_does_no_harm(launch: Launch) -> None:
    """It ended by itself, and stays so."""
    trainer = launch("pass")
    ended = trainer.wait_exit()
    trainer.process.end(0)
    trainer.process.kill()

    assert trainer.process.wait(0)
    assert not ended.was_ended


def test_one_may_be_told_before_it_runs(launch: Launch) -> None:
    """It is ended as soon as there is something to end."""
    trainer = launch(FOREVER)
    trainer.process.end(0)

    assert trainer.wait_exit().was_ended


def test_waiting_has_an_end(launch: Launch) -> None:
    """The answer is no while it runs."""
    trainer = launch(FOREVER)

    assert not trainer.process.wait(0.01)


def test_a_guardian_that_is_killed_takes_the_trainer_with_it(launch: Launch, mark: str) -> None:
    """And that is what the reason says; what was in the trainer's process group goes too."""
    trainer = launch("subprocess.Popen(['sleep', '600'])\n" + READY + FOREVER)
    pid = int(trainer.wait_line("ready"))
    (guardian,) = [pid for pid, line in marked_processes(mark).items() if "guardian.py" in line]
    os.kill(guardian, signal.SIGKILL)
    ended = trainer.wait_exit()

    assert ended.describe().startswith("its trainer process was killed, for its guardian process was killed by SIGKILL")
    wait_until(lambda: not marked_processes(mark), f"{pid} and its child are gone", GONE_S)


# --- what it says


def test_lines_come_in_order_from_both_streams(launch: Launch) -> None:
    """Many lines, none lost, and the last one without an end."""
    trainer = launch("for n in range(50000): print(n)\nprint('warn', file=sys.stderr)\nprint('end', end='')")
    trainer.wait_exit()

    assert trainer.out == [*map(str, range(50000)), "end"]
    assert [line for stream, line in trainer.lines if stream == "stderr"] == ["warn"]


def test_what_is_no_text_harms_nobody(launch: Launch) -> None:
    """Bytes that are no UTF-8 are replaced; of a progress bar the last state is kept; long lines are cut."""
    trainer = launch(
        "os.write(1, b'\\xff\\xfe\\x00 \\xc3\\xbc\\n')\nprint('10%\\r50%\\r100%')\nprint('x' * 200000)\nprint('end')"
    )
    trainer.wait_exit()

    assert trainer.out[:2] == ["\ufffd\ufffd\x00 ü", "100%"]
    assert [len(line) for line in trainer.out[2:]] == [65536, 65536, 65536, 200000 - 3 * 65536, 3]


def test_a_slow_log_does_not_stop_the_trainer(launch: Launch) -> None:
    """It writes much more than a pipe holds and ends, while its first line is still being handled."""
    go_on = threading.Event()
    trainer = launch(
        "for n in range(40): print('x' * 50000)",
        on_line=lambda *_: go_on.wait(LIMIT_S) and None,
    )
    wait_until(lambda: not trainer.process.is_running, "it ends")
    assert (trainer.lines, trainer.exits) == ([], [])
    go_on.set()
    trainer.wait_exit()

    assert len(trainer.out) == 40


def test_a_line_that_cannot_be_handled_is_no_end(launch: Launch, caplog: pytest.LogCaptureFixture) -> None:
    """The error is logged, and the next line comes."""

    def fail_once(_: str, line: str) -> None:
        if line == "one":
            raise ValueError("cannot")

    trainer = launch("print('one'); print('two')", on_line=fail_once)
    trainer.wait_exit()

    assert trainer.out == ["two"]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_last_words_are_without_marks(launch: Launch) -> None:
    """A log record of the trainer reads as in the log, and the line comes as it was written."""
    trainer = launch(f"os.write(2, {MARK + 'it failed'!r}.encode())")

    assert trainer.wait_exit().last_words == "it failed"
    assert trainer.lines == [("stderr", f"{MARK}it failed")]


def test_last_words_are_of_a_bounded_size(launch: Launch) -> None:
    """The end of standard error, whole lines, not more than 4 KiB."""
    ended = launch("for n in range(2000): print(n, file=sys.stderr)\nsys.exit(1)").wait_exit()

    assert ended.last_words.endswith("\n1998\n1999")
    assert 4000 < len(ended.last_words) <= 4096


def test_what_is_left_behind_does_not_delay_the_end(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process in a session of its own holds the output open and writes on; the end is told while it still runs."""
    changed_guardian(tmp_path, monkeypatch, ("GRACE_S = 1.0", f"GRACE_S = {10 * LIMIT_S}"))
    trainer = launch(
        "for number in (signal.SIGTERM, signal.SIGPIPE): signal.signal(number, signal.SIG_IGN)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.setsid()\n"
        "    while True:\n"
        "        try: os.write(1, b'.\\n')\n"
        "        except OSError: time.sleep(60)\n"
        "os.write(1, b'child %d\\n' % child)\n"
    )
    child = int(trainer.wait_line("child"))
    wait_until(lambda: trainer.exits, "the end is told")

    assert state_of(child) in "RS"
    assert not trainer.process.wait(0)
    trainer.process.kill()
    assert trainer.wait_exit().code == 0
    assert not Path(f"/proc/{child}").exists()


# --- what it is given


def test_it_lives_on_when_the_thread_that_started_it_ends(launch: Launch, tmp_path: Path) -> None:
    """A trainer belongs to the process, not to a thread."""
    started: list[Launched] = []
    code = READY + "while not os.path.exists('go'): time.sleep(0.01)\nprint('alive')"
    thread = threading.Thread(target=lambda: started.append(launch(code)))
    thread.start()
    thread.join(LIMIT_S)
    pid = int(started[0].wait_line("ready"))
    wait_until(lambda: thread.native_id not in map(int, os.listdir("/proc/self/task")), "the kernel's thread is gone")
    (tmp_path / "go").touch()

    assert started[0].wait_exit().code == 0
    assert started[0].out == [f"ready {pid}", "alive"]
    assert started[0].process.pid == pid


def test_names_arrive_as_they_are(launch: Launch, tmp_path: Path) -> None:
    """Spaces, quotes, other scripts and bytes that are no text, in folder, arguments and environment."""
    folder = tmp_path / "my folder ü '"
    folder.mkdir()
    odd = ["a b", "ü", "\udcff", "", "$HOME", "*", "\n"]
    code = "import os, sys; os.write(1, repr((os.getcwd(), sys.argv[1:], os.environ['ODD'])).encode('utf-8'))"
    trainer = launch([sys.executable, "-c", code, *odd], folder=folder, environ={**os.environ, "ODD": "\udcfe ü"})
    trainer.wait_exit()

    assert trainer.out == [repr((str(folder), odd, "\udcfe ü"))]


def test_it_gets_no_file_of_ours_and_an_empty_input(launch: Launch) -> None:
    """Only the three streams, also when a file of this process may be inherited."""
    read_end, write_end = os.pipe()
    os.set_inheritable(read_end, True)
    try:
        trainer = launch("print(sys.stdin.read() == '', sorted(os.listdir('/proc/self/fd'))[:-1])")
        trainer.wait_exit()
    finally:
        os.close(read_end)
        os.close(write_end)

    assert trainer.out == ["True ['0', '1', '2']"]


def test_it_starts_with_signals_as_they_are_by_default(launch: Launch) -> None:
    """Nothing is ignored or blocked, whatever this process ignores and blocks."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        trainer = launch(["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"])
        trainer.wait_exit()
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    # But for two that belong to the C library, which no program can ask about.
    own = ~(0b11 << 31)
    assert [int(line.split()[1], 16) & own for line in trainer.out] == [0, 0]


def test_it_leads_a_session_and_the_guardian_shows_nothing(launch: Launch, mark: str) -> None:
    """The arguments of the guardian, which anybody may read, name neither the trainer's nor its environment."""
    trainer = launch(
        "print(os.getpid() == os.getpgid(0) == os.getsid(0), os.getsid(os.getppid()) == os.getppid(), flush=True)\n"
        + FOREVER
    )
    trainer.wait_line("True True")
    (shown,) = [line for line in marked_processes(mark).values() if "guardian.py" in line]

    assert shown.split()[1:3] == ["-I", "-S"]
    assert len(shown.split()) == 5


def test_the_environment_of_a_trainer(launch: Launch, tmp_path: Path) -> None:
    """It knows what it is, and imports the very packages that run here, whatever its folder."""
    environ = trainer_environ(tmp_path / "client.json")
    code = (
        "import os, flarebus, flarebus_pipes, workflows\n"
        f"print(os.environ[{ENV_API_TYPE!r}], os.environ[{ENV_CLIENT_CONFIG!r}], flarebus.__file__)"
    )
    trainer = launch([sys.executable, "-c", code], environ=environ)
    trainer.wait_exit()

    assert trainer.out == [f"EX_PROCESS_API {tmp_path / 'client.json'} {flarebus.__file__}"]
    # Its PATH may begin with the folder of this Python.
    expected = {**os.environ, **import_path(os.environ), "PATH": environ["PATH"]}
    assert environ.items() >= expected.items()
    assert environ["PATH"].endswith(os.environ["PATH"])


@pytest.mark.parametrize(
    ("prefix", "path", "expected"),
    [
        ("/venv", "/usr/bin:/bin", "/venv/bin:/usr/bin:/bin"),
        ("/venv", "/own:/venv/bin:/bin", "/own:/venv/bin:/bin"),
        (sys.base_prefix, "/usr/bin:/bin", "/usr/bin:/bin"),
    ],
)
def test_python3_is_that_of_the_virtual_environment(
    monkeypatch: pytest.MonkeyPatch, prefix: str, path: str, expected: str
) -> None:
    """One that was not activated is; an order that somebody chose stays."""
    monkeypatch.setattr(sys, "prefix", prefix)

    assert trainer_environ(Path("c.json"), {"PATH": path})["PATH"] == expected
