"""SiteConfig: what one site runs and how it answers. Light: worker processes import it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from flarebus.job.checks import check_args, check_enum, check_flag, check_int, check_keys, check_text
from flarebus.job.kinds import ExchangeFormat, FrameworkType, TransferType

__all__ = ["SiteConfig"]


@dataclass(frozen=True, slots=True)
class SiteConfig:
    """What one site runs, and how it answers.

    Args:
        train_script: absolute path of the training script; its own folder comes first in the script's imports.
        train_args: the script's arguments in one string, split as a shell would.
        framework: what the script is written with.
        server_expected_format: what parameters are on their way to the server.
        params_transfer_type: whether answers are whole models or differences.
        memory_gc_rounds: clean up memory every so many rounds; 0 for never.
        cuda_empty_cache: with each clean-up, give cached GPU memory back too.
    """

    train_script: str
    train_args: str = ""
    framework: FrameworkType = FrameworkType.PYTORCH
    server_expected_format: ExchangeFormat = ExchangeFormat.NUMPY
    params_transfer_type: TransferType = TransferType.FULL
    memory_gc_rounds: int = 0
    cuda_empty_cache: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data; goes into a job folder and over the bus to a worker."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], parameter: str = "site") -> SiteConfig:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: a key is unknown or missing, or a value is not one of those allowed.
        """
        check_keys(data, [each.name for each in fields(cls)], ["train_script"], parameter)
        default = cls("")

        def given(name: str) -> tuple[str, Any]:
            return f"{parameter}[{name!r}]", data.get(name, getattr(default, name))

        return cls(
            train_script=check_text(*given("train_script")),
            train_args=check_args(*given("train_args")),
            framework=check_enum(*given("framework"), FrameworkType),
            server_expected_format=check_enum(*given("server_expected_format"), ExchangeFormat),
            params_transfer_type=check_enum(*given("params_transfer_type"), TransferType),
            memory_gc_rounds=check_int(*given("memory_gc_rounds"), minimum=0),
            cuda_empty_cache=check_flag(*given("cuda_empty_cache")),
        )
