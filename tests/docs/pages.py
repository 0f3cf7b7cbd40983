"""The pages of the documentation, as tests look at them."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

__all__ = ["ROOT", "blocks", "contains", "is_excerpt"]

ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of one language on a page of `docs/`."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def contains(text: str, part: str) -> bool:
    """Whether the lines of `part` stand in `text` one after another, at whatever depth."""
    wanted, lines = textwrap.dedent(part).rstrip().splitlines(), text.splitlines()
    return any(
        textwrap.dedent("\n".join(lines[begin : begin + len(wanted)])).splitlines() == wanted
        for begin in range(len(lines) - len(wanted) + 1)
    )


def is_excerpt(block: str, *files: Path) -> bool:
    """Whether a block stands in one of the files as it is."""
    return any(contains(file.read_text(encoding="utf-8"), block) for file in files)
