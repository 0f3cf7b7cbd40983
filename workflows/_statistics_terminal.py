"""What a person sees in the terminal: a bar for each pass, or a line anywhere else, and a table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from workflows._statistics_picture import features_of

__all__ = ["StatisticsWatcher", "show"]

_COLUMNS = ("count", "failure_count", "sum", "mean", "stddev", "var", "min", "max")


class StatisticsWatcher:
    """Follows one job. `on_event` may come from any thread, one call at a time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self._pass: TaskID | None = None

    def __enter__(self) -> StatisticsWatcher:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def on_event(self, event: str, fields: Mapping[str, Any]) -> None:
        """Take note of one event; unknown ones are nobody's concern here."""
        if event == "job_started":
            self._say(f"{len(fields['sites'])} sites, run folder {fields['run_dir']}")
        elif event == "round_started":
            self._pass_started(f"pass {fields['round'] + 1}", len(fields["sites"]))
        elif event == "result_accepted" and self._pass is not None:
            self._progress.update(self._pass, completed=fields["n_accepted"])
        elif event in ("site_failed", "result_refused"):
            self._say(f"{fields['site']} is left out: {fields['reason']}")

    def _pass_started(self, name: str, n_sites: int) -> None:
        if self._console.is_terminal:
            self._pass = self._progress.add_task(name, total=n_sites)
        else:
            self._say(f"{name}: asking {n_sites} sites")

    def _say(self, text: str) -> None:
        self._console.print(escape(text), soft_wrap=True)


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print the statistics of all sites together, a line for each feature and dataset."""
    statistics = {name: None for rows in report.values() for name in rows}
    quantiles = sorted({share for *_, row in features_of(report) for share in row.get("quantile", {})}, key=float)
    table = Table(title="all sites together", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("feature")
    columns = [name for name in _COLUMNS if name in statistics]
    for name in (*columns, *(f"{float(share):.0%}" for share in quantiles)):
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    several = len({dataset for _, dataset, _ in features_of(report)}) > 1
    for feature, dataset, row in features_of(report):
        cells = [row.get(name) for name in columns] + [row.get("quantile", {}).get(share) for share in quantiles]
        label = f"{feature} ({dataset})" if several else feature
        table.add_row(escape(label), *("" if value is None else f"{value:.5g}" for value in cells))
    console.print(table)
