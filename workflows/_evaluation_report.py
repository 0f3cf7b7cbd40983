"""What cross-site evaluation has left in the folder of a run: read, shown as a table, drawn as a heat map."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workflows._evaluations import GAPS_FILE, RESULTS_FILE
from workflows._outcome import natural

__all__ = ["Evaluated", "draw", "draw_heat_map", "read_evaluated", "show_evaluated"]

# More columns do not fit into a terminal: the models are then described by their extremes.
_MAX_SITE_COLUMNS = 8
# Reasons that are shown; the others are in the file.
_MAX_REASONS = 5
# Numbers in fields are legible up to this many rows or columns.
_MAX_NUMBERS = 16


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The two files.

    Args:
        results: site whose data it is -> owner of the model -> metric -> value.
        models: site -> why it has no model.
        gaps: site whose data it is -> owner of the model -> why there is no value.
        folder: where they are.
    """

    results: Mapping[str, Mapping[str, Mapping[str, Any]]]
    models: Mapping[str, str]
    gaps: Mapping[str, Mapping[str, str]]
    folder: Path

    @property
    def sites(self) -> list[str]:
        """Sites whose data were used, or should have been."""
        return sorted({*self.results, *self.gaps}, key=natural)

    @property
    def owners(self) -> list[str]:
        """Whose models were evaluated, or should have been: the server's last."""
        rows = [*self.results.values(), *self.gaps.values()]
        names = {owner for row in rows for owner in row}
        return sorted(names, key=lambda name: (name.startswith("SRV_"), natural(name)))

    def value(self, site: str, owner: str, metric: str) -> float:
        """What `site` measured of the model of `owner`; NaN where that is no number, or missing."""
        found = self.results.get(site, {}).get(owner, {}).get(metric)
        return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else math.nan

    def metric(self, *preferred: str) -> str:
        """The first of `preferred` that there is, else the first that is a number anywhere; "" without any."""
        names = [name for row in self.results.values() for metrics in row.values() for name in metrics]
        wanted = [name for name in (*preferred, *names) if name in names]
        numeric = [
            name
            for name in wanted
            if any(not math.isnan(self.value(site, owner, name)) for site in self.results for owner in self.owners)
        ]
        return next(iter(numeric), "")

    @property
    def n_missing(self) -> int:
        """Evaluations without a result, or with one that lacks something."""
        return sum(len(row) for row in self.gaps.values())

    def to_json(self) -> dict[str, Any]:
        """The part of the program's JSON line that is about it."""
        return {
            "results": str(self.folder / Path(RESULTS_FILE).name),
            "sites": len(self.sites),
            "models": len(self.owners),
            "missing": self.n_missing + len(self.models),
        }


def read_evaluated(run_dir: Path) -> Evaluated | None:
    """What a run has left; None if it had no cross-site evaluation, or did not get that far."""
    try:
        results = json.loads((run_dir / "server" / RESULTS_FILE).read_text(encoding="utf-8"))
        gaps = json.loads((run_dir / "server" / GAPS_FILE).read_text(encoding="utf-8"))
    except OSError:
        return None
    return Evaluated(results, gaps["models"], gaps["evaluations"], (run_dir / "server" / RESULTS_FILE).parent)


def show_evaluated(found: Evaluated, metric: str, console: Console) -> None:
    """Print a row for each model, and the reasons of gaps.

    Args:
        metric: the one to show; "" shows the reasons alone.
    """
    if metric:
        console.print(_table(found, metric))
    reasons = [f"{site} has no model: {why}" for site, why in found.models.items()]
    reasons += [f"{owner} on {site}: {why}" for site, row in found.gaps.items() for owner, why in row.items()]
    for reason in reasons[:_MAX_REASONS]:
        console.print(escape(reason), soft_wrap=True)
    if len(reasons) > _MAX_REASONS:
        more = f"and {len(reasons) - _MAX_REASONS} more in {found.folder / Path(GAPS_FILE).name}"
        console.print(escape(more), soft_wrap=True)


def _table(found: Evaluated, metric: str) -> Table:
    sites = found.sites
    few = len(sites) <= _MAX_SITE_COLUMNS
    table = Table(title=f"{metric} of each model on the data of each site", box=box.SIMPLE_HEAD)
    table.add_column("model of", overflow="fold")
    for heading in ("mean", *(sites if few else ("lowest", "highest"))):
        table.add_column(escape(heading), justify="right")
    for owner in found.owners:
        values = {site: found.value(site, owner, metric) for site in sites}
        known = {site: value for site, value in values.items() if not math.isnan(value)}
        mean = _figure(sum(known.values()) / len(known)) if known else "-"
        cells = [_figure(value) for value in values.values()] if few else _extremes(known)
        table.add_row(escape(owner), mean, *cells)
    return table


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _extremes(known: Mapping[str, float]) -> list[str]:
    if not known:
        return ["-", "-"]
    low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    return [escape(f"{_figure(known[site])} {site}") for site in (low, high)]


def draw(run_dir: str | Path, metric: str = "accuracy") -> Path | None:
    """Draw what the cross-site evaluation of a run has left, beside its results.

    Args:
        metric: the one to draw; where there is none of that name, the first one that is a number.

    Returns:
        The PNG file, or None when there is nothing to draw.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    found = read_evaluated(Path(run_dir))
    return None if found is None else draw_heat_map(found, found.metric(metric))


def draw_heat_map(found: Evaluated, metric: str) -> Path | None:
    """Draw sites' data against models, into the folder of the results; what is missing stays grey.

    Returns:
        The PNG file, or None when there is nothing to draw.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    sites, owners = found.sites, found.owners
    if not metric:
        return None
    # Not pyplot: it keeps figures and picks a window system; a canvas for files needs neither.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = [[found.value(site, owner, metric) for owner in owners] for site in sites]
    figure = Figure(figsize=(min(4 + 0.6 * len(owners), 24), min(2.5 + 0.45 * len(sites), 24)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("lightgrey")
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    figure.colorbar(image, label=metric)
    axes.set_xticks(range(len(owners)), owners, rotation=45, ha="right", fontsize="small")
    axes.set_yticks(range(len(sites)), sites, fontsize="small")
    axes.set(xlabel="model of", ylabel="data of", title=f"{metric} of each model on the data of each site")
    if max(len(sites), len(owners)) <= _MAX_NUMBERS:
        middle = sum(image.get_clim()) / 2
        for at, row in enumerate(values):
            for column, value in enumerate(row):
                colour = "black" if value > middle or math.isnan(value) else "white"
                axes.text(column, at, _short(value), ha="center", va="center", fontsize="x-small", color=colour)
    path = found.folder / "cross_val_results.png"
    figure.savefig(path, dpi=120)
    return path


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
