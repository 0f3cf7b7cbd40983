"""Rounds of FedAvg or of a swarm with a trivial script: how long they take and what memory they need."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["RoundBench"]

# What a site runs: in place, so that the script itself holds one copy of the model.
_SCRIPT = '''"""Add one to every weight."""

import flarebus.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    for weights in model.params.values():
        weights += 1
    meta = {"NUM_STEPS_CURRENT_ROUND": 1}
    flare.send(flare.FLModel(params=model.params, metrics={"accuracy": 0.5}, meta=meta))
'''


@dataclass(frozen=True, slots=True)
class RoundBench:
    """One measurement.

    Args:
        mb: size of the model in units of 10**6 bytes.
        layers: number of equal float32 arrays it is made of.
        clients: number of sites.
        threads: worker processes; None for one per processor.
        rounds: rounds to run.
        curve: encrypted TCP instead of local sockets.
        offload: incoming results in files.
        external: each site's script in a process of its own.
        pipe: name or class path of the pipe to it; only with `external`.
        swarm: sites average by turns, instead of the server.
    """

    mb: float
    layers: int
    clients: int
    threads: int | None
    rounds: int
    curve: bool = False
    offload: bool = False
    external: bool = False
    pipe: str = "cell"
    swarm: bool = False

    def run(self) -> dict[str, Any]:
        """Run the job in a folder of its own, which is removed, and return the figures.

        Raises:
            JobFailed: a round did not succeed.
        """
        from flarebus.cli.bench_peaks import Peaks

        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="flarebus-bench-") as folder:
            with Peaks() as peaks:
                clock = (_SwarmClock if self.swarm else _RoundClock)(on_first=peaks.mark_idle)
                run_dir, threads = self._run_job(Path(folder), clock)
            total_s = time.perf_counter() - began
            final = _final_value(run_dir / "server" / "models" / "FL_global_model.safetensors")
        lengths = clock.lengths()
        return {
            "bench": "swarm" if self.swarm else "round",
            "mb": self.mb,
            "layers": self.layers,
            "clients": self.clients,
            "threads": threads,
            "rounds": self.rounds,
            **({} if self.swarm else {"curve": self.curve, "offload": self.offload}),
            "external": self.external,
            **({"pipe": self.pipe} if self.external else {}),
            "round_s_median": round(statistics.median(lengths[1:] or lengths), 5),
            "round_s_all": [round(length, 5) for length in lengths],
            "total_s": round(total_s, 3),
            "final_value": final,
            "peak_mb": peaks.by_role,
            **({"idle_mb": peaks.idle} if self.external else {}),
        } | ({"peak_mb_note": peaks.note} if peaks.note else {})

    def _run_job(self, folder: Path, clock: _RoundClock) -> tuple[Path, int]:
        import numpy as np

        from flarebus.recipe import FedAvgRecipe, FrameworkType, SimEnv, SwarmRecipe

        script = folder / "job" / "client.py"
        script.parent.mkdir()
        script.write_text(_SCRIPT, encoding="utf-8")
        size = max(1, int(self.mb * 1e6 / 4 / self.layers))
        own: dict[str, Any] = {"enable_tensor_disk_offload": True} if self.offload else {}
        recipe = (SwarmRecipe if self.swarm else FedAvgRecipe)(
            name="bench",
            # Zeros take no memory until somebody writes to them.
            model={f"layer{index}": np.zeros(size, np.float32) for index in range(self.layers)},
            framework=FrameworkType.NUMPY,
            min_clients=self.clients,
            num_rounds=self.rounds,
            train_script=str(script),
            launch_external_process=self.external,
            **own,
        )
        if self.external:
            recipe.add_client_config({"pipe": self.pipe})
        extra: dict[str, Any] = {"on_event": clock.on_event} | ({"transport": "tcp"} if self.curve else {})
        env = SimEnv(num_clients=self.clients, num_threads=self.threads, workspace_root=folder / "runs", extra=extra)
        run = recipe.execute(env)
        result = run.get_result()
        assert result is not None, "execute returned, so the job has ended"
        return Path(result), env.num_threads


class _RoundClock:
    """Notes when rounds begin and when the last one is committed, on the server's own thread."""

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, on_first: Callable[[], None] | None = None
    ) -> None:
        self._clock = clock
        self._on_first = on_first
        self._starts: list[float] = []
        self._committed = math.nan

    def on_event(self, event: str, _fields: dict[str, Any]) -> None:
        if event == "round_started":
            self._begin()
        elif event == "round_committed":
            self._committed = self._clock()

    def _begin(self) -> None:
        if not self._starts and self._on_first is not None:
            self._on_first()
        self._starts.append(self._clock())

    def lengths(self) -> list[float]:
        """Seconds from each round's start to the next one's; the last one's to its commit."""
        ends = [*self._starts[1:], self._committed]
        return [end - start for start, end in zip(self._starts, ends, strict=True)]


class _SwarmClock(_RoundClock):
    """The same, as the server hears of it: a round begins when a site leads it."""

    def on_event(self, event: str, fields: dict[str, Any]) -> None:
        if event == "site_report" and fields["what"] == "swarm_leads":
            self._begin()
        elif event == "round_committed":
            super().on_event(event, fields)


def _final_value(model_file: Path) -> float | None:
    """The value that every weight of the saved model has; None if they differ."""
    from safetensors import safe_open

    values = set()
    with safe_open(model_file, framework="numpy") as model:
        for name in model.keys():  # noqa: SIM118  (not a dict: it cannot be iterated)
            weights = model.get_tensor(name)
            values |= {float(weights.min()), float(weights.max())}
    return values.pop() if len(values) == 1 else None
