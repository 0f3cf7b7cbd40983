"""`@train` and `@evaluate`: the receive and the send around a function that a script has already.

    @flare.evaluate
    def evaluate(model): ...; return {"accuracy": accuracy}

    @flare.train
    def train(model, epochs): ...; return flare.FLModel(params=trained)

The decorated function is called without the model: ``evaluate(); train(epochs=2)``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, overload

from flarebus.client.api import APIContext, context_of
from flarebus.errors import ClientApiError
from flarebus.model import FLModel

__all__ = ["evaluate", "train"]

_F = TypeVar("_F", bound=Callable[..., Any])


@overload
def train(function: _F) -> _F: ...
@overload
def train(function: None = None, *, ctx: APIContext | None = None) -> Callable[[_F], _F]: ...
def train(function: Callable[..., Any] | None = None, *, ctx: APIContext | None = None) -> Callable[..., Any]:
    """Give the function the received model as its first argument and send the `FLModel` that it returns.

    Metrics that an `evaluate` function found before are sent with it.

    Raises:
        ClientApiError: the job has ended, or the function returned something else (when called).
    """

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            context = context_of(ctx, "train")
            result = _call(body, context, args, kwargs)
            if not isinstance(result, FLModel):
                raise ClientApiError(f"{body.__name__}() must return an FLModel, not {type(result).__name__}")
            if context.rank == "0":
                context.session.send(result, clear_cache=True)
            return result

        return wrapper

    return decorate if function is None else decorate(function)


@overload
def evaluate(function: _F) -> _F: ...
@overload
def evaluate(function: None = None, *, ctx: APIContext | None = None) -> Callable[[_F], _F]: ...
def evaluate(function: Callable[..., Any] | None = None, *, ctx: APIContext | None = None) -> Callable[..., Any]:
    """Give the function the received model as its first argument and keep the metrics that it returns.

    In a train task they go out with the next train result; otherwise they are sent at once.

    Raises:
        ClientApiError: the job has ended, or the function returned neither a dict nor an `FLModel` with metrics (when
            called).
    """

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            context = context_of(ctx, "evaluate")
            result = _call(body, context, args, kwargs)
            metrics = result.metrics if isinstance(result, FLModel) else result
            if not isinstance(metrics, dict):
                raise ClientApiError(
                    f"{body.__name__}() must return its metrics as a dict such as {{'accuracy': 0.9}}, "
                    f"or an FLModel with metrics, not {type(result).__name__}"
                )
            session = context.session
            if session.task_name == session.settings.train_task:
                session.metrics = metrics
            elif context.rank == "0":
                session.send(FLModel(metrics=metrics), clear_cache=True)
            return result

        return wrapper

    return decorate if function is None else decorate(function)


def _call(body: Callable[..., Any], context: APIContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    model = context.session.receive(None)
    if model is None:
        raise ClientApiError(f"{body.__name__}(): there is no task to work on; the job has ended: {context.end_reason}")
    # A caller may pass the first argument as it would without the decorator; the received model replaces it.
    if args and isinstance(args[0], FLModel):
        args = args[1:]
    first = next(iter(inspect.signature(body).parameters), None)
    kwargs = {name: value for name, value in kwargs.items() if name != first}
    return body(model, *args, **kwargs)
