"""How commands end."""

from __future__ import annotations

import click
import pytest

from flarebus.cli.exits import run_command
from flarebus.errors import ConfigError, JobFailed


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (ConfigError("mb", -1, "above 0"), 2, "mb=-1: above 0"),
        (NotImplementedError("not built"), 2, "not built"),
        (click.UsageError("no such thing"), 2, "no such thing"),
        (JobFailed("site-1 broke", "/runs/x"), 1, "site-1 broke"),
        (FileNotFoundError(2, "No such file", "x.key"), 1, "x.key"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_each_kind_of_error_has_its_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException | None, code: int, said: str
) -> None:
    """The exit code says whose fault it is, and the reason stands in standard error, without a traceback."""

    @click.command()
    def command() -> None:
        if error is not None:
            raise error

    assert run_command(command, [], "x") == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err


def test_a_bug_is_not_dressed_up() -> None:
    """An error that nobody foresaw comes through with its traceback."""

    @click.command()
    def command() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(command, [], "x")


def test_the_command_chooses_its_exit_code() -> None:
    """What a command returns is the exit code."""
    assert run_command(click.Command("x", callback=lambda: 7), [], "x") == 7
