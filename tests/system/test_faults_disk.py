"""A disk that is full or cannot be written: the job ends with the reason and keeps what was committed."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flarebus.errors import ConfigError
from flarebus.job.journal import Journal, append_metrics
from tests.system.observed import ONE, ObservedRun

MB = 1_000_000
FULL = os.strerror(errno.ENOSPC)


class SmallDisk:
    """A file system of a few megabytes; where none can be mounted, calls that reserve space fail as on a full one."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._patch = patch
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
        try:
            self.is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            self.is_mounted = False
        self._left = 16 * 1024 * 1024
        if not self.is_mounted:
            patch.setattr(os, "posix_fallocate", self._reserve, raising=False)

    def _reserve(self, handle: int, begin: int, nbytes: int) -> None:
        if nbytes > self._left:
            _full()
        self._left -= nbytes
        os.ftruncate(handle, begin + nbytes)

    def fill(self) -> None:
        """Leave no byte."""
        if not self.is_mounted:
            self._patch.setattr(Journal, "commit", _full)
            return
        with open(self.folder / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def close(self) -> None:
        if self.is_mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, FULL, "/the/file")


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    made = SmallDisk(tmp_path / "disk", monkeypatch)
    yield made
    made.close()


def on(disk: SmallDisk, observed: ObservedRun) -> dict[str, Any]:
    """Settings of an environment whose runs go to the disk."""
    observed.run_dir = disk.folder / "runs" / "job"
    return {"workspace_root": disk.folder / "runs"}


def test_a_model_that_does_not_fit(observed: ObservedRun, disk: SmallDisk) -> None:
    """When the disk cannot hold the model, the first round fails with that as its reason."""
    observed.start(ONE.format(body=""), size=5 * MB, env=on(disk, observed))

    assert observed.end() == "failed"
    assert FULL in observed.reason
    assert "models" in observed.reason
    assert observed.journal() == ([], "failed")
    assert list(observed.run_dir.glob("server/models/*FL_global*")) == []


@pytest.mark.parametrize("size", [4, MB // 2])
def test_a_disk_that_fills_up(
    observed: ObservedRun, disk: SmallDisk, size: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """When the disk fills up between two rounds, the job fails and leaves the model of the last committed round."""
    observed.on("round_committed", lambda fields: disk.fill() if fields["round"] == 3 else None)
    observed.start(ONE.format(body=""), size=size, num_rounds=100_000, env=on(disk, observed))

    assert observed.end() == "failed"
    assert FULL in observed.reason
    assert "/" in observed.reason  # which file it was
    rounds, _ = observed.journal()
    assert len(rounds) >= 3
    assert set(observed.model()) == {float(len(rounds))}
    assert [line["round"] for line in observed.rounds()] in (rounds, rounds[:-1])
    assert "Traceback" not in capfd.readouterr().err


def test_no_room_for_results(observed: ObservedRun, disk: SmallDisk) -> None:
    """A result that the disk has no room for is lost with that reason, and the round goes on with the others."""
    # Room for the model and one result, which is three times as big.
    script = ONE.format(body="state = {name: model.params['w'].copy() for name in 'mv'}")
    script = script.replace("metrics=", "optimizer_params=state, metrics=")
    settings = {"enable_tensor_disk_offload": True, "min_clients": 1, "num_rounds": 1}
    observed.start(script, size=9 * MB // 10, env=on(disk, observed), **settings)

    assert observed.end() == "completed", observed.reason
    (reason,) = observed.complaints().values()
    assert f"its result could not be fetched: [Errno {errno.ENOSPC}] {FULL}" in reason
    assert set(observed.model()) == {1.0}


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    """When the disk takes only the beginning of a line of metrics, nothing of it stays."""
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"round": 0})
    before = path.read_text()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Like a disk with room for ten more bytes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_metrics(path, {"round": 1, "metrics": {"loss": 0.5}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert path.read_text() == before


def test_a_workspace_that_cannot_be_written(tmp_path: Path, disk: SmallDisk, observed: ObservedRun) -> None:
    """A workspace on a read-only disk, or below a file, is refused by its name before anything starts."""
    if disk.is_mounted:
        subprocess.run(["mount", "-o", "remount,ro", str(disk.folder)], check=True)
    else:
        disk.folder.rmdir()
        disk.folder.write_text("")
    (tmp_path / "file").write_text("")

    for root in (disk.folder / "runs", tmp_path / "file" / "runs"):
        with pytest.raises(ConfigError, match="cannot write there") as caught:
            observed.start(ONE.format(body=""), env={"workspace_root": root})
        assert (caught.value.parameter, caught.value.value) == ("workspace_root", str(root))
    assert observed.events == []
