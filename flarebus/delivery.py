"""Delivery: a message that arrived, for whoever handles it. Lane: the thread that handles one channel, in order."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flarebus.codec import decode
from flarebus.message import Buffer, Kind, Message
from flarebus.pending import Pending
from flarebus.slab import SlabPool, unbundle

if TYPE_CHECKING:
    from flarebus.cell import Cell

__all__ = ["Delivery", "Handler", "Lane", "resolve"]

log = logging.getLogger(__name__)


class Delivery:
    """One message and what may be done with it. From any thread.

    Big buffers are not here until somebody pulls them: a handler that only looks at the message costs no memory.
    """

    __slots__ = ("_buffers", "_cell", "message")

    def __init__(self, cell: Cell, message: Message, buffers: Sequence[Buffer] | None = None) -> None:
        self.message = message
        self._cell = cell
        self._buffers: Pending[Sequence[Buffer]] | None = None
        if buffers is not None:  # they came along
            self._buffers = Pending()
            self._buffers.set(buffers)

    @property
    def source(self) -> str:
        """Address of the sender, as its connection was allowed to state it."""
        return self.message.source

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, here or still at their holder."""
        carried = self.message.manifest or self.message.bundle
        return 0 if carried is None else sum(carried.lengths)

    @property
    def is_here(self) -> bool:
        """Whether all buffers are here, and nobody's death can take them away."""
        if self._buffers is None:
            return self.message.manifest is None
        return self._buffers.is_done and self._buffers.error() is None

    def pull(self, pool: SlabPool | None = None, order: bool = False) -> Pending[Sequence[Buffer]]:
        """Have the buffers brought here, into slabs of `pool`; the same pending each time it is called.

        With `order` their holder is asked to send the next ones, if they are small, by itself: see `ahead`.

        Its errors: `SourceLost` when the holder dies or withdraws, `UsageError` when they are more than the cell takes.
        """
        if self._buffers is None:
            if self.message.manifest is not None:
                # The answer to a request tells its sender what DONE would.
                tell_done = self.message.kind is not Kind.REQUEST
                self._buffers = self._cell.pull(self.message.manifest, self.message.target, pool, tell_done, order)
            else:
                self._buffers = Pending()
                self._buffers.set(() if self.message.bundle is None else unbundle(self.message.bundle))
        return self._buffers

    def value(self, timeout: float | None = None) -> Any:
        """The decoded body, with its buffers pulled first if need be; arrays are writable and the caller's own.

        Raises:
            DecodeError: the body is not what the codec makes.
            SourceLost: the holder of the buffers is gone.
        """
        return decode(self.message.body, self.pull().result(timeout))

    def plain(self) -> Any:
        """The decoded body when no buffer belongs to it (they go with a shared payload in it); pulls nothing."""
        return decode(self.message.body, ())

    def reply(self, value: Any = None) -> None:
        """Answer a request; large arrays in `value` are offered until pulled. For an event this does nothing."""
        self._cell.reply(self.message, value)

    def fail(self, error: BaseException) -> None:
        """Answer a request with an error; only its kind and text travel."""
        self._cell.reply_failure(self.message, error)


def resolve(pending: Pending[Delivery], delivery: Delivery) -> None:
    """Have the buffers of `delivery` brought here and give it to `pending` then, or the error that kept them away."""

    def pulled(buffers: Pending[Sequence[Buffer]]) -> None:
        error = buffers.error()
        pending.set(delivery) if error is None else pending.fail(error)

    delivery.pull().on_done(pulled)


Handler = Callable[[Delivery], Any]


class Lane:
    """The thread of one channel: deliveries in the order in which they came, one at a time.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[tuple[Handler, Delivery] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, handler: Handler, delivery: Delivery) -> None:
        """Handle `delivery` after all that came before it."""
        self._queue.put((handler, delivery))

    def __len__(self) -> int:
        return self._queue.qsize()

    def close(self) -> None:
        """Let the thread end after what is queued; does not wait for it, for handlers may do as they like."""
        self._queue.put(None)

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            handler, delivery = entry
            try:
                # Pulled before it is handled, so that a big message keeps its place among small ones.
                if not delivery.is_here:
                    delivery.pull().result()
                delivery.reply(handler(delivery))
            except BaseException as error:  # the asker gets it, whatever a handler raises, and the thread goes on
                log.debug("%s/%s: handler failed", delivery.message.channel, delivery.message.topic, exc_info=True)
                delivery.fail(error)
            # Arrays in it may be large; the next message can be hours away.
            del entry, handler, delivery
