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
# The command line that a worker of a simulation has.
_WORKER = "flarebus.site.worker"
_HAS_PROC = Path("/proc/self/status").exists()


class Peaks:
    """Watch this process and its children while the block runs; `by_role` is there afterwards.

    Where there is no /proc, the peaks of resident memory stand in, and `note` says so.
    """

    def __init__(self) -> None:
        self.by_role: dict[str, int] = {}
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
                self.by_role = json.loads(output)
        else:
            self.note = "no /proc here: peaks of resident memory, mapped files included"
            self.by_role = {
                "server": _resident_mb(resource.RUSAGE_SELF),
                "client": _resident_mb(resource.RUSAGE_CHILDREN),
            }


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
    return "worker" if _WORKER.encode() in command else "other"


def _memory_mb(pid: int) -> float:
    kib = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            kib += int(line.split()[1])
    return kib * 1024 / _MB


def _by_role(peaks: dict[int, tuple[str, float]]) -> dict[str, int]:
    """Workers get numbers in the order in which they were started; `client` is the largest of them."""
    named: dict[str, int] = {}
    workers = 0
    for _, (role, mb) in sorted(peaks.items()):
        if role == "worker":
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
        # A child has its parent's command line before it runs its own, and none any more when it ends.
        peaks[pid] = (role if known == "other" else known, max(mb, highest))


def _main() -> None:
    """Say that it has begun, sample until standard input ends, then print the peaks."""
    root = int(sys.argv[1])
    peaks: dict[int, tuple[str, float]] = {}
    print("sampling", flush=True)
    while not select.select([sys.stdin], [], [], _PERIOD_S)[0]:
        _add(peaks, _sample(root))
    print(json.dumps(_by_role(peaks)))


if __name__ == "__main__":
    _main()
