"""The handler above a pipe: signs of life, silence, and the ways to end."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from flarebus.codec import encode
from flarebus.errors import (
    Closed,
    ConfigError,
    DecodeError,
    NoRoute,
)
from flarebus.pipes import Message, Topic
from flarebus.pipes import handler as handler_module
from flarebus.pipes.handler import LAST_LOOK_S, PipeHandler
from tests.pipes.fake_pipe import LIMIT_S, FakePipe, FakeTime
from tests.pipes.told import Make, broken, the_next

# -- signs of life --


def test_heartbeats_flow_when_there_is_nothing_else_to_say(make: Make, fake: FakePipe) -> None:
    """One at the start and one after each interval; none may hold up what is queued for longer than that."""
    make(fake, heartbeat_interval=0.01)

    assert [the_next(fake.heartbeats) for _ in range(3)] == [0.01] * 3


def test_heartbeat_is_sent_only_after_quiet(make: Make, fake: FakePipe) -> None:
    """Whatever was sent is a sign of life; the next heartbeat is due an interval later."""
    handler, _ = make(fake, heartbeat_interval=1000, heartbeat_timeout=0)
    the_next(fake.heartbeats)

    for _ in range(20):
        assert handler.post(Message("metric")).result(LIMIT_S)

    assert fake.heartbeats.empty()


def test_heartbeat_is_not_delivered_and_not_answered(make: Make, fake: FakePipe) -> None:
    """A sign of life is for the handler alone."""
    _, told = make(fake)

    fake.inbox.put(Message(Topic.HEARTBEAT))
    fake.inbox.put(Message("train"))

    assert told.message().topic == "train"
    assert fake.sent.empty()


def test_peer_that_never_shows_up_is_gone_after_the_timeout(make: Make, fake: FakePipe) -> None:
    """Silence counts from the start; before the verdict the pipe is listened to once more."""
    clock = FakeTime()
    _, told = make(fake, clock=clock)
    assert the_next(fake.waits) == 30

    clock.now += 30
    fake.inbox.put(None)
    assert the_next(fake.waits) == LAST_LOOK_S
    fake.inbox.put(None)

    assert told.status() == (Topic.PEER_GONE, "no sign of life for 30 s")


def test_peer_that_was_awaited_and_falls_silent_is_gone(make: Make, fake: FakePipe) -> None:
    """Its first sign of life may come on a thread of the pipe, past whoever waits; silence counts from there."""
    clock = FakeTime()
    _, told = make(fake, clock=clock, awaits_peer=True)
    assert the_next(fake.waits) == 30

    clock.now += 1000
    fake.inbox.put(None)
    assert the_next(fake.waits) == 30  # whoever is awaited may take any time
    assert fake.to is not None
    fake.to(Message(Topic.HEARTBEAT))
    clock.now += 30
    fake.inbox.put(None)
    assert the_next(fake.waits) == LAST_LOOK_S
    fake.inbox.put(None)

    assert told.status() == (Topic.PEER_GONE, "no sign of life for 30 s")


def test_what_comes_in_at_the_last_look_is_life(make: Make, fake: FakePipe) -> None:
    """A process that stood still itself does not take its peer for dead."""
    clock = FakeTime()
    _, told = make(fake, clock=clock)
    the_next(fake.waits)
    clock.now += 1000
    fake.inbox.put(None)
    the_next(fake.waits)

    fake.inbox.put(Message(Topic.HEARTBEAT))

    assert the_next(fake.waits) == 30
    assert told.nothing_more()


def test_receive_that_returns_early_is_called_for_the_rest(make: Make, fake: FakePipe) -> None:
    """A pipe may come back before its time; only the time counts."""
    clock = FakeTime()
    make(fake, clock=clock)
    the_next(fake.waits)

    clock.now += 12
    fake.inbox.put(None)

    assert the_next(fake.waits) == 18


@pytest.mark.parametrize("sign", ["message", "active", "moved", "garbage"])
def test_any_sign_of_life_counts(make: Make, fake: FakePipe, sign: str) -> None:
    """A message, what the pipe itself knows, bytes that move, even what cannot be read: the peer has its time again."""
    clock = FakeTime()
    make(fake, clock=clock)
    the_next(fake.waits)

    clock.now += 29
    if sign == "active":
        fake.active_at = clock.now
    if sign == "moved":
        fake.moved += 1
    fake.inbox.put({"message": Message("metric"), "garbage": DecodeError("noise")}.get(sign))

    assert the_next(fake.waits) == 30


def test_time_in_a_callback_is_no_silence(make: Make, fake: FakePipe) -> None:
    """A peer is not silent while nobody listens to it."""
    clock = FakeTime()
    _, told = make(fake, clock=clock)

    def take_long(message: Message) -> None:
        clock.now += 1000

    told.act = take_long
    the_next(fake.waits)
    fake.inbox.put(Message("train"))

    assert the_next(fake.waits) == 30


def test_timeout_of_zero_is_never(make: Make, fake: FakePipe) -> None:
    """With 0 the pipe is waited on without limit."""
    make(fake, heartbeat_timeout=0)

    assert the_next(fake.waits) is None


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"heartbeat_interval": 30.0}, "heartbeat_interval"),
        ({"heartbeat_interval": 0}, "heartbeat_interval"),
        ({"heartbeat_timeout": -1}, "heartbeat_timeout"),
        ({"resend_interval": -1}, "resend_interval"),
        ({"max_resends": -1}, "max_resends"),
        ({"peer_read_timeout": 0}, "peer_read_timeout"),
    ],
)
def test_figures_that_make_no_sense_are_refused(make: Make, fake: FakePipe, given: Any, named: str) -> None:
    """A heartbeat that comes later than the timeout would make every pause the end."""
    with pytest.raises(ConfigError, match=named):
        make(fake, begin=False, **given)


# -- the end --


@pytest.mark.parametrize("topic", [Topic.END, Topic.ABORT])
def test_goodbye_of_the_peer_is_told_with_its_reason(pair: Any, topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """END and ABORT are told once; whoever waits for an answer hears it, now and later; nothing more is delivered."""
    monkeypatch.setattr(handler_module, "GOODBYE_S", LIMIT_S)
    (here, told), (there, peer_told) = pair
    waiting = here.request(Message("train"))
    peer_told.message()

    assert (there.notify_end if topic == Topic.END else there.notify_abort)("all rounds are done")

    assert told.status() == (topic, "all rounds are done")
    for pending in (waiting, here.request(Message("train")), here.post(Message("metric"))):
        with pytest.raises(Closed, match=r"the trainer (ended|aborted): all rounds are done"):
            pending.result(LIMIT_S)
    assert told.nothing_more()


def test_reason_that_is_no_text_is_no_reason(make: Make, fake: FakePipe) -> None:
    """A strange goodbye is a goodbye."""
    _, told = make(fake)

    fake.inbox.put(Message(Topic.END, b"\xc1"))

    assert told.status() == (Topic.END, "")


def test_goodbyes_are_told_once(make: Make, fake: FakePipe) -> None:
    """What follows an end changes nothing."""
    handler, told = make(fake)

    fake.inbox.put(Message(Topic.END, encode("done").body))
    assert told.status() == (Topic.END, "done")
    fake.take = broken
    handler.post(Message("metric"))
    handler.stop()

    assert told.nothing_more()


def test_pipe_that_breaks_is_a_peer_that_is_gone(make: Make, fake: FakePipe) -> None:
    """A break is told with its text, and fails whoever waits; it is noticed by the reader."""
    handler, told = make(fake)
    waiting = handler.request(Message("train"))
    the_next(fake.sent)

    fake.inbox.put(BrokenPipeError("it went away"))

    assert told.status() == (Topic.PEER_GONE, "it went away")
    with pytest.raises(NoRoute, match="the trainer: it went away"):
        waiting.result(LIMIT_S)


def test_break_is_noticed_by_the_sender_too(make: Make, fake: FakePipe) -> None:
    """Whoever hits it first tells it; what waits behind fails as well."""
    fake.take = broken
    handler, told = make(fake, begin=False)
    queued = [handler.post(Message("metric")), handler.request(Message("train")), handler.post(Message("metric"))]

    handler.start()

    assert told.status() == (Topic.PEER_GONE, "it went away")
    for pending in queued:
        with pytest.raises(NoRoute, match="it went away"):
            pending.result(LIMIT_S)
    assert told.nothing_more()


def test_receive_that_fails_is_told_with_its_class(make: Make, fake: FakePipe) -> None:
    """A pipe that raises what the contract does not know is as good as broken, and named."""
    _, told = make(fake)

    fake.inbox.put(PermissionError("not yours"))

    assert told.status() == (Topic.PEER_GONE, "FakePipe.receive raised PermissionError: not yours")


def test_what_cannot_be_read_is_dropped(make: Make, fake: FakePipe) -> None:
    """Garbage on a pipe ends nothing."""
    _, told = make(fake)

    fake.inbox.put(DecodeError("noise"))
    fake.inbox.put(Message("train"))

    assert told.message().topic == "train"


def test_nothing_is_delivered_after_the_end_was_told(make: Make, fake: FakePipe) -> None:
    """A status waits for the callback that is running, and no callback begins after it."""
    handler, told = make(fake)
    entered, leave = threading.Event(), threading.Event()

    def linger(message: Message) -> None:
        entered.set()
        assert leave.wait(LIMIT_S)
        told.statuses.put(("callback over", ""))

    told.act = linger
    fake.inbox.put(Message("train"))
    fake.inbox.put(Message("train"))
    assert entered.wait(LIMIT_S)
    fake.take = broken
    with pytest.raises(NoRoute):
        handler.post(Message("metric")).result(LIMIT_S)

    leave.set()

    assert told.status() == ("callback over", "")
    assert told.status() == (Topic.PEER_GONE, "it went away")
    told.message()
    handler.stop()
    assert told.nothing_more()


def test_message_that_comes_while_the_end_is_told_is_not_delivered(make: Make, fake: FakePipe) -> None:
    """The end counts from its beginning, not from when its callback is over."""
    telling, leave = threading.Event(), threading.Event()

    def linger(*_: str) -> None:
        telling.set()
        assert leave.wait(LIMIT_S)

    handler, told = make(fake, on_status=linger)
    the_next(fake.waits)
    fake.take = broken
    handler.post(Message("metric"))
    assert telling.wait(LIMIT_S)

    fake.inbox.put(Message("train"))
    leave.set()
    handler.stop()

    assert told.nothing_more()


def test_stop_waits_for_the_callback_that_runs_and_lets_no_other_begin(make: Make, fake: FakePipe) -> None:
    """When stop has returned nothing is called back any more, not even with an end that came before it."""
    handler, told = make(fake)
    entered, leave = threading.Event(), threading.Event()

    def linger(message: Message) -> None:
        entered.set()
        assert leave.wait(LIMIT_S)

    told.act = linger
    fake.inbox.put(Message("train"))
    assert entered.wait(LIMIT_S)
    fake.take = broken
    with pytest.raises(NoRoute):
        handler.post(Message("metric")).result(LIMIT_S)
    stopping = threading.Thread(target=handler.stop)
    stopping.start()
    stopping.join(0.2)
    assert stopping.is_alive()

    leave.set()
    stopping.join(LIMIT_S)

    assert handler_threads() == []
    told.message()
    assert told.nothing_more()


def test_whoever_waits_behind_a_send_that_hangs_hears_of_the_end(make: Make, fake: FakePipe) -> None:
    """A message that is on its way and those behind it fail with the end, not when the send comes back."""
    handler, told = make(fake)
    hang = threading.Event()
    fake.take = lambda message: hang.wait(LIMIT_S)
    posted = [handler.post(Message("metric")), handler.post(Message("metric"))]
    the_next(fake.sent)

    fake.inbox.put(Message(Topic.END))

    for pending in posted:
        with pytest.raises(Closed, match="the trainer ended"):
            pending.result(LIMIT_S)
    assert told.status() == (Topic.END, "")
    hang.set()


def test_stop_tells_whoever_waits_and_no_status(pair: Any) -> None:
    """This end's own stop is no news to it; the other end hears that the pipe broke."""
    (here, told), (_, peer_told) = pair
    waiting = here.request(Message("train"))
    peer_told.message()

    here.stop()
    here.stop()

    for pending in (waiting, here.request(Message("train"))):
        with pytest.raises(Closed, match="stopped"):
            pending.result(LIMIT_S)
    assert told.nothing_more()
    assert peer_told.status() == (Topic.PEER_GONE, "the PASSIVE end of this MemoryPipe is gone")


def handler_threads() -> list[threading.Thread]:
    """The threads of all handlers."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("flarebus-pipe-")]


def test_no_thread_is_left_after_stop(pair: Any) -> None:
    """Stop waits for the threads of its handler."""
    (here, _), (there, _) = pair
    assert len(handler_threads()) == 4

    here.stop()
    there.stop()

    assert handler_threads() == []


def test_stop_before_start(make: Make, fake: FakePipe) -> None:
    """A handler that was never started can be stopped, and what was queued fails."""
    handler, _ = make(fake, begin=False)
    queued = handler.post(Message("metric"))

    handler.stop()

    with pytest.raises(Closed):
        queued.result(LIMIT_S)
    assert fake.closed == 1


@pytest.mark.parametrize("where", ["on_message", "on_status", "on_done"])
def test_stop_may_come_from_a_callback(make: Make, fake: FakePipe, where: str) -> None:
    """A callback that stops its own handler returns, and the threads end behind it."""
    stopped = threading.Event()
    handlers: list[PipeHandler] = []

    def stop(*_: Any) -> None:
        handlers[0].stop()
        stopped.set()

    given = {"on_message": {"on_message": stop}, "on_status": {"on_status": stop}, "on_done": {}}[where]
    handler, told = make(fake, begin=False, **given)
    handlers.append(handler)
    handler.start()

    if where == "on_message":
        fake.inbox.put(Message("train"))
    elif where == "on_status":
        fake.inbox.put(Message(Topic.END))
    else:
        handler.post(Message("metric")).on_done(stop)

    assert stopped.wait(LIMIT_S)
    for thread in handler_threads():
        thread.join(LIMIT_S)
    assert handler_threads() == []
    assert told.nothing_more()


def test_abort_overtakes_what_is_queued_and_end_does_not(make: Make, fake: FakePipe) -> None:
    """Whoever aborts wants it known now; whoever ends wants everything said before that."""
    handler, _ = make(fake)
    hang, entered = threading.Event(), threading.Event()

    def take(message: Message) -> bool:
        entered.set()
        return hang.wait(LIMIT_S)

    fake.take = take
    handler.post(Message("first"))
    assert entered.wait(LIMIT_S)
    handler.post(Message("second"))
    results = []
    goodbyes = [
        threading.Thread(target=lambda say=say: results.append(say("reason")))
        for say in (handler.notify_end, handler.notify_abort)
    ]
    for thread in goodbyes:
        thread.start()
    for thread in goodbyes:
        thread.join(LIMIT_S)
    # Nobody waits long for a goodbye that does not get through.
    assert results == [False, False]

    hang.set()

    assert [the_next(fake.sent).topic for _ in range(4)] == ["first", Topic.ABORT, "second", Topic.END]


def test_callback_that_raises_ends_nothing(make: Make, fake: FakePipe) -> None:
    """What somebody does with an answer cannot take the threads of the handler down."""
    handler, told = make(fake)

    def explode(_: Any) -> None:
        raise RuntimeError("in a callback")

    pending = handler.request(Message("train"))
    pending.on_done(explode)
    handler.post(Message("metric")).on_done(explode)
    fake.inbox.put(the_next(fake.sent).reply())

    assert handler.post(Message("metric")).result(LIMIT_S)
    fake.inbox.put(Message("next"))
    assert told.message().topic == "next"
