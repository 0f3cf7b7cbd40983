"""What came out of a run, read from its folder: the metrics of every round, the best and the final ones, the files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workflows._evaluation_report import Evaluated

__all__ = ["Outcome", "Round", "model_files", "natural", "read_rounds"]

_MODELS = ("FL_global_model", "best_FL_global_model")


@dataclass(frozen=True, slots=True)
class Round:
    """One committed round. The metrics describe the model that entered it.

    Args:
        number: from 0.
        metrics: name -> weighted mean over the sites.
        sites: site -> its own metrics.
        refused: site -> why its result did not count.
        seconds: how long the round took.
    """

    number: int
    metrics: Mapping[str, float]
    sites: Mapping[str, Mapping[str, float]]
    refused: Mapping[str, str]
    seconds: float


def read_rounds(run_dir: Path) -> list[Round]:
    """The committed rounds of a run, in order; none when it did not get that far."""
    try:
        text = (run_dir / "server" / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError:
        return []
    # What stands after the last end of a line is being written, by a job that still runs.
    rows = [json.loads(line) for line in text.split("\n")[:-1] if line.strip()]
    return [
        Round(row["round"], row["metrics"], row.get("sites", {}), row.get("refused", {}), row.get("seconds", math.nan))
        for row in rows
    ]


def model_files(run_dir: Path) -> list[Path]:
    """The model files that a run left: the final model first, then the best one."""
    folder = run_dir / "server" / "models"
    return [path for stem in _MODELS for path in sorted(folder.glob(f"{stem}.*"))]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The figures of one run.

    Args:
        key_metric: the metric that counts.
        mode: "min" when less of it is better.
        site_metric: the metric that stands for a single site.
        measured: metrics of the finished model, measured after the last round; empty when nobody did.
        evaluated: what cross-site evaluation found, if there was one.
    """

    run_dir: Path
    rounds: list[Round]
    key_metric: str
    mode: str
    site_metric: str
    measured: Mapping[str, float] = field(default_factory=dict)
    evaluated: Evaluated | None = None

    @property
    def per_round(self) -> list[float | None]:
        """The key metric of the model that entered each round; None where no site reported it."""
        return [_number(row.metrics.get(self.key_metric)) for row in self.rounds]

    @property
    def final(self) -> dict[str, float | None]:
        """What is known of the finished model, else the metrics of the last round."""
        found = self.measured or (self.rounds[-1].metrics if self.rounds else {})
        return {name: _number(value) for name, value in found.items()}

    @property
    def best(self) -> dict[str, float]:
        """The best value of the key metric that any model of the run had."""
        values = [*self.per_round, _number(self.measured.get(self.key_metric))]
        known = [value for value in values if value is not None]
        if not known:
            return {}
        return {self.key_metric: min(known) if self.mode == "min" else max(known)}

    @property
    def evaluated_metric(self) -> str:
        """The metric of the cross-site evaluation to look at; "" if there is none."""
        return "" if self.evaluated is None else self.evaluated.metric(self.site_metric, self.key_metric)

    def site_series(self) -> dict[str, list[float | None]]:
        """For each site its own metric in each round; None where it had no part in it."""
        names = sorted({site for row in self.rounds for site in row.sites}, key=natural)
        return {name: [_number(row.sites.get(name, {}).get(self.site_metric)) for row in self.rounds] for name in names}

    def to_json(self) -> dict[str, Any]:
        """The part of the program's JSON line that is about the model."""
        return {
            "rounds": len(self.rounds),
            "key_metric": self.key_metric,
            "final": self.final,
            "best": self.best,
            "accuracy_per_round": self.per_round,
            "run_dir": str(self.run_dir),
        } | ({} if self.evaluated is None else {"evaluation": self.evaluated.to_json()})


def _number(value: Any) -> float | None:
    """`value` as JSON can hold it: NaN and infinity are as good as unknown."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts site-2 before site-10."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part)) if part.isdigit() else (0, part) for part in parts]
