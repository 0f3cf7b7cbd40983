"""What `flare.log` costs a training loop, and whether everything arrives: one site whose script does fixed work."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MetricsBench"]

# What the site runs. The work is pure Python: it shares the interpreter with whatever sends the records, which is the
# worst case. Blocks with and without logging take turns, so that a machine that changes its speed does so for both.
# Between them the script waits until what the last one logged has been sent, at its own cost and not at the next one's.
_SCRIPT = '''"""Time a loop with and without a metric in each step."""

import argparse
import json
import time

import flarebus.client as flare

clock, kind = time.perf_counter, flare.AnalyticsDataType.SCALAR


def work(n):
    total = 0
    for number in range(n):
        total += number * number
    return total


def plain(steps, n, first):
    for step in range(first, first + steps):
        work(n)


def logged(steps, n, first):
    for step in range(first, first + steps):
        work(n)
        flare.log("loss", 0.5, kind, global_step=step)


def seconds(loop, *args):
    begin = clock()
    loop(*args)
    return clock() - begin


def sized(period):
    """How much work takes that long."""
    n = 10
    while (took := min(seconds(plain, 20, n, 0) for _ in range(5)) / 20) < period:
        n = max(n + 1, int(n * min(2.0, period / took)))
    return n


parser = argparse.ArgumentParser()
parser.add_argument("--records", type=int)
parser.add_argument("--rate", type=float)
parser.add_argument("--blocks", type=int)
given = parser.parse_args()

flare.init()
model = flare.receive()
n = sized(1 / given.rate)
times, first = [], 0
for block in range(given.blocks):
    steps = (given.records - first) // (given.blocks - block)
    loops = (plain, logged) if block % 2 else (logged, plain)
    took = {}
    for loop in loops:
        took[loop] = seconds(loop, steps, n, first) / steps
        time.sleep(0.3)
    times.append((took[plain], took[logged]))
    first += steps
with open("bench.json", "w") as file:
    json.dump(times, file)
flare.send(flare.FLModel(params=model.params))
'''
# Long enough for two batches to be sent in each, and short beside the moods of a shared machine.
_BLOCK_S = 0.5
_MIN_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class MetricsBench:
    """One measurement.

    Args:
        records: how many to log.
        rate: steps a second of the loop when nothing is logged; it logs one record a step.
        external: the script in a process of its own.
    """

    records: int
    rate: float
    external: bool

    def run(self) -> dict[str, Any]:
        """Run the job in a folder of its own, which is removed, and return the figures.

        Raises:
            JobFailed: the script did not come to its end.
        """
        with tempfile.TemporaryDirectory(prefix="flarebus-bench-") as folder:
            run_dir = self._run_job(Path(folder))
            # The one that measured: a trainer may have another working directory than its site's folder.
            times = json.loads(next((run_dir / "site-1").rglob("bench.json")).read_text(encoding="utf-8"))
            lines = (run_dir / "server" / "site_metrics.jsonl").read_text(encoding="utf-8").splitlines()
        figures = {"bench": "metrics", "external": self.external, "records": self.records}
        return figures | costs(times) | arrivals([json.loads(line) for line in lines], self.records)

    def _run_job(self, folder: Path) -> Path:
        import numpy as np

        from flarebus.recipe import FedAvgRecipe, FrameworkType, SimEnv

        script = folder / "job" / "client.py"
        script.parent.mkdir()
        script.write_text(_SCRIPT, encoding="utf-8")
        blocks = min(self.records, max(_MIN_BLOCKS, round(self.records / (self.rate * _BLOCK_S))))
        recipe = FedAvgRecipe(
            name="bench",
            model={"w": np.zeros(1, np.float32)},
            framework=FrameworkType.NUMPY,
            min_clients=1,
            num_rounds=1,
            key_metric="",
            train_script=str(script),
            train_args=f"--records {self.records} --rate {self.rate} --blocks {blocks}",
            launch_external_process=self.external,
        )
        run = recipe.execute(SimEnv(num_clients=1, workspace_root=folder / "runs"))
        result = run.get_result()
        assert result is not None, "execute returned, so the job has ended"
        return Path(result)


def costs(times: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The figures for blocks of (seconds a step without, with a record): medians over the blocks.

    `log_us` is what a step takes longer for its record, sending included. Half of the blocks were slowed down by what
    lies between the two numbers of `slowdown_quartiles`: where they are far apart, the machine was busy with others.
    """
    plain = statistics.median(without for without, _ in times)
    extra = statistics.median(logged - without for without, logged in times)
    slowdowns = sorted(100 * (logged / without - 1) for without, logged in times)
    return {
        "records_s": round(1 / statistics.median(logged for _, logged in times)),
        "step_us": round(1e6 * plain, 2),
        "log_us": round(1e6 * extra, 2),
        "slowdown_percent": round(statistics.median(slowdowns), 2),
        "slowdown_quartiles": [round(slowdowns[len(slowdowns) // 4], 2), round(slowdowns[-1 - len(slowdowns) // 4], 2)],
    }


def arrivals(lines: Sequence[dict[str, Any]], expected: int) -> dict[str, Any]:
    """What became of the records, from the lines of the server's file."""
    steps = [line["step"] for line in lines if line["key"] == "loss"]
    return {
        "delivered": len(steps),
        "dropped": sum(line["value"] for line in lines if line["type"] == "DROPPED"),
        "lost": expected - len(steps),
        "in_order": "yes" if steps == sorted(set(steps)) else "no",
    }
