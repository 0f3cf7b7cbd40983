"""The names of `flarebus.client.log_config`, for the site."""

from __future__ import annotations

from flarebus.client.log_config import Layout, LogConfig, escape

__all__ = ["Layout", "LogConfig", "escape"]
