"""`flarebus bench round`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from flarebus.cli.bench_round import _final_value, _RoundClock
from flarebus.cli.main import main


def test_a_round_lasts_until_the_next_begins() -> None:
    """Lengths go from start to start; the last one ends with its commit."""
    times = iter([1.0, 1.9, 2.0, 2.4, 2.5, 2.75])
    clock = _RoundClock(lambda: next(times))

    for event in ("job_started", *("round_started", "result_accepted", "round_committed") * 3, "job_ended"):
        clock.on_event(event, {})

    assert clock.lengths() == pytest.approx([1.0, 0.5, 0.25])


def test_the_final_value_is_of_every_weight(tmp_path: Path) -> None:
    """One weight that differs is noticed, wherever it is."""
    arrays = {name: np.full(5, 3, np.float32) for name in "ab"}
    save_file(arrays, tmp_path / "same.safetensors")
    arrays["b"][4] = 4
    save_file(arrays, tmp_path / "different.safetensors")

    assert _final_value(tmp_path / "same.safetensors") == 3.0
    assert _final_value(tmp_path / "different.safetensors") is None


@pytest.mark.parametrize("option", [None, "--offload", "--curve"])
def test_a_small_one(capsys: pytest.CaptureFixture[str], option: str | None) -> None:
    """Three rounds over three sites end with the right weights, and every figure is there."""
    argv = ["bench", "round", "--mb", "0.1", "--layers", "3", "--clients", "3", "--threads", "2", "--rounds", "3"]

    assert main([*argv, "--json", *([option] if option else [])]) == 0

    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["final_value"] == 3
    assert len(figures["round_s_all"]) == 3
    assert figures["round_s_median"] == pytest.approx(np.median(figures["round_s_all"][1:]), abs=1e-5)
    assert {"server", "client", "worker-1", "worker-2"} <= set(figures["peak_mb"])
    assert figures["total_s"] > sum(figures["round_s_all"])


def test_a_small_swarm(capsys: pytest.CaptureFixture[str]) -> None:
    """The same for a swarm, as the server hears of it."""
    argv = ["bench", "swarm", "--mb", "0.1", "--layers", "3", "--clients", "3", "--threads", "3", "--rounds", "4"]

    assert main([*argv, "--json"]) == 0

    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["bench"], figures["final_value"], len(figures["round_s_all"])) == ("swarm", 4, 4)
    assert all(length > 0 for length in figures["round_s_all"])
    assert {"server", "client", "worker-1", "worker-2", "worker-3"} <= set(figures["peak_mb"])
