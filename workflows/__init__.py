"""Workflows of flarebus: each module is an algorithm, a plug-in and a program.

As a plug-in it is found by its name in the entry-point group `flarebus.workflows`; as a program, `python -m
workflows.<name>` runs a real example without arguments and anybody's training script with them. Importing this package
imports none of them.
"""

from __future__ import annotations

__all__: list[str] = []
