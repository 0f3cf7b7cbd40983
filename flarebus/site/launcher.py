"""TrainerProcess: a training script in a process of its own, from its start to the end of everything it started.

Between this process and the trainer stands a guardian (see `flarebus.site.guardian`), which starts it, tells at once
when it has ended, and ends it should this process die. Two threads belong to each trainer: one reads, and nothing else,
so that a slow log never stops the script; the other calls back.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flarebus.client.log_config import escape, without_mark
from flarebus.client.settings import ENV_API_TYPE, ENV_CLIENT_CONFIG, EX_PROCESS_API
from flarebus.site.import_path import import_path
from flarebus.site.lines import LineQueue, LineSplitter, Tail

__all__ = ["TrainerExit", "TrainerProcess", "trainer_environ"]

log = logging.getLogger(__name__)

_GUARDIAN = Path(__file__).with_name("guardian.py").absolute()
_READ_BYTES = 65536
# What may lie in a pipe when the trainer ends: no more is read then, for what it left behind may go on writing.
_MAX_PIPE_BYTES = 1 << 20
LAST_WORDS_BYTES = 4096
_SHOWN_CHARS = 300
_OUT_OF_MEMORY = ("MemoryError", "Cannot allocate memory", "std::bad_alloc")
# A process that was killed with less than this in memory was hardly chosen for its size.
_LARGE_RSS_MB = 1024
_KILLED_IN_A_SHELL = 128 + signal.SIGKILL


@dataclass(frozen=True, slots=True)
class TrainerExit:
    """How a trainer ended.

    Args:
        code: its exit code, or None.
        signal: the signal that killed it, or None.
        start_error: why it could not be started, or None if it was.
        last_words: the last lines it wrote to standard error, or to standard output if there were none; at most 4 KiB.
        max_rss_mb: the most memory that it, or a process it waited for, had at a time, in MiB; None if unknown.
        was_ended: whether it had been told to end.
        guardian_end: how its guardian ended, if that was before the trainer's end was known, else None; of the trainer
            nothing is known then but that it was killed.
    """

    code: int | None = None
    signal: int | None = None
    start_error: str | None = None
    last_words: str = ""
    max_rss_mb: int | None = None
    was_ended: bool = False
    guardian_end: str | None = None

    def describe(self) -> str:
        """What happened, in one line for a person."""
        lines = self.last_words.splitlines()
        said = f" (last output: {escape(lines[-1].strip())[:_SHOWN_CHARS]})" if lines else ""
        return f"its trainer process {self._what()}{self._memory()}{said}"

    def _what(self) -> str:
        told = " after it was told to end" if self.was_ended else ""
        if self.start_error is not None:
            return f"could not be started: {self.start_error}"
        if self.guardian_end is not None:
            return f"was killed, for its guardian process {self.guardian_end}"
        if self.signal is not None:
            return f"was killed by {_signal_name(self.signal)}{told}"
        return f"ended with exit code {self.code}{told}"

    def _memory(self) -> str:
        if self.was_ended or self.code == 0:
            return ""
        was_killed = self.signal == signal.SIGKILL or self.code == _KILLED_IN_A_SHELL
        is_large = self.max_rss_mb is not None and self.max_rss_mb >= _LARGE_RSS_MB
        if (was_killed and is_large) or any(word in self.last_words for word in _OUT_OF_MEMORY):
            return " (out of memory?" + (f" It had {self.max_rss_mb} MiB)" if self.max_rss_mb is not None else ")")
        return ""


class TrainerProcess:
    """A trainer that was started. Any thread may call.

    It may be started from any thread: nothing depends on how long that one lives. It gets an empty standard input, a
    session of its own, and no file descriptor of this process.

    Args:
        argv: the program, looked for along the ``PATH`` of `environ`, and its arguments.
        folder: its working directory.
        environ: its whole environment; see `trainer_environ`.
        on_line: told of each line of its output: ``stdout`` or ``stderr``, and the line without its end. UTF-8, with
            U+FFFD for what is none; of what carriage returns overwrite only the last is kept; a line of more than
            64 KiB comes as several. If it takes much longer than the trainer writes, lines are left out and counted.
        on_exit: told once how the trainer ended, also if it could not be started, after its last line. Both are called
            on a thread of this object, one call at a time; an exception is logged.

    Raises:
        RuntimeError: this process cannot start a thread.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        folder: Path,
        environ: Mapping[str, str],
        on_line: Callable[[str, str], None],
        on_exit: Callable[[TrainerExit], None],
    ) -> None:
        self._argv = list(argv)
        self._folder = folder
        self._on_line = on_line
        self._on_exit = on_exit
        self._lock = threading.Lock()
        self._lines = LineQueue()
        self._streams: list[_Stream] = []
        self._pid: int | None = None
        self._was_ended = False
        self._exit: TrainerExit | None = None
        self._is_told = threading.Event()
        self._is_gone = threading.Event()
        self._guardian: _Guardian | None = None
        try:
            self._guardian = _Guardian(self._argv, folder, environ)
        except OSError as error:
            self._exit = TrainerExit(start_error=f"its guardian process: {error.strerror or error}")
        try:
            threading.Thread(target=self._read, name="flarebus trainer", daemon=True).start()
            threading.Thread(target=self._call_back, name="flarebus trainer output", daemon=True).start()
        except RuntimeError:
            self.kill()
            raise

    @property
    def pid(self) -> int | None:
        """Its process id and the number of its process group; None until the guardian has started it."""
        return self._pid

    @property
    def is_running(self) -> bool:
        """Whether its end is not known yet; False before `on_exit` is called."""
        return self._exit is None

    def end(self, grace_s: float) -> None:
        """Have it ended, and all that it started: TERM now, KILL for what is left after `grace_s`. Returns at once.

        Again with less time makes it shorter; nothing makes it longer.
        """
        self._tell(f"TERM {max(0.0, grace_s):.3f}\n")

    def kill(self) -> None:
        """Have it and all that it started killed. Returns at once."""
        self._tell("KILL\n")

    def wait(self, timeout: float | None) -> bool:
        """Wait until it and all that it started are gone and `on_exit` has returned; not to be called from there.

        Args:
            timeout: seconds; None: without limit.

        Returns:
            False if the time was up first.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        return all(
            event.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
            for event in (self._is_told, self._is_gone)
        )

    def _tell(self, words: str) -> None:
        with self._lock:
            if self._exit is None:
                self._was_ended = True
            if self._guardian is not None:
                self._guardian.tell(words.encode())

    # --- the thread that calls back

    def _call_back(self) -> None:
        for stream, line in self._lines:
            try:
                self._on_line(stream, line)
            except Exception:  # the next line may fit again, and the trainer must not stop for this one
                log.exception("a line of a trainer's output could not be handled")
        assert self._exit is not None
        try:
            self._on_exit(self._exit)
        except Exception:  # there is nobody above this thread
            log.exception("the end of a trainer could not be handled: %s", self._exit.describe())
        finally:
            self._is_told.set()

    # --- the thread that reads

    def _read(self) -> None:
        guardian = self._guardian
        if guardian is not None:
            try:
                ended = self._make_exit(self._watch(guardian), guardian)
            except Exception as error:  # whoever waits for the end must hear of it
                log.exception("a trainer cannot be watched any more")
                guardian.tell(b"KILL\n")
                ended = TrainerExit(guardian_end=f"cannot be watched: {error}")
            with self._lock:
                self._exit = ended
        self._lines.close()
        if guardian is not None:
            guardian.wait()
            with self._lock:
                guardian.close()
        self._is_gone.set()

    def _watch(self, guardian: _Guardian) -> dict[str, Any] | None:
        """Read until the end of the trainer is reported, and return that; None if the guardian is gone without."""
        self._streams = [_Stream(name, fd, self._lines) for name, fd in guardian.outputs.items()]
        report: dict[str, Any] | None = {}
        with selectors.DefaultSelector() as selector:
            selector.register(guardian.status, selectors.EVENT_READ)
            for stream in self._streams:
                selector.register(stream.fd, selectors.EVENT_READ, stream)
            while report is not None and report.keys() <= {"pid"}:
                for key, _ in selector.select():
                    if key.data is None:
                        report = self._newest(guardian.read_reports())
                    elif not key.data.read():
                        selector.unregister(key.fileobj)
        for stream in self._streams:
            stream.drain()
        return report

    def _newest(self, reports: list[dict[str, Any]] | None) -> dict[str, Any] | None:
        if reports is None:
            return None
        for report in reports:
            self._pid = report.get("pid", self._pid)
        return reports[-1] if reports else {}

    def _make_exit(self, report: dict[str, Any] | None, guardian: _Guardian) -> TrainerExit:
        if report is None or "broken" in report:
            how = f"failed: {report['broken']}" if report else guardian.describe_end()
            self._kill_group()
            return TrainerExit(last_words=self._last_words(), was_ended=self._was_ended, guardian_end=how)
        if "stage" in report:
            return TrainerExit(start_error=_start_error(report, self._argv, self._folder), was_ended=self._was_ended)
        return TrainerExit(
            code=report["code"],
            signal=report["signal"],
            last_words=self._last_words(),
            max_rss_mb=report["max_rss_kib"] // 1024,
            was_ended=self._was_ended,
        )

    def _kill_group(self) -> None:
        """See that the trainer is dead, now that its guardian is: on Linux the kernel did it, but for its children."""
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._pid, signal.SIGKILL)

    def _last_words(self) -> str:
        texts = {stream.name: stream.tail.text for stream in self._streams}
        return texts["stderr"] or texts["stdout"]


class _Stream:
    """One of the trainer's outputs, read without waiting."""

    def __init__(self, name: str, fd: int, lines: LineQueue) -> None:
        self.name = name
        self.fd = fd
        self.tail = Tail(LAST_WORDS_BYTES)
        self._lines = lines
        self._splitter = LineSplitter()
        os.set_blocking(fd, False)

    def read(self) -> int:
        """Take some of what is there; 0 if there will never be more."""
        data = os.read(self.fd, _READ_BYTES)
        self._pass_on(self._splitter.feed(data))
        return len(data)

    def drain(self) -> None:
        """Take what is there, and end the line that has no end."""
        n_bytes = 0
        with contextlib.suppress(BlockingIOError):
            while n_bytes < _MAX_PIPE_BYTES and (more := self.read()):
                n_bytes += more
        self._pass_on(self._splitter.finish())

    def _pass_on(self, lines: list[str]) -> None:
        for line in lines:
            self.tail.add(without_mark(line))
        self._lines.put(self.name, lines)


class _Guardian:
    """The process between us and the trainer, and the pipes to it.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, argv: Sequence[str], folder: Path, environ: Mapping[str, str]) -> None:
        order = {
            "argv": [_as_text(each) for each in argv],
            "folder": _as_text(os.fspath(folder)),
            "environ": {_as_text(key): _as_text(value) for key, value in environ.items()},
            "parent": os.getpid(),
        }
        self.status, theirs = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_GUARDIAN), str(theirs)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",  # it must not keep a folder from being removed
                pass_fds=(theirs,),
                # Neither Ctrl-C nor the end of our own group must reach it.
                start_new_session=True,
            )
        except OSError:
            os.close(self.status)
            raise
        finally:
            os.close(theirs)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._pipes = (self._process.stdout, self._process.stderr)
        self.outputs = {"stdout": self._pipes[0].fileno(), "stderr": self._pipes[1].fileno()}
        self._rest = b""
        self.tell(json.dumps(order).encode() + b"\n")

    def tell(self, words: bytes) -> None:
        """Write to it, unless it is gone."""
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):
            while words and not stdin.closed:
                words = words[stdin.write(words) :]

    def read_reports(self) -> list[dict[str, Any]] | None:
        """Take what is there of its reports; None at their end."""
        data = os.read(self.status, _READ_BYTES)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None

    def describe_end(self) -> str:
        """Wait for its end; how that came, in words."""
        code = self._process.wait()
        return f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"

    def wait(self) -> None:
        """Wait until it is gone, which is when nothing of the trainer is left; read no more of what that writes."""
        for pipe in self._pipes:
            pipe.close()
        self._process.wait()

    def close(self) -> None:
        """Close what leads to it, once it is gone."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        os.close(self.status)


def trainer_environ(config_file: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a trainer.

    It is `environ`, with a ``PYTHONPATH`` along which this very flarebus is found, unless it is installed, and with the
    two variables by which `flarebus.client` knows that it is in a trainer. In a virtual environment that is not on the
    ``PATH``, its programs come first there, as if it had been activated: ``python3`` is the Python that runs here.

    Args:
        config_file: the client configuration.
        environ: what the trainer would get otherwise.
    """
    result = {**environ, **import_path(environ), ENV_API_TYPE: EX_PROCESS_API, ENV_CLIENT_CONFIG: str(config_file)}
    programs = os.path.join(sys.prefix, "bin")
    before = environ.get("PATH", os.defpath)
    if sys.prefix != sys.base_prefix and programs not in before.split(os.pathsep):
        result["PATH"] = os.pathsep.join((programs, before))
    return result


def _as_text(value: str) -> str:
    """The bytes that the system gets for `value`, as characters of the same numbers."""
    return os.fsencode(value).decode("latin-1")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _start_error(report: Mapping[str, Any], argv: Sequence[str], folder: Path) -> str:
    """Why the trainer could not be started, and what to look at."""
    if not argv:
        return "its command is empty"
    number = report["errno"]
    why = report["text"] if number is None else os.strerror(number)
    if report["stage"] == "folder":
        return f"its folder {folder}: {why}"
    if report["stage"] != "program":
        return why
    if number == errno.ENOENT:
        is_there = os.sep in argv[0] and (folder / argv[0]).exists()
        why = "the program that its first line names was not found" if is_there else "not found"
    elif number == errno.EACCES:
        why = "not executable"
    elif number == errno.ENOEXEC:
        why = "not a program (a script needs a first line with #!)"
    return f"{argv[0]}: {why}; check command"
