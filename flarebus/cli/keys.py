"""`flarebus keys`: the files that a router beyond loopback asks for, and those that let somebody dial it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from flarebus.errors import UsageError

__all__ = ["keys"]

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group()
def keys() -> None:
    """Make the keys of a router and of those who may dial it.

    \b
    Example:
      flarebus keys router /etc/flarebus/router
      flarebus keys cell /etc/flarebus/router site-1
      flarebus-router --bind tcp://0.0.0.0:8002 --keys /etc/flarebus/router
    """


@keys.command("router")
@click.argument("folder", type=_FOLDER, metavar="DIR")
def _router(folder: Path) -> None:
    """Make the keys of a router in DIR. Nobody is admitted yet."""
    from flarebus.security.keys import KeyPair

    _save(lambda: KeyPair.generate().save(folder, "router"))
    click.echo(folder)


@keys.command("cell")
@click.argument("folder", type=_FOLDER, metavar="DIR")
@click.argument("name")
@click.option("--out", type=_FOLDER, metavar="DIR", help="Where to put them, instead of DIR/cells/NAME.")
def _cell(folder: Path, name: str, out: Path | None) -> None:
    """Make keys for NAME, admitted by the router whose keys lie in DIR.

    What NAME needs is put into a folder of its own, to be carried there on a way that nobody else can read. A router
    that runs knows the new key when it is started again.
    """
    from flarebus.security.keys import ListenKeys

    target = out or folder / "cells" / name
    _save(lambda: ListenKeys.hand_out(folder, name, target))
    click.echo(target)


def _save(write: Callable[[], None]) -> None:
    try:
        write()
    except FileExistsError as error:
        raise UsageError(f"{error.filename}: exists already, and keys are never overwritten") from error
