"""SiteCall: a task for a site's executor or controller, and its answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from flarebus.cell import Cell, Payload
from flarebus.codec import encode
from flarebus.delivery import Delivery
from flarebus.errors import FilterFailed, FlarebusError, UsageError
from flarebus.model import FLModel
from flarebus.pending import Pending
from flarebus.site.ticket import Kept, Ticket
from flarebus.slab import SlabPool
from flarebus.workflow.filter import FilterChain, FilterTask

__all__ = ["SiteCall"]

log = logging.getLogger(__name__)


class SiteCall:
    """One task. Its arrays are here.

    Args:
        cell: the host's.
        site: whose it is.
        ticket: where the answer goes.
        fields: name, round and rounds of the task, and the encoded model.
        model: what came with it, the call's own.
        pool: memory for answers that are kept.
        filters: what the model goes through before it is seen, and the answer before it leaves.
    """

    def __init__(
        self,
        cell: Cell,
        site: str,
        ticket: Ticket,
        fields: Mapping[str, Any],
        model: FLModel,
        pool: SlabPool,
        filters: tuple[FilterChain, FilterChain],
    ) -> None:
        self.name: str = fields["task"]
        self.round: int = fields["round"]
        self.total_rounds: int | None = fields["total_rounds"]
        self.source = ticket.owner
        self.model = model
        self._cell = cell
        self._site = site
        self._ticket = ticket
        self._pool = pool
        self._input_filter, self._output_filter = (chain.for_task(self.name) for chain in filters)
        self._filter_task = FilterTask(self.name, self.round, site)
        self._is_answered = False

    @property
    def key(self) -> tuple[str, int]:
        """What tells its task from all others."""
        return self._ticket.key

    def open(self) -> bool:
        """Let the model go through the filters; False if one refuses it, which is the answer then."""
        try:
            self.model = self._input_filter.apply(self.model, self._filter_task)
        except FilterFailed as error:
            self.fail(str(error))
        return not self._is_answered

    def answer(self, model: FLModel | None = None) -> None:
        """Answer; see `Call.answer`."""
        if self._is_answered:
            raise UsageError(f"the task {self.name} was answered before")
        try:
            payload = self._payload(self._output_filter.apply(model or FLModel(), self._filter_task))
        except FilterFailed as error:
            self.fail(str(error))
            return
        self._is_answered = True
        ticket = self._ticket

        def settled(sent: Pending[Delivery]) -> None:
            self._cell.withdraw(payload, wait=False)
            if sent.error() is not None:
                log.warning("%s: its answer to %s was not delivered: %s", self._site, self.name, sent.error())

        fields = ticket.result(self._site, payload.body)
        self._cell.request(ticket.target, "task", "result", fields, payload=payload).on_done(settled)

    def _payload(self, model: FLModel) -> Payload:
        readers = self._ticket.readers
        if not readers:
            return self._cell.share(model, (self._ticket.target,))
        # It may be fetched long after this, so it gets memory of its own.
        kept = Kept((self.name, self.round), *encode(model), self._pool)
        return self._cell.share_encoded(kept.body, kept.buffers, readers)

    def fail(self, reason: str) -> None:
        """Say why there is no answer; see `Call.fail`."""
        if self._is_answered:
            return
        self._is_answered = True
        try:
            self._cell.request(self._ticket.target, "task", "result", self._ticket.result(self._site, b"", reason))
        except FlarebusError as error:
            log.warning("%s: its failure of %s was not reported: %s", self._site, self.name, error)
