"""One script's dealings with its engine: which task it holds, what it received, whether it has answered.

Shared by all contexts (ranks) of a script and safe to use from all its threads. While it waits, the script is *away*:
the host may let another site's script run. Everything that may be freed is freed before the script comes back, because
coming back may itself be a wait.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

from flarebus.client.settings import ClientSettings
from flarebus.errors import ClientApiError, EncodeError, FlarebusError
from flarebus.job.kinds import ExchangeFormat, TransferType
from flarebus.model import FLModel, MetaKey, ParamsType

if TYPE_CHECKING:
    from flarebus.client.engine import Assignment, Seat

__all__ = ["Session"]

_log = logging.getLogger("flarebus.client")

T = TypeVar("T")


class Session:
    """The state behind the Client API of one script.

    A task is *open* from the moment it came until it is answered or dropped. `receive` gives the same model as long as
    the task is open; `send` answers it, once.
    """

    def __init__(self, seat: Seat) -> None:
        self.settings = ClientSettings.read(seat.engine.config)
        self.n_received = 0
        self.n_answered = 0
        self.metrics: dict[str, Any] | None = None
        """Metrics of the received model that wait for the next train result."""
        self._engine = seat.engine
        self._away = seat.away
        self._fetching = threading.Lock()  # one thread waits for the task, the others for that thread
        self._lock = threading.RLock()
        self._open: Assignment | None = None
        self._task_name: str | None = None
        self._received: FLModel | None = None
        self._base: dict[Any, Any] | None = None
        self._sending = False
        self._answered_last = False
        self._end_told = False

    @property
    def open_task(self) -> str | None:
        """The id of the task that was fetched and not yet answered, or None."""
        task = self._open
        return None if task is None else task.task_id

    @property
    def task_name(self) -> str:
        """The name of the open task, or of the last one.

        Raises:
            ClientApiError: no task came yet.
        """
        if self._task_name is None:
            raise ClientApiError("there was no task yet; call flare.is_running() or flare.receive() first")
        return self._task_name

    def wait_task(self, timeout: float | None) -> Assignment | None:
        """Return the open task, or wait for the next one; None on timeout and at the end of the job."""
        task = self._open
        if task is not None and not self._sending:
            return task
        # A thread that comes while another one sends waits for the task after.
        deadline = None if timeout is None else time.monotonic() + timeout
        while (task := self._wait_away(deadline)) is not None:
            if self._engine.still_wanted(task):
                return task
            with self._lock:
                if self._open is task:
                    self._open = None
        self._tell_end()
        return None

    def _wait_away(self, deadline: float | None) -> Assignment | None:
        def left() -> float | None:
            return None if deadline is None else max(0.0, deadline - time.monotonic())

        with self._away():
            if not self._fetching.acquire(timeout=-1 if deadline is None else left() or 0.0):
                return None
            try:
                return self._open or self._fetch(left())
            finally:
                self._fetching.release()

    def _fetch(self, timeout: float | None) -> Assignment | None:
        task = self._engine.next_task(timeout)
        if task is not None:
            with self._lock:
                self._open = task
                self._task_name = task.task_name
                self._received = self._base = None
                self._answered_last = False
                self.n_received += 1
        return task

    def _tell_end(self) -> None:
        reason = self._engine.ended
        if reason is not None and not self._end_told:
            self._end_told = True
            _log.info("%s: no more tasks: %s", self._engine.site_name, reason)

    def is_running(self) -> bool:
        """Wait for a task; False once the job has ended, also for a script that left its last task unanswered.

        A follower that received the open task asks for the one after: whether rank 0 has answered it is not its to say.
        """
        if self._engine.is_follower and self._received is not None:
            self.let_go()
        running = self.wait_task(None) is not None and self._engine.ended is None
        if not running:
            self._tell_end()
        return running

    def receive(self, timeout: float | None) -> FLModel | None:
        """Return the model of the open or next task; None on timeout and at the end of the job."""
        task = self.wait_task(timeout)
        if task is None:
            return None
        with self._lock:
            if self._open is task and self._received is None:
                try:
                    self._received = self._take(task)
                except BaseException:
                    self._open = None  # `take` works once: this task is lost, the next one is not
                    raise
            return self._received

    def _take(self, task: Assignment) -> FLModel:
        model = task.take()
        settings = self.settings
        if settings.exchange_format is ExchangeFormat.PYTORCH:
            from flarebus.client.convert import to_tensors

            model.params = to_tensors(model.params, ("params",))
            model.optimizer_params = to_tensors(model.optimizer_params, ("optimizer_params",))
        if settings.transfer_type is TransferType.DIFF and task.task_name == settings.train_task and model.params:
            from flarebus.client.convert import private_copy

            # The script may train in the very memory it received; the price of a right answer is one model.
            self._base = private_copy(model.params)
        if model.current_round is None:
            model.current_round = task.round
        if model.total_rounds is None:
            model.total_rounds = task.total_rounds
        model.meta.update({MetaKey.JOB_ID: self._engine.job_id, MetaKey.SITE_NAME: self._engine.site_name})
        for key, number in ((MetaKey.CURRENT_ROUND, task.round), (MetaKey.TOTAL_ROUNDS, task.total_rounds)):
            if number is not None:
                model.meta[key] = number
        return model

    def send(self, model: FLModel, clear_cache: bool) -> None:
        """Answer the open task with `model`; see `flarebus.client.send`."""
        task, result = self._begin_send(model)
        try:
            # Away only if there is something to wait for: a turn that is given up comes back after everybody else's.
            with ExitStack() as away, self._fetching:
                wait = self._deliver(task, result)
                if wait is not None:
                    away.enter_context(self._away())
                    self._unless_ended(wait)
                del wait, result
                self._end_send(model, clear_cache)
        finally:
            self._sending = False
        every = self.settings.memory_gc_rounds
        if every and self.n_answered % every == 0:
            from flarebus.client.memory import release_memory

            release_memory(self.settings.cuda_empty_cache)

    def let_go(self) -> None:
        """A follower is done with the open task."""
        with self._lock:
            self._open = self._received = self._base = self.metrics = None

    def _deliver(self, task: Assignment, result: FLModel) -> Callable[[], None] | None:
        if self._engine.ended is None:
            return self._unless_ended(lambda: self._engine.answer(task, result))
        self._tell_dropped()
        return None

    def _unless_ended(self, step: Callable[[], T]) -> T | None:
        """Do a step of answering. It may fail once the job has ended: the script then goes on to `is_running`, which is
        False."""
        try:
            return step()
        except FlarebusError:
            if self._engine.ended is None:
                raise
        self._tell_dropped()
        return None

    def _tell_dropped(self) -> None:
        _log.warning("%s: the job has ended (%s); a result was dropped", self._engine.site_name, self._engine.ended)

    def _begin_send(self, model: FLModel) -> tuple[Assignment, FLModel]:
        if not isinstance(model, FLModel):
            raise EncodeError(
                "model", f"{type(model).__name__} is not an FLModel", "wrap it: flare.FLModel(params=...)"
            )
        with self._lock:
            task = self._open
            if self._sending or self._answered_last:
                raise ClientApiError("this task is answered already: one flare.send() for each flare.receive()")
            if task is None or self._received is None:
                raise ClientApiError("flare.send() needs a flare.receive() before it that returned a model")
            metrics = self._metrics_for(task, model)
            if model.params is None and metrics is None:
                raise ClientApiError("the model to send has neither params nor metrics; give it one of them")
            result = self._result(task, model, metrics)
            self._sending = True
            return task, result

    def _metrics_for(self, task: Assignment, model: FLModel) -> dict[str, Any] | None:
        if self.metrics is None or task.task_name != self.settings.train_task:
            return model.metrics
        return {**self.metrics, **(model.metrics or {})}

    def _result(self, task: Assignment, model: FLModel, metrics: dict[str, Any] | None) -> FLModel:
        """Build what goes out as an object of its own: the script's is never rewritten."""
        from flarebus.client.convert import plain_scalar

        optimizer_params = self._on_wire(model.optimizer_params, "optimizer_params")
        params, kind = self._outgoing(task, model)
        return FLModel(
            params_type=kind,
            params=params,
            optimizer_params=optimizer_params,
            metrics=None if metrics is None else {key: plain_scalar(value) for key, value in metrics.items()},
            start_round=model.start_round,
            current_round=task.round if model.current_round is None else model.current_round,
            total_rounds=task.total_rounds if model.total_rounds is None else model.total_rounds,
            meta={key: plain_scalar(value) for key, value in model.meta.items()},
        )

    def _outgoing(self, task: Assignment, model: FLModel) -> tuple[dict[Any, Any] | None, ParamsType | None]:
        params, settings = model.params, self.settings
        if params is None:
            return None, None
        kind = ParamsType(model.params_type or ParamsType.FULL)
        subtract = settings.transfer_type is TransferType.DIFF and task.task_name == settings.train_task
        if subtract and kind is ParamsType.FULL:
            from flarebus.client.convert import difference

            if self._base is None:
                raise ClientApiError(
                    "transfer type DIFF: there is no received model left to subtract "
                    "(none came with this task, or a send before this one failed on its way)"
                )
            params, kind = difference(params, self._base), ParamsType.DIFF
            self._base = None  # its memory is the difference now
        return self._on_wire(params, "params"), kind

    def _on_wire(self, value: dict[Any, Any] | None, name: str) -> Any:
        settings = self.settings
        if (
            settings.server_expected_format is not ExchangeFormat.NUMPY
            or settings.exchange_format is ExchangeFormat.RAW
        ):
            return value
        from flarebus.client.convert import to_arrays

        return to_arrays(value, (name,))

    def _end_send(self, model: FLModel, clear_cache: bool) -> None:
        with self._lock:
            received, self._received, self._open, self._base = self._received, None, None, None
            self.metrics = None
            self._answered_last = True
            self.n_answered += 1
        if clear_cache:
            for held in (model, received):
                if held is not None:
                    held.params = held.optimizer_params = None

    def clear(self) -> None:
        """Drop the open task and what was received with it."""
        with self._lock:
            if self._received is not None:
                self._received.params = self._received.optimizer_params = None
            self._open = self._received = self._base = self.metrics = None
            self._answered_last = False
