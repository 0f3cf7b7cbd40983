"""The handler above a pipe: requests and replies, what came twice, and sending again."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flarebus.errors import (
    ConfigError,
    DeadlineExceeded,
    LinkError,
    RemoteError,
    UsageError,
)
from flarebus.pending import Pending
from flarebus.pipes import Message, MessageType, Topic
from flarebus.pipes.handler import PipeHandler
from tests.pipes.fake_pipe import LIMIT_S, FakePipe
from tests.pipes.links import wait_until
from tests.pipes.told import Make, drained, the_next

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


# -- pipes that spare the threads --


def begins(handler: PipeHandler, fake: FakePipe, begin: Callable[[Message], Pending[bool] | None]) -> None:
    """From now on the pipe sends without waiting; the first sign of life is through."""
    assert fake.heartbeats.get(timeout=LIMIT_S)
    wait_until(lambda: handler._sender._pending == 0, "nothing is on its way")
    fake.begin_with = begin


def test_a_message_that_was_begun_needs_no_thread(make: Make, fake: FakePipe) -> None:
    """What the pipe sends without waiting is read when it says so, and is not sent again."""
    begun: list[Pending[bool]] = []
    handler, _ = make(fake)
    begins(handler, fake, lambda message: begun.append(Pending()) or begun[-1])  # type: ignore[func-returns-value]

    posted = handler.post(Message("task"))
    assert len(begun) == 1
    assert not posted.is_done
    begun[0].set(True)
    assert posted.result(LIMIT_S) is True
    handler.post(Message("task"))

    assert len(begun) == 2
    assert fake.sent.empty()
    begun[1].set(True)


def test_what_is_said_behind_a_message_that_was_begun_waits_for_it(make: Make, fake: FakePipe) -> None:
    """One message after the other, also when the first has to be sent again."""
    begun: list[Pending[bool]] = []
    handler, _ = make(fake, resend_interval=0.0)
    begins(handler, fake, lambda message: begun.append(Pending()) or begun[-1])  # type: ignore[func-returns-value]
    first, second = handler.post(Message("first")), handler.post(Message("second"))
    assert len(begun) == 1
    assert fake.sent.empty()

    begun[0].set(False)

    assert [the_next(fake.sent).topic for _ in range(2)] == ["first", "second"]
    assert (first.result(LIMIT_S), second.result(LIMIT_S)) == (True, True)


@pytest.mark.parametrize("error", [BrokenPipeError("cut"), OSError("no room")])
def test_a_message_that_was_begun_in_vain_fails_as_any_other(make: Make, fake: FakePipe, error: OSError) -> None:
    """A broken pipe ends the handler, anything else one message."""
    begun: Pending[bool] = Pending()
    handler, told = make(fake)
    begins(handler, fake, lambda message: begun)
    posted = handler.post(Message("task"))

    begun.fail(error)

    with pytest.raises(LinkError, match=str(error)):
        posted.result(LIMIT_S)
    if isinstance(error, BrokenPipeError):
        assert told.status() == (Topic.PEER_GONE, "cut")
    else:
        fake.begin_with = lambda message: None
        assert handler.post(Message("task")).result(LIMIT_S)


def test_a_pipe_that_cannot_begin_a_message_is_asked_to_send_it(make: Make, fake: FakePipe) -> None:
    """What it raises is met again, and told, by `send`."""

    def refuse(message: Message) -> Pending[bool]:
        raise ValueError("not like this")

    handler, _ = make(fake)
    begins(handler, fake, refuse)

    assert handler.post(Message("task")).result(LIMIT_S) is True
    assert the_next(fake.sent).topic == "task"


def test_a_message_on_its_way_without_a_thread_hears_of_the_end(make: Make, fake: FakePipe) -> None:
    """Whoever waits for it is told when this end stops, whatever the pipe says later."""
    begun: Pending[bool] = Pending()
    handler, _ = make(fake)
    begins(handler, fake, lambda message: begun)
    asked = handler.request(Message("result"))

    handler.stop()

    with pytest.raises(LinkError, match="stopped"):
        asked.result(LIMIT_S)
    begun.set(True)
    assert the_next(fake.released).topic == "result"


def test_a_delivered_message_is_taken_as_one_that_was_received(make: Make, fake: FakePipe) -> None:
    """Once, whichever way it comes, and never after the end."""
    handler, told = make(fake)
    message = Message("task")
    assert fake.to is not None

    fake.to(message)
    assert told.message() is message
    fake.inbox.put(message)
    fake.inbox.put(Message("next"))
    assert told.message().topic == "next"
    handler.stop()
    fake.to(Message("late"))
    assert told.nothing_more()


def test_news_of_an_earlier_message_do_not_end_a_later_one(make: Make, fake: FakePipe) -> None:
    """The thread may have ended the first one before whoever knows of it says so."""
    told_late: list[Callable[[Pending[bool]], None]] = []
    begun: list[Pending[bool]] = []

    class Late(Pending[bool]):
        def on_done(self, callback: Callable[[Pending[bool]], None]) -> None:
            told_late.append(callback)

    handler, _ = make(fake)
    begins(handler, fake, lambda message: begun.append(Late()) or begun[-1])  # type: ignore[func-returns-value]
    first, second = handler.post(Message("first")), handler.post(Message("second"))
    begun[0].set(True)
    assert (first.result(LIMIT_S), second.result(LIMIT_S)) == (True, True)
    wait_until(lambda: handler._sender._pending == 0, "nothing is on its way")
    third = handler.post(Message("third"))

    told_late[0](begun[0])

    assert not third.is_done
    begun[1].set(True)
    told_late[1](begun[1])
    assert third.result(LIMIT_S) is True
