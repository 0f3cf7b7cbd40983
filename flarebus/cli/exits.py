"""How a command ends: 0 done, 1 it failed, 2 wrong usage, 130 stopped with Ctrl-C; a line says why, no traceback."""

from __future__ import annotations

from collections.abc import Sequence

import click

from flarebus.errors import FlarebusError, UsageError

__all__ = ["FAILED", "OK", "STOPPED", "USAGE", "run_command"]

OK, FAILED, USAGE, STOPPED = 0, 1, 2, 130


def run_command(command: click.Command, argv: Sequence[str] | None, name: str) -> int:
    """Run `command` and return the exit code.

    Args:
        argv: the arguments; those of the process when None.
        name: what the command is called in its help.
    """
    try:
        code = command.main(None if argv is None else list(argv), name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (UsageError, NotImplementedError) as error:
        click.echo(f"error: {error}", err=True)
        return USAGE
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped", err=True)
        return STOPPED
    except (FlarebusError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        return FAILED
    return code if isinstance(code, int) else OK
