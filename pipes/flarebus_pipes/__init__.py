"""Pipes of flarebus: the pluggable links between a client job and a training process of its own.

Each pipe is a module here and an entry point of the group `flarebus.pipes`; the framework finds it by that name and
never imports it. Importing this package imports none of them.
"""

from __future__ import annotations

__all__: list[str] = []
