"""Cross-site evaluation with a trivial script: what it moves, how long it takes, and what memory it needs."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CseBench"]

# What a site runs. Its model is its number, everywhere; what it finds of another one is that one's number.
_SCRIPT = '''"""Submit a model of one number, and find the number in those of others."""

import sys

import numpy as np

import flarebus.client as flare

flare.init()
number, size, layers = int(flare.get_site_name().rpartition("-")[2]), int(sys.argv[1]), int(sys.argv[2])
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    if flare.is_submit_model():
        flare.send(flare.FLModel(params={f"layer{at}": np.full(size, number, np.float32) for at in range(layers)}))
    else:
        values = {float(value) for array in model.params.values() for value in (array.min(), array.max())}
        flare.send(flare.FLModel(metrics={"value": values.pop() if len(values) == 1 else float("nan")}))
'''


@dataclass(frozen=True, slots=True)
class CseBench:
    """One measurement.

    Args:
        mb: size of a model in units of 10**6 bytes.
        layers: number of equal float32 arrays it is made of.
        clients: number of sites.
        threads: worker processes; None for one per processor.
        server_models: number of models that the server has.
        external: each site's script in a process of its own.
    """

    mb: float
    layers: int
    clients: int
    threads: int | None
    server_models: int
    external: bool = False

    def run(self) -> dict[str, Any]:
        """Run the job in a folder of its own, which is removed, and return the figures.

        Raises:
            JobFailed: it did not succeed.
        """
        from flarebus.cli.bench_peaks import Peaks

        with tempfile.TemporaryDirectory(prefix="flarebus-bench-") as folder:
            clock = _Clock()
            with Peaks() as peaks:
                clock.on_begin = peaks.mark_idle
                run_dir, threads = self._run_job(Path(folder), clock)
            wrong = self._wrong(run_dir)
        n_models = self.clients + self.server_models
        size = self._size * self.layers * 4
        return {
            "bench": "cse",
            "mb": self.mb,
            "layers": self.layers,
            "clients": self.clients,
            "threads": threads,
            "server_models": self.server_models,
            "external": self.external,
            "evaluations": n_models * self.clients,
            "wrong": wrong,
            "moved_mb": round(clock.moved / 1e6, 1),
            "moved_mb_at_most": round(n_models * self.clients * size / 1e6, 1),
            "seconds": round(clock.seconds, 3),
            "peak_mb": peaks.by_role,
            "idle_mb": peaks.idle,
        } | ({"peak_mb_note": peaks.note} if peaks.note else {})

    @property
    def _size(self) -> int:
        """Numbers in one array."""
        return max(1, int(self.mb * 1e6 / 4 / self.layers))

    def _run_job(self, folder: Path, clock: _Clock) -> tuple[Path, int]:
        from flarebus.recipe import CrossSiteEvalRecipe, FrameworkType, SimEnv

        script = folder / "job" / "evaluate.py"
        script.parent.mkdir()
        script.write_text(_SCRIPT, encoding="utf-8")
        recipe = CrossSiteEvalRecipe(
            name="bench",
            server_models=self._save_models(folder),
            eval_script=str(script),
            eval_args=f"{self._size} {self.layers}",
            framework=FrameworkType.NUMPY,
            launch_external_process=self.external,
        )
        env = SimEnv(
            num_clients=self.clients,
            num_threads=self.threads,
            workspace_root=folder / "runs",
            extra={"on_event": clock.on_event},
        )
        result = recipe.execute(env).get_result()
        assert result is not None, "execute returned, so the job has ended"
        return Path(result), env.num_threads

    def _save_models(self, folder: Path) -> dict[str, str]:
        """The server's models: numbers below zero. One at a time is in memory."""
        import numpy as np
        from safetensors.numpy import save_file

        found = {}
        for number in range(1, self.server_models + 1):
            path = folder / f"model{number}.safetensors"
            save_file({f"layer{at}": np.full(self._size, -number, np.float32) for at in range(self.layers)}, path)
            found[f"model{number}"] = str(path)
        return found

    def _wrong(self, run_dir: Path) -> int:
        """How many evaluations did not find the number that is in the model."""
        results = json.loads((run_dir / "server/cross_site_val/cross_val_results.json").read_text(encoding="utf-8"))
        numbers = {f"site-{number}": number for number in range(1, self.clients + 1)}
        numbers |= {f"SRV_model{number}": -number for number in range(1, self.server_models + 1)}
        return sum(
            results.get(f"site-{number}", {}).get(owner, {}).get("value") != expected
            for number in range(1, self.clients + 1)
            for owner, expected in numbers.items()
        )


class _Clock:
    """Notes how long the evaluation takes, and what moves meanwhile, on the server's own thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.on_begin: Callable[[], None] = lambda: None
        self.seconds = math.nan
        self.moved = 0
        """Bytes, those of messages between hosts included."""
        self._clock = clock
        self._began = math.nan

    def on_event(self, event: str, fields: dict[str, Any]) -> None:
        if event == "evaluation_started":
            self.on_begin()
            self._began = self._clock()
        elif event == "evaluation_ended":
            self.seconds = self._clock() - self._began
        elif event == "bus_traffic":
            self.moved = fields["bytes_forwarded"] + fields["bytes_served"]
