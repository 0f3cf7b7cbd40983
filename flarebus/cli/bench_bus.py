"""Requests and a stream through a router, with asker, router and answerer in processes of their own.

`run` asks; `python -m flarebus.cli.bench_bus` is the answerer, which reads what it needs from standard input (keys do
not belong on a command line) and ends when that ends.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flarebus.errors import Closed

if TYPE_CHECKING:
    from flarebus.cell import Cell
    from flarebus.delivery import Delivery
    from flarebus.pending import Pending
    from flarebus.security.keys import DialKeys, ListenKeys

__all__ = ["run"]

_WARM_UP = 200
_ROUND_TRIPS = 3000
_REQUESTS = 30_000
# Requests under way at once: enough to keep every process busy, few enough to stay in the caches.
_WINDOW = 128
_STREAM_BYTES = 256_000_000
_STREAMS = 5
_START_TIMEOUT_S = 30.0


def run(*, curve: bool, transport: str) -> dict[str, Any]:
    """Measure both arrangements.

    Returns:
        The figures through a router process (`latency_us_median`, `latency_us_p99`, `requests_s`, `stream_mb_s`), and
        under `embedded` those through a router in the asker's process.
    """
    with tempfile.TemporaryDirectory(prefix="flarebus-bench-") as name:
        folder = Path(name)
        keys = _Keys(folder / "keys") if curve else None
        bind = "tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{folder / 'bus'}"
        standalone = _standalone(bind, keys)
        embedded = _embedded(bind, keys)
    return {"bench": "bus", "transport": transport, "curve": curve, **standalone, "embedded": embedded}


class _Keys:
    """Key pairs for a router and the two who dial it."""

    def __init__(self, folder: Path) -> None:
        from flarebus.security.keys import KeyPair

        self.folder = folder
        self._router, self._asker, self._answerer = (KeyPair.generate() for _ in range(3))
        self._router.save(folder, "router")
        (folder / "admitted").mkdir()
        for name, pair in (("asker", self._asker), ("answerer", self._answerer)):
            (folder / "admitted" / f"{name}.pub").write_bytes(pair.public)

    @property
    def listen(self) -> ListenKeys:
        from flarebus.security.keys import ListenKeys

        return ListenKeys.load(self.folder)

    @property
    def asker(self) -> DialKeys:
        from flarebus.security.keys import DialKeys

        return DialKeys(self._asker, self._router.public)

    @property
    def answerer(self) -> dict[str, str]:
        parts = {"public": self._answerer.public, "secret": self._answerer.secret, "server": self._router.public}
        return {name: key.decode() for name, key in parts.items()}


def _standalone(bind: str, keys: _Keys | None) -> dict[str, float]:
    from flarebus.cell import Cell

    command = [sys.executable, "-m", "flarebus.cli.router", "--json", "--bind", bind]
    if keys is not None:
        command += ["--keys", str(keys.folder)]
    router = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert router.stdout is not None
        endpoint = json.loads(router.stdout.readline())["bound"]
        cell = Cell.dial("asker", endpoint, keys.asker if keys else None)
        with _answerer(endpoint, keys), contextlib.closing(cell):
            cell.wait_until_up(_START_TIMEOUT_S)
            return _measure(cell)
    finally:
        router.terminate()
        router.communicate()


def _embedded(bind: str, keys: _Keys | None) -> dict[str, float]:
    from flarebus.cell import Cell
    from flarebus.loop import Loop
    from flarebus.router import Router

    loop = Loop("asker")
    try:
        router = Router(loop)
        endpoint = router.bind(bind, keys.listen if keys else None)
        cell = Cell.attach("asker", router, loop)
        with _answerer(endpoint, keys):
            figures = _measure(cell)
        router.close()
    finally:
        loop.stop()
    return figures


@contextlib.contextmanager
def _answerer(endpoint: str, keys: _Keys | None) -> Iterator[None]:
    """A process whose cell `answerer` is up when the block begins."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flarebus.cli.bench_bus"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        setup = {"endpoint": endpoint, "keys": None if keys is None else keys.answerer}
        process.stdin.write(json.dumps(setup).encode() + b"\n")
        process.stdin.flush()
        if process.stdout.readline() != b"up\n":
            raise Closed("the answering process did not come up; what it said stands above")
        yield
    finally:
        process.communicate()


def _measure(cell: Cell) -> dict[str, float]:
    latencies = sorted([_round_trip(cell) for _ in range(_WARM_UP + _ROUND_TRIPS)][_WARM_UP:])
    return {
        "latency_us_median": round(1e6 * statistics.median(latencies), 1),
        "latency_us_p99": round(1e6 * latencies[int(0.99 * len(latencies))], 1),
        "requests_s": round(_rate(cell)),
        "stream_mb_s": round(_stream(cell)),
    }


def _round_trip(cell: Cell) -> float:
    begin = time.perf_counter()
    cell.request("answerer", "bench", "echo").result()
    return time.perf_counter() - begin


def _rate(cell: Cell) -> float:
    """Requests a second with `_WINDOW` of them under way."""
    waiting: deque[Pending[Delivery]] = deque()
    begin = time.perf_counter()
    for _ in range(_REQUESTS):
        if len(waiting) == _WINDOW:
            waiting.popleft().result()
        waiting.append(cell.request("answerer", "bench", "echo"))
    while waiting:
        waiting.popleft().result()
    return _REQUESTS / (time.perf_counter() - begin)


def _stream(cell: Cell) -> float:
    """MB/s of an array that the other end pulls; the first pull, into fresh memory, does not count."""
    import numpy as np

    data = np.ones(_STREAM_BYTES, np.uint8)
    seconds = []
    for _ in range(_STREAMS + 1):
        begin = time.perf_counter()
        cell.request("answerer", "bench", "take", data).result()
        seconds.append(time.perf_counter() - begin)
    return _STREAM_BYTES / 1e6 / statistics.median(seconds[1:])


def _answer() -> None:
    """Be the answerer until standard input ends."""
    from flarebus.cell import Cell
    from flarebus.security.keys import DialKeys, KeyPair

    setup = json.loads(sys.stdin.readline())
    keys = None
    if setup["keys"] is not None:
        part = {name: key.encode() for name, key in setup["keys"].items()}
        keys = DialKeys(KeyPair(part["public"], part["secret"]), part["server"])
    cell = Cell.dial("answerer", setup["endpoint"], keys)
    cell.on("bench", "echo", lambda _: None)
    # The array is here before the handler runs; it has nothing to do with it.
    cell.on("bench", "take", lambda _: None)
    cell.wait_until_up(_START_TIMEOUT_S)
    print("up", flush=True)
    sys.stdin.read()
    cell.close()


if __name__ == "__main__":
    _answer()
