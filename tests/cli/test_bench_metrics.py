"""`flarebus bench metrics`."""

from __future__ import annotations

import json

import pytest

from flarebus.cli.bench_metrics import arrivals, costs
from flarebus.cli.main import main


def test_costs_are_medians_of_what_came_on_top() -> None:
    """A block in which the machine did something else changes nothing."""
    found = costs([(100e-6, 104e-6), (110e-6, 114e-6), (100e-6, 900e-6)])

    quartiles = found.pop("slowdown_quartiles")
    assert found == {"records_s": 8772, "step_us": 100.0, "log_us": 4.0, "slowdown_percent": 4.0}
    assert quartiles == [3.64, 800.0]


def test_arrivals_are_read_from_the_lines() -> None:
    """What is missing, dropped, out of order or there twice is seen."""

    def lines(*steps: int) -> list[dict[str, object]]:
        return [{"key": "loss", "type": "SCALAR", "step": step, "value": 0.5} for step in steps]

    loss = {"key": "records dropped at the site", "type": "DROPPED", "step": None, "value": 2}

    assert arrivals(lines(0, 1, 2), 3) == {"delivered": 3, "dropped": 0, "lost": 0, "in_order": "yes"}
    assert arrivals([*lines(0), loss], 3) == {"delivered": 1, "dropped": 2, "lost": 2, "in_order": "yes"}
    assert arrivals(lines(0, 2, 1), 3)["in_order"] == "no"
    assert arrivals(lines(0, 1, 1), 3)["in_order"] == "no"


def test_a_small_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Every record is delivered in order, and every figure is there."""
    assert main(["bench", "metrics", "--records", "500", "--rate", "1000", "--json"]) == 0

    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: figures[name] for name in ("bench", "external", "records", "delivered", "dropped", "in_order")} == {
        "bench": "metrics",
        "external": False,
        "records": 500,
        "delivered": 500,
        "dropped": 0,
        "in_order": "yes",
    }
    assert {"records_s", "step_us", "log_us", "slowdown_percent"} <= figures.keys()
