"""The guardian: a small program between a client job and its trainer. It starts the trainer, waits for it, and sees
that nothing of it outlives the client job.

Run as ``python -I -S guardian.py FD``, so that it starts in milliseconds and needs nothing that could be missing: the
standard library only. It has one thread and no timer that repeats. What it is told comes on standard input:

- first one line of JSON: ``argv``, ``folder`` and ``environ`` of the trainer, and ``parent``, the process id of the
  client job. Their texts are bytes, written as the characters of the same numbers: no encoding has to fit.
- then words, one a line: ``TERM 2.5`` ends everything, with KILL for what is left after so many seconds; ``KILL`` does
  it now.
- the end of the file, which is the end of the client job however it came.

What it has to tell goes to FD as lines of JSON: ``{"pid"}`` when the trainer runs; ``{"stage", "errno", "text"}`` when
it could not be started; ``{"code", "signal", "max_rss_kib"}`` when it has ended; ``{"broken"}`` when the guardian
failed itself.

On Linux the guardian is the reaper of all that the trainer starts, so that processes in sessions of their own are found
too, and the kernel kills the trainer should the guardian be killed. Elsewhere it reaches the trainer's process group.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["GRACE_S", "Guardian", "main"]

# Between TERM and KILL when the client job is gone, and for what the trainer left behind when it ended.
GRACE_S = 1.0
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_NOT_STARTED = 127


class Guardian:
    """One trainer and all it starts, from its start until nothing of it is left.

    Args:
        status: file descriptor that takes the lines of JSON.
    """

    def __init__(self, status: int) -> None:
        self._status = status
        self._input = b""
        self._trainer = 0  # its process id, and the number of its process group
        self._has_exited = False
        self._is_ending = False
        self._is_killed = False
        self._kill_at = math.inf
        self._prctl = _prctl()
        self._is_reaper = self._prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._poll = select.poll()
        self._wakeups, wake = os.pipe()
        os.set_blocking(self._wakeups, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # it is the byte in the pipe that counts
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def run(self) -> None:
        """Start the trainer and return when nothing of it is left."""
        order = self._read_order()
        if order is None or not self._start(order):
            return
        sources: dict[int, Callable[[], bool]] = {0: self._listen, self._wakeups: self._woken}
        watch = _watch_process(order["parent"])
        if watch is not None:
            # Somebody forked off the client job may hold our standard input open, so its end alone proves too little.
            sources[watch] = self._orphaned
        for source in sources:
            self._poll.register(source, select.POLLIN)
        if os.getppid() != order["parent"]:
            self._orphaned()
        self._obey()
        while self._is_anything_left():
            wait_s = self._kill_at - time.monotonic()
            timeout_ms = math.ceil(wait_s * 1000) if 0 < wait_s < math.inf else None
            if wait_s <= 0:
                # Again at each wake-up: what was started while we looked is found when those that started it are gone.
                self._signal(signal.SIGKILL)
                self._is_killed = True
                if self._has_exited and not self._is_reaper:
                    timeout_ms = 0  # nothing would tell of the end of what is left
            for source, _ in self._poll.poll(timeout_ms):
                if not sources[source]():
                    self._poll.unregister(source)

    def fail(self, error: BaseException) -> None:
        """Say what went wrong with the guardian, and leave nothing behind."""
        self._report({"broken": f"{type(error).__name__}: {error}"})
        if self._trainer:
            self._signal(signal.SIGKILL)

    def _report(self, fields: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the client job is gone: nobody wants to know
            os.write(self._status, json.dumps(fields).encode() + b"\n")

    # --- starting

    def _read_order(self) -> dict[str, Any] | None:
        while b"\n" not in self._input:
            data = os.read(0, 65536)
            if not data:
                return None
            self._input += data
        line, _, self._input = self._input.partition(b"\n")
        order: dict[str, Any] = json.loads(line)
        return order

    def _start(self, order: dict[str, Any]) -> bool:
        argv = [text.encode("latin-1") for text in order["argv"]]
        folder = order["folder"].encode("latin-1")
        environ = {key.encode("latin-1"): value.encode("latin-1") for key, value in order["environ"].items()}
        guardian = os.getpid()
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            self._become_trainer(guardian, write_end, argv, folder, environ)
        os.close(write_end)
        with open(read_end, "rb") as file:
            problem = file.read()  # ends when the program is loaded, for the other end closes then
        if problem:
            os.waitpid(child, 0)
            self._report(json.loads(problem))
            return False
        self._trainer = child
        self._report({"pid": child})
        # Whoever reads the trainer's output must not wait for us to end.
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.close(null)
        return True

    def _become_trainer(
        self, guardian: int, problem: int, argv: list[bytes], folder: bytes, environ: dict[bytes, bytes]
    ) -> NoReturn:
        stage = "guardian"
        try:
            os.setsid()
            self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != guardian:
                os._exit(_NOT_STARTED)  # it was killed before the kernel knew
            signal.set_wakeup_fd(-1)
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
                with contextlib.suppress(OSError):  # those that the C library keeps to itself
                    signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            stage = "folder"
            os.chdir(folder)
            stage = "program"
            os.execvpe(argv[0], argv, environ)
        except BaseException as error:
            fields = {"stage": stage, "errno": getattr(error, "errno", None), "text": str(error)}
            os.write(problem, json.dumps(fields).encode())
        finally:
            os._exit(_NOT_STARTED)

    # --- waiting: each answers whether its source is worth another look

    def _listen(self) -> bool:
        data = os.read(0, 65536)
        if not data:
            return self._orphaned()
        self._input += data
        self._obey()
        return True

    def _obey(self) -> None:
        *words, self._input = self._input.split(b"\n")
        for word in words:
            verb, _, grace = word.partition(b" ")
            if verb == b"TERM":
                self._end(float(grace))
            elif verb == b"KILL":
                self._kill_at = -math.inf

    def _woken(self) -> bool:
        if signal.SIGTERM in os.read(self._wakeups, 4096):
            self._end(GRACE_S)
        return True

    def _orphaned(self) -> bool:
        self._end(GRACE_S)
        return False

    # --- ending

    def _end(self, grace_s: float) -> None:
        """Send TERM to everything, once; KILL is due after `grace_s`, or earlier if it was."""
        self._kill_at = min(self._kill_at, time.monotonic() + grace_s)
        if not self._is_ending:
            self._is_ending = True
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)  # one that is stopped would not notice

    def _is_anything_left(self) -> bool:
        """Whether something runs that comes from the trainer; once it has ended itself, see that the rest ends too."""
        has_children = self._collect()
        if not self._has_exited:
            return True
        is_left = has_children if self._is_reaper else not self._is_killed and _is_group(self._trainer)
        if is_left and not self._is_ending:
            self._end(GRACE_S)
        return is_left

    def _collect(self) -> bool:
        """Collect children that have ended, report the trainer's end, and say whether there are more."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._trainer:
                self._has_exited = True
                self._report(_describe(status, usage.ru_maxrss))

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the trainer and to all that comes from it."""
        pids = _descendants()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        # KILL to the group as well, for that is one step, which nobody forks ahead of. As long as one of ours is in it
        # its number is nobody else's.
        if not pids or (number == signal.SIGKILL and any(_group(pid) == self._trainer for pid in pids)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._trainer, number)


def _describe(status: int, max_rss: int) -> dict[str, Any]:
    code = os.waitstatus_to_exitcode(status)
    max_rss_kib = max_rss // 1024 if sys.platform == "darwin" else max_rss
    return {"code": code if code >= 0 else None, "signal": -code if code < 0 else None, "max_rss_kib": max_rss_kib}


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def _is_group(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _descendants() -> set[int]:
    """All processes that come from this one and run or wait to be collected; none where the kernel does not tell."""
    found: set[int] = set()
    todo = {os.getpid()}
    while todo:
        folder = f"/proc/{todo.pop()}/task"
        children: set[int] = set()
        with contextlib.suppress(OSError):  # it has ended meanwhile; what it started comes to us
            for task in os.listdir(folder):
                with open(f"{folder}/{task}/children", "rb") as file:
                    children.update(map(int, file.read().split()))
        todo |= children - found
        found |= children
    return found


def _watch_process(pid: int) -> int | None:
    """A file descriptor that can be read once the process is gone, or None where there is no such thing."""
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _prctl() -> Callable[[int, int], bool]:
    """The system call of this name, as a function that says whether it worked; elsewhere one that does nothing."""
    if sys.platform != "linux":
        return lambda _option, _value: False
    call = ctypes.CDLL(None, use_errno=True).prctl
    return lambda option, value: bool(call(option, value, 0, 0, 0) == 0)


def main() -> int:
    """Guard the trainer that standard input describes; the argument is the file descriptor for reports."""
    status = int(sys.argv[1])
    os.set_inheritable(status, False)
    guardian = Guardian(status)
    try:
        guardian.run()
    except BaseException as error:
        guardian.fail(error)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
