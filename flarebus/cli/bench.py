"""`flarebus bench`: what flarebus costs on this machine. Each command prints a short list, or one JSON line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import click

from flarebus.errors import UsageError

__all__ = ["bench"]

_json = click.option("--json", "as_json", is_flag=True, help="One JSON line instead of a list.")
_curve = click.option("--curve", is_flag=True, help="Encrypted TCP connections.")

_mb = click.option(
    "--mb",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    metavar="M",
    help="Size of the model in MB (10**6 bytes).",
)
_layers = click.option(
    "--layers",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="L",
    help="Number of equal float32 arrays in it.",
)
_threads = click.option(
    "--threads", type=click.IntRange(min=1), metavar="T", help="Sites that compute at once. Default: one per processor."
)


@click.group()
def bench() -> None:
    """Measure flarebus on this machine."""


@bench.command("round")
@_mb
@_layers
@click.option("--clients", type=click.IntRange(min=1), default=2, show_default=True, metavar="N", help="Sites.")
@_threads
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, metavar="R", help="Rounds.")
@click.option("--env", type=click.Choice(["sim"]), default="sim", show_default=True, help="Where it runs.")
@_curve
@click.option("--external", is_flag=True, help="Training scripts in processes of their own.")
@click.option("--pipe", metavar="P", help="Pipe to them: cell, file, memory, shm, or a class path. Default: cell.")
@click.option("--offload", is_flag=True, help="Incoming results in files instead of memory.")
@_json
def _round(*, env: str, external: bool, pipe: str | None, as_json: bool, **settings: Any) -> int:
    """FedAvg rounds in which every site adds one to every weight.

    The length of a round is measured at the server, from its beginning to that of the next: handing out, the sites'
    work, averaging and saving. The median leaves out the first. The final weights are checked.
    """  # fmt: skip
    if pipe is not None and not external:
        raise UsageError("--pipe: belongs to --external")
    from flarebus.cli.bench_round import RoundBench

    _report_rounds(RoundBench(**settings, external=external, pipe=pipe or "cell").run(), as_json)
    return 0


@bench.command("swarm")
@_mb
@_layers
@click.option("--clients", type=click.IntRange(min=1), default=4, show_default=True, metavar="N", help="Sites.")
@_threads
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True, metavar="R", help="Rounds.")
@click.option("--external", is_flag=True, help="Training scripts in processes of their own.")
@_json
def _swarm(*, as_json: bool, **settings: Any) -> int:
    """Rounds of swarm learning, in which sites average by turns; otherwise as `bench round`.

    A round reaches from one site's taking the lead to the next one's, as the server hears of it.
    """  # fmt: skip
    from flarebus.cli.bench_round import RoundBench

    _report_rounds(RoundBench(**settings, swarm=True).run(), as_json)
    return 0


@bench.command("cse")
@click.option(
    "--mb",
    type=click.FloatRange(min=0, min_open=True),
    default=100.0,
    show_default=True,
    metavar="M",
    help="Size of a model in MB (10**6 bytes).",
)
@click.option(
    "--layers",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="L",
    help="Number of equal float32 arrays in it.",
)
@click.option("--clients", type=click.IntRange(min=1), default=4, show_default=True, metavar="N", help="Sites.")
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="T", help="Sites that compute at once. Default: one per processor."
)
@click.option(
    "--server-models",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    metavar="S",
    help="The server's models.",
)
@click.option("--external", is_flag=True, help="Evaluation scripts in processes of their own.")
@_json
def _cse(*, as_json: bool, **settings: Any) -> int:
    """Cross-site evaluation: every site's model, and the server's, at every site.

    What is moved is what comes from the server, and what passes its router: sites of one worker need not move what they
    give each other. Each evaluation is checked: the numbers in a model say
    whose it is.
    """
    from flarebus.cli.bench_cse import CseBench

    figures = CseBench(**settings).run()
    _print(figures, as_json)
    if figures["wrong"]:
        raise click.ClickException(f"{figures['wrong']} of {figures['evaluations']} evaluations are wrong")
    return 0


@bench.command("bus")
@_curve
@click.option(
    "--transport", type=click.Choice(["tcp", "ipc"]), default="tcp", show_default=True, help="Kind of socket."
)
@_json
def _bus(*, curve: bool, transport: str, as_json: bool) -> int:
    """Latency and rate of requests, and the rate of a stream, through a router.

    First through a router process of its own, then through one in the asking process, as a server has it.
    """
    if curve and transport != "tcp":
        raise UsageError("--curve: needs --transport tcp; ipc sockets are not encrypted")
    from flarebus.cli.bench_bus import run

    _print(run(curve=curve, transport=transport), as_json)
    return 0


@bench.command("metrics")
@click.option(
    "--records",
    type=click.IntRange(min=1),
    default=100_000,
    show_default=True,
    metavar="N",
    help="Records to log.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=1, max=1e6),
    default=10_000,
    show_default=True,
    metavar="R",
    help="Steps a second of the loop when nothing is logged; it logs one record in each.",
)
@click.option("--external", is_flag=True, help="The training script in a process of its own.")
@_json
def _metrics(*, as_json: bool, **settings: Any) -> int:
    """What `flare.log` costs a training loop, and whether everything arrives in order.

    The loop works in pure Python, which nothing can happen beside, once with a record in each step and once without, in
    blocks that take turns.
    """
    from flarebus.cli.bench_metrics import MetricsBench

    figures = MetricsBench(**settings).run()
    _print(figures, as_json)
    if figures["lost"] or figures["in_order"] != "yes":
        raise click.ClickException(f"{figures['lost']} records are missing; in order: {figures['in_order']}")
    return 0


@bench.command("import")
@click.option(
    "--runs",
    type=click.IntRange(min=1),
    default=15,
    show_default=True,
    metavar="N",
    help="Fresh interpreters to start, with and without the import.",
)
@_json
def _import(*, runs: int, as_json: bool) -> int:
    """What `import flarebus.client` costs a training script."""  # fmt: skip
    from flarebus.cli.bench_import import run

    _print(run(runs), as_json)
    return 0


def _report_rounds(figures: Mapping[str, Any], as_json: bool) -> None:
    _print(figures, as_json)
    if figures["final_value"] != figures["rounds"]:
        raise click.ClickException(f"final weights are {figures['final_value']}, not {figures['rounds']}")


def _print(figures: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(figures))
        return
    _print_list(figures, click.echo, "")


def _print_list(figures: Mapping[str, Any], say: Callable[[str], None], indent: str) -> None:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            say(f"{indent}{name}")
            _print_list(value, say, indent + "  ")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            say(f"{indent}{name:<{22 - len(indent)}} {shown}")
