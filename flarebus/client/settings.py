"""What a script's session needs to know from the client configuration. Read once, at `init`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from flarebus.client.config import ClientConfig
from flarebus.errors import ConfigError
from flarebus.job.kinds import ExchangeFormat, TransferType

__all__ = [
    "ENV_API_TYPE",
    "ENV_CLIENT_CONFIG",
    "ENV_CUDA_EMPTY_CACHE",
    "ENV_MEMORY_GC_ROUNDS",
    "EX_PROCESS_API",
    "ClientSettings",
]

# What tells a script that it is a trainer in a process of its own, and where its configuration is.
ENV_API_TYPE, EX_PROCESS_API = "CLIENT_API_TYPE", "EX_PROCESS_API"
ENV_CLIENT_CONFIG = "FLAREBUS_CLIENT_CONFIG"

ENV_MEMORY_GC_ROUNDS = ("FLAREBUS_CLIENT_MEMORY_GC_ROUNDS", "NVFLARE_CLIENT_MEMORY_GC_ROUNDS")
ENV_CUDA_EMPTY_CACHE = ("FLAREBUS_CUDA_EMPTY_CACHE", "NVFLARE_CUDA_EMPTY_CACHE")
"""Environment variables that override the configuration; the first one that is set counts."""
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off", ""})


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What the section ``TASK_EXCHANGE`` of the client configuration says about a session.

    Args:
        exchange_format: what the script works with: ``pytorch`` tensors, ``numpy`` arrays, ``keras_layer_weights``
            (lists of arrays), or ``raw`` (as it comes).
        server_expected_format: what the server wants to get.
        transfer_type: FULL, or DIFF to have the received model subtracted from a full one.
        train_with_eval: whether a train task is expected to evaluate the received model as well.
        train_task: name of the task for which `is_train` holds; `eval_task` and `submit_task` likewise.
        memory_gc_rounds: free memory after every so many sends; 0: leave it to Python.
        cuda_empty_cache: empty PyTorch's CUDA cache then as well.
    """

    exchange_format: ExchangeFormat
    server_expected_format: ExchangeFormat
    transfer_type: TransferType
    train_with_eval: bool
    train_task: str
    eval_task: str
    submit_task: str
    memory_gc_rounds: int
    cuda_empty_cache: bool

    @classmethod
    def read(cls, config: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> ClientSettings:
        """Take the settings from a client configuration; environment variables override its memory settings.

        Raises:
            ConfigError: a key is unknown, or a value is not one of those allowed.
        """
        found = ClientConfig(config)
        return cls(
            exchange_format=found.get_exchange_format(),
            server_expected_format=found.get_server_expected_format(),
            transfer_type=found.get_transfer_type(),
            train_with_eval=found.get_train_with_eval(),
            train_task=found.get_train_task(),
            eval_task=found.get_eval_task(),
            submit_task=found.get_submit_model_task(),
            memory_gc_rounds=_overridden(environ, ENV_MEMORY_GC_ROUNDS, _count, found.get_memory_gc_rounds()),
            cuda_empty_cache=_overridden(environ, ENV_CUDA_EMPTY_CACHE, _truth, found.get_cuda_empty_cache()),
        )


_Value = TypeVar("_Value", int, bool)


def _overridden(
    environ: Mapping[str, str], names: tuple[str, ...], read: Callable[[str, str], _Value], configured: _Value
) -> _Value:
    for name in names:
        if name in environ:
            return read(name, environ[name])
    return configured


def _count(name: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise ConfigError(name, text, "a whole number from 0")
    return int(text)


def _truth(name: str, text: str) -> bool:
    word = text.strip().lower()
    if word not in _TRUE | _FALSE:
        raise ConfigError(name, text, "true or false")
    return word in _TRUE
