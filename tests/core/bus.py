"""A bus for a test: routers, cells and what carries messages between them, all closed at its end.

The same test runs over every arrangement of `ARRANGEMENTS`. Nothing waits for a time: what should happen is waited for,
at most `WAIT_S` seconds, and a test that needs that long has failed.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any

from flarebus.cell import Cell
from flarebus.delivery import Delivery
from flarebus.loop import Loop
from flarebus.pending import Pending
from flarebus.router import Router
from flarebus.security.keys import DialKeys, KeyPair, ListenKeys

__all__ = ["ARRANGEMENTS", "WAIT_S", "Bus", "Cable", "collector", "error_of", "value_of", "wait_for"]

WAIT_S = 20.0
# inproc: two cells on one router without a socket; embedded: the answering one on it, as a server is; chain: the asker
# dials a router that dials the other's.
ARRANGEMENTS = ("inproc", "embedded", "ipc", "tcp", "curve", "chain")


class Bus:
    """Routers and cells. `near` and `far` make cells at the two ends of the arrangement."""

    def __init__(self, arrangement: str = "ipc", silence_s: float = 15.0) -> None:
        self.arrangement = arrangement
        self.silence_s = silence_s
        self._stack = ExitStack()
        self.folder = tempfile.mkdtemp(prefix="flarebus-test-")
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self._routers = 0
        self.listen: ListenKeys | None = None
        self.dial: DialKeys | None = None
        if arrangement == "curve":
            own, cells = KeyPair.generate(), KeyPair.generate()
            self.listen, self.dial = ListenKeys(own, frozenset({cells.public})), DialKeys(cells, own.public)
        self.loop, self.router, self.endpoint = self.add_router(arrangement in ("tcp", "curve"))
        self.lower = self.router
        if arrangement == "chain":
            _, self.lower, self.lower_endpoint = self.add_router()
            self.lower.connect(self.endpoint)
            self._probe = self.attach("probe", self.router)
            self._probe.on("probe", "reach", lambda _: None)

    def __enter__(self) -> Bus:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add_router(self, tcp: bool = False) -> tuple[Loop, Router, str]:
        """One more router, on a loop of its own, that listens."""
        loop = Loop("router")
        self._stack.callback(loop.stop)
        router = Router(loop, self.silence_s)
        self._routers += 1
        bind = "tcp://127.0.0.1:*" if tcp else f"ipc://{self.folder}/r{self._routers}"
        return loop, router, "" if self.arrangement == "inproc" else router.bind(bind, self.listen)

    def attach(self, name: str, router: Router | None = None, aliases: Iterable[str] = ()) -> Cell:
        """A cell in the process of a router."""
        router = router or self.router
        return self.close_later(Cell.attach(name, router, router._loop, aliases))

    def connect(self, name: str, endpoint: str = "", aliases: Iterable[str] = ()) -> Cell:
        """A cell that dials, and is up."""
        cell = self.close_later(
            Cell.dial(name, endpoint or self.endpoint, self.dial, aliases, silence_s=self.silence_s)
        )
        cell.wait_until_up(WAIT_S)
        return cell

    def near(self, name: str = "asker", aliases: Iterable[str] = ()) -> Cell:
        """A cell at the end where the asker is."""
        if self.arrangement == "inproc":
            return self.attach(name, aliases=aliases)
        if self.arrangement != "chain":
            return self.connect(name, aliases=aliases)
        cell = self.connect(name, self.lower_endpoint, aliases)
        # What it says goes up after its name did: once this is answered, it can be reached from above.
        cell.request("probe", "probe", "reach").result(WAIT_S)
        return cell

    def far(self, name: str = "answerer", aliases: Iterable[str] = ()) -> Cell:
        """A cell at the other end."""
        if self.arrangement in ("inproc", "embedded"):
            return self.attach(name, aliases=aliases)
        return self.connect(name, aliases=aliases)

    def close_later(self, closable: Any) -> Any:
        """Close `closable` when the test is over."""
        self._stack.callback(closable.close)
        return closable


class Cable:
    """A TCP connection that can be cut, and stopped with nobody being told; whoever dials again gets a new one.

    Args:
        endpoint: `tcp://127.0.0.1:PORT` of whoever is at the other end.
        cut_after: cut the first connection when this many bytes have come down from there.
    """

    def __init__(self, endpoint: str, cut_after: int | None = None) -> None:
        self._target = ("127.0.0.1", int(endpoint.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._cut_after = cut_after
        self._ends: list[socket.socket] = []
        self._flows = threading.Event()
        self._flows.set()
        self.was_cut = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End all connections."""
        with self._lock:
            ends, self._ends = self._ends, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.was_cut.set()

    def hold(self) -> None:
        """Let nothing through until `release`."""
        self._flows.clear()

    def release(self) -> None:
        """Let through what waits, and all that comes."""
        self._flows.set()

    def close(self) -> None:
        """End everything."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._flows.set()
        self.cut()

    def _accept(self) -> None:
        with self._listener, suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    near.close()
                    continue
                with self._lock:
                    self._ends += [near, far]
                for source, sink, is_down in ((near, far, False), (far, near, True)):
                    threading.Thread(target=self._copy, args=(source, sink, is_down), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, is_down: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._flows.wait()
                sink.sendall(data)
                if is_down and self._cut_after is not None:
                    self._cut_after -= len(data)
                    if self._cut_after < 0:
                        self._cut_after = None
                        self.cut()
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        # The other end is read, and closed, by the thread of the other direction.
        source.close()


def value_of(pending: Pending[Delivery]) -> Any:
    """The value that a request is answered with."""
    return pending.result(WAIT_S).value(WAIT_S)


def error_of(pending: Pending[Any]) -> BaseException:
    """The error that comes instead of an answer."""
    done = threading.Event()
    pending.on_done(lambda _: done.set())
    wait_for(done)
    error = pending.error()
    assert error is not None, f"answered with {pending.result()}"
    return error


def wait_for(event: threading.Event) -> None:
    """Wait until it has happened."""
    assert event.wait(WAIT_S), "it never happened"


def collector(count: int) -> tuple[list[Any], Callable[[Delivery], None], threading.Event]:
    """A list, a handler that puts values into it, and an event set when there are `count`."""
    seen: list[Any] = []
    done = threading.Event()

    def handle(delivery: Delivery) -> None:
        seen.append(delivery.value())
        if len(seen) == count:
            done.set()

    return seen, handle, done
