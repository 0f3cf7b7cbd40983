"""One tracker of a job, as the job carries it: by name, with settings, and who tracks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flarebus.errors import ConfigError
from flarebus.job.checks import check_flag, check_keys, check_mapping, check_text
from flarebus.job.secrets import check_no_secrets

__all__ = ["TrackingRef"]

_KEYS = ("tracker", "config", "server_side", "client_side")


@dataclass(frozen=True, slots=True)
class TrackingRef:
    """A tracker that is used; what its settings mean is known to the tracker.

    Args:
        tracker: the name of an installed tracker, or the dotted path of its class.
        config: its settings: JSON values, no secret in clear.
        server_side: the server tracks all sites and the aggregate.
        client_side: each site tracks itself.

    Raises:
        ConfigError: a value is of another type or no JSON, holds a secret, or nobody would track.
    """

    tracker: str
    config: Mapping[str, Any]
    server_side: bool = True
    client_side: bool = False

    def __post_init__(self) -> None:
        check_text("tracking_type", self.tracker)
        check_mapping("tracking_config", self.config)
        check_no_secrets("tracking_config", self.config)
        try:
            config = json.loads(json.dumps(self.config, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigError("tracking_config", sorted(map(str, self.config)), f"no JSON values: {error}") from None
        object.__setattr__(self, "config", config)  # a copy, with lists where tuples were
        if not check_flag("server_side", self.server_side) | check_flag("client_side", self.client_side):
            raise ConfigError("server_side", False, "True, unless client_side is: somebody has to track")

    def to_json(self) -> dict[str, Any]:
        """Plain data; goes into a job folder and over the bus to a worker."""
        return {
            "tracker": self.tracker,
            "config": dict(self.config),
            "server_side": self.server_side,
            "client_side": self.client_side,
        }

    @classmethod
    def from_json(cls, data: object, parameter: str = "tracking") -> TrackingRef:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: see the class; or a key is unknown or missing.
        """
        found = check_mapping(parameter, data)
        check_keys(found, _KEYS, _KEYS, parameter)
        try:
            return cls(**found)
        except ConfigError as error:
            raise ConfigError(f"{parameter}: {error.parameter}", error.value, error.allowed) from error
