"""What the program makes of a run folder: figures, table, plot."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from workflows._outcome import Outcome, model_files, read_rounds
from workflows._report import draw_plot, show


def write_rounds(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    """A metrics file with `rows`, each with what it must have."""
    (run_dir / "server").mkdir(exist_ok=True)
    lines = [
        {"round": number, "accepted": list(row.get("sites", {})), "refused": {}, "seconds": 0.5, "sites": {}} | row
        for number, row in enumerate(rows)
    ]
    (run_dir / "server" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def outcome_of(run_dir: Path, rows: list[dict[str, Any]], **changes: Any) -> Outcome:
    """The outcome of a run with such rounds."""
    write_rounds(run_dir, rows)
    given = {"key_metric": "accuracy", "mode": "max", "site_metric": "accuracy", **changes}
    return Outcome(run_dir=run_dir, rounds=read_rounds(run_dir), **given)


ROWS = [
    {"metrics": {"accuracy": 0.5}, "sites": {"site-1": {"accuracy": 0.4}, "site-2": {"accuracy": 0.6}}},
    {"metrics": {"accuracy": 0.9}, "sites": {"site-10": {"accuracy": 0.9}}, "refused": {"site-2": "NaN in 'w'"}},
    {"metrics": {"accuracy": 0.7}, "sites": {"site-1": {"accuracy": 0.7}}},
]


def test_a_run_that_did_not_get_to_a_round(tmp_path: Path) -> None:
    """Without a metrics file there are no rounds and no figures."""
    found = Outcome(tmp_path, read_rounds(tmp_path), "accuracy", "max", "accuracy")

    assert (found.per_round, found.final, found.best) == ([], {}, {})
    assert draw_plot(found) is None


@pytest.mark.parametrize(
    ("mode", "measured", "final", "best"),
    [
        ("max", {}, 0.7, 0.9),
        ("min", {}, 0.7, 0.5),
        ("max", {"accuracy": 0.95}, 0.95, 0.95),
        ("min", {"accuracy": 0.95}, 0.95, 0.5),
    ],
)
def test_final_and_best(tmp_path: Path, mode: str, measured: dict[str, float], final: float, best: float) -> None:
    """The finished model counts if it was measured, and the best is the best in the direction that is asked for."""
    found = outcome_of(tmp_path, ROWS, mode=mode, measured=measured)

    assert found.per_round == [0.5, 0.9, 0.7]
    assert found.final == {"accuracy": final}
    assert found.best == {"accuracy": best}


def test_sites_come_in_the_order_of_their_numbers_with_gaps(tmp_path: Path) -> None:
    """A site that had no part in a round has a gap there, and site-2 stands before site-10."""
    found = outcome_of(tmp_path, ROWS).site_series()

    assert found == {"site-1": [0.4, None, 0.7], "site-2": [0.6, None, None], "site-10": [None, 0.9, None]}
    assert list(found) == ["site-1", "site-2", "site-10"]


def test_json_never_holds_nan(tmp_path: Path) -> None:
    """A metric that is no number is null in the JSON line, which any reader can read."""
    found = outcome_of(tmp_path, [{"metrics": {"accuracy": math.nan, "note": "x"}}])

    text = json.dumps(found.to_json(), allow_nan=False)

    assert json.loads(text)["accuracy_per_round"] == [None]
    assert found.best == {}


def test_models_final_first(tmp_path: Path) -> None:
    """The files of the final model come before those of the best one; others are not shown."""
    folder = tmp_path / "server" / "models"
    folder.mkdir(parents=True)
    for name in ("best_FL_global_model.pt", "model-0.safetensors", "FL_global_model.safetensors", "FL_global_model.pt"):
        (folder / name).touch()

    assert [path.name for path in model_files(tmp_path)] == [
        "FL_global_model.pt",
        "FL_global_model.safetensors",
        "best_FL_global_model.pt",
    ]


def shown(outcome: Outcome, plot: Path | None = None) -> str:
    """What a wide terminal would show."""
    console = Console(width=200, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115
    show(outcome, console, plot)
    console.file.close()
    return console.export_text()


def test_the_table_has_a_row_for_each_round_and_a_column_for_each_site(tmp_path: Path) -> None:
    """With few sites each has its column, and the paths of what was written stand below."""
    text = shown(outcome_of(tmp_path, ROWS), tmp_path / "plot.png")

    assert "site-10" in text
    assert "0.9000" in text
    assert str(tmp_path / "server" / "metrics.jsonl") in text
    assert str(tmp_path / "plot.png") in text


def test_many_sites_and_rounds_are_thinned(tmp_path: Path) -> None:
    """With many sites the lowest and highest are named, and of many rounds the first and last are there."""
    sites = {f"site-{number}": {"accuracy": number / 100} for number in range(1, 51)}
    text = shown(outcome_of(tmp_path, [{"metrics": {"accuracy": 0.25}, "sites": sites}] * 90))

    rows = [line.split() for line in text.splitlines() if "0.2500" in line and "site" in line]
    assert rows[0][1] == "1"
    assert rows[-1][1] == "90"
    assert len(rows) < 30
    assert "0.0100 site-1" in text
    assert "0.5000 site-50" in text


@pytest.mark.parametrize("n_sites", [0, 2, 40])
@pytest.mark.parametrize("measured", [{}, {"accuracy": 0.8}])
def test_the_plot_is_an_image(tmp_path: Path, n_sites: int, measured: dict[str, float]) -> None:
    """Whatever the number of sites, with gaps and without, a picture lies in the run folder."""
    sites = {f"site-{number}": {"accuracy": 0.5} for number in range(n_sites)}
    found = outcome_of(tmp_path, [{"metrics": {"accuracy": 0.1}, "sites": sites}, {"metrics": {}}], measured=measured)

    path = draw_plot(found)

    assert path == tmp_path / "accuracy_per_round.png"
    assert path.read_bytes().startswith(b"\x89PNG")
