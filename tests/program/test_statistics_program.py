"""`python -m workflows.statistics` as people run it, and what it shows."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from workflows._statistics_picture import draw
from workflows._statistics_program import main
from workflows._statistics_terminal import StatisticsWatcher, show


def test_the_tumours(tmp_path: Path) -> None:
    """Without arguments: means are those of all rows to the last digit of the report, and there is a picture."""
    command = [sys.executable, "-m", "workflows.statistics", "--json", "--workspace", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["state"], found["features"], found["left_out"]) == ("completed", 6, None)
    assert found["mean_error"] <= 0.5001e-4
    assert Path(found["plot"]).read_bytes().startswith(b"\x89PNG")
    report = json.loads(Path(found["report"]).read_text())
    assert report["mean radius"]["count"]["Global"] == {"tumours": 569}
    assert "pass 3: asking 3 sites" in done.stderr
    assert "worst area" in done.stderr


TABLES = """
import threading

from flarebus.statistics import ColumnStatistics


class Tables(ColumnStatistics):
    def __init__(self, size):
        self.size = size

    def load(self, site_name):
        return {"d": {"x": range(self.size)}}


class Broken(Tables):
    def load(self, site_name):
        raise OSError("the disk is broken")


class Endless(Tables):
    def load(self, site_name):
        threading.Event().wait()
"""


def test_a_generator_of_ones_own(tmp_path: Path) -> None:
    """It is found in the working directory, gets its arguments, and its report goes where it should."""
    tmp_path.joinpath("my_tables.py").write_text(TABLES)
    argv = ["--generator", "my_tables:Tables", "--generator-args", '{"size": 99}', "--statistics", "count,mean"]
    argv += ["--clients", "berlin,paris", "--name", "mine", "--workspace", str(tmp_path / "runs"), "--json"]
    command = [sys.executable, "-m", "workflows.statistics", *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["run_dir"]) == tmp_path / "runs" / "mine"
    assert json.loads(Path(found["report"]).read_text()) == {
        "x": {
            "count": {"berlin": {"d": 99}, "paris": {"d": 99}, "Global": {"d": 198}},
            "mean": {"berlin": {"d": 49.0}, "paris": {"d": 49.0}, "Global": {"d": 49.0}},
        }
    }


def own(tmp_path: Path, name: str) -> subprocess.Popen[str]:
    """The program with a generator of TABLES, at two sites."""
    tmp_path.joinpath("my_tables.py").write_text(TABLES)
    argv = ["--generator", f"my_tables:{name}", "--generator-args", '{"size": 99}', "--clients", "2"]
    command = [sys.executable, "-m", "workflows.statistics", *argv, "--workspace", str(tmp_path / "runs"), "--json"]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_job_that_fails_says_why(tmp_path: Path) -> None:
    """Exit code 1, the reason in a line and in the JSON, and no traceback."""
    with own(tmp_path, "Broken") as process:
        out, err = process.communicate(timeout=100)

    assert process.returncode == 1
    assert json.loads(out)["state"] == "failed"
    assert "StatisticsExecutor: OSError: the disk is broken" in json.loads(out)["reason"]
    assert "error: " in err
    assert "Traceback" not in err


def test_interrupt_ends_the_job(tmp_path: Path) -> None:
    """Ctrl-C while a site loads: exit code 130, and the JSON line says that it was aborted."""
    with own(tmp_path, "Endless") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("pass 1"):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=100)

    assert process.returncode == 130, err
    assert json.loads(out)["state"] == "aborted"
    assert err.endswith("stopped\n")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--statistics", "mean,std"], "did you mean 'stddev'"),
        (["--quantiles", "0.5,x"], "--quantiles '0.5,x': numbers with commas between"),
        (["--quantiles", "50"], "shares between 0 and 1"),
        (["--generator-args", "{}"], "--generator-args: belongs to --generator"),
        (["--generator", "no_such_module:Tables"], "no module named no_such_module"),
        (["--clients", "0"], "0 is not a number of sites"),
        (["--min-clients", "4"], "needs more sites than there are: 3"),
        (["--min-count", "0"], "min_count=0: a whole number from 1"),
    ],
)
def test_wrong_usage(argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and a line that says what is wrong."""
    assert main([*argv, "--workspace", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_wrong_usage_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever reads the JSON line gets the reason there."""
    assert main(["--statistics", "std", "--json", "--workspace", str(tmp_path)]) == 2

    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "failed"
    assert "did you mean 'stddev'" in found["reason"]


def row(value: Any) -> dict[str, Any]:
    return {"a": {"d": value}, "b": {"d": value}, "Global": {"d": value}}


REPORT = {
    "age": {
        "count": row(30),
        "mean": row(40.5),
        "histogram": row([[0, 1, 3], [1, 2, 27]]),
        "quantile": row({"0.5": 40}),
    },
    "size": {"count": row(30), "mean": row(7.25), "stddev": row(1.5)},
    "name": {"count": {"a": {"d": 30}, "Global": {"d": 30}}},
}


def test_table_has_a_line_for_every_feature(capsys: pytest.CaptureFixture[str]) -> None:
    """With what all sites together have, and nothing where there is nothing."""
    show(REPORT, Console(width=100))

    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["feature", "count", "mean", "stddev", "50%"] in lines
    assert ["age", "30", "40.5", "40"] in lines
    assert ["size", "30", "7.25", "1.5"] in lines
    assert ["name", "30"] in lines


@pytest.mark.parametrize("n_sites", [2, 20])
def test_picture_has_a_panel_for_every_feature(n_sites: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A histogram, or means where there is none; nothing for a feature that has neither."""
    from matplotlib.figure import Figure

    panels: list[Any] = []
    add = Figure.add_subplot
    monkeypatch.setattr(Figure, "add_subplot", lambda *args: panels.append(add(*args)) or panels[-1])
    sites = {f"s{number}": {"d": [[0, 1, 3], [1, 2, 27]]} for number in range(n_sites)}
    report = {**REPORT, "age": {"histogram": {**sites, "Global": {"d": [[0, 1, 3], [1, 2, 27]]}}}}

    path = draw(report, tmp_path / "new" / "report.png")

    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [panel.get_title() for panel in panels] == ["age (d)", "size (d)"]
    assert len(panels[0].patches) == n_sites + 1
    assert (panels[0].get_legend() is None) == (n_sites > 8)


def test_nothing_to_draw(tmp_path: Path) -> None:
    """Counts alone make no picture."""
    assert draw({"name": REPORT["name"]}, tmp_path / "report.png") is None
    assert list(tmp_path.iterdir()) == []


def test_sites_that_are_left_out_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """With the reason, on the way."""
    with StatisticsWatcher(Console(width=100)) as watcher:
        watcher.on_event("job_started", {"sites": ["a", "b"], "run_dir": "/runs/x"})
        watcher.on_event("round_started", {"round": 0, "sites": ["a", "b"]})
        watcher.on_event("site_failed", {"site": "a", "reason": "no [data]"})
        watcher.on_event("result_accepted", {"n_accepted": 1})
        watcher.on_event("something_else", {})

    assert capsys.readouterr().out.splitlines() == [
        "2 sites, run folder /runs/x",
        "pass 1: asking 2 sites",
        "a is left out: no [data]",
    ]


def test_terminal_shows_a_bar_for_each_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """It fills with the sites that have answered."""
    with StatisticsWatcher(Console(width=100, force_terminal=True)) as watcher:
        watcher.on_event("round_started", {"round": 1, "sites": ["a", "b"]})
        watcher.on_event("result_accepted", {"n_accepted": 2})

    assert "pass 2" in capsys.readouterr().out
