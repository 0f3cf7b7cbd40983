"""Peak memory per process."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import pytest

from flarebus.cli import bench_peaks
from flarebus.cli.bench_peaks import Peaks


def test_roles_are_numbered_and_the_largest_worker_is_the_client() -> None:
    """Workers are numbered as they were started, and `client` is the largest of them."""
    peaks = {30: ("worker", 12.4), 10: ("server", 50.0), 20: ("worker", 99.6), 40: ("other", 3.0), 41: ("other", 2.0)}

    assert bench_peaks._by_role(peaks, has_trainers=False) == {
        "server": 50,
        "worker-1": 100,
        "worker-2": 12,
        "client": 100,
        "other": 3,
    }


def test_with_trainers_a_worker_is_a_client_job() -> None:
    """Where scripts have processes of their own the worker only relays, and is called so."""
    peaks = {10: ("server", 50.0), 20: ("worker", 30.0), 30: ("guardian", 6.0), 31: ("trainer", 99.0)}

    roles = bench_peaks._by_role(peaks, has_trainers=True)

    assert roles == {"server": 50, "client_job": 30, "guardian": 6, "trainer": 99}


def test_a_child_counts_from_its_own_program_on() -> None:
    """Between fork and exec a process looks like its parent, with all of its memory."""
    peaks: dict[int, tuple[str, float]] = {}
    for role, mb in (("worker", 500.0), ("guardian", 6.0), ("other", 0.0)):
        bench_peaks._add(peaks, {7: (role, mb)})

    assert peaks == {7: ("guardian", 6.0)}


def test_a_worker_stays_a_worker() -> None:
    """What a process was once seen as counts, however its command line looks before it starts and when it ends."""
    peaks: dict[int, tuple[str, float]] = {}
    for role, mb in (("other", 5.0), ("worker", 20.0), ("worker", 10.0), ("other", 0.0)):
        bench_peaks._add(peaks, {7: (role, mb)})

    assert peaks == {7: ("worker", 20.0)}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_that_was_given_back_counts() -> None:
    """The peak holds what this process had at its fullest, not what it has at the end."""
    with Peaks() as peaks:
        peaks.mark_idle()
        before = bench_peaks._memory_mb(os.getpid())
        held = b"\x01" * 200_000_000
        waits = _waits_of_the_sampler(peaks)
        # It waits once after each sample: two more, and one sample lies wholly in between.
        while _waits_of_the_sampler(peaks) < waits + 2:
            pass
        del held

    assert peaks.by_role["server"] >= before + 190
    assert peaks.idle["server"] < before + 100
    assert "worker-1" not in peaks.by_role


def _waits_of_the_sampler(peaks: Peaks) -> int:
    assert peaks._sampler is not None
    status = Path(f"/proc/{peaks._sampler.pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def test_without_proc_resident_memory_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no /proc the figures come from the operating system's own peaks, with a note."""
    monkeypatch.setattr(bench_peaks, "_HAS_PROC", False)

    with Peaks() as peaks:
        pass

    assert peaks.note
    assert peaks.by_role["server"] > 0


def test_bytes_or_kibibytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit of resident memory is the platform's."""
    monkeypatch.setattr(resource, "getrusage", lambda _: type("Usage", (), {"ru_maxrss": 2_000_000})())
    monkeypatch.setattr(sys, "platform", "linux")
    assert bench_peaks._resident_mb(0) == 2048

    monkeypatch.setattr(sys, "platform", "darwin")
    assert bench_peaks._resident_mb(0) == 2
