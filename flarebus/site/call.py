"""SiteCall: a task for a site's executor or controller, and its answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from flarebus.cell import Cell
from flarebus.codec import encode
from flarebus.delivery import Delivery
from flarebus.errors import FlarebusError
from flarebus.message import Buffer
from flarebus.model import FLModel
from flarebus.pending import Pending
from flarebus.site.ticket import Kept, Ticket
from flarebus.site.work import model_of
from flarebus.slab import SlabPool

__all__ = ["SiteCall"]

log = logging.getLogger(__name__)


class SiteCall:
    """One task. Its arrays are here.

    Args:
        cell: the host's.
        site: whose it is.
        ticket: where the answer goes.
        fields: name, round and rounds of the task, and the encoded model.
        buffers: of the model; shared with other sites of the host.
        pool: memory for answers that are kept.

    Raises:
        FlarebusError: there is no model in it.
    """

    def __init__(
        self,
        cell: Cell,
        site: str,
        ticket: Ticket,
        fields: Mapping[str, Any],
        buffers: Sequence[Buffer],
        pool: SlabPool,
    ) -> None:
        self.name: str = fields["task"]
        self.round: int = fields["round"]
        self.total_rounds: int | None = fields["total_rounds"]
        self.source = ticket.owner
        self.model = model_of(fields["model"], buffers, copy=True)
        self._cell = cell
        self._site = site
        self._ticket = ticket
        self._pool = pool
        self._is_answered = False

    def answer(self, model: FLModel | None = None) -> None:
        """Answer; see `Call.answer`."""
        self._is_answered = True
        ticket = self._ticket
        if ticket.readers:
            # It may be fetched long after this, so it gets memory of its own.
            kept = Kept((self.name, self.round), *encode(model or FLModel()), self._pool)
            payload = self._cell.share_encoded(kept.body, kept.buffers, ticket.readers)
        else:
            payload = self._cell.share(model or FLModel(), (ticket.target,))

        def settled(sent: Pending[Delivery]) -> None:
            self._cell.withdraw(payload, wait=False)
            if sent.error() is not None:
                log.warning("%s: its answer to %s was not delivered: %s", self._site, self.name, sent.error())

        fields = ticket.result(self._site, payload.body)
        self._cell.request(ticket.target, "task", "result", fields, payload=payload).on_done(settled)

    def fail(self, reason: str) -> None:
        """Say why there is no answer; see `Call.fail`."""
        if self._is_answered:
            return
        self._is_answered = True
        try:
            self._cell.request(self._ticket.target, "task", "result", self._ticket.result(self._site, b"", reason))
        except FlarebusError as error:
            log.warning("%s: its failure of %s was not reported: %s", self._site, self.name, error)
