"""What a job is: its description, its folder, its initial model, the workflow it names. Imports nothing by itself."""

from __future__ import annotations

__all__: list[str] = []
