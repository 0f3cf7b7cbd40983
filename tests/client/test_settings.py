"""What a session takes from the configuration, and what the environment may override."""

from __future__ import annotations

from typing import Any

import pytest

from flarebus.client.settings import ClientSettings
from flarebus.errors import ConfigError
from flarebus.job.kinds import ExchangeFormat, TransferType

CONFIGURED = {"TASK_EXCHANGE": {"memory_gc_rounds": 5, "cuda_empty_cache": False}}


def test_silent_configuration_means_the_defaults() -> None:
    """With nothing said the settings are those of the table of keys."""
    settings = ClientSettings.read({}, {})

    assert settings == ClientSettings(
        ExchangeFormat.NUMPY,
        ExchangeFormat.NUMPY,
        TransferType.FULL,
        False,
        "train",
        "validate",
        "submit_model",
        0,
        False,
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (5, False)),
        ({"FLAREBUS_CLIENT_MEMORY_GC_ROUNDS": "2"}, (2, False)),
        ({"NVFLARE_CLIENT_MEMORY_GC_ROUNDS": " 3 ", "NVFLARE_CUDA_EMPTY_CACHE": "True"}, (3, True)),
        ({"FLAREBUS_CUDA_EMPTY_CACHE": "0", "NVFLARE_CUDA_EMPTY_CACHE": "1"}, (5, False)),
        ({"FLAREBUS_CLIENT_MEMORY_GC_ROUNDS": "0", "NVFLARE_CLIENT_MEMORY_GC_ROUNDS": "9"}, (0, False)),
        ({"FLAREBUS_CUDA_EMPTY_CACHE": "on"}, (5, True)),
    ],
    ids=str,
)
def test_environment_overrides_the_memory_settings(environ: dict[str, str], expected: tuple[int, bool]) -> None:
    """Both families of names are understood; flarebus's own count first."""
    settings = ClientSettings.read(CONFIGURED, environ)

    assert (settings.memory_gc_rounds, settings.cuda_empty_cache) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FLAREBUS_CLIENT_MEMORY_GC_ROUNDS", "often"),
        ("NVFLARE_CLIENT_MEMORY_GC_ROUNDS", "-1"),
        ("NVFLARE_CLIENT_MEMORY_GC_ROUNDS", ""),
        ("FLAREBUS_CUDA_EMPTY_CACHE", "perhaps"),
        ("NVFLARE_CUDA_EMPTY_CACHE", "2"),
    ],
)
def test_wrong_variable_is_named(name: str, value: str) -> None:
    """A variable that cannot be read is an error by its name, never ignored."""
    with pytest.raises(ConfigError, match=f"^{name}="):
        ClientSettings.read({}, {name: value})


@pytest.mark.parametrize("config", [{"TASK_EXCHANGES": {}}, {"TASK_EXCHANGE": {"exchange_formats": "raw"}}])
def test_unknown_key_is_an_error(config: dict[str, Any]) -> None:
    """A misspelt key does not silently leave a default in place."""
    with pytest.raises(ConfigError, match="did you mean"):
        ClientSettings.read(config, {})
