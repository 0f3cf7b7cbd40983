"""What a script's session needs to know from the client configuration. Read once, at `init`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from flarebus.errors import ConfigError
from flarebus.job.kinds import ExchangeFormat, TransferType

__all__ = ["ENV_CUDA_EMPTY_CACHE", "ENV_MEMORY_GC_ROUNDS", "ClientSettings"]

ENV_MEMORY_GC_ROUNDS = "FLAREBUS_CLIENT_MEMORY_GC_ROUNDS"
ENV_CUDA_EMPTY_CACHE = "FLAREBUS_CUDA_EMPTY_CACHE"
_SECTION = "TASK_EXCHANGE"
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off", ""})


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """The section ``TASK_EXCHANGE`` of the client configuration, checked.

    Args:
        exchange_format: what the script works with: ``pytorch`` tensors, ``numpy`` arrays, or ``raw`` (as it comes).
        server_expected_format: what the server wants to get.
        transfer_type: FULL, or DIFF to have the received model subtracted from a full one.
        train_task: name of the task for which `is_train` holds; `eval_task` and `submit_task` likewise.
        memory_gc_rounds: free memory after every so many sends; 0: leave it to Python.
        cuda_empty_cache: empty PyTorch's CUDA cache then as well.
    """

    exchange_format: ExchangeFormat = ExchangeFormat.NUMPY
    server_expected_format: ExchangeFormat = ExchangeFormat.NUMPY
    transfer_type: TransferType = TransferType.FULL
    train_task: str = "train"
    eval_task: str = "validate"
    submit_task: str = "submit_model"
    memory_gc_rounds: int = 0
    cuda_empty_cache: bool = False

    @classmethod
    def read(cls, config: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> ClientSettings:
        """Take the settings from a client configuration; two environment variables override its memory settings.

        Raises:
            ConfigError: a value is not one of those allowed.
        """
        section = config.get(_SECTION) or {}
        return cls(
            exchange_format=_word(ExchangeFormat, section, "exchange_format", ExchangeFormat.NUMPY),
            server_expected_format=_word(ExchangeFormat, section, "server_expected_format", ExchangeFormat.NUMPY),
            transfer_type=_word(TransferType, section, "transfer_type", TransferType.FULL),
            train_task=section.get("train_task_name") or "train",
            eval_task=section.get("eval_task_name") or "validate",
            submit_task=section.get("submit_model_task_name") or "submit_model",
            memory_gc_rounds=_count("memory_gc_rounds", section.get("memory_gc_rounds", 0))
            if ENV_MEMORY_GC_ROUNDS not in environ
            else _count(ENV_MEMORY_GC_ROUNDS, environ[ENV_MEMORY_GC_ROUNDS]),
            cuda_empty_cache=_truth("cuda_empty_cache", section.get("cuda_empty_cache", False))
            if ENV_CUDA_EMPTY_CACHE not in environ
            else _truth(ENV_CUDA_EMPTY_CACHE, environ[ENV_CUDA_EMPTY_CACHE]),
        )


_Word = TypeVar("_Word", ExchangeFormat, TransferType)


def _word(kind: type[_Word], section: Mapping[str, Any], name: str, default: _Word) -> _Word:
    value = section.get(name) or default
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(name, value, "one of " + ", ".join(word.value for word in kind)) from None


def _count(name: str, value: object) -> int:
    try:
        count = int(value) if isinstance(value, int | str) and not isinstance(value, bool) else -1
    except ValueError:
        count = -1
    if count < 0:
        raise ConfigError(name, value, "a whole number from 0")
    return count


def _truth(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text not in _TRUE | _FALSE:
        raise ConfigError(name, value, "true or false")
    return text in _TRUE
