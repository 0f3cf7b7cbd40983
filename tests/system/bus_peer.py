"""A process with one cell, for tests that kill, stop and start such processes.

`python bus_peer.py ADDRESS ENDPOINT SILENCE_S` says `up` and serves until its standard input ends.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np

from flarebus.cell import Cell
from flarebus.delivery import Delivery

BIG = 64 * 1024 * 1024


def say(word: str) -> None:
    print(word, flush=True)


def main() -> None:
    address, endpoint, silence_s = sys.argv[1:]
    cell = Cell.dial(address, endpoint, silence_s=float(silence_s))

    def wait(_: Delivery) -> None:
        say("entered")
        threading.Event().wait()

    def stall(_: Delivery) -> Any:
        serve = cell._carrier._serve

        def serve_once(*request: Any) -> None:
            serve(*request)
            cell._carrier._serve = lambda *_: None  # type: ignore[method-assign]
            say("served")

        cell._carrier._serve = serve_once  # type: ignore[method-assign]
        return np.ones(BIG, np.uint8)

    cell.on("test", "echo", lambda delivery: delivery.value())
    cell.on("test", "leave", lambda _: sys.stdin.close())
    cell.on("blocked", "wait", wait)
    cell.on("test", "stall", stall)
    cell.wait_until_up(20)
    say("up")
    word = sys.stdin.readline()
    if word == "fail\n":
        raise ValueError("nobody closed anything")
    if word != "end\n":
        cell.close()


if __name__ == "__main__":
    main()
