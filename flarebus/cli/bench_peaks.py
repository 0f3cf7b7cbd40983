"""Peak memory of a process and its children: anonymous and shared-memory pages, per process.

Pages of mapped files do not count: the kernel can drop them. A second interpreter takes the samples, so that what is
measured is not held up; it runs this file by its path, so only the standard library is imported here.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

__all__ = ["Peaks"]

_PERIOD_S = 0.05
_MB = 1e6
# What stands in the command lines of a worker of a simulation, and of the guardian of a trainer.
_WORKER = "flarebus.site.worker"
_GUARDIAN = "/flarebus/site/guardian.py"
_HAS_PROC = Path("/proc/self/status").exists()


class Peaks:
    """Watch this process and its children while the block runs; `by_role` is there afterwards.

    Roles are `server`, `worker-N` and `client`, the largest of them; with trainers, `client_job` instead of these, and
    `trainer`. Where there is no /proc, the peaks of resident memory stand in, and `note` says so.
    """

    def __init__(self) -> None:
        self.by_role: dict[str, int] = {}
        self.idle: dict[str, int] = {}
        """What each role had at `mark_idle`."""
        self.note = ""
        self._sampler: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Peaks:
        if _HAS_PROC:
            command = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
            self._sampler = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            # On a busy machine a short job would be over before the first sample.
            assert self._sampler.stdout is not None
            self._sampler.stdout.readline()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sampler is not None:
            output, _ = self._sampler.communicate()
            if kind is None:
                self.by_role, self.idle = json.loads(output)
        else:
            self.note = "no /proc here: peaks of resident memory, mapped files included"
            self.by_role = {
                "server": _resident_mb(resource.RUSAGE_SELF),
                "client": _resident_mb(resource.RUSAGE_CHILDREN),
            }

    def mark_idle(self) -> None:
        """Note what everybody has now."""
        if self._sampler is not None:
            assert self._sampler.stdin is not None
            assert self._sampler.stdout is not None
            self._sampler.stdin.write(b"\n")
            self._sampler.stdin.flush()
            self._sampler.stdout.readline()


def _resident_mb(who: int) -> int:
    # Bytes on macOS, KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(who).ru_maxrss * unit / _MB)


def _sample(root: int) -> dict[int, tuple[str, float]]:
    """pid -> (role, MB) of `root` and its descendants, except this process; processes that ended are left out."""
    found = {}
    for pid in _tree(root):
        try:
            role = "server" if pid == root else _role(pid)
            found[pid] = (role, _memory_mb(pid))
        except OSError:
            continue
    return found


def _tree(pid: int) -> Iterator[int]:
    if pid == os.getpid():
        return
    yield pid
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for task in tasks:
        try:
            children = Path(f"/proc/{pid}/task/{task}/children").read_text()
        except OSError:
            continue
        for child in children.split():
            yield from _tree(int(child))


def _role(pid: int) -> str:
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    if _GUARDIAN.encode() in command:
        return "guardian"
    if _WORKER.encode() in command:
        return "worker"
    # Below a guardian everything is the trainer, whatever its command.
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    return "trainer" if _GUARDIAN.encode() in Path(f"/proc/{parent}/cmdline").read_bytes() else "other"


def _memory_mb(pid: int) -> float:
    kib = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            kib += int(line.split()[1])
    return kib * 1024 / _MB


def _by_role(peaks: dict[int, tuple[str, float]], has_trainers: bool) -> dict[str, int]:
    """Workers get numbers in the order in which they were started; `client` is the largest of them."""
    named: dict[str, int] = {}
    workers = 0
    for _, (role, mb) in sorted(peaks.items()):
        if role == "worker" and has_trainers:
            named["client_job"] = max(named.get("client_job", 0), round(mb))
        elif role == "worker":
            workers += 1
            named[f"worker-{workers}"] = round(mb)
            named["client"] = max(named.get("client", 0), round(mb))
        else:
            named[role] = max(named.get(role, 0), round(mb))
    return named


def _add(peaks: dict[int, tuple[str, float]], samples: dict[int, tuple[str, float]]) -> None:
    """Raise `peaks` to `samples`."""
    for pid, (role, mb) in samples.items():
        known, highest = peaks.get(pid, (role, mb))
        # A child has its parent's command line, and memory, before it runs its own, and none any more when it ends.
        if role not in (known, "other"):
            known, highest = role, mb
        peaks[pid] = known, max(mb, highest)


def _main() -> None:
    """Say that it has begun, sample until standard input ends, then print the peaks and what was marked."""
    root = int(sys.argv[1])
    peaks: dict[int, tuple[str, float]] = {}
    idle: dict[int, tuple[str, float]] = {}
    print("sampling", flush=True)
    while True:
        if select.select([0], [], [], _PERIOD_S)[0]:
            if not os.read(0, 1):
                break
            idle = _sample(root)
            print("marked", flush=True)
        _add(peaks, _sample(root))
    has_trainers = any(role == "trainer" for role, _ in peaks.values())
    print(json.dumps([_by_role(peaks, has_trainers), _by_role(idle, has_trainers)]))


if __name__ == "__main__":
    _main()
