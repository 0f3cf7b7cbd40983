"""The handler above a pipe: requests, what came twice, sending again, signs of life, and the three ways to end."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import pytest
from flarebus_pipes.memory_pipe import MemoryPipe

from flarebus.codec import encode
from flarebus.errors import (
    Closed,
    ConfigError,
    DeadlineExceeded,
    DecodeError,
    LinkError,
    NoRoute,
    RemoteError,
    UsageError,
)
from flarebus.pipes import Message, MessageType, Mode, Topic
from flarebus.pipes import handler as handler_module
from flarebus.pipes.handler import LAST_LOOK_S, PipeHandler
from flarebus.pipes.pipe import Pipe
from tests.pipes.fake_pipe import LIMIT_S, FakePipe, FakeTime


class Told:
    """What a handler called back with."""

    def __init__(self) -> None:
        self.messages: SimpleQueue[Message] = SimpleQueue()
        self.statuses: SimpleQueue[tuple[str, str]] = SimpleQueue()
        self.act: Callable[[Message], None] = lambda message: None

    def on_message(self, message: Message) -> None:
        """Note it, and do what the test wants done."""
        self.messages.put(message)
        self.act(message)

    def on_status(self, topic: str, reason: str) -> None:
        """Note it."""
        self.statuses.put((topic, reason))

    def message(self) -> Message:
        """The next message."""
        return self.messages.get(timeout=LIMIT_S)

    def status(self) -> tuple[str, str]:
        """The next status."""
        return self.statuses.get(timeout=LIMIT_S)

    def nothing_more(self) -> bool:
        """Whether nothing was called back with that was not looked at."""
        return self.messages.empty() and self.statuses.empty()


Make = Callable[..., tuple[PipeHandler, Told]]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes started handlers, which are stopped at the end."""
    made: list[PipeHandler] = []

    def start(pipe: Pipe, begin: bool = True, **given: Any) -> tuple[PipeHandler, Told]:
        told = Told()
        given = {"on_message": told.on_message, "on_status": told.on_status, **given}
        handler = PipeHandler(pipe, **given)
        made.append(handler)
        if begin:
            handler.start()
        return handler, told

    yield start
    for handler in made:
        handler.stop()


@pytest.fixture
def pair(make: Make) -> tuple[tuple[PipeHandler, Told], tuple[PipeHandler, Told]]:
    """Two handlers at the ends of one pipe: the client job's, and the trainer's."""
    ends = []
    for mode in (Mode.PASSIVE, Mode.ACTIVE):
        pipe = MemoryPipe(mode, "handler-test")
        pipe.open("task")
        ends.append(make(pipe))
    return ends[0], ends[1]


@pytest.fixture
def fake() -> FakePipe:
    """A pipe whose other end is the test."""
    return FakePipe()


def the_next(queue: SimpleQueue[Any]) -> Any:
    """The next entry."""
    return queue.get(timeout=LIMIT_S)


# -- requests --


def test_request_is_resolved_by_its_reply(pair: Any) -> None:
    """Each reply finds the request that it answers, whatever the order of the answers."""
    (here, _), (there, told) = pair
    first, second = here.request(Message("train", b"1")), here.request(Message("train", b"2"))
    asked = [told.message(), told.message()]

    there.reply(asked[1], b"two")
    there.reply(asked[0], b"one", [bytearray(b"weights")])

    assert second.result(LIMIT_S).body == b"two"
    answer = first.result(LIMIT_S)
    assert (answer.body, bytes(answer.buffers[0])) == (b"one", b"weights")


def test_exception_in_on_message_answers_the_request(pair: Any) -> None:
    """What the other end raised fails the request with its kind and text, and the other end goes on."""
    (here, _), (there, told) = pair

    def refuse(message: Message) -> None:
        raise KeyError("no such layer")

    told.act = refuse
    failed = here.request(Message("train"))
    with pytest.raises(RemoteError, match="the trainer: KeyError: 'no such layer'"):
        failed.result(LIMIT_S)

    told.act = lambda message: there.reply(message, b"fine")

    assert here.request(Message("train")).result(LIMIT_S).body == b"fine"


def test_fail_answers_with_an_error(pair: Any) -> None:
    """A request that was taken and could not be done fails for whoever asked."""
    (here, told), (there, _) = pair
    told.act = lambda message: here.fail(message, ValueError("too late"))

    with pytest.raises(RemoteError, match="the client job: ValueError: too late"):
        there.request(Message("submit")).result(LIMIT_S)


def test_post_is_true_once_it_was_read(pair: Any) -> None:
    """One-way messages arrive in order, and whoever wants to know hears when they were read."""
    (here, _), (_, told) = pair

    posted = [here.post(Message("metric", str(number).encode())) for number in range(100)]

    assert [told.message().body for _ in posted] == [str(number).encode() for number in range(100)]
    assert all(each.result(LIMIT_S) for each in posted)


def test_reply_that_nobody_waits_for_is_dropped(make: Make, fake: FakePipe) -> None:
    """A late answer is neither delivered nor an error."""
    _, told = make(fake)

    fake.inbox.put(Message("train", type=MessageType.REPLY, req_id="0" * 32))
    fake.inbox.put(Message("train", b"next"))

    assert told.message().body == b"next"


@pytest.mark.parametrize("topic", [Topic.END, Topic.ABORT, Topic.HEARTBEAT, Topic.PEER_GONE, Topic.ERROR])
def test_topics_of_the_handler_are_refused(make: Make, fake: FakePipe, topic: str) -> None:
    """Nobody ends a pipe by sending a message of that name."""
    handler, _ = make(fake)

    with pytest.raises(ConfigError, match="topic"):
        handler.request(Message(topic))
    with pytest.raises(ConfigError, match="topic"):
        handler.post(Message(topic))


# -- what came twice --


def test_request_that_comes_twice_is_delivered_once_and_answered_alike(make: Make, fake: FakePipe) -> None:
    """A request whose receipt got lost comes again: its effect happens once, and its answer is repeated."""
    handler, told = make(fake)
    told.act = lambda message: handler.reply(message, b"done")
    asked = Message("train")
    fake.inbox.put(asked)
    first = the_next(fake.sent)

    fake.inbox.put(asked)
    again = the_next(fake.sent)

    assert (again.msg_id, again.req_id, again.body) == (first.msg_id, asked.msg_id, b"done")
    assert told.message() is asked
    assert told.nothing_more()


def test_error_is_repeated_too(make: Make, fake: FakePipe) -> None:
    """A request that failed is not tried again because it came again."""
    _, told = make(fake)

    def refuse(message: Message) -> None:
        raise ValueError("no")

    told.act = refuse
    asked = Message("train")
    fake.inbox.put(asked)
    first = the_next(fake.sent)

    fake.inbox.put(asked)

    assert the_next(fake.sent).body == first.body
    told.message()
    assert told.nothing_more()


def test_nothing_is_kept_of_an_answer_with_buffers(make: Make, fake: FakePipe) -> None:
    """Once it was read, the buffers of an answer are whose they were: nothing of the handler refers to them."""
    handler, told = make(fake, heartbeat_interval=1000, heartbeat_timeout=0)
    asked = Message("train")
    fake.inbox.put(asked)
    weights = np.zeros(100)
    gone = threading.Event()
    watched = weakref.ref(weights, lambda _: gone.set())
    assert handler.reply(told.message(), b"", [weights.data]).result(LIMIT_S)
    the_next(fake.sent)
    the_next(fake.released)

    del weights
    gc.collect()

    # The sender may have to finish its line first; what it did not forget lives as long as it does.
    assert gone.wait(LIMIT_S / 2)
    assert watched() is None


def test_one_way_message_and_reply_that_come_twice_count_once(make: Make, fake: FakePipe) -> None:
    """Whatever comes again is dropped."""
    handler, told = make(fake)
    metric = Message("metric", b"1")
    answer = handler.request(Message("train"))
    reply = the_next(fake.sent).reply(b"yes")

    for message in (metric, metric, reply, reply, Message("metric", b"2")):
        fake.inbox.put(message)

    assert [told.message().body, told.message().body] == [b"1", b"2"]
    assert answer.result(LIMIT_S).body == b"yes"
    assert told.nothing_more()


def test_handler_keeps_nothing_of_a_message_it_delivered(make: Make, fake: FakePipe) -> None:
    """While the reader waits for the next message, the memory of the last one is free to be used again."""
    _, told = make(fake)
    weights = np.zeros(100)
    gone = weakref.ref(weights)
    the_next(fake.waits)
    fake.inbox.put(Message("train", b"", [weights.data]))
    told.message()
    the_next(fake.waits)

    del weights
    gc.collect()

    assert gone() is None


# -- sending again --


def unread(times: int) -> Callable[[Message], bool]:
    """An other end that reads a message at the try after so many."""
    left = [times]

    def take(message: Message) -> bool:
        left[0] -= 1
        return left[0] < 0

    return take


def test_message_that_was_not_read_is_sent_again(make: Make, fake: FakePipe) -> None:
    """The same message, with the same id, until it is read."""
    fake.take = unread(2)
    handler, _ = make(fake, resend_interval=0)

    posted = handler.post(Message("metric"))

    assert posted.result(LIMIT_S)
    assert len({the_next(fake.sent).msg_id for _ in range(3)}) == 1
    assert fake.sent.empty()


@pytest.mark.parametrize(("resendable", "tries"), [(True, 4), (False, 1)])
def test_message_that_nobody_reads_is_given_up(make: Make, fake: FakePipe, resendable: bool, tries: int) -> None:
    """After the tries that are allowed, or the one that the pipe allows, whoever waits hears of it; others still go."""
    fake.resendable = resendable
    fake.take = lambda message: message.topic == "metric"
    handler, _ = make(fake, resend_interval=0, max_resends=3)

    with pytest.raises(DeadlineExceeded, match=f"the trainer did not read train in {tries} tries"):
        handler.request(Message("train")).result(LIMIT_S)
    assert handler.post(Message("metric")).result(LIMIT_S)

    assert [the_next(fake.sent).topic for _ in range(tries + 1)] == ["train"] * tries + ["metric"]


def test_none_tries_without_end(make: Make, fake: FakePipe) -> None:
    """`max_resends=None` gives up only with the peer."""
    fake.take = unread(50)
    handler, _ = make(fake, resend_interval=0, max_resends=None)

    assert handler.post(Message("metric")).result(LIMIT_S)


def test_answered_request_is_not_sent_again(make: Make, fake: FakePipe) -> None:
    """An answer is proof that the request was read, even if the pipe says otherwise."""
    handler, _ = make(fake, resend_interval=LIMIT_S)
    answered = threading.Event()

    def answer_but_say_no(message: Message) -> bool:
        if message.topic == "train":
            fake.inbox.put(message.reply(b"yes"))
            assert answered.wait(LIMIT_S)
            return False
        return True

    fake.take = answer_but_say_no
    pending = handler.request(Message("train"))
    pending.on_done(lambda _: answered.set())
    assert pending.result(LIMIT_S).body == b"yes"
    handler.notify_abort()
    handler.post(Message("metric")).result(LIMIT_S)

    assert [each.topic for each in drained(fake.sent)] == ["train", Topic.ABORT, "metric"]


def test_there_is_a_pause_between_tries_which_only_what_is_urgent_cuts_short(make: Make, fake: FakePipe) -> None:
    """A peer that does not read is not asked again and again at once; an abort does not wait for the next try."""
    fake.take = lambda message: message.topic == Topic.ABORT
    handler, _ = make(fake, resend_interval=LIMIT_S)
    handler.post(Message("metric"))
    the_next(fake.sent)

    handler.notify_abort()

    assert the_next(fake.sent).topic == Topic.ABORT


def test_peer_has_longer_to_read_what_is_big(make: Make, fake: FakePipe) -> None:
    """The time to read grows with the bytes that the pipe itself has to carry."""
    handler, _ = make(fake, peer_read_timeout=10)

    handler.post(Message("small")).result(LIMIT_S)
    handler.post(Message("big", b"", [bytes(5_000_000)])).result(LIMIT_S)

    assert fake.timeouts == [10, 11]


def test_pipe_may_forget_a_message_once_it_is_settled(make: Make, fake: FakePipe) -> None:
    """A one-way message is settled when it was read, a request when it is answered; each is told once."""
    handler, told = make(fake)
    post, request = Message("metric"), Message("train")
    handler.post(post).result(LIMIT_S)
    pending = handler.request(request)
    the_next(fake.sent), the_next(fake.sent)
    assert the_next(fake.released) is post

    handler.post(Message("metric")).result(LIMIT_S)
    assert the_next(fake.released) is not request
    fake.inbox.put(request.reply())
    pending.result(LIMIT_S)
    assert the_next(fake.released) is request

    # Anything told twice would be before this one.
    fake.inbox.put(Message("last"))
    told.message()
    handler.stop()
    assert [each for each in drained(fake.released) if each in (post, request)] == []


def drained(queue: SimpleQueue[Any]) -> list[Any]:
    """All that is in it."""
    found = []
    while True:
        try:
            found.append(queue.get_nowait())
        except Empty:
            return found


def test_send_that_raises_fails_its_message_only(make: Make, fake: FakePipe) -> None:
    """A full disk is told to whoever sent, as an error of the path with its cause; a misuse as what it is."""
    handler, _ = make(fake)
    errors: list[Exception] = [OSError("disk full"), UsageError("carries no manifests")]

    def take(message: Message) -> bool:
        if errors:
            raise errors.pop(0)
        return True

    fake.take = take

    with pytest.raises(LinkError, match="could not be sent: OSError: disk full") as raised:
        handler.post(Message("metric")).result(LIMIT_S)
    with pytest.raises(UsageError, match="carries no manifests"):
        handler.request(Message("train")).result(LIMIT_S)
    assert isinstance(raised.value.__cause__, OSError)
    assert handler.post(Message("metric")).result(LIMIT_S)


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


def broken(message: Message) -> bool:
    """An other end that is gone."""
    raise BrokenPipeError("it went away")


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
