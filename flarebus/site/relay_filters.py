"""RelayFilters: the filters of a site on the models that a client job passes on, with and without looking at values."""

from __future__ import annotations

from collections.abc import Sequence

from flarebus.codec import encode
from flarebus.message import Buffer
from flarebus.site.work import Work, model_of
from flarebus.workflow.filter import FilterChain, FilterTask

__all__ = ["RelayFilters"]


class RelayFilters:
    """What tasks and results of one site go through on their way.

    Args:
        site: its name.
        on_tasks: for what its trainer gets.
        on_results: for what its trainer answers.
    """

    def __init__(self, site: str, on_tasks: FilterChain, on_results: FilterChain) -> None:
        self._site = site
        self._on_tasks = on_tasks
        self._on_results = on_results

    def task_body(self, work: Work) -> bytes | None:
        """The encoded model of a task; None if a filter has to see values, and none has run yet.

        Raises:
            FilterFailed: a filter raised; for all methods here.
        """
        return self._without_values(self._on_tasks, work, work.body)

    def result_body(self, work: Work, body: bytes) -> bytes | None:
        """Like `task_body`, for an encoded result."""
        return self._without_values(self._on_results, work, body)

    def filter_task(self, work: Work, buffers: Sequence[Buffer]) -> tuple[bytes, Sequence[Buffer]]:
        """Body and buffers of a task whose filters see values. They see it once: every rank and life gets the same.

        Args:
            buffers: of the model as it came; copied, for other sites of the host read them as well.
        """
        if work.filtered is None:
            chain = self._on_tasks.for_task(work.fields["name"])
            work.filtered = encode(chain.apply(model_of(work.body, buffers, copy=True), self._task(work)))
        return work.filtered

    def filter_result(self, work: Work, body: bytes, buffers: Sequence[Buffer]) -> tuple[bytes, Sequence[Buffer]]:
        """Body and buffers of a result whose filters see values; `buffers` belong to it from here on."""
        chain = self._on_results.for_task(work.fields["name"])
        return encode(chain.apply(model_of(body, buffers, copy=False), self._task(work)))

    def _without_values(self, filters: FilterChain, work: Work, body: bytes) -> bytes | None:
        chain = filters.for_task(work.fields["name"])
        return chain.apply_to_body(body, self._task(work)) if chain else body

    def _task(self, work: Work) -> FilterTask:
        return FilterTask(work.fields["name"], work.fields["round"], self._site)
