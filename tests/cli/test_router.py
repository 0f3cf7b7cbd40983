"""The program `flarebus-router`, as a process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from flarebus.cell import Cell
from flarebus.cli.router import main
from flarebus.errors import LinkError
from flarebus.security.keys import DialKeys, KeyPair


@contextmanager
def router(*argv: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A router process and the first line it says."""
    command = [sys.executable, "-m", "flarebus.cli.router", "--json", *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def ask(asker: Cell, target: str) -> Any:
    """What a request of `asker` comes back with."""
    return asker.request(target, "test", "double", 21, timeout=20).result().value()


def answering(name: str, endpoint: str, keys: DialKeys | None = None) -> Cell:
    """A cell that doubles numbers."""
    cell = Cell.dial(name, endpoint, keys)
    cell.on("test", "double", lambda delivery: 2 * delivery.value())
    cell.wait_until_up(20)
    return cell


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_forwards_until_it_is_told_to_end(number: signal.Signals) -> None:
    """It says where it listens, forwards, and ends cleanly with Ctrl-C or SIGTERM."""
    with router("--bind", "tcp://127.0.0.1:*") as (process, about):
        with closing(answering("a", about["bound"])), closing(answering("b", about["bound"])) as asker:
            assert ask(asker, "a") == 42
        process.send_signal(number)
        out, err = process.communicate(timeout=20)

    assert process.returncode == 0
    assert json.loads(out)["messages"] >= 2
    assert err == ""


def test_routers_chain(tmp_path: Path) -> None:
    """A cell behind a lower router is reached from the upper one, through a socket file that is gone afterwards."""
    with router("--bind", "tcp://127.0.0.1:*") as (_, upper):
        bind = f"ipc://{tmp_path}/bus"
        with router("--bind", bind, "--upstream", upper["bound"]) as (process, lower):
            assert lower == {"bound": bind, "endpoints": [bind], "upstream": upper["bound"], "curve": False}
            with closing(answering("low", lower["bound"])) as low, closing(answering("high", upper["bound"])):
                assert ask(low, "high") == 42
            process.terminate()
            process.communicate(timeout=20)
        assert not (tmp_path / "bus").exists()


def test_only_admitted_keys_come_in(tmp_path: Path) -> None:
    """With keys, a cell whose key is in the folder is served, and one without is not."""
    own, known = KeyPair.generate(), KeyPair.generate()
    own.save(tmp_path / "keys", "router")
    (tmp_path / "keys" / "admitted").mkdir()
    (tmp_path / "keys" / "admitted" / "a.pub").write_bytes(known.public)

    with router("--bind", "tcp://127.0.0.1:*", "--keys", str(tmp_path / "keys")) as (_, about):
        assert about["curve"]
        with closing(answering("a", about["bound"], DialKeys(known, own.public))) as cell:
            assert ask(cell, "a") == 42
        stranger = Cell.dial("b", about["bound"], DialKeys(KeyPair.generate(), own.public))
        with closing(stranger), pytest.raises(LinkError):
            stranger.wait_until_up(1)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--bind"),
        (["--bind", "tcp://0.0.0.0:*"], "beyond loopback"),
        (["--bind", "http://x"], "http://x"),
        (["--bind", "tcp://127.0.0.1:*", "--keys", "nowhere"], "nowhere"),
        (["--bind", "tcp://127.0.0.1:*", "--upstream-keys", "x"], "x/cell.key"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    """What cannot work is refused with exit code 2 and its name, before anything listens."""
    assert main(argv) == 2
    assert said in capsys.readouterr().err
