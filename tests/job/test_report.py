"""Reports: JSON in the folder of the run, whole or not there, and nowhere else."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from flarebus.errors import ConfigError
from flarebus.job.report import check_report_path, write_report


def test_report_is_json_in_place_of_the_one_before(tmp_path: Path) -> None:
    """What JSON has no word for is null; folders are made."""
    write_report(tmp_path, "a/b/report.json", {"x": 1})

    path = write_report(tmp_path, "a/b/report.json", {"x": [1.5, math.nan, None], "y": {"z": math.inf}})

    assert path == tmp_path / "a" / "b" / "report.json"
    assert json.loads(path.read_text()) == {"x": [1.5, None, None], "y": {"z": None}}
    assert os.listdir(path.parent) == ["report.json"]


def test_report_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk costs the new one."""
    path = write_report(tmp_path, "report.json", {"x": 1})

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path, "report.json", {"x": 2})

    assert json.loads(path.read_text()) == {"x": 1}
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize(
    "path", ["../report.json", "a/../../report.json", "/tmp/report.json", "report.txt", "", None, 3]
)
def test_path_that_leads_elsewhere_is_refused(path: Any) -> None:
    """Only a relative path to a JSON file will do."""
    with pytest.raises(ConfigError, match=r"the relative path of a file ending in \.json"):
        check_report_path("stats_output_path", path)
