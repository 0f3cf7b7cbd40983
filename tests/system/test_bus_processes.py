"""The bus between real processes that are killed, stopped and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flarebus.cell import Cell
from flarebus.delivery import Delivery
from flarebus.errors import LinkError, NoRoute, SourceLost
from tests.core.bus import WAIT_S, Bus, error_of, value_of, wait_for

ROOT = Path(__file__).parents[2]
# So long that nothing in these tests is found out by it.
NEVER_S = 3600.0
QUICK_S = 0.6


class Process:
    """A process that is killed at the latest when its test is over."""

    def __init__(self, *command: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.communicate()

    def hear(self) -> str:
        """The next line that it says."""
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def end(self, text: str = "") -> tuple[int, str, str]:
        """Its exit code and the rest of what it says, once it has ended."""
        out, err = self.popen.communicate(text, timeout=WAIT_S)
        return self.popen.returncode, out, err


def peer(name: str, endpoint: str, silence_s: float = NEVER_S) -> Process:
    """A process with a cell that is up."""
    process = Process(str(ROOT / "tests/system/bus_peer.py"), name, endpoint, str(silence_s))
    assert process.hear() == "up", process.end()
    return process


def router(*argv: str) -> tuple[Process, dict[str, Any]]:
    """A `flarebus-router`, and what it says about itself."""
    process = Process("-m", "flarebus.cli.router", "--json", *argv)
    return process, json.loads(process.hear())


@contextmanager
def told_of(cell: Cell, name: str) -> Iterator[None]:
    """Check that `cell` is told within the block that `name` has gone."""
    gone = threading.Event()
    cell.on_gone(lambda names: gone.set() if name in names else None)
    yield
    wait_for(gone)


@pytest.mark.parametrize("arrangement", ["ipc", "chain"])
def test_a_killed_process_is_known_at_once(arrangement: str) -> None:
    """On one machine nobody waits for a heartbeat: whoever waits for a killed process hears it from the router."""
    with Bus(arrangement, NEVER_S) as bus:
        asker, other = bus.near("asker"), bus.far("other")
        with peer("victim", bus.lower_endpoint if arrangement == "chain" else bus.endpoint) as process:
            pending = asker.request("victim", "blocked", "wait")
            assert process.hear() == "entered"

            with told_of(asker, "victim"), told_of(other, "victim"):
                process.send(signal.SIGKILL)

            assert isinstance(error_of(pending), NoRoute)
            assert isinstance(error_of(asker.request("victim", "test", "echo")), NoRoute)
            assert bus.router.statistics().names == (3 if arrangement == "chain" else 2)


def test_a_killed_holder_ends_the_pull() -> None:
    """Who is pulling from a process that is killed hears that the source is lost, and does not wait for the rest."""
    with Bus("ipc", NEVER_S) as bus:
        asker = bus.connect("asker")
        with peer("holder", bus.endpoint) as process:
            pending = asker.request("holder", "test", "stall")
            assert process.hear() == "served"
            assert asker.statistics().pulls_running == 1

            process.send(signal.SIGKILL)

            error = error_of(pending)
            assert isinstance(error, SourceLost)
            assert error.holder == "holder"


def test_a_process_that_comes_back_is_served() -> None:
    """A killed process's successor, under the same name, gets what is asked from then on."""
    with Bus("ipc", NEVER_S) as bus:
        asker = bus.attach("server")
        for number in range(3):
            with peer("site", bus.endpoint) as process:
                assert value_of(asker.request("site", "test", "echo", number)) == number
                with told_of(asker, "site"):
                    process.send(signal.SIGKILL)


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_stopped_process_is_found_by_its_silence(transport: str) -> None:
    """A process that hangs is given up after a silence; when it goes on, it is a member again by itself."""
    with Bus(transport, QUICK_S) as bus:
        asker = bus.attach("server")
        joined = threading.Event()
        asker.on("test", "hello", lambda _: joined.set())
        with peer("site", bus.endpoint, QUICK_S) as process:
            with told_of(asker, "site"):
                process.send(signal.SIGSTOP)
            assert isinstance(error_of(asker.request("site", "test", "echo")), NoRoute)

            welcomed = threading.Event()
            join = bus.router._join

            def note(port: Any, names: Any) -> None:
                join(port, names)
                welcomed.set()

            bus.router._join = note  # type: ignore[method-assign]
            process.send(signal.SIGCONT)
            wait_for(welcomed)

            assert value_of(asker.request("site", "test", "echo", 1)) == 1


def test_a_stopped_router_is_found_by_its_silence(tmp_path: Path) -> None:
    """Cells give up a router that hangs, and find it again when it goes on."""
    process, about = router("--bind", f"ipc://{tmp_path}/bus")
    with process, ExitStack() as stack:
        cells = [Cell.dial(name, about["bound"], silence_s=QUICK_S) for name in ("one", "other")]
        ups = []
        for cell in cells:
            stack.callback(cell.close)
            cell.on("test", "echo", lambda delivery: delivery.value())
            cell.wait_until_up(WAIT_S)
            lost = threading.Event()
            cell.on_link_lost(lambda _, lost=lost: lost.set())
            ups.append((lost, threading.Event(), cell.link_up))
            cell.link_up = lambda up=ups[-1]: (up[2](), up[1].set())[0]  # type: ignore[method-assign]

        process.send(signal.SIGSTOP)
        for lost, _, _ in ups:
            wait_for(lost)
        assert isinstance(error_of(cells[0].request("other", "test", "echo")), LinkError)
        process.send(signal.SIGCONT)
        for _, up, _ in ups:
            wait_for(up)

        assert value_of(cells[0].request("other", "test", "echo", 1)) == 1


def test_a_router_may_be_killed_under_load(tmp_path: Path) -> None:
    """Killed and started again, twice, it costs no request and no transfer; each is handled once."""
    bind = f"ipc://{tmp_path}/bus"
    with ExitStack() as stack:
        process = stack.enter_context(router("--bind", bind)[0])
        asker, answerer = Cell.dial("asker", bind), Cell.dial("answerer", bind)
        for cell in (asker, answerer):
            stack.callback(cell.close)
            cell.wait_until_up(WAIT_S)
        handled: list[int] = []
        gate = threading.Semaphore(0)

        def handle(delivery: Delivery) -> Any:
            number, array = delivery.value()
            handled.append(number)
            gate.acquire()
            return number, array

        answerer.on("test", "work", handle)
        arrays = [np.full(1000 if number % 10 else 300_000, number) for number in range(40)]
        pendings = [asker.request("answerer", "test", "work", [n, array]) for n, array in enumerate(arrays)]
        for done in (10, 20):
            gate.release(10)
            assert value_of(pendings[done - 1])[0] == done - 1
            process.send(signal.SIGKILL)
            process.popen.wait(WAIT_S)
            # What is done meanwhile is answered into the void.
            gate.release(5)
            process = stack.enter_context(router("--bind", bind)[0])
        gate.release(1000)

        for number, pending in enumerate(pendings):
            came, array = value_of(pending)
            assert came == number
            assert np.array_equal(array, arrays[number])
        assert handled == list(range(40))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_router_ends_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C and TERM end it with exit code 0, no traceback and no file, and its cells hear it at once."""
    process, about = router("--bind", f"ipc://{tmp_path}/one", "--bind", f"ipc://{tmp_path}/two")
    assert about["endpoints"] == [f"ipc://{tmp_path}/one", f"ipc://{tmp_path}/two"]
    with process, ExitStack() as stack:
        lost = threading.Event()
        for name, endpoint in zip(("one", "two"), about["endpoints"], strict=True):
            cell = Cell.dial(name, endpoint, silence_s=NEVER_S)
            stack.callback(cell.close)
            cell.on("test", "echo", lambda delivery: delivery.value())
            cell.wait_until_up(WAIT_S)
            cell.on_link_lost(lambda _: lost.set())
        assert value_of(cell.request("one", "test", "echo", 5)) == 5

        process.send(number)
        process.send(number)

        code, out, err = process.end()
        assert (code, err) == (0, "")
        assert json.loads(out)["names"] == 2
        assert list(tmp_path.iterdir()) == []
        wait_for(lost)


def test_a_second_router_is_refused(tmp_path: Path) -> None:
    """Where one listens a second one ends with exit code 2 and a line that says why; the first is not disturbed."""
    first, about = router("--bind", f"ipc://{tmp_path}/bus")
    with first, Process("-m", "flarebus.cli.router", "--bind", about["bound"]) as second:
        code, out, err = second.end()

        assert (code, out) == (2, "")
        assert "another live process listens here" in err
        assert len(err.splitlines()) == 1
        cell = Cell.dial("site", about["bound"])
        cell.wait_until_up(WAIT_S)
        cell.close()


def test_routers_in_processes_chain(tmp_path: Path) -> None:
    """Below, above and across: a cell is found through two router processes, and lost with the lower one."""
    upper, top = router("--bind", f"ipc://{tmp_path}/upper")
    lower, bottom = router("--bind", f"ipc://{tmp_path}/lower", "--upstream", top["bound"])
    with upper, lower, ExitStack() as stack:
        high, low = Cell.dial("high", top["bound"]), Cell.dial("low", bottom["bound"])
        for cell in (high, low):
            stack.callback(cell.close)
            cell.on("test", "echo", lambda delivery: delivery.value())
            cell.wait_until_up(WAIT_S)
        array = np.arange(500_000)
        assert np.array_equal(value_of(low.request("high", "test", "echo", array)), array)
        assert np.array_equal(value_of(high.request("low", "test", "echo", array)), array)

        with told_of(high, "low"):
            lower.send(signal.SIGKILL)

        assert isinstance(error_of(high.request("low", "test", "echo")), NoRoute)


@pytest.mark.parametrize(("word", "code"), [("", 0), ("end\n", 0), ("fail\n", 1)])
def test_ending_never_hangs(word: str, code: int) -> None:
    """With a handler that never returns and an answer that nobody fetches, a process ends when its program does."""
    with Bus("ipc", NEVER_S) as bus:
        asker = bus.connect("asker")
        with peer("site", bus.endpoint) as process:
            pending = asker.request("site", "blocked", "wait")
            assert process.hear() == "entered"

            ended, _, err = process.end(word)

            assert ended == code
            assert err.startswith("Traceback") if code else err == ""
            assert isinstance(error_of(pending), NoRoute)
