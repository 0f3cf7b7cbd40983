"""What a person sees while models are evaluated: a bar on a terminal, lines at beginning and end anywhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["EvaluationWatcher"]

# What a whole site lacks is one line for each model; more must not scroll everything else away.
_MAX_COMPLAINTS = 5


class EvaluationWatcher:
    """Follows one cross-site evaluation.

    Args:
        say: shows a line.
        progress: told how many evaluations there are to do, and how many are done.
    """

    def __init__(self, say: Callable[[str], None], progress: Callable[[int, int], None]) -> None:
        self._say = say
        self._progress = progress
        self._n_sites = 0
        self._total = 0
        self._done: set[tuple[str, str]] = set()
        self._missing = 0
        self._complaints = 0

    def on_event(self, event: str, fields: Mapping[str, Any]) -> None:
        """Take note of one event; unknown ones are nobody's concern here."""
        if event == "evaluation_started":
            self._n_sites, n_models = len(fields["sites"]), len(fields["models"])
            self._total = self._n_sites * n_models
            self._say(f"evaluating {n_models} models at {self._n_sites} sites")
        elif event == "model_missing":
            self._total -= self._n_sites
            self._complain(f"{fields['site']} has no model: {fields['reason']}")
        elif event in ("site_evaluated", "evaluation_missing"):
            self._done.add((fields["data_site"], fields["owner"]))
            if event == "evaluation_missing":
                self._missing += 1
                self._complain(f"no metrics of {fields['owner']} on {fields['data_site']}: {fields['reason']}")
        elif event == "evaluation_ended":
            gaps = f", {self._missing} with gaps" if self._missing else ""
            self._say(f"{len(self._done)} evaluations{gaps}")
        self._progress(len(self._done), self._total)

    def _complain(self, text: str) -> None:
        self._complaints += 1
        if self._complaints <= _MAX_COMPLAINTS:
            self._say(text)
        elif self._complaints == _MAX_COMPLAINTS + 1:
            self._say("more is missing; cross_val_gaps.json says what and why")
