"""What the program makes of a cross-site evaluation: progress, table and picture, from the files of a run."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from workflows._evaluation_progress import EvaluationWatcher
from workflows._evaluation_report import draw, draw_heat_map, read_evaluated, show_evaluated

RESULTS: dict[str, Any] = {
    "site-2": {"site-2": {"loss": 0.5, "note": "ok"}, "SRV_a": {"loss": 0.25, "note": "ok"}},
    "site-10": {"site-2": {"loss": None, "note": "odd"}, "SRV_a": {"loss": 0.75, "note": "ok"}},
}
GAPS = {
    "models": {"site-10": "no [file]"},
    "evaluations": {"site-10": {"site-2": "loss is nan"}, "site-3": {"site-2": "boom", "SRV_a": "boom"}},
}


def left(folder: Path, results: Any = RESULTS, gaps: Any = GAPS) -> Path:
    """The folder of a run with these reports."""
    place = folder / "server" / "cross_site_val"
    place.mkdir(parents=True)
    place.joinpath("cross_val_results.json").write_text(json.dumps(results))
    place.joinpath("cross_val_gaps.json").write_text(json.dumps(gaps))
    return folder


def shown(folder: Path, metric: str) -> str:
    """What is printed, with one blank where there are several."""
    found = read_evaluated(folder)
    assert found is not None
    console = Console(file=io.StringIO(), width=100)
    show_evaluated(found, metric, console)
    return "\n".join(" ".join(line.split()) for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def test_reads_what_a_run_has_left(tmp_path: Path) -> None:
    """Sites in the order of their numbers, the server's models last; what is no number is missing."""
    found = read_evaluated(left(tmp_path))

    assert found is not None
    assert (found.sites, found.owners) == (["site-2", "site-3", "site-10"], ["site-2", "SRV_a"])
    assert found.value("site-2", "SRV_a", "loss") == 0.25
    assert all(math.isnan(found.value("site-10", owner, "loss")) for owner in ("site-2", "SRV_b"))
    assert (found.metric("accuracy", "loss"), found.metric("accuracy"), found.metric("note")) == ("loss",) * 3
    assert found.to_json() == {
        "results": str(found.folder / "cross_val_results.json"),
        "sites": 3,
        "models": 2,
        "missing": 4,
    }


def test_a_run_without_evaluation_has_none(tmp_path: Path) -> None:
    """Nothing is made up."""
    assert read_evaluated(tmp_path) is None


def test_shows_a_row_for_each_model_and_reasons(tmp_path: Path) -> None:
    """Dashes where nothing is known; the mean is of what is."""
    text = shown(left(tmp_path), "loss")

    assert "model of mean site-2 site-3 site-10" in text
    assert "site-2 0.5000 0.5000 - -" in text
    assert "SRV_a 0.5000 0.2500 - 0.7500" in text
    assert "site-10 has no model: no [file]" in text
    assert "site-2 on site-3: boom" in text


def test_many_sites_are_shown_by_their_extremes(tmp_path: Path) -> None:
    """Not a column for each; and of many reasons a few."""
    sites = {f"site-{number}": {"SRV_a": {"v": number}} for number in range(1, 30)}
    gaps = {site: {"SRV_b": "boom"} for site in sites}
    text = shown(left(tmp_path, sites, {"models": {}, "evaluations": gaps}), "v")

    assert "SRV_a 15.0000 1.0000 site-1 29.0000 site-29" in text
    assert "SRV_b - - -" in text
    assert "and 24 more in" in text


def test_nothing_to_show_still_says_why(tmp_path: Path) -> None:
    """Reasons without a table, and no picture."""
    folder = left(tmp_path, {}, GAPS)
    found = read_evaluated(folder)

    assert found is not None
    assert found.metric("loss") == ""
    assert shown(folder, "").startswith("site-10 has no model")
    assert draw_heat_map(found, "") is None


def test_draws_a_picture_with_holes(tmp_path: Path) -> None:
    """A PNG beside the results, of any size."""
    found = read_evaluated(left(tmp_path))
    assert found is not None
    path = draw_heat_map(found, "loss")

    assert path == found.folder / "cross_val_results.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_draws_the_picture_of_a_run(tmp_path: Path) -> None:
    """For whoever has run a recipe: of the metric asked for, else of one that there is; of nothing, none."""
    assert draw(tmp_path) is None
    folder = left(tmp_path)

    assert draw(str(folder)) == draw(folder, "loss") == folder / "server/cross_site_val/cross_val_results.png"


def test_progress_counts_each_evaluation_once() -> None:
    """A model that is missing is nobody's work; what has no value is done as well."""
    said: list[str] = []
    progress: list[tuple[int, int]] = []
    watcher = EvaluationWatcher(said.append, lambda done, total: progress.append((done, total)))
    watcher.on_event("evaluation_started", {"sites": ["a", "b"], "models": ["a", "b", "SRV_x"]})
    watcher.on_event("model_missing", {"site": "b", "reason": "none"})
    watcher.on_event("round_started", {"round": 0})
    for site in "ab":
        for owner in ("a", "SRV_x"):
            watcher.on_event("site_evaluated", {"data_site": site, "owner": owner, "metrics": {}})
    watcher.on_event("evaluation_missing", {"data_site": "b", "owner": "a", "reason": "loss is nan"})
    watcher.on_event("evaluation_ended", {})

    assert progress[0] == (0, 6)
    assert progress[-1] == (4, 4)
    assert said == [
        "evaluating 3 models at 2 sites",
        "b has no model: none",
        "no metrics of a on b: loss is nan",
        "4 evaluations, 1 with gaps",
    ]


def test_progress_does_not_complain_without_end() -> None:
    """After a few, the file is named that has all."""
    said: list[str] = []
    watcher = EvaluationWatcher(said.append, lambda *_: None)
    for number in range(20):
        watcher.on_event("evaluation_missing", {"data_site": f"s{number}", "owner": "a", "reason": "boom"})

    assert len(said) == 6
    assert "cross_val_gaps.json" in said[-1]


@pytest.mark.parametrize("event", ["round_committed", "nonsense"])
def test_progress_leaves_other_events_alone(event: str) -> None:
    """They are not its business."""
    EvaluationWatcher(pytest.fail, lambda *_: None).on_event(event, {})
