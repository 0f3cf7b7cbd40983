"""Upstream: what a client job says about the tasks of one site to whoever gave them, and what it offers on the bus."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from flarebus.cell import Cell, Payload
from flarebus.delivery import Delivery
from flarebus.errors import FlarebusError
from flarebus.message import Buffer
from flarebus.pending import Pending
from flarebus.site.work import Work

__all__ = ["Upstream"]


class Upstream:
    """The way from one site to whoever steers. Any thread may call.

    Args:
        cell: the host's.
        job_id: the job.
        site: its name.
    """

    def __init__(self, cell: Cell, job_id: str, site: str) -> None:
        self._cell = cell
        self._site = site
        self._trainers = f"{site}.{job_id}"

    def send_result(
        self, work: Work, body: bytes, payload: Payload, settled: Callable[[Pending[Delivery]], None]
    ) -> None:
        """Send a result; `settled` is called with the answer, on the bus thread. What was shared for it is offered
        until then."""
        target, fields = work.ticket.target, work.ticket.result(self._site, body)
        own = payload.manifest is not None and payload.manifest.holder == str(self._cell.address)
        if own:
            self._cell.send_ahead(payload, target)
        sent = self._cell.request(target, "task", "result", fields, payload=payload)

        def done(answer: Pending[Delivery]) -> None:
            if own:
                self._cell.withdraw(payload, wait=False)
            settled(answer)

        sent.on_done(done)

    def send_failure(self, work: Work, reason: str) -> None:
        """Say why there will be no result."""
        with contextlib.suppress(FlarebusError):  # the host has ended: nobody asks any more
            fields = work.ticket.result(self._site, b"", reason)
            self._cell.request(work.ticket.target, "task", "result", fields)

    def share_result(self, work: Work, buffers: Sequence[Buffer]) -> Payload:
        """Arrays of a result that are here, to be fetched."""
        return self._cell.share_encoded(b"", buffers, work.ticket.readers or (work.ticket.target,))

    def offer_task(self, work: Work, buffers: Sequence[Buffer]) -> Payload:
        """Arrays of a task that are here, for the site's trainers to fetch until `withdraw_task`; once for a task."""
        if work.offer is None:
            work.offer = self._cell.share_encoded(b"", buffers, (self._trainers,))
        return work.offer

    def withdraw_task(self, work: Work) -> None:
        """The task is closed."""
        if work.offer is not None:
            self._cell.withdraw(work.offer, wait=False)
