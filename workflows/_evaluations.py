"""What cross-site evaluation has found: for each site's data and each model the metrics, or why there are none."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["GAPS_FILE", "RESULTS_FILE", "Evaluations"]

RESULTS_FILE = "cross_site_val/cross_val_results.json"
GAPS_FILE = "cross_site_val/cross_val_gaps.json"


class Evaluations:
    """The table as it fills. Pure.

    `results`: site whose data it is -> owner of the model -> metric -> value.
    `gaps`: the same with a reason. `models`: site -> why it has no model to evaluate.
    """

    def __init__(self) -> None:
        self.results: dict[str, dict[str, dict[str, Any]]] = {}
        self.gaps: dict[str, dict[str, str]] = {}
        self.models: dict[str, str] = {}

    def add(self, data_site: str, owner: str, metrics: Mapping[str, Any] | None) -> str:
        """Note what `data_site` found of the model of `owner`; what is missing in it, or "".

        Metrics that are no numbers stay what they are. NaN and infinities are no results: JSON has no word for them.
        """
        if not metrics:
            return self.miss(data_site, owner, "it answered without metrics")
        plain = {name: _plain(value) for name, value in metrics.items()}
        self.results.setdefault(data_site, {})[owner] = plain
        odd = [name for name, value in plain.items() if isinstance(value, float) and not math.isfinite(value)]
        if not odd:
            return ""
        return self.miss(data_site, owner, "; ".join(f"{name} is {plain[name]}" for name in odd))

    def miss(self, data_site: str, owner: str, reason: str) -> str:
        """Note why `data_site` has nothing, or not all, to say of the model of `owner`; the reason."""
        self.gaps.setdefault(data_site, {})[owner] = reason
        return reason

    def of(self, data_site: str, owner: str) -> dict[str, Any]:
        """What `data_site` found of the model of `owner`."""
        return self.results[data_site][owner]

    def results_report(self) -> dict[str, Any]:
        """What goes into the file of the results."""
        return {site: dict(sorted(row.items())) for site, row in sorted(self.results.items())}

    def gaps_report(self) -> dict[str, Any]:
        """What goes into the file beside it."""
        gaps = {site: dict(sorted(row.items())) for site, row in sorted(self.gaps.items())}
        return {"models": dict(sorted(self.models.items())), "evaluations": gaps}


def _plain(value: Any) -> Any:
    """A number as Python's own, also one in an array."""
    if isinstance(value, np.ndarray | np.generic) and np.size(value) == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)
