"""FLModel: what a server and a training script hand each other, with the words and rules of the Client API."""

from __future__ import annotations

from enum import Enum
from typing import Any

from flarebus.errors import ConfigError

__all__ = ["FLModel", "MetaKey", "ParamsType"]


class ParamsType(str, Enum):
    """Whether `params` are a whole model or what to add to one."""

    FULL = "FULL"
    DIFF = "DIFF"


class MetaKey:
    """Keys of `FLModel.meta` that flarebus itself reads or writes."""

    NUM_STEPS_CURRENT_ROUND = "NUM_STEPS_CURRENT_ROUND"
    CURRENT_ROUND = "current_round"
    TOTAL_ROUNDS = "total_rounds"
    JOB_ID = "job_id"
    SITE_NAME = "site_name"
    CLIENT_NAME = "client_name"
    FEDPROX_MU = "fedprox_mu"
    EARLY_TERMINATION = "EARLY_TERMINATION"


def _checked_round(name: str, value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ConfigError(name, value, "a whole number from 0, or None")
    return value


def _no_dict(name: str, value: object) -> str:
    # What Keras' `get_weights` returns is a list.
    hint = '; give {"weights": [...]}' if name == "params" and isinstance(value, list) else ""
    return f"a dict or None, not {type(value).__name__}{hint}"


class FLModel:
    """A model, an update of one, metrics, or both.

    Args:
        params_type: `ParamsType` or its string; FULL when there are params and nothing is said.
        params: name -> array, tensor, number, string, None, list or nested dict. Kept by reference.
        optimizer_params: name -> value; travels like `params`.
        metrics: name -> number. With a train result they describe the model that was *received*.
        start_round: first round of the job, from 0.
        current_round: round this belongs to, from 0, or None.
        total_rounds: number of rounds of the job, or None.
        meta: anything small; `NUM_STEPS_CURRENT_ROUND` is the weight of the update. With `EARLY_TERMINATION`, True, a
            site ends a job whose workflow lets it.

    Raises:
        ConfigError: a field has a wrong type, or a `params_type` comes without params.
    """

    __slots__ = (
        "current_round",
        "meta",
        "metrics",
        "optimizer_params",
        "params",
        "params_type",
        "start_round",
        "total_rounds",
    )

    def __init__(
        self,
        params_type: ParamsType | str | None = None,
        params: dict[Any, Any] | None = None,
        optimizer_params: dict[Any, Any] | None = None,
        metrics: dict[str, Any] | None = None,
        start_round: int | None = 0,
        current_round: int | None = None,
        total_rounds: int | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        for name, value in (
            ("params", params),
            ("optimizer_params", optimizer_params),
            ("metrics", metrics),
            ("meta", meta),
        ):
            if value is not None and not isinstance(value, dict):
                raise ConfigError(name, value, _no_dict(name, value))
        if params_type is not None:
            try:
                params_type = ParamsType(params_type)
            except ValueError:
                raise ConfigError("params_type", params_type, "ParamsType.FULL or ParamsType.DIFF") from None
            if params is None:
                raise ConfigError("params_type", params_type.value, "needs params; there are none")
        elif params is not None:
            params_type = ParamsType.FULL
        self.params_type: ParamsType | None = params_type
        self.params = params
        self.optimizer_params = optimizer_params
        self.metrics = metrics
        self.start_round = _checked_round("start_round", start_round)
        self.current_round = _checked_round("current_round", current_round)
        self.total_rounds = _checked_round("total_rounds", total_rounds)
        self.meta: dict[str, Any] = {} if meta is None else meta

    def summary(self) -> dict[str, Any]:
        """Sizes and types only, never a value; empty and absent fields are left out."""
        found: dict[str, Any] = {}
        for name in ("params", "optimizer_params", "metrics", "meta"):
            value = getattr(self, name)
            if value:
                found[name] = len(value)
        if self.params_type is not None:
            found["params_type"] = self.params_type.value
        for name in ("start_round", "current_round", "total_rounds"):
            value = getattr(self, name)
            if value:
                found[name] = value
        return found

    def __repr__(self) -> str:
        return f"FLModel({', '.join(f'{name}={value!r}' for name, value in self.summary().items())})"
