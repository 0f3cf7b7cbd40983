"""The calls of a training script: `init`, `receive`, `send` and what goes with them.

    import flarebus.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        ...
        flare.send(flare.FLModel(params=trained, metrics={"accuracy": accuracy}))

One rule for every end: when the job is complete or aborted `is_running()` is False and `receive()` is None; the reason
is logged and stays readable as `APIContext.end_reason`. Calls in a wrong order raise `ClientApiError`, a RuntimeError.
Any thread of the script may call. A thread that the script started itself is recognised while it runs a function of the
script; one that runs only library code should be given the context: `flare.log(..., ctx=context)`.

Every call but `init` takes ``ctx``: the context to use; without it, the first one that the script made.
"""

from __future__ import annotations

import copy
import logging
import os
from types import TracebackType
from typing import Any

from flarebus.client.engine import Seat, seat_of_caller
from flarebus.client.record import hand_over
from flarebus.client.session import Session
from flarebus.client.settings import ENV_API_TYPE, ENV_CLIENT_CONFIG, EX_PROCESS_API
from flarebus.errors import ClientApiError, ConfigError
from flarebus.metric import AnalyticsDataType
from flarebus.model import FLModel, MetaKey

__all__ = [
    "APIContext",
    "clear",
    "context_of",
    "get_config",
    "get_job_id",
    "get_site_name",
    "get_task_name",
    "init",
    "is_evaluate",
    "is_running",
    "is_submit_model",
    "is_train",
    "log",
    "receive",
    "send",
    "shutdown",
    "system_info",
]

_log = logging.getLogger("flarebus.client")

DEFAULT_CONFIG_FILE = "config/client_api_config.json"


class APIContext:
    """What `init` returns: one rank's view of the script's session. Made by `init` only.

    As a context manager it calls `shutdown` when it is left.
    """

    def __init__(self, seat: Seat, session: Session, rank: str, config_file: str | None) -> None:
        self.rank = rank
        self.config_file = config_file
        self.closed = False
        self.session = session
        self._seat = seat

    @property
    def end_reason(self) -> str | None:
        """Why there are no more tasks, or None while the job runs."""
        return self._seat.engine.ended

    @property
    def seat(self) -> Seat:
        """The script that this context belongs to."""
        return self._seat

    def __enter__(self) -> APIContext:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutdown(ctx=self)


def init(rank: str | int | None = None, config_file: str | None = None) -> APIContext:
    """Connect the script to its client job.

    Args:
        rank: which process of a multi-process trainer this is; None: environment variable ``RANK``, else "0".
        config_file: where a trainer in a process of its own finds its client job; None: where the environment variable
            ``FLAREBUS_CLIENT_CONFIG`` says, or with ``CLIENT_API_TYPE=EX_PROCESS_API`` in
            ``config/client_api_config.json``. A script that runs inside the client job does not need it: there it only
            tells contexts apart.

    Returns:
        The context. The same arguments again give the same one, with a warning. The first becomes the default.

    Raises:
        ClientApiError: no job runs this script, the client job refuses it, or it is a trainer that has left its client
            job before.
        ConfigError: an argument has a wrong type, or the client configuration is wrong.
        LinkError: the client job that the configuration names is not there.
    """
    if config_file is not None and not isinstance(config_file, str | os.PathLike):
        raise ConfigError("config_file", config_file, "a path, or None")
    key = (_checked_rank(rank), None if config_file is None else os.fspath(config_file))
    seat = seat_of_caller()
    if seat is None or seat.closed:
        seat = _process_seat(*key) or seat
    if seat is None:
        raise ClientApiError(
            "flare.init(): no job runs this script, so there is nobody to get a model from. Name it as train_script "
            "of a recipe and execute that (FedAvgRecipe(...).execute(SimEnv(...))), "
            "or run: python -m workflows.fedavg --train-script <this file>"
        )
    if seat.closed:
        raise ClientApiError("flare.init(): the script that started this thread has ended")
    context = seat.contexts.get(key)
    if context is not None and not context.closed:
        _log.warning("flare.init() was called again with the same arguments; the first context stays")
        return context
    if seat.session is None:
        seat.session = Session(seat)
    context = seat.contexts[key] = APIContext(seat, seat.session, *key)
    if seat.default is None or seat.default.closed:
        seat.default = context
    return context


def receive(timeout: float | None = None, *, ctx: APIContext | None = None) -> FLModel | None:
    """Return the model of the current task, waiting for a task if there is none.

    Args:
        timeout: seconds to wait at most; None: until a task comes or the job ends.

    Returns:
        The model; the same object until it is answered. Its params are the script's to change. None if the time was up
        or the job has ended: then there is nothing to send.

    Raises:
        ConfigError: `timeout` is not a number from 0.
        FlarebusError: the model could not be fetched whole; the task is lost, the next one can be received.
    """
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0):
        raise ConfigError("timeout", timeout, "seconds from 0, or None")
    return context_of(ctx, "receive").session.receive(timeout)


def send(model: FLModel, clear_cache: bool = True, *, ctx: APIContext | None = None) -> None:
    """Answer the current task; return when the server has the answer whole.

    Args:
        model: params, metrics or both; an empty dict counts. Metrics sent with trained params describe the model that
            was *received*. ``meta["NUM_STEPS_CURRENT_ROUND"]`` is the weight. With transfer type DIFF the received
            model is subtracted from full params, in an object of its own: `model` itself is never rewritten. Once the
            job has ended the model is dropped, with a warning in the log.
        clear_cache: set params and optimizer_params of `model` and of the received model to None, so that their memory
            is free while the script waits.

    Raises:
        EncodeError: `model` is not an `FLModel` (a TypeError), or holds something that cannot travel.
        ClientApiError: nothing was received, the task is answered already, there are neither params nor metrics, or
            the params do not fit the received ones (DIFF). On ranks other than 0 nothing is sent.
    """
    context = context_of(ctx, "send")
    if context.seat.engine.is_follower:
        context.session.let_go()
    elif context.rank == "0":
        context.session.send(model, clear_cache)


def is_running(*, ctx: APIContext | None = None) -> bool:
    """Wait for the next task; True when there is one, False when the job is complete or aborted.

    A task that was fetched and not answered yet counts: the call returns True at once while the job runs.
    """
    return context_of(ctx, "is_running").session.is_running()


def is_train(*, ctx: APIContext | None = None) -> bool:
    """Whether the current task is to train. Rank 0 only."""
    session = _rank_zero(ctx, "is_train").session
    return session.task_name == session.settings.train_task


def is_evaluate(*, ctx: APIContext | None = None) -> bool:
    """Whether the current task is to evaluate the received model. Rank 0 only."""
    session = _rank_zero(ctx, "is_evaluate").session
    return session.task_name == session.settings.eval_task


def is_submit_model(*, ctx: APIContext | None = None) -> bool:
    """Whether the current task is to submit the site's own model; it comes without params. Rank 0 only."""
    session = _rank_zero(ctx, "is_submit_model").session
    return session.task_name == session.settings.submit_task


def log(key: str, value: Any, data_type: AnalyticsDataType, *, ctx: APIContext | None = None, **kwargs: Any) -> None:
    """Send one metric to the server; never waits. Rank 0 only. `flarebus.client.tracking` has writers as trackers do.

    Args:
        key: its name, of at most 250 characters.
        value: what `data_type` says; a scalar array or tensor becomes a number. Arrays are copied: they may be written
            to afterwards. A value that cannot travel is left out, with a warning in the log.
        data_type: see `AnalyticsDataType`.
        kwargs: ``global_step``, a whole number: the step that the record belongs to. Anything else that a tracker may
            want to know goes with the record.

    Raises:
        ConfigError: `key`, `value`, `data_type` or ``global_step`` is wrong.
    """
    context = ctx
    if context is None and (seat := seat_of_caller()) is not None:
        context = seat.default
    # All is well in a loop that logs thousands of times a second; else the long way says what is wrong.
    if type(context) is not APIContext or context.closed or context._seat.closed or context.rank != "0":
        context = _rank_zero(ctx, "log")
    hand_over(context._seat.engine.log, key, value, data_type, kwargs)


def system_info(*, ctx: APIContext | None = None) -> dict[str, str]:
    """The job and the site: ``{"job_id": ..., "site_name": ...}``."""
    engine = context_of(ctx, "system_info").seat.engine
    return {MetaKey.JOB_ID: engine.job_id, MetaKey.SITE_NAME: engine.site_name}


def get_config(*, ctx: APIContext | None = None) -> dict[str, Any]:
    """A copy of the client configuration; it holds no secrets."""
    return copy.deepcopy(dict(context_of(ctx, "get_config").seat.engine.config))


def get_job_id(*, ctx: APIContext | None = None) -> str:
    """The job that this script works for."""
    return context_of(ctx, "get_job_id").seat.engine.job_id


def get_site_name(*, ctx: APIContext | None = None) -> str:
    """The site that this script runs on."""
    return context_of(ctx, "get_site_name").seat.engine.site_name


def get_task_name(*, ctx: APIContext | None = None) -> str:
    """The name of the current task, after `send` of the last one. Rank 0 only."""
    return _rank_zero(ctx, "get_task_name").session.task_name


def clear(*, ctx: APIContext | None = None) -> None:
    """Drop the current task and free the received model; `send` then needs another `receive`, of the next task."""
    context_of(ctx, "clear").session.clear()


def shutdown(*, ctx: APIContext | None = None) -> None:
    """Close the context; calling it again does nothing. Other calls then need another `init`.

    A trainer in a process of its own leaves its client job with the last context, for good.
    """
    if ctx is not None and ctx.closed:
        return
    seat = seat_of_caller()
    if ctx is None and seat is not None and seat.default is not None and seat.default.closed:
        return
    context = context_of(ctx, "shutdown")
    context.closed = True
    seat = context.seat
    if seat.on_shutdown is not None and all(other.closed for other in seat.contexts.values()):
        seat.on_shutdown()


def context_of(ctx: APIContext | None, call: str) -> APIContext:
    """The context that a call means.

    Raises:
        ClientApiError: there is none, it is closed, or its script has ended; the message names `call`.
    """
    if ctx is None:
        seat = seat_of_caller()
        ctx = None if seat is None else seat.default
        if ctx is None:
            raise ClientApiError(f"flare.{call}() came before flare.init(); call flare.init() first")
    elif not isinstance(ctx, APIContext):
        raise ConfigError("ctx", ctx, "what flare.init() returned")
    if ctx.closed:
        raise ClientApiError(f"flare.{call}() came after flare.shutdown(); call flare.init() again")
    if ctx._seat.closed:
        raise ClientApiError(f"flare.{call}(): the script that this call belongs to has ended")
    return ctx


def _process_seat(rank: str, config_file: str | None) -> Seat | None:
    """The seat of a trainer in a process of its own; None if nothing says that this is one."""
    path = config_file or os.environ.get(ENV_CLIENT_CONFIG)
    if path is None and os.environ.get(ENV_API_TYPE) == EX_PROCESS_API:
        path = DEFAULT_CONFIG_FILE
    if path is None:
        return None
    from flarebus.client.ex_process.seat import open_process_seat

    return open_process_seat(path, rank)


def _rank_zero(ctx: APIContext | None, call: str) -> APIContext:
    context = context_of(ctx, call)
    if context.rank != "0":
        raise ClientApiError(f"only rank 0 can call flare.{call}(); this is rank {context.rank}")
    return context


def _checked_rank(rank: str | int | None) -> str:
    if rank is None:
        return os.environ.get("RANK", "0")
    if isinstance(rank, bool) or not isinstance(rank, str | int):
        raise ConfigError("rank", rank, "a number, its string, or None")
    return str(rank)
