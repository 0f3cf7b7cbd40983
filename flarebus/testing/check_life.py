"""Checks of the life of an end: making, opening, waiting, closing, and what is left."""

from __future__ import annotations

import json
import threading
import time

from flarebus.errors import ConfigError, UsageError
from flarebus.pipes.loading import make_pipe
from flarebus.pipes.message import Message
from flarebus.pipes.pipe import ExportMode, Mode, Pipe
from flarebus.testing.trial import End, PipeTrial

__all__ = ["CHECKS", "check_nothing_is_left", "wait"]

# Long enough for anything that happens at once to have happened, on a slow machine too.
SHORT_S = 0.3


def wait(seconds: float) -> None:
    """Let other threads and processes do what they do."""
    threading.Event().wait(seconds)


def making_an_end_touches_nothing(trial: PipeTrial) -> None:
    """A constructor must not touch anything outside, and keeps the mode."""
    before = sorted(trial.leftovers())
    for mode in Mode:
        end = trial.end(mode)
        if not isinstance(end.pipe, Pipe) or end.pipe.mode is not mode:
            raise end.broken("__init__", f"an end made with mode {mode.value} has to be one of that mode")
    if (after := sorted(trial.leftovers())) != before:
        raise end.broken("__init__", f"must not touch anything outside; made {_more(after, before)}")


def use_before_open_is_refused(trial: PipeTrial) -> None:
    """An end that was never opened refuses to send and to receive."""
    for mode in Mode:
        _refuses_use(trial.end(mode), "on an end that was never opened")


def use_after_close_is_refused(trial: PipeTrial) -> None:
    """A closed end refuses to send and to receive."""
    for end in trial.pair():
        end.close()
        _refuses_use(end, "on a closed end")


def _refuses_use(end: End, why: str) -> None:
    end.send(Message("early"), SHORT_S).raises(BrokenPipeError, why)
    end.receive(SHORT_S).raises(BrokenPipeError, why)


def second_open_is_refused(trial: PipeTrial) -> None:
    """An open end cannot be opened again, on any channel, and goes on as if nothing was."""
    channel = trial.channel()
    here, there = trial.pair(channel)
    for end in (here, there):
        for name in (channel, trial.channel()):
            end.begin("open", name).raises(UsageError, "on an end that is open already")
    trial.exchange(here, there, Message("after"), "after a second open was refused")


def taken_place_is_refused(trial: PipeTrial) -> None:
    """Of each mode one live end has a channel; the first keeps it."""
    channel = trial.channel()
    here, there = trial.pair(channel)
    for mode in Mode:
        trial.end(mode).begin("open", channel).raises(
            UsageError, f"while another live end of mode {mode.value} has this place"
        )
    trial.exchange(here, there, Message("after"), "after a second end of the same mode was refused")


def close_is_idempotent(trial: PipeTrial) -> None:
    """Closing does no harm before opening, nor twice."""
    for mode in Mode:
        trial.end(mode).close()
    for end in trial.pair():
        end.close()
        end.close()


def close_wakes_receive(trial: PipeTrial) -> None:
    """A receive that waits without limit ends when its end is closed."""
    for side in (0, 1):
        end = trial.pair()[side]
        receiving = end.begin("receive", None)
        if receiving.returns_within(SHORT_S):
            raise end.broken("receive", f"has to wait for a message, but ended with {receiving.outcome(Exception)!r}")
        end.close()
        receiving.raises(BrokenPipeError, "when its end is closed while it waits")


def close_wakes_send(trial: PipeTrial) -> None:
    """A send that waits without limit for its reader ends when its end is closed."""
    for side in (0, 1):
        end = trial.pair()[side]
        sending = end.begin("send", Message("unread"), None)
        if sending.returns_within(SHORT_S):
            raise end.broken("send", f"has to wait for the reader, but ended with {sending.outcome(Exception)!r}")
        end.close()
        sending.raises(BrokenPipeError, "when its end is closed while it waits")


def closed_peer_reads_nothing(trial: PipeTrial) -> None:
    """When the other end is closed, a send is not True, and a receive brings nothing."""
    for ends in (trial.pair(), trial.pair()[::-1]):
        here, there = ends
        there.close()
        alone(here, "after the other end was closed")


def alone(end: End, why: str) -> None:
    """Check what an end says whose other end is gone."""
    if end.send(Message("alone"), SHORT_S).outcome(BrokenPipeError, why=why) is True:
        raise end.broken("send", f"is True, though nobody can have received the message, {why}")
    found = end.receive(SHORT_S).outcome(BrokenPipeError, why=why)
    if isinstance(found, Message):
        raise end.broken("receive", f"returned a message that nobody sent, {why}")


def closed_ends_can_be_reopened(trial: PipeTrial) -> None:
    """After both ends were closed, the same objects work again on the same channel, and nothing old is there."""
    channel = trial.channel()
    here, there = trial.pair(channel)
    unread = here.begin("send", Message("old"), None)
    wait(SHORT_S)
    here.close()
    there.close()
    unread.outcome(BrokenPipeError)
    for name in (channel, trial.channel()):
        here.open(name)
        there.open(name)
        trial.greet(here, there, "after both ends were closed and opened again")
        trial.exchange(here, there, Message("again"), "after both ends were closed and opened again")
        trial.exchange(there, here, Message("again"), "after both ends were closed and opened again")
        here.close()
        there.close()


def other_end_may_come_later(trial: PipeTrial) -> None:
    """Whoever opens first can send at once; the message is read when the other end is there."""
    for mode in Mode:
        channel = trial.channel()
        first = trial.end(mode).open(channel)
        sending = first.send(Message("early", b"body"))
        if sending.returns_within(SHORT_S):
            raise first.broken(
                "send", f"ended with {sending.outcome(Exception)!r} before the other end was there; it has to wait"
            )
        second = trial.end(_other(mode)).open(channel)
        if mode is Mode.PASSIVE:
            trial.greet(first, second)
        second.next("before this end was open")
        if sending.result() is not True:
            raise first.broken("send", "has to be True once the peer's receive has returned the message")


def receive_ends_in_time(trial: PipeTrial) -> None:
    """A receive with nothing to bring returns None when its time is up, not before."""
    for end in trial.pair():
        began = time.monotonic()
        if (found := end.receive(SHORT_S).result("with nothing to receive")) is not None:
            raise end.broken("receive", f"has to return None when nothing came in time, not {found!r}")
        if time.monotonic() - began < SHORT_S / 2:
            raise end.broken("receive", f"returned None long before its timeout of {SHORT_S:g} s")
        if (found := end.receive(0).result("with nothing to receive")) is not None:
            raise end.broken("receive", f"has to return None when nothing came in time, not {found!r}")


def send_ends_in_time(trial: PipeTrial) -> None:
    """A send that nobody reads returns False when its time is up, and the next one works."""
    for here, there in (trial.pair(), trial.pair()[::-1]):
        if (found := here.send(Message("unread"), SHORT_S).result("with nobody who receives")) is not False:
            raise here.broken("send", f"has to be False when nobody received the message in time, not {found!r}")
        message = Message("read")
        sending = here.send(message)
        # One that could not be withdrawn may still come.
        received = there.next()
        if received.topic == "unread":
            received = there.next()
        if received.msg_id != message.msg_id or sending.result() is not True:
            raise here.broken("send", "has to work after one that was not read in time")


def one_that_was_not_read_can_be_sent_again(trial: PipeTrial) -> None:
    """Where `can_resend` is true, the same message can be sent again and arrives under the same id."""
    here, there = trial.pair()
    if not here.begin("can_resend").result():
        return
    message = Message("again", b"body", [sample_of(64)])
    here.send(message, SHORT_S).result("with nobody who receives")
    sending = here.send(message)
    received = there.next("when it is sent again")
    if not sending.returns_within(SHORT_S):
        # What came was the one that could not be withdrawn; its handler drops the second.
        received = there.next("when it is sent again")
    if sending.result() is not True or received.msg_id != message.msg_id:
        raise here.broken("can_resend", "is true, but the same message does not arrive when it is sent again")


def sample_of(nbytes: int) -> bytearray:
    """A few bytes."""
    return bytearray(range(nbytes))


def clear_drops_what_waits(trial: PipeTrial) -> None:
    """What waits to be received is gone after `clear`, and what comes later is not."""
    for attempt in range(1, 6):
        here, there = trial.pair()
        sending = here.send(Message("old"), 10 * SHORT_S * attempt)
        # One that only now arrives may be delivered: only a message that waited every time is a broken promise.
        wait(SHORT_S * attempt)
        there.begin("clear").result()
        if there.receive(SHORT_S).result("after clear") is None:
            sending.outcome(BrokenPipeError)
            trial.exchange(here, there, Message("new"), "after clear")
            return
    raise there.broken("clear", "has to drop what waits to be received, but it was received afterwards")


def export_describes_both_ends(trial: PipeTrial) -> None:
    """Class path and arguments are JSON values, and make an end that works with the one that exported them."""
    for mode in Mode:
        channel = trial.channel()
        end = trial.end(mode).open(channel)
        for side in ExportMode:
            path, args = end.export(side)
            try:
                round_trip = json.loads(json.dumps(args))
            except (TypeError, ValueError) as error:
                raise end.broken("export", f"the arguments for {side.value} are no JSON values: {error}") from error
            if round_trip != args:
                raise end.broken("export", f"the arguments for {side.value} change on their way through JSON")
            wanted = mode if side is ExportMode.SELF else _other(mode)
            if args.get("mode") != wanted.value:
                raise end.broken("export", f"the arguments for {side.value} have to say mode {wanted.value!r}")
            try:
                made = make_pipe(path, args, trial.context, wanted)
            except ConfigError as error:
                raise end.broken("export", f"what it says for {side.value} makes no end: {error}") from error
            if side is ExportMode.PEER:
                peer = trial.adopt(made).open(channel)
                ends = (end, peer) if mode is Mode.PASSIVE else (peer, end)
                trial.greet(*ends, "between an end and the peer that export describes")
                trial.exchange(peer, end, Message("hello"), "from the end that export describes")
                trial.exchange(end, peer, Message("hello"), "to the end that export describes")


def what_it_tells_has_the_right_type(trial: PipeTrial) -> None:
    """`can_resend` is a bool, `moved_bytes` a count, and the time of the last sign of life is no time to come."""
    here, there = trial.pair()
    trial.exchange(here, there, Message("hello"))
    for end in (here, there):
        if not isinstance(end.begin("can_resend").result(), bool):
            raise end.broken("can_resend", "has to return True or False")
        moved = end.begin("moved_bytes").result()
        if not isinstance(moved, int) or moved < 0:
            raise end.broken("moved_bytes", f"has to return a count, not {moved!r}")
        active = end.begin("get_last_peer_active_time").result()
        if not isinstance(active, int | float) or active > time.monotonic():
            raise end.broken("get_last_peer_active_time", f"has to return monotonic seconds, not {active!r}")
        end.begin("release_send_cache", Message("unknown")).result("for a message that it never had")


def closed_ends_leave_nothing(trial: PipeTrial) -> None:
    """Once both ends are closed nothing is left behind, whichever went first and whatever waited."""
    for first in (0, 1):
        ends = trial.pair()
        trial.exchange(*ends, Message("read", b"body", [sample_of(64)]))
        unread = ends[first].begin("send", Message("unread", b"body", [sample_of(64)]), None)
        wait(SHORT_S)
        ends[first].close()
        ends[1 - first].close()
        unread.outcome(BrokenPipeError)
        check_nothing_is_left(trial, ends[0], "closed")


def check_nothing_is_left(trial: PipeTrial, end: End, how: str) -> None:
    """Wait until nothing is left.

    Raises:
        PromiseBroken: something stays.
    """
    deadline = time.monotonic() + trial.patience
    while left := trial.leftovers():
        if time.monotonic() > deadline:
            raise end.broken("close", f"nothing may be left behind once both ends are {how}: {', '.join(left)}")
        wait(0.02)


def _other(mode: Mode) -> Mode:
    return Mode.ACTIVE if mode is Mode.PASSIVE else Mode.PASSIVE


def _more(after: list[str], before: list[str]) -> str:
    return ", ".join(name for name in after if name not in before) or "changes"


CHECKS = (
    making_an_end_touches_nothing,
    use_before_open_is_refused,
    use_after_close_is_refused,
    second_open_is_refused,
    taken_place_is_refused,
    close_is_idempotent,
    close_wakes_receive,
    close_wakes_send,
    closed_peer_reads_nothing,
    closed_ends_can_be_reopened,
    other_end_may_come_later,
    receive_ends_in_time,
    send_ends_in_time,
    one_that_was_not_read_can_be_sent_again,
    clear_drops_what_waits,
    export_describes_both_ends,
    what_it_tells_has_the_right_type,
    closed_ends_leave_nothing,
)
