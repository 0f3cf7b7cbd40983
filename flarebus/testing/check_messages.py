"""Checks of what a pipe does with messages: all of them, whole, in order, in memory of the receiver's own."""

from __future__ import annotations

import gc
from queue import Empty, SimpleQueue

import numpy as np

from flarebus.message import Buffer
from flarebus.pipes.message import Message, MessageType
from flarebus.testing.check_life import SHORT_S
from flarebus.testing.samples import sample
from flarebus.testing.trial import End, PipeTrial

__all__ = ["CHECKS", "check_same"]

ALIGNMENT = 64
BURST = 2000
MANY_BUFFERS = 1000
MEBIBYTE = 1024 * 1024


def messages_keep_their_order(trial: PipeTrial) -> None:
    """Messages come in the order of sending, in both directions."""
    here, there = trial.pair()
    for sender, receiver in ((here, there), (there, here)):
        _stream(trial, sender, receiver, [Message("order", str(number).encode()) for number in range(50)])


def burst_arrives_whole(trial: PipeTrial) -> None:
    """Two thousand messages, one after the other as fast as they go: none is lost, none twice, none out of order."""
    here, there = trial.pair()
    buffer = sample(1000)
    _stream(trial, here, there, [Message("burst", str(n).encode(), [buffer] * (n % 3)) for n in range(BURST)])


def _stream(trial: PipeTrial, sender: End, receiver: End, messages: list[Message]) -> None:
    sending = [sender.send(message) for message in messages]
    for number, message in enumerate(messages):
        received = receiver.next(f"as number {number + 1} of {len(messages)}")
        if received.msg_id != message.msg_id:
            raise receiver.broken("receive", f"returned message {received.body!r} where {message.body!r} was due")
        check_same(receiver, message, received)
    for call in sending:
        if call.result() is not True:
            raise sender.broken("send", "has to be True once the peer's receive has returned the message")


def begun_messages_keep_their_order(trial: PipeTrial) -> None:
    """A pipe that can send without waiting says what became of it, and `send` after it stays behind it."""
    here, there = trial.pair()
    trial.exchange(here, there, Message("first"))
    trial.exchange(there, here, Message("first"))
    for sender, receiver in ((here, there), (there, here)):
        for number in range(20):
            begun = sender.begin("begin", Message("begun", str(number).encode()), trial.patience).result()
            if begun is None:
                break
            if begun.is_done:
                raise sender.broken("begin", "says what became of a message that nobody has received")
            if (found := receiver.next("that was begun")).body != str(number).encode():
                raise receiver.broken("receive", f"returned message {found.body!r} where {number} was due")
            if begun.result(trial.patience) is not True:
                raise sender.broken("begin", "has to come to True once the peer's receive has returned the message")


def delivered_messages_keep_their_order(trial: PipeTrial) -> None:
    """A pipe that delivers messages by itself gives each to one of the two ways, in order."""
    here, there = trial.pair()
    for sender, receiver in ((here, there), (there, here)):
        came: SimpleQueue[Message] = SimpleQueue()
        _stream(trial, sender, receiver, [Message("before")])
        if receiver.begin("deliver", came.put).result() is not True:
            continue
        _fetch(receiver, came)
        for number in range(20):
            message = Message("order", str(number).encode(), [sample(300_000)] * (number % 2))
            sending = sender.send(message)
            try:
                found = came.get(timeout=trial.patience)
            except Empty:
                raise receiver.broken("deliver", f"message {number} came neither way") from None
            if found.msg_id != message.msg_id:
                raise receiver.broken("deliver", f"message {found.body!r} came where {message.body!r} was due")
            check_same(receiver, message, found)
            if sending.result() is not True:
                raise sender.broken("send", "has to be True once the message was delivered")
        if not came.empty():
            raise receiver.broken("deliver", "gave a message twice")


def _fetch(receiver: End, came: SimpleQueue[Message]) -> None:
    """Receive, as long as there is something to receive."""
    receiving = receiver.receive()

    def again() -> None:
        if not receiving.has_failed and isinstance(found := receiving.result(), Message):
            came.put(found)
            _fetch(receiver, came)

    receiving.on_done(again)


def fields_survive(trial: PipeTrial) -> None:
    """Topic, kind, ids and body of requests and replies arrive as they were sent."""
    here, there = trial.pair()
    for sender, receiver in ((here, there), (there, here)):
        for topic in ("a", "Train_1", "x" * 64, "_END_", "_ABORT_", "_ERROR_"):
            request = Message(topic, topic.encode())
            check_same(receiver, request, trial.exchange(sender, receiver, request))
        reply = Message("train", bytes(range(256)), type=MessageType.REPLY, req_id=request.msg_id)
        check_same(receiver, reply, trial.exchange(sender, receiver, reply))


def every_size_arrives(trial: PipeTrial) -> None:
    """Empty messages, empty buffers, small ones, odd lengths, a whole body: all arrive as they were."""
    here, there = trial.pair()
    messages = [
        Message("size"),
        Message("size", b"", [b""]),
        Message("size", b"x", [b"", b"y", b""]),
        Message("size", bytes(sample(1000)), [sample(length, length) for length in (1, 63, 64, 65, 4095, 4096, 4097)]),
        Message("size", bytes(sample(MEBIBYTE)), [sample(300_000)]),
        Message("size", b"", [memoryview(sample(100))[10:90], bytes(sample(10)), bytearray(sample(20))]),
    ]
    for message in messages:
        check_same(there, message, trial.exchange(here, there, message))


def many_buffers_arrive(trial: PipeTrial) -> None:
    """A model of a thousand tensors arrives with all of them in their order."""
    here, there = trial.pair()
    message = Message("many", b"body", [sample(number % 257, number) for number in range(MANY_BUFFERS)])
    check_same(there, message, trial.exchange(here, there, message))


def big_message_arrives(trial: PipeTrial) -> None:
    """A big message arrives whole, twice, in both directions."""
    here, there = trial.pair()
    message = Message("big", b"body", [sample(trial.big_bytes // 2, 1), sample(trial.big_bytes // 2, 2)])
    for sender, receiver in ((here, there), (there, here)):
        for _ in range(2):
            again = Message(message.topic, message.body, message.buffers)
            check_same(receiver, again, trial.exchange(sender, receiver, again))
            sender.begin("release_send_cache", again).result("for a message that is settled")


def both_ends_send_at_once(trial: PipeTrial) -> None:
    """Both ends send and receive at the same time, and nobody waits for the other."""
    here, there = trial.pair()
    forth = [Message("forth", str(number).encode(), [sample(MEBIBYTE, number)]) for number in range(20)]
    back = [Message("back", str(number).encode(), [sample(MEBIBYTE, number)]) for number in range(20)]
    calls = [(here, here.send(message)) for message in forth] + [(there, there.send(message)) for message in back]
    for one, other in zip(forth, back, strict=True):
        check_same(there, one, there.next("while it sends itself"))
        check_same(here, other, here.next("while it sends itself"))
    for end, call in calls:
        if call.result("while it receives") is not True:
            raise end.broken("send", "has to be True once the peer's receive has returned the message")


def send_is_true_only_after_receive(trial: PipeTrial) -> None:
    """A send waits for the receive of its own message at the other end, also when that one read others before."""
    here, there = trial.pair()
    for sender, receiver in ((here, there), (there, here)):
        for size in (0, MEBIBYTE):
            trial.exchange(sender, receiver, Message("before"))
            sending = sender.send(Message("unread", b"", [sample(size)]))
            if sending.returns_within(SHORT_S):
                raise sender.broken("send", "is over before the peer's receive has returned the message")
            receiver.next()
            if sending.result() is not True:
                raise sender.broken("send", "has to be True once the peer's receive has returned the message")


def message_wakes_receive(trial: PipeTrial) -> None:
    """A receive that waits without limit returns the message that comes then."""
    here, there = trial.pair()
    for sender, receiver in ((here, there), (there, here)):
        receiving = receiver.begin("receive", None)
        receiving.returns_within(SHORT_S)
        sender.send(Message("wake"))
        if not isinstance(receiving.result("when a message comes while it waits"), Message):
            raise receiver.broken("receive", "has to wait for a message when it has no timeout")


def channels_are_apart(trial: PipeTrial) -> None:
    """Two channels between the same ends do not mix, and one may stand still while the other runs."""
    task, metric = trial.pair(), trial.pair()
    waiting = task[0].send(Message("task", b"unread"))
    for number in range(5):
        trial.exchange(metric[1], metric[0], Message("metric", str(number).encode()), "on a second channel")
    if (found := metric[1].receive(SHORT_S).result()) is not None:
        raise metric[1].broken("receive", f"returned {found!r}, which was sent on another channel")
    if task[1].next().body != b"unread" or waiting.result() is not True:
        raise task[1].broken("receive", "has to return the message of its own channel")
    metric[0].close()
    trial.exchange(task[1], task[0], Message("task"), "after another channel was closed")


def buffers_are_the_receivers_own(trial: PipeTrial) -> None:
    """Buffers are writable and aligned; after the answer neither side sees what the other does to them."""
    here, there = trial.pair()
    for sender, receiver in ((here, there), (there, here)):
        for size in (100, 100_000, 3 * MEBIBYTE):
            originals = [sample(size, 1), sample(size + 1, 2)]
            request = Message("own", b"", originals)
            received = trial.exchange(sender, receiver, request)
            buffers = receiver.content(received)
            for buffer in buffers:
                _check_writable(receiver, buffer)
            trial.exchange(receiver, sender, received.reply())
            sender.begin("release_send_cache", request).result("for a request that is answered")
            _fill(buffers, 1)
            if originals != [sample(size, 1), sample(size + 1, 2)]:
                raise receiver.broken("receive", "what is done to a received buffer changes the sender's memory")
            _fill(originals, 2)
            if any(np.any(np.frombuffer(buffer, np.uint8) != 1) for buffer in buffers):
                raise receiver.broken("receive", "what the sender does after the answer changes a received buffer")


def buffers_last_until_they_are_dropped(trial: PipeTrial) -> None:
    """Whoever keeps a received buffer keeps its bytes, whatever comes next, also when the pipe is closed."""
    here, there = trial.pair()
    kept = []
    for number in range(6):
        received = trial.exchange(here, there, Message("keep", b"", [sample(200_000, number)]))
        buffers = there.content(received)
        if number % 2 == 0:
            kept.append((number, buffers[0]))
        # Every other one is dropped, so that its memory may be used again.
        del received, buffers
        gc.collect()
    here.close()
    there.close()
    for number, buffer in kept:
        if bytes(buffer) != sample(200_000, number):
            raise there.broken("receive", "a received buffer that the caller still holds was used for something else")


def _check_writable(end: End, buffer: Buffer) -> None:
    view = memoryview(buffer)
    if view.readonly:
        raise end.broken("receive", "the buffers of a message that came in have to be writable")
    if np.frombuffer(view, np.uint8).ctypes.data % ALIGNMENT:
        raise end.broken("receive", f"the buffers of a message that came in have to be aligned to {ALIGNMENT} bytes")


def _fill(buffers: list[Buffer] | list[bytearray], value: int) -> None:
    for buffer in buffers:
        np.frombuffer(buffer, np.uint8)[:] = value


def check_same(receiver: End, sent: Message, received: Message) -> None:
    """Check that a message arrived as it was sent.

    Raises:
        PromiseBroken: something of it differs.
    """
    for field in ("type", "topic", "msg_id", "req_id", "body"):
        was, came = getattr(sent, field), getattr(received, field)
        if came != was:
            raise receiver.broken("receive", f"{field} has to arrive as it was sent: {was!r:.60} came as {came!r:.60}")
    buffers = receiver.content(received)
    lengths = [memoryview(buffer).nbytes for buffer in sent.buffers]
    if [memoryview(buffer).nbytes for buffer in buffers] != lengths:
        raise receiver.broken("receive", f"{len(lengths)} buffers have to arrive in their order, with their lengths")
    for number, (was, came) in enumerate(zip(sent.buffers, buffers, strict=True)):
        if memoryview(was).cast("B") != memoryview(came).cast("B"):
            raise receiver.broken("receive", f"the bytes of buffer {number} have to arrive as they were sent")


CHECKS = (
    messages_keep_their_order,
    burst_arrives_whole,
    begun_messages_keep_their_order,
    delivered_messages_keep_their_order,
    fields_survive,
    every_size_arrives,
    many_buffers_arrive,
    big_message_arrives,
    both_ends_send_at_once,
    send_is_true_only_after_receive,
    message_wakes_receive,
    channels_are_apart,
    buffers_are_the_receivers_own,
    buffers_last_until_they_are_dropped,
)
