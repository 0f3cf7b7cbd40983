"""What is shown while a job runs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from workflows._progress import Watcher

EVENTS: list[tuple[str, dict[str, Any]]] = [
    ("job_started", {"job_id": "j", "sites": ["site-1", "site-2"], "run_dir": "/runs/x", "total_rounds": 10}),
    ("round_started", {"round": 0, "sites": ["site-1", "site-2"]}),
    ("result_accepted", {"round": 0, "site": "site-1", "metrics": {}, "n_accepted": 1, "n_expected": 2}),
    ("site_failed", {"round": 0, "site": "site-2", "reason": "[Errno 2] no file"}),
    ("round_committed", {"round": 0, "metrics": {"accuracy": 0.5}, "seconds": 0.25, "model_path": "m"}),
    ("something_new", {}),
    ("job_ended", {"state": "completed", "reason": None}),
]


def watched(
    events: list[tuple[str, dict[str, Any]]], terminal: bool, key_metric: str = "accuracy"
) -> tuple[str, Watcher]:
    """What is shown for `events`."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    with Watcher(console, key_metric) as watcher:
        for event, fields in events:
            watcher.on_event(event, fields)
    return out.getvalue(), watcher


def test_plain_lines() -> None:
    """Where there is no terminal each round is one line, and a lost site is named with its reason."""
    text, watcher = watched(EVENTS, terminal=False)

    assert text.splitlines() == [
        "2 sites, 10 rounds, run folder /runs/x",
        "round 1: site-2 failed: [Errno 2] no file",
        "round  1/10  0.250 s  accuracy 0.5000",
    ]
    assert watcher.run_dir == Path("/runs/x")


def test_bars_on_a_terminal() -> None:
    """On a terminal there are bars for rounds and sites, with the metric beside them."""
    text, _ = watched(EVENTS, terminal=True)

    assert "1/10" in text
    assert "1/2" in text
    assert "accuracy 0.5000" in text
    assert "site-2 failed" in text


def test_a_lost_turn_is_said_once() -> None:
    """Where a site failed, that is why its turn was lost; otherwise the reason for that is shown."""
    lost = [
        ("site_failed", {"round": 0, "site": "site-1", "reason": "boom"}),
        ("turn_lost", {"round": 0, "site": "site-1", "reason": "boom"}),
        ("turn_lost", {"round": 0, "site": "site-2", "reason": "it was not there in time"}),
    ]
    text, _ = watched([*EVENTS[:2], *lost], terminal=False)

    assert text.splitlines()[1:] == [
        "round 1: site-1 failed: boom",
        "round 1: site-2 lost its turn: it was not there in time",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_metric_nobody_reported_is_not_shown(terminal: bool) -> None:
    """Without the key metric the round is shown all the same."""
    text, _ = watched(EVENTS, terminal, key_metric="loss")

    assert "1/10" in text
    assert "accuracy" not in text


def test_many_lost_sites_do_not_flood() -> None:
    """Of many lost sites in one round the first few are named, and it is said where the others are."""
    lost = [("site_failed", {"round": 0, "site": f"site-{number}", "reason": "x"}) for number in range(100)]
    text, _ = watched([*EVENTS[:2], *lost, ("round_started", {"round": 1, "sites": []}), lost[0]], terminal=False)

    lines = text.splitlines()
    assert sum("failed: x" in line for line in lines) == 6
    assert sum("more sites" in line for line in lines) == 1
