"""PipeHandler: what is the same for every pipe. Signs of life, sending again, dropping what came twice, requests.

Two threads. The reader blocks in `Pipe.receive`, for as long as the peer may be silent, and calls back; the sender
takes what is queued, in order, and sends a heartbeat when there is nothing else to say. A pipe with threads of its own
may spare both: it calls back itself, and sends for whoever has something to say.

A peer has ended when it says so (END, ABORT), when its pipe breaks, or when it was silent too long (PEER_GONE): the
status is told once, after everybody who waits for an answer was told, and nothing is delivered from then on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from flarebus.codec import decode, encode
from flarebus.errors import Closed, ConfigError, DecodeError, LinkError, NoRoute
from flarebus.failure import decode_failure, encode_failure
from flarebus.message import Buffer
from flarebus.pending import Pending
from flarebus.pipes.liveness import Liveness
from flarebus.pipes.message import Message, MessageType, Topic
from flarebus.pipes.pipe import Mode, Pipe
from flarebus.pipes.recall import Answers, SeenIds
from flarebus.pipes.sender import Outgoing, Patience, Sender

__all__ = ["PipeHandler"]

log = logging.getLogger(__name__)

# A goodbye is read at once or not at all.
GOODBYE_S = 0.5
# Threads end as soon as the pipe is closed under them; more than this is a pipe or a callback that hangs.
JOIN_S = 5.0
# When its time is up a peer is listened to once more: this process may have been the one that stood still.
LAST_LOOK_S = 0.1
MAX_REASON = 1000
_RESERVED = frozenset({Topic.ABORT, Topic.END, Topic.ERROR, Topic.HEARTBEAT, Topic.PEER_GONE})


class PipeHandler:
    """Talks to the other end of an open pipe. Any thread may call.

    Args:
        pipe: opened by the caller; the handler closes it in `stop`.
        on_message: called with each request and each one-way message, in order, on the reader's thread or one of the
            pipe's. While it runs nothing is read: it must neither block nor stop the handler. What it raises is logged,
            and answers the message.
        on_status: called once, with END, ABORT or PEER_GONE and the reason, when the other end has ended; never while
            `on_message` runs.
        heartbeat_interval: seconds of own quiet before a sign of life is sent; below `heartbeat_timeout`.
        heartbeat_timeout: seconds of silence, from `start` on, that mean the peer is gone; 0 is never.
        awaits_peer: count silence from the peer's first sign of life instead: somebody else knows when it is due.
        resend_interval: seconds between two tries to send a message, for a pipe that can do that.
        max_resends: tries after the first; None is without end.
        peer_read_timeout: seconds in which the peer must have read a message, each time it is sent; buffers that the
            pipe itself carries add to it. None is without end.
        clock: monotonic seconds.

    Raises:
        ConfigError: one of the figures is not as above.
    """

    def __init__(
        self,
        pipe: Pipe,
        *,
        on_message: Callable[[Message], None],
        on_status: Callable[[str, str], None],
        heartbeat_interval: float = 5.0,
        heartbeat_timeout: float = 30.0,
        awaits_peer: bool = False,
        resend_interval: float = 2.0,
        max_resends: int | None = 5,
        peer_read_timeout: float | None = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pipe = pipe
        self._peer = "the client job" if pipe.mode is Mode.ACTIVE else "the trainer"
        self._on_message = on_message
        self._on_status = on_status
        self._clock = clock
        self._liveness = Liveness(heartbeat_interval, heartbeat_timeout, awaits_peer)
        self._sender = Sender(
            pipe,
            peer=self._peer,
            liveness=self._liveness,
            patience=Patience(resend_interval, max_resends, peer_read_timeout),
            clock=clock,
            on_broken=self._gone,
        )
        # Guards the table of requests, the answers, and the end.
        self._lock = threading.Lock()
        self._waiting: dict[str, Outgoing] = {}
        self._answers = Answers()
        self._seen = SeenIds()
        self._ended = False
        self._stopped = False
        # Held while somebody is called back. Reentrant: what a callback does may end the pipe.
        self._calling = threading.RLock()
        self._reader = threading.Thread(target=self._read, name="flarebus-pipe-reader", daemon=True)

    # -- for the caller --

    def start(self) -> None:
        """Begin to listen and to give signs of life; once."""
        self._liveness.begin(self._clock(), self._pipe.moved_bytes())
        self._sender.thread.start()
        self._pipe.deliver(self._hear)
        self._reader.start()

    @property
    def has_ended(self) -> bool:
        """Whether nothing goes out or comes in any more; the status that says why may be told only now."""
        return self._ended

    def request(self, message: Message) -> Pending[Message]:
        """Send a request; the reply will be set, on the thread that reads.

        Fails with the error that the other end answered with, or with a LinkError: the peer is gone (NoRoute), one of
        the ends has ended (Closed), or nobody read the message in all tries (DeadlineExceeded).

        Raises:
            ConfigError: the topic belongs to the handler.
        """
        _check_topic(message)
        answer: Pending[Message] = Pending()
        item = Outgoing(message, answer=answer)
        # Before it is submitted: whoever ends first ends the sender, then looks who waits here.
        with self._lock:
            self._waiting[message.msg_id] = item
        answer.on_done(lambda _: self._settle(item))
        self._sender.submit(item)
        return answer

    def post(self, message: Message) -> Pending[bool]:
        """Send a message that is not answered; True will be set once the peer has read it. Fails as `request` does.

        Raises:
            ConfigError: the topic belongs to the handler.
        """
        _check_topic(message)
        return self._sender.submit(Outgoing(message)).read

    def reply(self, request: Message, body: bytes = b"", buffers: Sequence[Buffer] = ()) -> Pending[bool]:
        """Answer a request; True will be set once the peer has read it, and the buffers may change then."""
        return self._reply(request.reply(body, buffers))

    def fail(self, request: Message, error: BaseException) -> Pending[bool]:
        """Answer a request with an error: at the other end it fails with a RemoteError that names it."""
        body = encode_failure(error)
        return self._reply(Message(Topic.ERROR, body, type=MessageType.REPLY, req_id=request.msg_id))

    def notify_end(self, reason: str = "") -> bool:
        """Say, after all that is queued, that this end is done; True if that was read. Waits at most half a second."""
        return self._say_goodbye(Topic.END, reason)

    def notify_abort(self, reason: str = "") -> bool:
        """Say, before all that is queued, to give up; True if that was read. Waits at most half a second."""
        return self._say_goodbye(Topic.ABORT, reason)

    def stop(self) -> None:
        """Close the pipe and end the threads. Whoever waits gets Closed; no status is told. Idempotent.

        From a callback of the handler it does not wait: its threads end when the callback returns.
        """
        self._stopped = True
        self._end(lambda: Closed("this end of the pipe was stopped"))
        self._pipe.close()
        threads = (self._reader, self._sender.thread)
        if threading.current_thread() in threads:
            return
        for thread in threads:
            if thread.is_alive():
                thread.join(JOIN_S)
            if thread.is_alive():
                log.warning("%s is still busy %g s after its pipe was closed", thread.name, JOIN_S)

    def _reply(self, reply: Message) -> Pending[bool]:
        with self._lock:
            self._answers.add(reply)
        return self._sender.submit(Outgoing(reply)).read

    def _say_goodbye(self, topic: str, reason: str) -> bool:
        goodbye = Message(topic, encode(reason[:MAX_REASON]).body)
        item = self._sender.submit(Outgoing(goodbye, limit=GOODBYE_S), urgent=topic == Topic.ABORT)
        if threading.current_thread() is self._sender.thread:
            return False  # it is sent when the callback returns
        try:
            return item.read.result(GOODBYE_S)
        except LinkError:
            return False

    # -- receiving --

    def _read(self) -> None:
        while not self._ended:
            patience = self._patience()
            # Who is awaited may come on a thread of the pipe's, which does not end the waiting here.
            limit = (self._liveness.timeout or None) if patience is None else patience or LAST_LOOK_S
            try:
                message = self._pipe.receive(limit)
            except BrokenPipeError as error:
                self._gone(str(error) or "the pipe is broken")
                return
            except DecodeError as error:
                log.warning("dropped what %s sent: %s", self._peer, error)
                self._liveness.heard(self._clock())
                continue
            except Exception as error:  # a pipe that cannot receive is as good as broken, and is told with its reason
                log.exception("%s.receive failed", type(self._pipe).__name__)
                self._gone(f"{type(self._pipe).__name__}.receive raised {type(error).__name__}: {error}")
                return
            if message is not None:
                self._hear(message)
                # Its buffers are the receiver's: they must not live here until the next message comes.
                del message
            elif patience == 0 and self._patience() == 0:
                self._gone(f"no sign of life for {self._liveness.timeout:g} s")

    def _patience(self) -> float | None:
        """Seconds that the peer may still be silent, by all that is known now."""
        now = self._clock()
        self._liveness.notice(now, self._pipe.get_last_peer_active_time(), self._pipe.moved_bytes())
        return self._liveness.patience(now)

    def _hear(self, message: Message) -> None:
        if self._ended:
            return
        try:
            self._take(message)
        except Exception:  # out of a callback of whoever waited for an answer
            log.exception("what %s sent could not be told", self._peer)
        # Now, not before: a peer is not silent while nobody listens.
        self._liveness.heard(self._clock())

    def _take(self, message: Message) -> None:
        """Do what a message is for, once."""
        if message.topic == Topic.HEARTBEAT:
            return
        if message.topic in (Topic.END, Topic.ABORT):
            self._hear_goodbye(message)
        elif not self._seen.add(message.msg_id):
            self._answer_again(message)
        elif message.type is MessageType.REPLY:
            self._resolve(message)
        else:
            with self._calling:
                if self._ended:
                    return
                try:
                    self._on_message(message)
                except Exception as error:  # the caller's own: whoever asked is told
                    log.exception("%s from %s failed", message.topic, self._peer)
                    self.fail(message, error)

    def _resolve(self, reply: Message) -> None:
        with self._lock:
            item = self._waiting.get(reply.req_id)
        if item is None or item.answer is None:
            log.debug("nobody waits for the answer to %s", reply.req_id)
        elif reply.topic == Topic.ERROR:
            item.answer.fail(decode_failure(reply.body, self._peer))
        else:
            item.answer.set(reply)

    def _settle(self, item: Outgoing) -> None:
        """A request is answered, or given up."""
        with self._lock:
            self._waiting.pop(item.message.msg_id, None)
        self._sender.let_go(item)

    def _answer_again(self, duplicate: Message) -> None:
        with self._lock:
            reply = self._answers.get(duplicate.msg_id)
        if reply is not None:
            self._sender.submit(Outgoing(reply))

    # -- the end --

    def _hear_goodbye(self, message: Message) -> None:
        try:
            reason = decode(message.body, ())
        except DecodeError as error:
            log.debug("the reason of %s cannot be read: %s", message.topic, error)
            reason = ""
        reason = reason if isinstance(reason, str) else ""
        text = f"{self._peer} {'ended' if message.topic == Topic.END else 'aborted'}" + (reason and f": {reason}")
        self._end(lambda: Closed(text), message.topic, reason)

    def _gone(self, reason: str) -> None:
        self._end(lambda: NoRoute(self._peer, reason), Topic.PEER_GONE, reason)

    def _end(self, error: Callable[[], LinkError], topic: str = "", reason: str = "") -> None:
        """Nothing more goes out or comes in. The first end counts; each waiter gets an `error` of its own."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
        self._sender.end(error)
        with self._lock:
            waiting = list(self._waiting.values())
        for item in waiting:
            item.fail(error())
        if topic:
            with self._calling:
                if not self._stopped:
                    try:
                        self._on_status(topic, reason)
                    except Exception:  # the caller's own, on a thread that has nobody above it
                        log.exception("the status %s could not be told", topic)


def _check_topic(message: Message) -> None:
    if message.topic in _RESERVED:
        raise ConfigError("topic", message.topic, "any but those that belong to the handler")
