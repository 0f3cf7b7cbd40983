"""An engine in memory: the test gives tasks, the script's answers come out. Every wait is bounded."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from typing import Any

from flarebus.client.engine import Assignment
from flarebus.errors import FlarebusError
from flarebus.metric import AnalyticsDataType
from flarebus.model import FLModel

LIMIT_S = 30.0


class FakeEngine:
    """Implements `flarebus.client.engine.Engine`."""

    def __init__(self, site_name: str = "site-1", config: Mapping[str, Any] | None = None) -> None:
        self.job_id = "job-7"
        self.site_name = site_name
        self.config: Mapping[str, Any] = {} if config is None else config
        self.ended: str | None = None
        self.is_follower = False
        self.tasks: queue.SimpleQueue[Assignment | None] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[tuple[Assignment, FLModel]] = queue.SimpleQueue()
        self.logged: list[tuple[str, Any, AnalyticsDataType, dict[str, Any]]] = []
        self.refusal: FlarebusError | None = None
        self.wait: Callable[[], None] | None = None
        """What there is to wait for after an answer."""
        self.cancelled: set[str] = set()
        """Ids of tasks that are not wanted any more."""
        self.waiting: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        """One entry for each call of `next_task` that found nothing at hand."""
        self._n_given = 0

    def give(
        self,
        model: FLModel | Callable[[], FLModel],
        name: str = "train",
        round: int | None = 0,
        total: int | None = None,
    ) -> str:
        """Put a task in; its id is returned."""
        self._n_given += 1
        task_id = f"{self.site_name}/task-{self._n_given}"
        take = model if callable(model) else lambda: model
        self.tasks.put(Assignment(task_id, name, round, total, take))
        return task_id

    def end(self, reason: str = "completed") -> None:
        """End the job; whoever waits for a task returns."""
        self.ended = reason
        self.tasks.put(None)

    def next_answer(self) -> FLModel:
        """The next answer, whose task is not of interest."""
        return self.answers.get(timeout=LIMIT_S)[1]

    # --- Engine

    def next_task(self, timeout: float | None) -> Assignment | None:
        if self.ended is not None:
            return None
        if self.tasks.empty():
            self.waiting.put(timeout)
        try:
            return self.tasks.get(timeout=LIMIT_S if timeout is None else timeout)
        except queue.Empty:
            return None

    def still_wanted(self, assignment: Assignment) -> bool:
        return assignment.task_id not in self.cancelled

    def answer(self, assignment: Assignment, result: FLModel) -> Callable[[], None] | None:
        if self.refusal is not None:
            raise self.refusal
        self.answers.put((assignment, result))
        return self.wait

    def log(self, key: str, value: Any, data_type: AnalyticsDataType, fields: dict[str, Any]) -> None:
        self.logged.append((key, value, data_type, fields))
