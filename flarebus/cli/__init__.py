"""Commands: `flarebus` and `flarebus-router`. Each module is one command; what it needs is imported when it runs."""

from __future__ import annotations

__all__: list[str] = []
