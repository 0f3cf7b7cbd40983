"""`flarebus bench cse`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flarebus.cli.bench_cse import CseBench, _Clock
from flarebus.cli.main import main


def test_the_time_is_that_of_the_evaluation_alone() -> None:
    """Not that of starting sites; what moves is what the server sends and what its router forwards."""
    times = iter([2.0, 5.5])
    clock = _Clock(lambda: next(times))
    for event in ("job_started", "evaluation_started", "round_started", "evaluation_ended"):
        clock.on_event(event, {})
    clock.on_event("bus_traffic", {"bytes_forwarded": 30, "bytes_served": 4})

    assert (clock.seconds, clock.moved) == (3.5, 34)


def test_a_wrong_evaluation_is_noticed(tmp_path: Path) -> None:
    """One number that is not that of its model, and one that is missing."""
    right = {"site-1": {"value": 1.0}, "site-2": {"value": 2.0}, "SRV_model1": {"value": -1.0}}
    odd = {**right, "site-1": {"value": 2.0}}
    del odd["SRV_model1"]
    place = tmp_path / "server" / "cross_site_val"
    place.mkdir(parents=True)
    bench = CseBench(1.0, 1, 2, None, 1)

    for rows, expected in (({"site-1": right, "site-2": right}, 0), ({"site-1": right, "site-2": odd}, 2)):
        place.joinpath("cross_val_results.json").write_text(json.dumps(rows))
        assert bench._wrong(tmp_path) == expected


@pytest.mark.parametrize("threads", [1, 3])
def test_a_small_one(capsys: pytest.CaptureFixture[str], threads: int) -> None:
    """No evaluation is wrong, and no model moved twice to a site; none of what sites of one worker give each other."""
    argv = ["bench", "cse", "--mb", "2", "--layers", "2", "--clients", "3", "--threads", str(threads), "--json"]

    assert main([*argv, "--server-models", "1"]) == 0

    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["evaluations"], figures["wrong"], figures["moved_mb_at_most"]) == (12, 0, 24.0)
    moves = 3 + 6 if threads == 3 else 1
    assert figures["moved_mb"] == pytest.approx(2 * moves, rel=0.05)
    assert figures["peak_mb"]["server"] > 0
    assert figures["seconds"] > 0
