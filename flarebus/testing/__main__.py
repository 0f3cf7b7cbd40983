"""`python -m flarebus.testing NAME`: check a pipe by its name or path from a shell."""

from __future__ import annotations

import json
from typing import Any

import click

from flarebus.cli.exits import FAILED, OK, run_command
from flarebus.pipes.loading import make_pipe
from flarebus.testing.conformance import ContractBroken, check_pipe

__all__: list[str] = []


def _argument(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise click.BadParameter(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:  # a word without quotes is a string
        return key, value


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name")
@click.option("--arg", "args", multiple=True, metavar="KEY=VALUE", help="For the constructor; JSON, or a plain string.")
@click.option("--patience", default=30.0, show_default=True, help="Seconds that any call may take.")
@click.option("--big-mib", default=64, show_default=True, help="Size of a big message.")
def _check(name: str, args: tuple[str, ...], patience: float, big_mib: int) -> int:
    """Check that the pipe NAME, or package.module:Class, keeps the promises of a pipe.

    What it leaves behind outside the process only its author can tell: call flarebus.testing.check_pipe with
    'leftovers' for that.
    """
    given = dict(map(_argument, args))
    try:
        check_pipe(
            lambda mode: make_pipe(name, given, {}, mode),
            patience=patience,
            big_bytes=big_mib * 1024 * 1024,
            on_check=click.echo,
        )
    except ContractBroken as error:
        click.echo(f"error: {error}", err=True)
        return FAILED
    click.echo("keeps all promises")
    return OK


if __name__ == "__main__":
    raise SystemExit(run_command(_check, None, "python -m flarebus.testing"))
