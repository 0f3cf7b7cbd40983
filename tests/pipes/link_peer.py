"""The other end of a pipe in a process of its own, for tests: `python link_peer.py CLASS ARGUMENTS CHANNEL ACTION`.

It prints a line when it is ready and one for each thing it did; the end of its input is its cue to leave.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys

import numpy as np

from flarebus.errors import UsageError
from flarebus.pipes import Message, Pipe

FLOATS = 64 * 1024 * 1024 // 4


def say(*words: object) -> None:
    """One line, at once."""
    print(*words, flush=True)


def hold(pipe: Pipe) -> None:
    """Do nothing until told to leave."""
    sys.stdin.read()


def echo(pipe: Pipe) -> None:
    """Answer every message with its own buffers, one added to each float, until the other end is gone."""
    while True:
        try:
            message = pipe.receive(60)
        except BrokenPipeError:
            return
        if message is None:
            return
        arrays = [np.frombuffer(buffer, np.float32) for buffer in message.buffers]
        for array in arrays:
            array += 1
        answer = message.reply(message.body, [memoryview(array).cast("B") for array in arrays])
        pipe.send(answer, 60)
        del message, arrays, answer


def send(pipe: Pipe) -> None:
    """Send a large message that nobody may want to read."""
    array = np.ones(FLOATS, np.float32)
    say("sending")
    say("sent", pipe.send(Message("big", b"body", [memoryview(array).cast("B")])))


def send_again_and_again(pipe: Pipe) -> None:
    """Send large messages until the other end is gone."""
    array = np.ones(FLOATS, np.float32)
    while True:
        say("sent", pipe.send(Message("big", b"body", [memoryview(array).cast("B")])))


def drain(pipe: Pipe) -> None:
    """Receive all that comes, until the other end is gone."""
    while True:
        try:
            message = pipe.receive(60)
        except BrokenPipeError:
            return
        say("received", message is not None and message.msg_id)


def keep(pipe: Pipe) -> None:
    """Receive one message and keep its buffers until told to leave."""
    message = pipe.receive(60)
    say("received", message is not None and message.nbytes)
    sys.stdin.read()


def keep_in_parent(pipe: Pipe) -> None:
    """Receive one message and keep its buffers; a forked child drops its copies of them."""
    message = pipe.receive(60)
    child = os.fork()
    if not child:
        del message
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    say("dropped")
    sys.stdin.read()


ACTIONS = {each.__name__: each for each in (hold, echo, drain, send, send_again_and_again, keep, keep_in_parent)}


def main() -> None:
    """Open the pipe, act, close it."""
    path, arguments, channel, action = sys.argv[1:]
    module, _, name = path.rpartition(".")
    pipe = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    try:
        pipe.open(channel)
    except UsageError as error:
        say("refused", error)
        return
    say("ready")
    try:
        ACTIONS[action](pipe)
    finally:
        pipe.close()


if __name__ == "__main__":
    main()
