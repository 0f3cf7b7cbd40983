"""What the READMEs of the examples tell people to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

__all__ = ["commands"]


def commands(readme: Path) -> list[list[str]]:
    """The commands in the shell blocks of a README."""
    blocks = re.findall(r"```sh\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]
