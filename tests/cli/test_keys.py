"""`flarebus keys`: the files it makes are those that routers and cells take."""

from __future__ import annotations

from pathlib import Path

import pytest

from flarebus.cli.main import main
from flarebus.security.keys import DialKeys, ListenKeys


def test_keys_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A router's folder and those of two cells fit together; each command says where it wrote."""
    folder, out = tmp_path / "router", tmp_path / "elsewhere"

    assert main(["keys", "router", str(folder)]) == 0
    assert main(["keys", "cell", str(folder), "site-1"]) == 0
    assert main(["keys", "cell", str(folder), "site-2", "--out", str(out)]) == 0

    listen = ListenKeys.load(folder)
    cells = [DialKeys.load(folder / "cells" / "site-1"), DialKeys.load(out)]
    assert {cell.own.public for cell in cells} == listen.admitted
    assert {cell.server for cell in cells} == {listen.own.public}
    said = capsys.readouterr()
    assert said.out.splitlines() == [str(folder), str(folder / "cells" / "site-1"), str(out)]
    assert said.err == ""


@pytest.mark.parametrize(
    ("argv", "wrong"),
    [
        (["router", "{}"], "exists already"),
        (["cell", "{}", "site-1"], "exists already"),
        (["cell", "{}", ".."], "a name is"),
        (["cell", "{}/nowhere", "site-2"], "nowhere/router.key"),
        (["cell", "{}"], "NAME"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], wrong: str
) -> None:
    """Keys are never overwritten and never made for nobody: exit code 2 and a line that names what is wrong."""
    assert main(["keys", "router", str(tmp_path)]) == 0
    assert main(["keys", "cell", str(tmp_path), "site-1"]) == 0
    before = sorted(path for path in tmp_path.rglob("*"))
    capsys.readouterr()

    assert main(["keys", *(arg.format(tmp_path) for arg in argv)]) == 2

    assert wrong in capsys.readouterr().err
    assert sorted(path for path in tmp_path.rglob("*")) == before
