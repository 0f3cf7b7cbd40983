"""The options of the program: what can be said on the command line, in sections, as one frozen record."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from flarebus.errors import ConfigError

__all__ = [
    "Option",
    "Options",
    "SectionedCommand",
    "json_object",
    "of_the_algorithm",
    "option_of",
    "section",
    "site_names",
    "with_options",
]

Option = Callable[[Callable[..., Any]], Callable[..., Any]]
"""A decorator that adds one option to a command."""


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for. None means: whatever the recipe or the environment holds right."""

    train_script: str | None
    train_args: str
    model: str | None
    model_args: dict[str, Any]
    initial_ckpt: str | None
    framework: str | None
    external: bool
    command: str | None
    pipe: dict[str, Any] | str | None
    clients: tuple[str, ...]
    min_clients: int | None
    clients_per_round: int | None
    threads: int | None
    gpu_config: str | None
    env: str
    rounds: int
    key_metric: str
    key_metric_mode: str | None
    stop_cond: str | None
    patience: int | None
    transfer_type: str
    exclude_vars: str | None
    round_timeout: float | None
    grace: float | None
    offload: bool
    seed: int
    deterministic: bool
    name: str | None
    workspace: str | None
    log_config: str | None
    json: bool
    own: dict[str, Any] = field(default_factory=dict)
    """What only the recipe of one algorithm takes."""

    @property
    def quorum(self) -> int:
        """Results that a round needs: as asked, else from everybody who is asked to train."""
        return self.min_clients or self.clients_per_round or len(self.clients)


def site_names(text: str) -> tuple[str, ...]:
    """A number of sites, or their names with commas between."""
    if not text.lstrip("-").isdigit():
        return tuple(name.strip() for name in text.split(","))
    count = int(text)
    if count < 1:
        raise click.BadParameter(f"{count} is not a number of sites: at least 1")
    return tuple(f"site-{number}" for number in range(1, count + 1))


def _pipe(text: str) -> dict[str, Any] | str:
    """The name of a pipe, or its class with arguments as a JSON object."""
    return json_object(text) if text.lstrip().startswith("{") else text


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        read = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no JSON: {error}") from None
    if not isinstance(read, dict):
        raise click.BadParameter(f"{text!r} is no JSON object, such as '{{\"hidden\": 64}}'")
    return read


class _SectionOption(click.Option):
    """An option that knows under which heading of the help it stands."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class SectionedCommand(click.Command):
    """A command whose help lists its options under headings, and leaves the epilog's lines as they are."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each section in the order in which its first option was declared."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "Other"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def section(heading: str) -> Callable[..., Option]:
    """Makes options that stand under `heading` in the help of a `SectionedCommand`."""
    return functools.partial(click.option, cls=_SectionOption, section=heading)


_what = section("What to train")
_who = section("Who takes part")
_how = section("How it goes")
_where = section("Where it goes and what is shown")

of_the_algorithm = section("The algorithm")
"""Makes an option that sets the parameter of its name in the recipe of one algorithm; None leaves the default."""

_OPTIONS = (
    _what("--train-script", metavar="FILE", help="Your training script. Without it: the digits."),
    _what("--train-args", metavar="TEXT", default="", help="Its command line, as one string."),
    _what("--model", metavar="MODULE:CLASS", help="The model to start from; looked for beside the script first."),
    _what("--model-args", type=json_object, metavar="JSON", default="{}",
          help="Keyword arguments for the class."),
    _what("--initial-ckpt", metavar="FILE", help="Weights to start from: .npy, .npz, .pt, .keras, ..."),
    _what(
        "--framework",
        type=click.Choice(["numpy", "pytorch", "tensorflow", "raw"]),
        help="What the script's parameters are. Default: pytorch with --model or a .pt file, tensorflow "
        "with a .keras or .weights.h5 file, else numpy.",
    ),
    _what("--external", is_flag=True, help="Run the script in a process of its own at every site."),
    _what("--command", metavar="TEXT", help="What starts that process, such as 'torchrun'. Implies --external."),
    _what("--pipe", type=_pipe, metavar="NAME|JSON",
          help="The link to that process: cell, file, ... Implies --external. Default: cell."),
    _who("--clients", type=site_names, metavar="N|NAMES", default="4", show_default=True,
         help="How many sites, or their names: a,b,c."),
    _who("--min-clients", type=int, metavar="N",
         help="Results a round needs. Default: one from every site asked; cyclic: 2."),
    _who("--clients-per-round", type=int, metavar="N", help="Sites drawn anew for each round. Default: all."),
    _who("--threads", type=int, metavar="N", help="Sites that compute at once. Default: one per processor."),
    _who("--gpu-config", metavar="TEXT", help="GPUs of the workers, such as '[0],[1]'."),
    _who("--env", type=click.Choice(["sim"]), default="sim", show_default=True, help="sim: all on this machine."),
    _how("--rounds", type=int, metavar="N", default=15, show_default=True, help="How many rounds."),
    _how("--key-metric", metavar="NAME", default="accuracy", show_default=True, help="What decides on the best model."),
    _how("--key-metric-mode", type=click.Choice(["max", "min"]), help="Whether more or less of it is better."),
    _how("--stop-cond", metavar="TEXT", help="End early, such as 'accuracy >= 0.95'."),
    _how("--patience", type=int, metavar="N", help="With --stop-cond: end after N rounds without improvement."),
    _how("--transfer-type", type=click.Choice(["FULL", "DIFF"]), default="FULL", show_default=True,
         help="Sites send whole models, or what changed."),
    _how("--exclude-vars", metavar="REGEX", help="Parameters that keep the server's value."),
    _how("--round-timeout", type=float, metavar="SECONDS", help="A round ends after this long with what it has."),
    _how("--grace", type=float, metavar="SECONDS", help="How long to wait for the rest once the quorum has answered."),
    _how("--offload", is_flag=True, help="Keep incoming updates in files instead of memory."),
    _how("--seed", type=int, metavar="N", default=0, show_default=True,
         help="Seed of the digits and of drawing sites."),
    _how("--deterministic", is_flag=True, help="The same bits whatever the order in which results come."),
    _where("--name", metavar="NAME", help="Name of the job and its run folder. Default: that of the workflow."),
    _where("--workspace", metavar="DIR", help="Where run folders go. Default: a folder in your cache."),
    _where("--log-config", metavar="FILE|LEVEL", help="How much is logged."),
    _where("--json", is_flag=True,
           help="Last line of standard output: one JSON object. The rest goes to standard error."),
)  # fmt: skip

# Where an option is not called like the parameter of the recipe or environment that it sets.
_RENAMED = {
    'model["args"]': "--model-args",
    "num_rounds": "--rounds",
    "num_clients": "--clients",
    "num_threads": "--threads",
    "workspace_root": "--workspace",
    "params_transfer_type": "--transfer-type",
    "wait_time_after_min_received": "--grace",
    "enable_tensor_disk_offload": "--offload",
    "launch_external_process": "--external",
    "client_config": "--pipe",
}


def with_options(function: Callable[[Options], int], own: Sequence[Option] = ()) -> Callable[..., int]:
    """Decorate a command that takes one `Options` with all of the options.

    Args:
        own: the options of one algorithm.
    """

    @functools.wraps(function)
    def command(**values: Any) -> int:
        common = {name: values.pop(name) for name in Options.__slots__ if name in values}
        return function(Options(**common, own={name: value for name, value in values.items() if value is not None}))

    made: Callable[..., Any] = command
    for option in reversed((*own, *_OPTIONS)):
        made = option(made)
    return made


def option_of(error: ConfigError, own: Sequence[str] = ()) -> str:
    """Say what is wrong in terms of the command line.

    Args:
        own: parameters that the options of one algorithm set.
    """
    parameter = error.parameter if error.parameter in _RENAMED else error.parameter.partition("[")[0]
    option = _RENAMED.get(parameter, "--" + parameter.replace("_", "-"))
    if option.removeprefix("--").replace("-", "_") not in (*Options.__slots__, *own):
        return str(error)
    return f"{option} {error.value!r}: {error.allowed}"
