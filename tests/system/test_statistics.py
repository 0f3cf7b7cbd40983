"""Federated statistics over the real bus: sites that fail or hold back, and the others' statistics all the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flarebus.errors import JobFailed
from flarebus.recipe import FedStatsRecipe, SimEnv
from flarebus.recipe.described import code_in

TABLES = """
import os
import signal

import numpy as np

from flarebus.statistics import ColumnStatistics, StatisticsPrivacyCleanser


class Tables(ColumnStatistics):
    def __init__(self, faults):
        self.faults = faults

    def load(self, site_name):
        fault = self.faults.get(site_name)
        if fault == "raise":
            raise OSError("the disk of the clinic is broken")
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        n = 5 if fault == "few" else 100
        return {"d": {"x": np.arange(n) + 10.0 * int(site_name[-1])}}


class Broken(StatisticsPrivacyCleanser):
    def apply(self, values, count):
        raise RuntimeError("no budget left")
"""
CONFIGS = {"count": {}, "mean": {}, "var": {}, "max": {}, "histogram": {"*": {"bins": 5}}, "quantile": {"*": [0.5]}}


@pytest.fixture
def _here(tmp_path: Path) -> Iterator[None]:
    """The code of the job in a folder."""
    tmp_path.joinpath("my_tables.py").write_text(TABLES)
    with code_in(tmp_path):
        yield


def run(tmp_path: Path, faults: dict[str, str], **settings: Any) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The server's folder, the report and what was left out."""
    recipe = FedStatsRecipe(
        statistic_configs=CONFIGS,
        stats_generator={"class_path": "my_tables.Tables", "args": {"faults": faults}},
        **settings,
    )
    result = recipe.execute(SimEnv(num_clients=4, num_threads=2, workspace_root=tmp_path / "runs")).get_result()
    server = Path(str(result)) / "server"
    left_out = server / "statistics" / "statistics_left_out.json"
    return (
        server,
        json.loads((server / "statistics" / "statistics.json").read_text()),
        json.loads(left_out.read_text()) if left_out.exists() else {},
    )


@pytest.mark.usefixtures("_here")
def test_report_over_the_bus(tmp_path: Path) -> None:
    """Numbers are those of all values in one place, and no row nor model lies at the server."""
    server, report, left_out = run(tmp_path, {}, precision=None)

    values = np.concatenate([np.arange(100) + 10.0 * number for number in (1, 2, 3, 4)])
    found = {name: rows["Global"]["d"] for name, rows in report["x"].items()}
    assert found["count"] == 400
    assert found["mean"] == values.mean()
    assert found["var"] == pytest.approx(values.var(ddof=1), rel=1e-14)
    assert found["max"] > values.max()
    assert sum(count for *_, count in found["histogram"]) == 400
    assert abs(found["quantile"]["0.5"] - np.median(values)) < 5
    assert left_out == {}
    assert list((server / "models").iterdir()) == []


@pytest.mark.usefixtures("_here")
def test_sites_that_cannot_answer_are_left_out(tmp_path: Path) -> None:
    """One raises, one has few values: the others make the report."""
    server, report, left_out = run(tmp_path, {"site-1": "raise", "site-3": "few"}, min_clients=3)

    assert report["x"]["count"] == {"site-2": {"d": 100}, "site-4": {"d": 100}, "Global": {"d": 200}}
    assert left_out["site-1"] == "no usable answer; the log of the server says why"
    assert left_out["site-3"]["d"]["x"]["count"] == "fewer than 10 values"
    log = (server / "log.txt").read_text()
    assert "the disk of the clinic is broken" in log


@pytest.mark.usefixtures("_here")
def test_site_that_takes_its_worker_down_takes_no_other_with_it(tmp_path: Path) -> None:
    """It is given up after three times; the other site of its worker is asked again, and answers."""
    _, report, left_out = run(tmp_path, {"site-2": "die"}, min_clients=3, wait_time_after_min_received=60)

    assert set(report["x"]["count"]) == {"site-1", "site-3", "site-4", "Global"}
    assert set(left_out) == {"site-2"}


@pytest.mark.usefixtures("_here")
def test_cleanser_that_fails_everywhere_fails_the_job(tmp_path: Path) -> None:
    """With that reason, and without a report."""
    with pytest.raises(JobFailed, match="no budget left"):
        run(tmp_path, {}, cleansers=[{"class_path": "my_tables.Broken"}], enable_pre_run_task=False)

    assert not list(tmp_path.rglob("statistics.json"))
