"""The program `flarebus`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from flarebus import __version__
from flarebus.cli.main import main


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`flarebus --version` prints the version."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flarebus {__version__}\n"


def test_help_lists_the_commands_and_imports_none() -> None:
    """`flarebus --help` shows the commands without loading what they need."""
    code = (
        "import sys\nfrom flarebus.cli.main import main\nassert main(['--help']) == 0\n"
        "assert not {'zmq', 'numpy', 'rich', 'flarebus.cli.bench'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert "bench" in done.stdout


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["bnech"], "bnech"),
        (["bench", "round", "--pipe", "file"], "--external"),
        (["bench", "round", "--mb", "0"], "--mb"),
        (["bench", "round", "--clients", "0"], "--clients"),
        (["bench", "bus", "--curve", "--transport", "ipc"], "--curve"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    """Wrong usage ends with exit code 2 and names what is wrong."""
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_bench_import(capsys: pytest.CaptureFixture[str]) -> None:
    """`flarebus bench import` says how long the import takes and what it brings in."""
    assert main(["bench", "import", "--runs", "1", "--json"]) == 0

    figures = json.loads(capsys.readouterr().out)
    assert figures["import_s"] == pytest.approx(figures["whole_s"] - figures["bare_s"], abs=2e-4)
    assert set(figures["modules"]) <= {"zmq", "msgpack", "numpy"}


def test_bench_as_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json the figures come as a list, one to a line."""
    assert main(["bench", "import", "--runs", "1"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["bench", "import_s", "bare_s", "whole_s", "modules"]
