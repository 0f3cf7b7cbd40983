"""`flarebus plugins`: what is installed here under which name, where it comes from, and whether it can be used."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import click

from flarebus.errors import ConfigError
from flarebus.job.plugins import EXECUTORS, WORKFLOWS, load_executor_class, load_workflow
from flarebus.pipes.loading import PIPES, load_pipe_class
from flarebus.plugins import PluginKind
from flarebus.tracking.loading import TRACKERS, check_library

__all__ = ["plugins"]


@dataclass(frozen=True, slots=True)
class _Listed:
    """One plug-in; `wrong` says why it cannot be used, "" if it can."""

    kind: str
    name: str
    path: str
    distribution: str
    version: str
    wrong: str


# Each is looked at as it is when a job asks for it by name.
_KINDS: Mapping[str, tuple[PluginKind, Callable[[str], object]]] = {
    "workflow": (WORKFLOWS, load_workflow),
    "executor": (EXECUTORS, load_executor_class),
    "pipe": (PIPES, load_pipe_class),
    "tracker": (TRACKERS, check_library),
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON line for each plug-in.")
def plugins(as_json: bool) -> None:
    """List the workflows, executors, pipes and trackers that are installed here.

    Each with its name, its class and the distribution that brings it. All are imported to find out whether they can be
    used; below one that cannot stands why.
    """
    found = list(_found())
    if as_json:
        for each in found:
            click.echo(json.dumps(asdict(each)))
    else:
        _show(
            [(each.kind, each.name, each.path, f"{each.distribution} {each.version}".strip()) for each in found], found
        )


def _found() -> Iterator[_Listed]:
    for kind, (plugin_kind, check) in _KINDS.items():
        for each in plugin_kind.installed():
            yield _Listed(kind, **asdict(each), wrong=_wrong(check, each.name))


def _wrong(check: Callable[[str], Any], name: str) -> str:
    try:
        check(name)
    except ConfigError as error:
        return error.allowed
    return ""


def _show(rows: list[tuple[str, ...]], found: list[_Listed]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, each in zip(rows, found, strict=True):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if each.wrong:
            click.echo(f"  cannot be used: {each.wrong}")
