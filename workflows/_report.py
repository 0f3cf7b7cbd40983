"""The report at the end of a run: a table for the terminal and a plot for a file. It reads an `Outcome`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workflows._evaluation_report import show_evaluated
from workflows._outcome import Outcome, model_files

__all__ = ["draw_plot", "show"]

# Wider or longer tables are not read: past these only the lowest and highest site, and every n-th round, are shown.
_MAX_SITE_COLUMNS = 6
_MAX_ROWS = 25
_MAX_LEGEND = 12


def show(outcome: Outcome, console: Console, plot: Path | None, heat_map: Path | None = None) -> None:
    """Print the table, the figures of the finished model and the paths of what was written."""
    console.print(_table(outcome))
    if outcome.evaluated is not None:
        show_evaluated(outcome.evaluated, outcome.evaluated_metric, console)
    final = "  ".join(f"{name} {_figure(value)}" for name, value in outcome.final.items())
    what = "finished model" if outcome.measured else "last round"
    best = "  ".join(f"{name} {_figure(value)}" for name, value in outcome.best.items())
    _line(console, what, final or "no metrics")
    if best:
        _line(console, "best", best)
    for path in model_files(outcome.run_dir):
        _line(console, "best model" if path.name.startswith("best_") else "model", str(path))
    _line(console, "metrics", str(outcome.run_dir / "server" / "metrics.jsonl"))
    if plot is not None:
        _line(console, "plot", str(plot))
    if outcome.evaluated is not None:
        _line(console, "evaluation", str(outcome.evaluated.folder))
    if heat_map is not None:
        _line(console, "heat map", str(heat_map))
    _line(console, "run folder", str(outcome.run_dir))


def _line(console: Console, what: str, text: str) -> None:
    console.print(f"[bold]{what:14}[/bold] {escape(text)}", soft_wrap=True)


def _table(outcome: Outcome) -> Table:
    series = outcome.site_series()
    few = len(series) <= _MAX_SITE_COLUMNS
    table = Table(title=f"{outcome.key_metric} of the model that entered each round; sites: {outcome.site_metric}")
    for heading in ("round", outcome.key_metric, "seconds", *(series if few else ("lowest site", "highest site"))):
        table.add_column(escape(heading), justify="right")
    step = -(-len(outcome.rounds) // _MAX_ROWS) or 1
    last = len(outcome.rounds) - 1
    for index, row in enumerate(outcome.rounds):
        if index % step and index != last:
            continue
        of_sites = {site: values[index] for site, values in series.items()}
        cells = [_figure(value) for value in of_sites.values()] if few else _extremes(of_sites)
        table.add_row(str(row.number + 1), _figure(outcome.per_round[index]), f"{row.seconds:.3f}", *cells)
    return table


def _extremes(values: dict[str, float | None]) -> list[str]:
    known = sorted((value, site) for site, value in values.items() if value is not None)
    return [escape(f"{_figure(value)} {site}") for value, site in (known[0], known[-1])] if known else ["", ""]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def draw_plot(outcome: Outcome) -> Path | None:
    """Draw the key metric over the rounds, with one line for each site, into the run folder.

    Returns:
        The file, or None when there is nothing to draw.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    mean = outcome.per_round
    if all(value is None for value in mean):
        return None
    # Not pyplot: it keeps figures and picks a window system; a canvas for files needs neither.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    numbers = [row.number + 1 for row in outcome.rounds]
    sites = outcome.site_series()
    for site, values in sites.items():
        legible = len(sites) <= _MAX_LEGEND
        axes.plot(
            numbers,
            _with_gaps(values),
            linewidth=1,
            alpha=0.8 if legible else 0.3,
            color=None if legible else "grey",
            label=site if legible else None,
        )
    measured = outcome.final.get(outcome.key_metric) if outcome.measured else None
    if measured is not None:
        # The finished model would have entered the round after the last.
        numbers, mean = [*numbers, numbers[-1] + 1], [*mean, measured]
    axes.plot(numbers, _with_gaps(mean), linewidth=2.5, color="black", label=outcome.key_metric)
    axes.set(xlabel="round that the model entered", ylabel=outcome.key_metric)
    axes.set_title(f"black: {outcome.key_metric}; sites: {outcome.site_metric}", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    path = outcome.run_dir / "accuracy_per_round.png"
    figure.savefig(path, dpi=120)
    return path


def _with_gaps(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
