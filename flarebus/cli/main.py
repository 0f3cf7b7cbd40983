"""The program `flarebus`: a group of commands, each imported only when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import click

from flarebus import __version__
from flarebus.cli.exits import run_command

__all__ = ["main"]


# Known here, so that the help of the program imports none of them.
_COMMANDS = {
    "bench": "Measure flarebus on this machine: rounds, the bus, the import.",
    "keys": "Make the keys of a router and of those who may dial it.",
    "plugins": "List the workflows, pipes and trackers that are installed here.",
}


class _LazyGroup(click.Group):
    """Commands by name, each found in a module of that name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        found = getattr(import_module(f"flarebus.cli.{cmd_name}"), cmd_name)
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="flarebus %(version)s")
def _flarebus() -> None:
    """flarebus: a message bus for federated learning.

    A workflow is a program of its own: python -m workflows.fedavg --help. A router on its own is flarebus-router.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return run_command(_flarebus, argv, "flarebus")


if __name__ == "__main__":
    raise SystemExit(main())
