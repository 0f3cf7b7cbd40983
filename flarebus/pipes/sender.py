"""Sender: what sends for a handler. One message after the other, as often as needed, and heartbeats.

A send blocks until the peer has read the message, so a thread does that. Where a pipe can do without waiting, and
nothing else is on its way, whoever submits a message sends it, and the thread is woken only if that comes to nothing.
What is urgent overtakes what is queued, not what is on its way.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue

from flarebus.errors import ConfigError, DeadlineExceeded, FlarebusError, LinkError
from flarebus.pending import Pending
from flarebus.pipes.liveness import Liveness
from flarebus.pipes.message import Message, Topic
from flarebus.pipes.pipe import Pipe

__all__ = ["Outgoing", "Patience", "Sender"]

log = logging.getLogger(__name__)

# On top of the time to read a message, for the bytes that the pipe itself has to carry: even a slow disk is faster.
SLOWEST_BYTES_PER_S = 5_000_000


class Outgoing:
    """A message on its way out, and whoever waits for what becomes of it.

    Args:
        message: what to send.
        answer: of a request: set by the reply.
        limit: seconds in which it must be read, without a second try; None: as patient as the sender is.
    """

    __slots__ = ("_holds", "answer", "begun", "limit", "message", "read")

    def __init__(self, message: Message, *, answer: Pending[Message] | None = None, limit: float | None = None) -> None:
        self.message = message
        self.answer = answer
        self.limit = limit
        self.read: Pending[bool] = Pending()
        """Set once the peer has read it."""
        self.begun: Pending[bool] | None = None
        """What will become of a first try that nobody waits for."""
        # The sender lets go of it once; a request is also held until it is answered.
        self._holds = 1 if answer is None else 2

    @property
    def is_settled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.answer.is_done if self.answer is not None else self.read.is_done

    def fail(self, error: FlarebusError) -> None:
        """Tell whoever waits that nothing will come of it."""
        self.read.fail(error)
        if self.answer is not None:
            self.answer.fail(error)

    def let_go(self) -> bool:
        """One of those who hold it is done with it; True if that was the last. Calls must not overlap."""
        self._holds -= 1
        return self._holds == 0


class Patience:
    """How long a sender tries.

    Args:
        resend_interval: seconds between two tries.
        max_resends: tries after the first; None is without end.
        peer_read_timeout: seconds in which the peer must have read a message, at each try; None is without end.

    Raises:
        ConfigError: one of them is not as above.
    """

    def __init__(self, resend_interval: float, max_resends: int | None, peer_read_timeout: float | None) -> None:
        if resend_interval < 0:
            raise ConfigError("resend_interval", resend_interval, "seconds")
        if max_resends is not None and max_resends < 0:
            raise ConfigError("max_resends", max_resends, "a number of times, or None for without end")
        if peer_read_timeout is not None and peer_read_timeout <= 0:
            raise ConfigError("peer_read_timeout", peer_read_timeout, "seconds above 0, or None for without end")
        self.resend_interval = resend_interval
        self.tries = None if max_resends is None else max_resends + 1
        self._peer_read_timeout = peer_read_timeout

    def timeout(self, message: Message) -> float | None:
        """Seconds for one try at `message`."""
        if self._peer_read_timeout is None:
            return None
        carried = sum(memoryview(buffer).nbytes for buffer in message.buffers)
        return self._peer_read_timeout + carried / SLOWEST_BYTES_PER_S


class Sender:
    """Sends what is submitted, in order, until it is ended.

    Args:
        pipe: open.
        peer: what the other end is called in errors.
        liveness: told of everything that is sent; says when a heartbeat is due.
        patience: how long to try.
        clock: monotonic seconds.
        on_broken: called with the reason when the pipe breaks, on the sender's thread. It must call `end`.
    """

    def __init__(
        self,
        pipe: Pipe,
        *,
        peer: str,
        liveness: Liveness,
        patience: Patience,
        clock: Callable[[], float],
        on_broken: Callable[[str], None],
    ) -> None:
        self._pipe = pipe
        self._peer = peer
        self._liveness = liveness
        self._patience = patience
        self._clock = clock
        self._on_broken = on_broken
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Outgoing | None] = SimpleQueue()
        self._urgent: deque[Outgoing] = deque()
        self._current: Outgoing | None = None
        # Messages that were submitted and are not through: only one that is alone is sent by whoever submits it.
        self._pending = 0
        self._begun: Outgoing | None = None
        # Cuts the time between two tries short.
        self._nudge = threading.Event()
        self._ended: Callable[[], LinkError] | None = None
        self.thread = threading.Thread(target=self._run, name="flarebus-pipe-sender", daemon=True)

    def submit(self, item: Outgoing, urgent: bool = False) -> Outgoing:
        """Send a message, or queue it; after the end it fails at once."""
        with self._lock:
            ended = self._ended
            if ended is None:
                self._pending += 1
                if urgent:
                    self._urgent.append(item)
                    self._queue.put(None)
                elif self._pending > 1 or not self._begin(item):
                    self._queue.put(item)
        if ended is not None:
            item.fail(ended())
            self.let_go(item)
        elif urgent:
            self._nudge.set()
        elif item.begun is not None:
            item.begun.on_done(partial(self._came, item))
        return item

    def end(self, error: Callable[[], LinkError]) -> None:
        """Fail all that is queued or on its way, each with an `error` of its own, and send nothing more."""
        with self._lock:
            self._ended = error
        current = self._current
        if current is not None:
            # A send may hang until the pipe is closed; whoever waits for it need not.
            current.fail(error())
        begun = self._take_begun()
        if begun is not None:
            begun.fail(error())
            self.let_go(begun)
        self._drain()
        self._nudge.set()
        self._queue.put(None)

    def let_go(self, item: Outgoing) -> None:
        """Somebody who holds `item` is done with it; the last one lets the pipe forget it."""
        with self._lock:
            is_last = item.let_go()
        if is_last:
            try:
                self._pipe.release_send_cache(item.message)
            except Exception:  # a plug-in's own: it must not take down whichever thread came last
                log.exception("%s.release_send_cache failed", type(self._pipe).__name__)

    def _begin(self, item: Outgoing) -> bool:
        """Send a message without waiting, if the pipe can do that."""
        try:
            item.begun = self._pipe.begin(item.message, self._timeout(item))
        except Exception:  # the thread will meet it again, and tell
            return False
        if item.begun is None:
            return False
        self._liveness.sent(self._clock())
        self._begun = item
        return True

    def _came(self, item: Outgoing, outcome: Pending[bool]) -> None:
        """What became of a message that was begun; on the thread of whoever knows."""
        if outcome.error() is not None or not outcome.result():
            self._queue.put(None)
        elif self._take_begun(item) is not None:
            item.read.set(True)
            self._through(item)

    def _take_begun(self, expected: Outgoing | None = None) -> Outgoing | None:
        """The message that was begun, for one of those who may end it. None if one of them has, or if
        it is another one than `expected`."""
        with self._lock:
            item = self._begun
            if expected is not None and item is not expected:
                return None
            self._begun = None
        return item

    def _through(self, item: Outgoing) -> None:
        with self._lock:
            self._pending -= 1
        self.let_go(item)

    def _run(self) -> None:
        while self._ended is None:
            item = self._next()
            for each in (self._take_begun(), item):
                if each is not None:
                    try:
                        self._deliver(each)
                    except Exception:  # out of a callback of whoever waited
                        log.exception("what became of %s could not be told", each.message.topic)
            # Its buffers may go as soon as they are read.
            del item, each

    def _next(self) -> Outgoing | None:
        """What to send now; waits for it until a heartbeat is due."""
        try:
            return self._urgent.popleft()
        except IndexError:
            pass
        try:
            return self._queue.get(timeout=self._liveness.heartbeat_in(self._clock()))
        except Empty:
            with self._lock:
                self._pending += 1
            return Outgoing(Message(Topic.HEARTBEAT), limit=self._liveness.interval)

    def _deliver(self, item: Outgoing) -> None:
        """Send a message until it was read, or is not wanted any more, or all tries are used up."""
        previous, self._current = self._current, item
        try:
            self._send(item)
        except BrokenPipeError as error:
            self._on_broken(str(error) or "the pipe is broken")
        except DeadlineExceeded as error:
            item.fail(error)
        except (
            Exception
        ) as error:  # one message that cannot be sent is no reason to send no other; the sender hears why
            level = logging.DEBUG if item.message.topic == Topic.HEARTBEAT else logging.WARNING
            log.log(level, "%s.send of %s failed: %r", type(self._pipe).__name__, item.message.topic, error)
            item.fail(error if isinstance(error, FlarebusError) else _as_link_error(error))
        finally:
            self._current = previous
            ended = self._ended
            if ended is not None:
                item.fail(ended())
            self._through(item)

    def _send(self, item: Outgoing) -> None:
        message, tries = item.message, 0
        while self._ended is None and not item.is_settled:
            try:
                begun, item.begun = item.begun, None
                was_read = self._pipe.send(message, self._timeout(item)) if begun is None else begun.result()
            finally:
                self._liveness.sent(self._clock())
            if was_read:
                item.read.set(True)
                return
            tries += 1
            if item.limit is not None or tries == self._patience.tries or not self._pipe.can_resend():
                raise DeadlineExceeded(f"{self._peer} did not read {message.topic} in {tries} tries")
            self._nudge.wait(self._patience.resend_interval)
            self._nudge.clear()
            while self._urgent and self._ended is None:
                self._deliver(self._urgent.popleft())

    def _timeout(self, item: Outgoing) -> float | None:
        return item.limit or self._patience.timeout(item.message)

    def _drain(self) -> None:
        """Fail what was queued and will not be sent."""
        assert self._ended is not None
        while True:
            try:
                item = self._urgent.popleft() if self._urgent else self._queue.get_nowait()
            except Empty:
                return
            except IndexError:  # the thread was quicker, and will fail it
                continue
            if item is not None:
                item.fail(self._ended())
                self.let_go(item)


def _as_link_error(error: Exception) -> LinkError:
    wrapped = LinkError(f"could not be sent: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
