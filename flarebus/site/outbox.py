"""ResultOutbox: small results of the sites of one host on their way to the server, several in a message.

A result that fits into a message costs the bus more than its bytes do. So while one message with results is on its way,
those that come up wait for the next one: a single site waits for nothing, and a thousand sites share their messages.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from flarebus.cell import Cell, Payload
from flarebus.delivery import Delivery
from flarebus.errors import FlarebusError
from flarebus.message import Bundle
from flarebus.pending import Pending
from flarebus.site.ticket import Ticket
from flarebus.wire import MAX_CARRIED_BYTES, MAX_INLINE_BYTES

__all__ = ["Credit", "ResultOutbox"]

# Bodies of one message together, and of one result: with room to spare in what a message may hold.
MOST_BODY_BYTES = 256 * 1024
# Buffers and results of one message: header and decoding stay small.
MOST_BUFFERS, MOST_RESULTS = 4096, 256


class _Result(NamedTuple):
    site: str
    number: int
    payload: Payload
    note: Callable[[str], None]


class Credit:
    """Bytes of bigger results that the server takes along with their messages before it has answered them.

    Any thread may call. Without credit a result is announced, and pulled when there is room for it.
    """

    def __init__(self) -> None:
        self._granted = self._taken = 0
        self._lock = threading.Lock()

    def grant(self, nbytes: int) -> None:
        """The server grants so much in all, from now on."""
        self._granted = nbytes

    def take(self, nbytes: int) -> bool:
        """Take credit for a result; False if it is too big to go with a message, or so much is not left."""
        with self._lock:
            if nbytes > MAX_CARRIED_BYTES or self._taken + nbytes > self._granted:
                return False
            self._taken += nbytes
            return True

    def give_back(self, nbytes: int) -> None:
        """It was answered."""
        with self._lock:
            self._taken -= nbytes


class ResultOutbox:
    """The outbox of one host. Any thread may call.

    Args:
        cell: the host's.
        server: address of the server job.
    """

    def __init__(self, cell: Cell, server: str) -> None:
        self.credit = Credit()
        """For results that this does not take."""
        self._cell = cell
        self._server = server
        self._waiting: deque[_Result] = deque()
        self._is_sending = False
        self._lock = threading.Lock()

    def takes(self, payload: Payload, ticket: Ticket) -> bool:
        """Whether a result is for the server, and small enough."""
        is_small = payload.manifest is None and len(payload.body) <= MOST_BODY_BYTES
        return is_small and ticket.target == self._server

    def put(self, site: str, number: int, payload: Payload, note: Callable[[str], None]) -> None:
        """Take the result of `site` for task `number`; returns at once.

        Args:
            note: told if it could not be delivered.
        """
        with self._lock:
            self._waiting.append(_Result(site, number, payload, note))
            if self._is_sending:
                return
            self._is_sending = True
        self._send_next()

    def _send_next(self) -> None:
        """Send what waits, as far as one message takes it; its answer brings us here again."""
        while batch := self._take_batch():
            try:
                sent = self._request(batch)
            except FlarebusError as error:  # this end was closed
                _note(batch, error)
                continue
            sent.on_done(partial(self._sent, batch))
            return

    def _take_batch(self) -> list[_Result]:
        batch: list[_Result] = []
        body = data = buffers = 0
        with self._lock:
            while self._waiting and len(batch) < MOST_RESULTS:
                payload = self._waiting[0].payload
                body += len(payload.body)
                if payload.bundle is not None:
                    data += len(payload.bundle.data)
                    buffers += len(payload.bundle.lengths)
                if batch and (body > MOST_BODY_BYTES or data > MAX_INLINE_BYTES or buffers > MOST_BUFFERS):
                    break
                batch.append(self._waiting.popleft())
            self._is_sending = bool(batch)
        return batch

    def _request(self, batch: list[_Result]) -> Pending[Delivery]:
        entries = [
            {
                "site": each.site,
                "number": each.number,
                "model": each.payload.body,
                "buffers": 0 if each.payload.bundle is None else len(each.payload.bundle.lengths),
            }
            for each in batch
        ]
        bundles = [each.payload.bundle for each in batch if each.payload.bundle is not None]
        bundle = None
        if bundles:
            # Each is padded to the alignment, so one after the other they are one.
            lengths = tuple(length for bundle in bundles for length in bundle.lengths)
            bundle = Bundle(lengths, b"".join([bundle.data for bundle in bundles]))
        return self._cell.request(
            self._server, "task", "results", {"results": entries}, payload=Payload(b"", bundle, None)
        )

    def _sent(self, batch: list[_Result], done: Pending[Delivery]) -> None:
        error = done.error()
        if error is not None:
            _note(batch, error)
        self._send_next()


def _note(batch: list[_Result], error: BaseException) -> None:
    for each in batch:
        each.note(f"result not delivered: {error}")
