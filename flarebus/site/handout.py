"""HandOut: gives a task to the ranks of a trainer; its arrays stay where they are unless somebody wants to see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from flarebus.client.ex_process.words import TASK, pack
from flarebus.errors import FlarebusError
from flarebus.message import Buffer
from flarebus.pending import Pending
from flarebus.pipes import Message
from flarebus.site.relay_filters import RelayFilters
from flarebus.site.trainer import Trainer
from flarebus.site.upstream import Upstream
from flarebus.site.work import Work, real_error
from flarebus.slab import unbundle

__all__ = ["HandOut", "HandOutOwner"]


class HandOutOwner(Protocol):
    """Whose trainer it is; on its own thread."""

    def is_open(self, life: Trainer, work: Work) -> bool:
        """Whether `work` is still to be done by `life`."""

    def fail(self, reason: str) -> None:
        """The open task cannot be done."""

    def note(self, level: str, text: str) -> None:
        """Write a line into the site's log."""


class HandOut:
    """The way of tasks from a client job to its trainer. On the owner's thread.

    Args:
        owner: told of failures.
        post: has something done on the owner's thread; from any thread.
        filters: on tasks.
        upstream: offers arrays that are here.
    """

    def __init__(
        self,
        owner: HandOutOwner,
        post: Callable[[Callable[[], None]], None],
        filters: RelayFilters,
        upstream: Upstream,
    ) -> None:
        self._owner = owner
        self._post = post
        self._filters = filters
        self._upstream = upstream

    def give(self, life: Trainer, work: Work, ranks: Sequence[int]) -> None:
        """Give the task to those of `ranks` that have not got it."""
        ranks = [rank for rank in ranks if rank not in work.given]
        work.given.update(ranks)
        if not ranks:
            return
        if work.filtered is not None:
            self._give_own(life, work, ranks, *work.filtered)
            return
        manifest = work.delivery.message.manifest
        body = self._filters.task_body(work)
        if body is not None and (life.passes_manifests or manifest is None):
            bundle = work.delivery.message.bundle
            self._send(life, work, ranks, body, () if bundle is None else unbundle(bundle), manifest)
            return
        if body is None and manifest is not None:
            self._owner.note("INFO", "a filter looks at the model: it is fetched here first")

        def pulled(arrived: Pending[Sequence[Buffer]]) -> None:
            self._post(lambda: self._pulled(life, work, ranks, body, arrived))

        work.delivery.pull(order=True).on_done(pulled)

    def _pulled(
        self,
        life: Trainer,
        work: Work,
        ranks: Sequence[int],
        body: bytes | None,
        arrived: Pending[Sequence[Buffer]],
    ) -> None:
        if not self._owner.is_open(life, work):
            return
        try:
            buffers = arrived.result()
            if body is None:
                body, buffers = self._filters.filter_task(work, buffers)
        except (FlarebusError, MemoryError, OSError) as error:
            self._owner.fail(f"could not take the task: {error}")
            return
        self._give_own(life, work, ranks, body, buffers)

    def _give_own(
        self, life: Trainer, work: Work, ranks: Sequence[int], body: bytes, buffers: Sequence[Buffer]
    ) -> None:
        """Give the task with arrays that are here. A trainer that fetches arrays does so after it has the message, so
        they stay on offer until the task is closed."""
        if not life.passes_manifests:
            self._send(life, work, ranks, body, buffers, None)
            return
        offer = self._upstream.offer_task(work, buffers)
        self._send(life, work, ranks, body, () if offer.bundle is None else unbundle(offer.bundle), offer.manifest)

    def _send(
        self, life: Trainer, work: Work, ranks: Sequence[int], body: bytes, buffers: Sequence[Buffer], manifest: Any
    ) -> None:
        readers = list(work.ticket.readers) or [work.ticket.target]
        fields = pack(number=work.number, model=body, readers=readers, **work.fields)

        def done(sent: Pending[bool]) -> None:
            error = real_error(sent)
            if error is not None:
                self._post(lambda: self._not_given(life, work, error))

        for rank in ranks:
            life.send(rank, Message(TASK, fields, buffers, manifest=manifest)).on_done(done)

    def _not_given(self, life: Trainer, work: Work, error: BaseException) -> None:
        if self._owner.is_open(life, work):
            self._owner.fail(f"the task could not be handed to its trainer: {error}")
