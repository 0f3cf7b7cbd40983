"""The program behind `python -m workflows.statistics`: options, progress, a table, a picture."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flarebus.cli.exits import OK, run_command
from flarebus.errors import FlarebusError, JobFailed, UsageError
from workflows._options import SectionedCommand, json_object, section, site_names

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]

_ABOUT = """Federated statistics: what is in the tables of all sites together, without a record leaving its site.

Without arguments it describes tumours in a table that comes with scikit-learn, split over three clinics, and compares
with all rows in one place. With --generator it asks your own class at every site.
"""

_EPILOG = """\b
Examples:
  python -m workflows.statistics
  python -m workflows.statistics --clients 5 --statistics count,mean,stddev --json
  python -m workflows.statistics --generator my_tables:MyTables --generator-args '{"folder": "/data"}' \\
      --clients berlin,paris --min-count 50

A generator derives from flarebus.statistics.ColumnStatistics, which asks it for columns, or from Statistics. The lowest
and highest values in a report lie outside the true ones: each site adds noise before it tells them.

\b
Exit codes:
  0 done   1 the job failed   2 wrong usage   130 stopped with Ctrl-C
"""

_DEFAULT = "count,mean,stddev,min,max,histogram,quantile"
_what = section("What to ask")
_who = section("Who takes part")
_limits = section("What may leave a site")
_where = section("Where it goes and what is shown")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return run_command(_command, argv, "python -m workflows.statistics")


@click.command(
    cls=SectionedCommand,
    help=_ABOUT,
    epilog=_EPILOG,
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
)
@_what("--generator", metavar="MODULE:CLASS", help="Your statistics. Without it: the tumours.")
@_what("--generator-args", type=json_object, metavar="JSON", help="Keyword arguments for the class.")
@_what("--statistics", metavar="NAMES", default=_DEFAULT, show_default=True, help="Which, with commas between.")
@_what("--bins", type=int, metavar="N", default=15, show_default=True, help="Bins of every histogram.")
@_what("--quantiles", metavar="SHARES", default="0.25,0.5,0.75", show_default=True, help="Which, between 0 and 1.")
@_who(
    "--clients",
    type=site_names,
    metavar="N|NAMES",
    default="3",
    show_default=True,
    help="How many sites, or their names: a,b,c.",
)
@_who("--min-clients", type=int, metavar="N", help="Sites that have to answer. Default: all.")
@_who("--threads", type=int, metavar="N", help="Sites that compute at once. Default: one per processor.")
@_limits(
    "--min-count", type=int, metavar="N", default=10, show_default=True, help="A feature with fewer values is not told."
)
@_limits(
    "--min-noise-level",
    type=float,
    metavar="P",
    default=0.1,
    show_default=True,
    help="Noise on the lowest and highest value: at least this part of their distance.",
)
@_limits("--max-noise-level", type=float, metavar="P", default=0.3, show_default=True, help="And at most this part.")
@_limits(
    "--max-bins-percent",
    type=float,
    metavar="P",
    default=10,
    show_default=True,
    help="Bins for each hundred values; a histogram with more is not told.",
)
@_where("--precision", type=int, metavar="N", default=4, show_default=True, help="Decimal places in the report.")
@_where("--seed", type=int, metavar="N", default=0, show_default=True, help="Seed of the split of the tumours.")
@_where("--name", metavar="NAME", default="fedstats", show_default=True, help="Name of the job and its run folder.")
@_where("--workspace", metavar="DIR", help="Where run folders go. Default: a folder in your cache.")
@_where("--log-config", metavar="FILE|LEVEL", help="How much is logged.")
@_where(
    "--json",
    "as_json",
    is_flag=True,
    help="Last line of standard output: one JSON object. The rest goes to standard error.",
)
def _command(**options: Any) -> int:
    from workflows._progress import Terminal

    begin = time.monotonic()
    # With --json, standard output belongs to the program that reads it.
    console = Terminal(stderr=options["as_json"], highlight=False)
    found: dict[str, Any] = {"workflow": "statistics", "state": "aborted"}
    try:
        found |= _run(options, console) | {"state": "completed"}
    except FlarebusError as error:
        found |= {"state": "failed", "reason": error.reason if isinstance(error, JobFailed) else str(error)}
        raise
    finally:
        if options["as_json"]:
            click.echo(json.dumps(found | {"total_s": round(time.monotonic() - begin, 3)}))
    return OK


def _run(options: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """Run the job, and show what came out."""
    from flarebus.recipe import FedStatsRecipe, SimEnv
    from workflows._statistics_terminal import StatisticsWatcher

    watcher = StatisticsWatcher(console)
    recipe = FedStatsRecipe(
        statistic_configs=_configs(options),
        stats_generator=_generator(options),
        **{name: options[name] for name in _FOR_THE_RECIPE},
    )
    environment = SimEnv(
        clients=list(options["clients"]),
        num_threads=options["threads"],
        log_config=options["log_config"],
        workspace_root=options["workspace"],
        extra={"on_event": watcher.on_event},
    )
    with watcher:
        run = recipe.execute(environment)
    run_dir = Path(str(run.get_result()))
    return _shown(run_dir, recipe.definition.workflow_settings["stats_output_path"], options, console)


_FOR_THE_RECIPE = (
    "name",
    "min_clients",
    "min_count",
    "min_noise_level",
    "max_noise_level",
    "max_bins_percent",
    "precision",
)


def _configs(options: Mapping[str, Any]) -> dict[str, Any]:
    configs: dict[str, Any] = {name.strip(): {} for name in options["statistics"].split(",")}
    if "histogram" in configs:
        configs["histogram"] = {"*": {"bins": options["bins"]}}
    if "quantile" in configs:
        try:
            configs["quantile"] = {"*": [float(share) for share in options["quantiles"].split(",")]}
        except ValueError:
            raise UsageError(f"--quantiles {options['quantiles']!r}: numbers with commas between") from None
    return configs


def _generator(options: Mapping[str, Any]) -> dict[str, Any]:
    if options["generator"] is not None:
        return {"class_path": options["generator"], "args": options["generator_args"] or {}}
    if options["generator_args"] is not None:
        raise UsageError("--generator-args: belongs to --generator")
    try:
        import sklearn  # noqa: F401  (to see whether the data are there, before anything is started)
    except ModuleNotFoundError:
        raise UsageError(
            "the tumours come with scikit-learn: pip install 'flarebus[sklearn]', or give --generator"
        ) from None
    args = {"sites": list(options["clients"]), "seed": options["seed"]}
    return {"class_path": "workflows._scripts.tumours:Tumours", "args": args}


def _shown(run_dir: Path, path: str, options: Mapping[str, Any], console: Console) -> dict[str, Any]:
    from workflows._statistics_picture import draw
    from workflows._statistics_terminal import show

    file = run_dir / "server" / path
    report = json.loads(file.read_text(encoding="utf-8"))
    show(report, console)
    found: dict[str, Any] = {"report": str(file), "plot": None, "run_dir": str(run_dir), "features": len(report)}
    if options["generator"] is None and "mean" in options["statistics"]:
        found["mean_error"] = _error_of_means(report)
        console.print(
            f"means differ from those of all rows in one place by {found['mean_error']:.1e} at most; "
            f"the report has {options['precision']} decimal places"
        )
    try:
        plot = draw(report, file.with_suffix(".png"))
        found["plot"] = None if plot is None else str(plot)
    except ModuleNotFoundError as error:
        console.print(f"no plot: {error}; pip install 'flarebus[plot]'")
    left_out = file.with_name(f"{file.stem}_left_out.json")
    found["left_out"] = str(left_out) if left_out.exists() else None
    for what in ("report", "left_out", "plot", "run_dir"):
        if found[what] is not None:
            console.print(f"[bold]{what.replace('_', ' '):10}[/bold] {found[what]}", soft_wrap=True)
    return found


def _error_of_means(report: Mapping[str, Any]) -> float:
    """How far the means of the report are from those of all rows in one place, at most."""
    from workflows._scripts.tumours import columns_of_all

    errors = [
        abs(report[name]["mean"]["Global"]["tumours"] - float(values.mean()))
        for name, values in columns_of_all().items()
    ]
    return float(max(errors))
