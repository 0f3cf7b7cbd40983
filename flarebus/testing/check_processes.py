"""Checks with the other end in a process of its own: it works, and it may be killed at any moment."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

from flarebus.errors import DecodeError
from flarebus.pipes.message import Message
from flarebus.pipes.pipe import ExportMode, Mode
from flarebus.testing.check_life import alone, check_nothing_is_left, wait
from flarebus.testing.check_messages import check_same
from flarebus.testing.peer_process import PeerFailed, PeerProcess
from flarebus.testing.samples import sample
from flarebus.testing.trial import End, PipeTrial

__all__ = ["CHECKS"]

# Seconds after a process began to send when it is killed: before, in the middle and near the end of the message.
MOMENTS_S = (0.0, 0.002, 0.01, 0.03, 0.1)


def peer_works_in_another_process(trial: PipeTrial) -> None:
    """What `export` says for the peer makes, in another process, an end that sends and receives."""
    for mode in trial.modes_here:
        end, process = _with_process(trial, mode)
        for size in (0, 1000, trial.big_bytes):
            request = Message("echo", b"body", [sample(size, 1)])
            process.say({"do": "echo", "timeout": trial.patience})
            if end.send(request).result("to another process") is not True:
                raise end.broken("send", "has to be True once the peer's receive, in another process, has returned it")
            reply = end.next("from another process")
            expected = Message("echo", b"body", request.buffers, type=reply.type, req_id=request.msg_id)
            expected.msg_id = reply.msg_id
            check_same(end, expected, reply)
            if _said(end, "send", process.expect, "echoed") is not True:
                raise end.broken("send", "in another process has to be True once the peer's receive has returned it")
        process.say({"do": "receive", "timeout": trial.patience})
        data = sample(1000, 2)
        end.send(Message("check", b"12", [data])).result("to another process")
        if _said(end, "receive", process.expect, "received") != ["check", 2, zlib.crc32(data)]:
            raise end.broken("send", "what arrives in another process is not what was sent")
        process.kill()


def killed_sender_delivers_no_half_message(trial: PipeTrial) -> None:
    """A peer killed in the middle of a message: it arrives whole or not at all, and the end is not fooled after."""
    for mode in trial.modes_here:
        for moment in MOMENTS_S:
            end, process = _with_process(trial, mode)
            process.say({"do": "send", "nbytes": trial.big_bytes, "timeout": trial.patience})
            receiving = end.receive(trial.patience)
            _said(end, "send", process.expect, "sending")
            wait(moment)
            process.kill()
            # A pipe need not know that its peer is dead: it may wait on, and is closed under that.
            if not receiving.returns_within(1.0):
                end.close()
            _check_whole(trial, end, receiving.outcome(BrokenPipeError, DecodeError, why="when the peer was killed"))
            end.close()


def _check_whole(trial: PipeTrial, end: End, found: Any) -> None:
    if not isinstance(found, Message):
        return
    buffers = end.content_if_there(found)
    if buffers is not None and [bytes(buffer) for buffer in buffers] != [bytes(sample(trial.big_bytes))]:
        raise end.broken("receive", "returned half a message of a peer that was killed while it sent it")


def killed_peer_reads_nothing(trial: PipeTrial) -> None:
    """A message to a process that was killed before it read it is not reported as read."""
    for mode in trial.modes_here:
        end, process = _with_process(trial, mode)
        sending = end.send(Message("unread", b"", [sample(1000)]), 2.0)
        wait(0.1)
        process.kill()
        if sending.outcome(BrokenPipeError, why="when the peer was killed") is True:
            raise end.broken("send", "is True, though the peer was killed before it received anything")
        alone(end, "after the peer was killed")


def killed_reader_ends_a_send(trial: PipeTrial) -> None:
    """A big message whose reader is killed meanwhile: the send ends in its time, and the next one is not True."""
    for mode in trial.modes_here:
        end, process = _with_process(trial, mode)
        process.say({"do": "receive", "timeout": trial.patience})
        sending = end.send(Message("big", b"", [sample(trial.big_bytes)]), 5.0)
        wait(0.01)
        process.kill()
        sending.outcome(BrokenPipeError, why="when the peer was killed while it read")
        alone(end, "after the peer was killed")


def place_of_a_dead_end_is_free(trial: PipeTrial) -> None:
    """After a process was killed, another can take its place, and gets nothing that the dead one left."""
    for mode in trial.modes_here:
        end, process = _with_process(trial, mode)
        process.say({"do": "send", "nbytes": 1000, "timeout": trial.patience})
        _said(end, "send", process.expect, "sending")
        process.kill()
        end.close()
        channel = process.channel
        fresh = trial.end(mode).open(channel)
        peer = trial.end(Mode.ACTIVE if mode is Mode.PASSIVE else Mode.PASSIVE).open(channel)
        trial.greet(*((fresh, peer) if mode is Mode.PASSIVE else (peer, fresh)))
        for sender, receiver in ((fresh, peer), (peer, fresh)):
            trial.exchange(sender, receiver, Message("fresh"), "in the place of an end whose process was killed")


def dead_ends_leave_nothing(trial: PipeTrial) -> None:
    """Both processes are killed in the middle of a message: nothing is left behind."""
    if Mode.ACTIVE not in trial.modes_here:
        _dead_trainer_leaves_nothing(trial)
        return
    for moment in (MOMENTS_S[0], MOMENTS_S[2]):
        model = trial.end(Mode.ACTIVE)
        channel = trial.channel()
        ends = [_said(model, "export", trial.process, model.export(side), channel) for side in ExportMode]
        ends[1].say({"do": "receive", "timeout": trial.patience})
        ends[0].say({"do": "send", "nbytes": trial.big_bytes, "timeout": trial.patience})
        _said(model, "send", ends[0].expect, "sending")
        wait(moment)
        for process in ends:
            process.kill()
        check_nothing_is_left(trial, model, "dead")


def _dead_trainer_leaves_nothing(trial: PipeTrial) -> None:
    """Where the client job's end cannot be in another process, only the trainer's dies."""
    end, process = _with_process(trial, Mode.PASSIVE)
    process.say({"do": "send", "nbytes": trial.big_bytes, "timeout": trial.patience})
    _said(end, "send", process.expect, "sending")
    process.kill()
    end.close()
    check_nothing_is_left(trial, end, "dead or closed")


def _with_process(trial: PipeTrial, mode: Mode) -> tuple[End, PeerProcess]:
    """An open end of this mode, and its peer in another process."""
    channel = trial.channel()
    end = trial.end(mode).open(channel)
    process: PeerProcess = _said(end, "export", trial.process, end.export(ExportMode.PEER), channel)
    # The first word is the trainer's; see `PipeTrial.greet`.
    if mode is Mode.PASSIVE:
        process.say({"do": "send", "nbytes": 0, "timeout": trial.patience})
        end.next("as the first message of the ACTIVE end")
        _said(end, "send", process.expect, "sending")
        _said(end, "send", process.expect, "sent")
    else:
        process.say({"do": "receive", "timeout": trial.patience})
        end.send(Message("hello")).result("to another process")
        _said(end, "receive", process.expect, "received")
    return end, process


def _said(end: End, method: str, ask: Callable[..., Any], *args: Any) -> Any:
    """What the other process says; that it fails is the pipe's doing."""
    try:
        return ask(*args)
    except PeerFailed as error:
        raise end.broken(method, f"in another process: {error}") from error


CHECKS = (
    peer_works_in_another_process,
    killed_sender_delivers_no_half_message,
    killed_peer_reads_nothing,
    killed_reader_ends_a_send,
    place_of_a_dead_end_is_free,
    dead_ends_leave_nothing,
)
