"""One site's training script, run as a program in a thread of this process.

The script is what `python client.py ...` would run: ``__name__`` is ``"__main__"``, its globals are its own,
``sys.argv``, the working directory and ``sys.path`` are set, output goes to the site's log. What differs is that it
works by turns (see `flarebus.site.turn`), that `atexit` callbacks run when the process ends, not the script, and that
its globals are emptied when it has ended.

What a task is and where it comes from is not known here: `Engine` brings it.
"""

from __future__ import annotations

import builtins
import os
import shlex
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType, TracebackType

from flarebus.client.engine import HOST_THREAD_PREFIX, Engine, Seat, sit
from flarebus.client.log_config import escape
from flarebus.errors import ConfigError
from flarebus.site.output import SiteLogs
from flarebus.site.turn import Place, Turnstile

__all__ = ["CodeCache", "Outcome", "SiteScript"]

_MAX_CAUSE_CHARS = 500


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one run of a script ended.

    Args:
        site: whose script it was.
        cause: "" if it ended as a script should, else what went wrong, in one line.
        exit_code: what the script's process would have returned: 0, the number given to `sys.exit`, or 1.
        n_received: tasks it fetched.
        n_answered: tasks it answered.
        open_task: the id of the task it held without having answered it, or None.
    """

    site: str
    cause: str
    exit_code: int
    n_received: int
    n_answered: int
    open_task: str | None


class CodeCache:
    """Compiled scripts, one for each path, shared by all sites of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._codes: dict[str, CodeType] = {}

    def load(self, path: Path) -> CodeType:
        """Return the code of a script, compiled at the first call.

        Raises:
            OSError: the file cannot be read.
            SyntaxError: it is not Python.
        """
        name = str(path)
        with self._lock:
            code = self._codes.get(name)
            if code is None:
                code = self._codes[name] = compile(path.read_bytes(), name, "exec", dont_inherit=True)
            return code


class SiteScript:
    """A site's script: started when there is a task and none runs, so one-shot scripts serve every round.

    Args:
        engine: the site's tasks; its `site_name` names the site.
        script: the ``.py`` file.
        args: its arguments, as one string in shell quoting or as a list.
        folder: the site's folder: working directory of the script; made if need be.
        turnstile: who works when, shared by all scripts of this process.
        codes: compiled scripts, shared as well.
        logs: where output goes; holds a log for this site.
        task_waiting: whether a task waits for this site; asked when a script has ended, to run it again.
        on_end: called in the script's thread after each run, without the turn. If the outcome has a cause it must fail
            the task that the script held, and if the script took none, the one that waits.

    Raises:
        ConfigError: the script is no ``.py`` file, or `args` is badly quoted.
    """

    def __init__(
        self,
        engine: Engine,
        script: str | os.PathLike[str],
        args: str | Sequence[str],
        folder: str | os.PathLike[str],
        *,
        turnstile: Turnstile,
        codes: CodeCache,
        logs: SiteLogs,
        task_waiting: Callable[[], bool],
        on_end: Callable[[Outcome], None],
    ) -> None:
        self.site = engine.site_name
        self._engine = engine
        self._script = _checked_script(script)
        self._args = _checked_args(args)
        self._folder = Path(folder).absolute()
        self._turnstile = turnstile
        self._codes = codes
        self._logs = logs
        self._task_waiting = task_waiting
        self._on_end = on_end
        self._lock = threading.Lock()
        self._place: Place | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._woken = False

    @property
    def is_running(self) -> bool:
        """Whether the script runs or waits now."""
        return not self._idle.is_set()

    def wake(self) -> None:
        """Say that a task waits: start the script unless it runs. Returns at once; any thread may call.

        The task must be there before the call: `task_waiting` is asked when the running script ends.
        """
        with self._lock:
            self._woken = True
            if not self._idle.is_set():
                return
            self._idle.clear()
        # A daemon: a script that never ends must not keep the process from ending.
        thread = threading.Thread(target=self._serve, name=f"{HOST_THREAD_PREFIX}-{self.site}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # too many threads, or no memory for one
            self._idle.set()
            self._on_end(Outcome(self.site, f"no thread for the script: {error}", 1, 0, 0, None))

    def line_up(self, gate: threading.Lock) -> None:
        """Open `gate` when the script has the turn; see `Turnstile.line_up`."""
        if self._place is None:
            gate.release()
        else:
            self._turnstile.line_up(self._place, gate)

    def stand_back(self, gate: threading.Lock) -> None:
        """Nobody waits at `gate` any more; see `Turnstile.stand_back`."""
        if self._place is not None:
            self._turnstile.stand_back(self._place, gate)

    def wait_ended(self, timeout_s: float | None = None) -> bool:
        """Wait until no script runs; False if the time was up first."""
        return self._idle.wait(timeout_s)

    def _serve(self) -> None:
        try:
            while self._wanted_again(self._run()):
                continue
        except BaseException:
            self._idle.set()  # `on_end` has failed; whoever waits for the end must not wait for ever
            raise

    def _wanted_again(self, outcome: Outcome) -> bool:
        """Report the outcome; whether to run once more. Every run but a woken one took a task: this comes to an end."""
        with self._lock:
            self._woken = False
        self._on_end(outcome)
        with self._lock:
            again = (self._woken or outcome.n_received > 0) and self._engine.ended is None and self._task_waiting()
            if not again:
                self._idle.set()
            return again

    def _run(self) -> Outcome:
        seat = Seat(self._engine)
        failure: BaseException | None = None
        try:
            code = self._codes.load(self._script)
            self._folder.mkdir(parents=True, exist_ok=True)
            self._execute(code, seat)
        except BaseException as error:  # whatever ends the script, SystemExit included, is its outcome
            failure = error
        outcome = self._outcome(seat, failure)
        if failure is not None and outcome.cause:
            self._logs.note(self.site, "ERROR", f"the script failed: {outcome.cause}", _traceback_of(failure))
        elif outcome.cause:
            self._logs.note(self.site, "ERROR", outcome.cause)
        self._logs.finish(self.site)
        if failure is not None:
            failure.__traceback__ = None  # it holds the script's variables
        return outcome

    def _execute(self, code: CodeType, seat: Seat) -> None:
        main = ModuleType("__main__")
        main.__dict__.update(__file__=str(self._script), __builtins__=builtins, __cached__=None)
        argv = [str(self._script), *self._args]
        path = [str(self._script.parent), *self._turnstile.base_path]
        self._place = place = Place(argv, str(self._folder), path, main, seat)
        seat.away = lambda: self._turnstile.away(place)
        threads = set(threading.enumerate())
        try:
            self._turnstile.take(place)
            with sit(seat, main.__dict__):
                exec(code, main.__dict__)
        finally:
            self._turnstile.leave(place)
            _empty(main, threads)

    def _outcome(self, seat: Seat, failure: BaseException | None) -> Outcome:
        session = seat.session
        n_received, n_answered = (0, 0) if session is None else (session.n_received, session.n_answered)
        open_task = None if session is None else session.open_task
        code, cause = 0, ""
        name = self._script.name
        if isinstance(failure, SystemExit) and (failure.code is None or isinstance(failure.code, int)):
            code = failure.code or 0
            cause = f"{name} called sys.exit({code})" if code else ""
        elif failure is not None:
            code, cause = 1, _cause_of(failure, self._script)
        if not cause and self._engine.ended is None:
            if open_task is not None:
                cause = f"{name} ended without answering its task: it needs a flare.send() for each flare.receive()"
            elif n_received == 0 and self._task_waiting():
                cause = f"{name} ended without asking for its task: it needs flare.init() and flare.receive()"
        return Outcome(self.site, cause, code, n_received, n_answered, open_task)


def _checked_script(script: str | os.PathLike[str]) -> Path:
    path = Path(script).absolute()
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError("train_script", os.fspath(script), "the path of a Python file (.py) that exists")
    return path


def _checked_args(args: str | Sequence[str]) -> list[str]:
    if not isinstance(args, str):
        return [str(arg) for arg in args]
    try:
        return shlex.split(args)
    except ValueError as error:
        raise ConfigError("train_args", args, f"arguments in shell quoting ({error})") from None


def _empty(main: ModuleType, threads_before: set[threading.Thread]) -> None:
    """Free what the script's globals hold now: they are part of cycles, which might live until long after.

    Not done while a thread is alive that the script may have started: it would lose its globals.
    """
    for thread in threading.enumerate():
        if thread not in threads_before and not thread.name.startswith(HOST_THREAD_PREFIX):
            return
    for name in [name for name in main.__dict__ if not name.startswith("__")]:
        del main.__dict__[name]


def _script_frames(error: BaseException) -> TracebackType | None:
    """The traceback without the frames of this module."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace


def _traceback_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, _script_frames(error)))


def _cause_of(error: BaseException, script: Path) -> str:
    """One line: the exception, and the innermost line of the user's code it came through."""
    if isinstance(error, SystemExit):
        text = f"sys.exit: {error.code}"
    else:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    folder = str(script.parent) + os.sep
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(folder)]
    place = ""
    if isinstance(error, SyntaxError) and error.filename:
        text, place = f"{type(error).__name__}: {error.msg}", f" ({Path(error.filename).name}:{error.lineno})"
    elif frames:
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    shown = escape(text)
    return (shown if len(shown) <= _MAX_CAUSE_CHARS else shown[: _MAX_CAUSE_CHARS - 3] + "...") + place
