"""Where another process looks for the code that runs here."""

from __future__ import annotations

import os
import site
from pathlib import Path

import pytest

import flarebus
from flarebus.site.import_path import import_path

ROOT = Path(flarebus.__file__).parents[1]


def test_a_checkout_comes_first_and_relative_folders_become_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is in a checkout is found by a process with another working directory, before anything else."""
    monkeypatch.chdir(tmp_path)

    found = import_path({"PYTHONPATH": f"mine{os.pathsep}/else"})["PYTHONPATH"].split(os.pathsep)

    assert found == [str(ROOT), str(ROOT / "pipes"), str(tmp_path / "mine"), "/else"]


def test_what_is_installed_is_left_to_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of installed packages of one interpreter is not given to another one."""
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(ROOT), str(ROOT / "pipes")])

    assert import_path({}) == {}
    assert import_path({"PYTHONPATH": "/else"}) == {"PYTHONPATH": "/else"}
