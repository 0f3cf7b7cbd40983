"""The process behind `PeerProcess`: an end of a pipe that does what it is told. Not for anybody else.

The first line of standard input says what to make: class_path, args, channel. Then, one a line, what to do:

    {"do": "send", "nbytes": n, "timeout": s}    says "sending" before and "sent" after it
    {"do": "receive", "timeout": s}              says "received" with topic, body length, and a checksum of the buffers
    {"do": "echo", "timeout": s}                 receives a request and answers with its body and buffers
    {"do": "close"}                              says "closed"

It ends with its input.
"""

from __future__ import annotations

import json
import sys
import zlib
from typing import Any

from flarebus.pipes.loading import make_pipe
from flarebus.pipes.message import Message
from flarebus.pipes.pipe import Pipe
from flarebus.testing.samples import sample

__all__ = ["main"]


def main() -> None:
    """Make the end, open it, and obey."""
    wanted = json.loads(sys.stdin.readline())
    try:
        pipe = make_pipe(wanted["class_path"], wanted["args"], {}, wanted["args"].get("mode"))
        pipe.open(wanted["channel"])
    except Exception as error:  # told to the process that asked
        _say("failed", f"{type(error).__name__}: {error}")
        return
    _say("open")
    for line in sys.stdin:
        try:
            _do(pipe, json.loads(line))
        except Exception as error:  # told to the process that asked
            _say("failed", f"{type(error).__name__}: {error}")
    pipe.close()


def _do(pipe: Pipe, order: dict[str, Any]) -> None:
    match order["do"]:
        case "send":
            message = Message("sample", b"body", [sample(order["nbytes"])])
            _say("sending")
            _say("sent", pipe.send(message, order["timeout"]))
        case "receive":
            received = pipe.receive(order["timeout"])
            if received is None:
                _say("received", None)
                return
            checksum = 0
            for buffer in pipe.pull(received).result(order["timeout"]):
                checksum = zlib.crc32(buffer, checksum)
            _say("received", [received.topic, len(received.body), checksum])
        case "echo":
            request = pipe.receive(order["timeout"])
            if request is None:
                _say("echoed", False)
                return
            buffers = pipe.pull(request).result(order["timeout"])
            _say("echoed", pipe.send(request.reply(request.body, buffers), order["timeout"]))
        case "close":
            pipe.close()
            _say("closed")


def _say(word: str, what: Any = None) -> None:
    print(json.dumps({"say": word, "what": what}), flush=True)


if __name__ == "__main__":
    main()
