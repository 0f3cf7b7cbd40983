"""`flarebus plugins`: everything that is installed, from where, and what is wrong with what cannot be used."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flarebus import __version__
from flarebus.cli.main import main

CODE = """
from flarebus.workflow.controller import Controller
from flarebus_pipes.memory_pipe import MemoryPipe

class Flow(Controller):
    def run(self, job):
        pass

class Half(Controller):
    pass

class Deaf(MemoryPipe):
    def receive(self):
        return None
"""
ENTRIES = """
[flarebus.workflows]
whole = outside_plugins:Flow
half = outside_plugins:Half
gone = no_such_module:Flow
fedavg = outside_plugins:Flow

[flarebus.pipes]
deaf = outside_plugins:Deaf
"""


@pytest.fixture
def _outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution on the path, as an installer would leave it, of which only one part is as it should be."""
    folder = tmp_path / "outside-1.5.dist-info"
    folder.mkdir()
    folder.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.5\n")
    folder.joinpath("entry_points.txt").write_text(ENTRIES)
    tmp_path.joinpath("outside_plugins.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("outside_plugins", None)


def listed(capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, str, str], tuple[str, str]]:
    """(kind, name, distribution) -> path and what is wrong, from the JSON lines."""
    assert main(["plugins", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {(row["kind"], row["name"], row["distribution"]): (row["path"], row["wrong"]) for row in rows}


def test_what_comes_with_flarebus_is_listed_and_can_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each, with kind, name, class and origin."""
    assert main(["plugins"]) == 0

    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in (
        ["workflow", "fedavg", "workflows.fedavg:FedAvg"],
        ["pipe", "memory", "flarebus_pipes.memory_pipe:MemoryPipe"],
        ["tracker", "mlflow", "flarebus.tracking.mlflow:MLflowTracker"],
    ):
        assert [*row, "flarebus", __version__] in rows
    assert {row[0] for row in rows} == {"workflow", "executor", "pipe", "tracker"}


@pytest.mark.usefixtures("_outside")
@pytest.mark.parametrize(
    ("kind", "name", "path", "wrong"),
    [
        ("workflow", "whole", "outside_plugins:Flow", ""),
        ("workflow", "half", "outside_plugins:Half", "outside_plugins.Half does not implement run"),
        (
            "workflow",
            "gone",
            "no_such_module:Flow",
            "cannot load no_such_module:Flow: No module named 'no_such_module'",
        ),
        ("workflow", "fedavg", "outside_plugins:Flow", "claimed more than once: outside_plugins:Flow (outside 1.5), "),
        ("pipe", "deaf", "outside_plugins:Deaf", "outside_plugins.Deaf.receive cannot be called as receive(self, "),
    ],
)
def test_what_an_outside_package_brings_is_judged(
    capsys: pytest.CaptureFixture[str], kind: str, name: str, path: str, wrong: str
) -> None:
    """A plug-in that does not keep its contract says what of it, beside those that do."""
    found = listed(capsys)

    assert found[kind, name, "outside"][0] == path
    assert found[kind, name, "outside"][1].startswith(wrong)
    assert bool(found[kind, name, "outside"][1]) == bool(wrong)
    assert found["workflow", "scaffold", "flarebus"][1] == ""


@pytest.mark.usefixtures("_outside")
def test_reason_stands_under_the_line_it_belongs_to(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json, a person reads it right there."""
    assert main(["plugins"]) == 0

    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.split()[1] == "half")
    assert lines[at + 1] == "  cannot be used: outside_plugins.Half does not implement run"


def test_tracker_without_its_library_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a recipe that asked for it would."""
    monkeypatch.setattr("flarebus.tracking.loading._is_there", lambda module: module != "wandb")

    found = listed(capsys)

    assert (
        found["tracker", "wandb", "flarebus"][1] == "needs wandb, which is not installed: pip install 'flarebus[wandb]'"
    )
    assert found["tracker", "tensorboard", "flarebus"][1] == ""
