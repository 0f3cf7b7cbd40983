"""A picture of a report of federated statistics. It reads the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from workflows._statistics_global import GLOBAL

__all__ = ["draw", "features_of"]

# More panels are not looked at, and more lines in one cannot be told apart.
_MAX_PANELS = 24
_MAX_LEGEND = 8
_PER_ROW = 3


def draw(report: Mapping[str, Any], path: Path) -> Path | None:
    """Draw a panel for each feature and dataset: its histogram, or where there is none its means and deviations.

    Args:
        path: the PNG file to write.

    Returns:
        The file, or None when there is nothing to draw.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    shown = [
        (feature, dataset) for feature, dataset, row in features_of(report) if "histogram" in row or "mean" in row
    ][:_MAX_PANELS]
    if not shown:
        return None
    # Not pyplot: it keeps figures and picks a window system; a canvas for files needs neither.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_columns = min(_PER_ROW, len(shown))
    n_rows = -(-len(shown) // n_columns)
    figure = Figure(figsize=(4.5 * n_columns, 3.2 * n_rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (feature, dataset) in enumerate(shown, start=1):
        _draw_panel(figure.add_subplot(n_rows, n_columns, number), report[feature], feature, dataset)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def features_of(report: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Feature, dataset, statistic -> value of all sites together."""
    for feature, rows in report.items():
        datasets = dict.fromkeys(dataset for sites in rows.values() for dataset in sites.get(GLOBAL, {}))
        for dataset in datasets:
            found = {name: sites[GLOBAL][dataset] for name, sites in rows.items() if dataset in sites.get(GLOBAL, {})}
            yield feature, dataset, found


def _draw_panel(axes: Any, rows: Mapping[str, Any], feature: str, dataset: str) -> None:
    if dataset in rows.get("histogram", {}).get(GLOBAL, {}):
        _draw_histogram(axes, rows["histogram"], dataset)
    else:
        _draw_means(axes, rows, dataset)
    axes.set_title(f"{feature} ({dataset})", fontsize="medium")


def _draw_histogram(axes: Any, sites: Mapping[str, Any], dataset: str) -> None:
    """The counts of all sites as a filled step, those of each site as a line over it."""
    _steps(axes, sites[GLOBAL][dataset], fill=True, color="lightgrey", label="all")
    singles = [site for site in sites if site != GLOBAL and dataset in sites[site]]
    legible = len(singles) <= _MAX_LEGEND
    for site in singles:
        look = {"label": site} if legible else {"color": "grey", "alpha": 0.4}
        _steps(axes, sites[site][dataset], linewidth=1.2, **look)
    axes.set_ylabel("records")
    if legible:
        axes.legend(fontsize="x-small")


def _steps(axes: Any, bins: Sequence[Sequence[float]], **look: Any) -> None:
    edges = [low for low, _, _ in bins] + [bins[-1][1]]
    axes.stairs([count for _, _, count in bins], edges, **look)


def _draw_means(axes: Any, rows: Mapping[str, Any], dataset: str) -> None:
    """The mean of each site and of all, with a standard deviation to both sides if there is one."""
    sites = [site for site, of_datasets in rows["mean"].items() if dataset in of_datasets]
    means = [rows["mean"][site][dataset] for site in sites]
    deviations = [rows.get("stddev", {}).get(site, {}).get(dataset, 0.0) for site in sites]
    axes.errorbar(range(len(sites)), means, deviations, fmt="o", capsize=3)
    if len(sites) <= _MAX_LEGEND + 1:
        axes.set_xticks(range(len(sites)), ["all" if site == GLOBAL else site for site in sites])
    axes.set_ylabel("mean" if "stddev" not in rows else "mean and standard deviation")
