"""What the tests of `FilePipe` share: ends for one job, and what is left in a folder."""

from __future__ import annotations

from pathlib import Path

from flarebus_pipes.file_pipe import FilePipe

__all__ = ["BIG", "Ends", "big", "channel_of", "files_below", "make"]

BIG = 400_000
Ends = tuple[FilePipe, FilePipe]


def make(root: Path, mode: str, **given: object) -> FilePipe:
    """An end for the tests' job."""
    return FilePipe(mode, str(root), token="job", site_name="site-1", **given)  # type: ignore[arg-type]


def channel_of(root: Path) -> Path:
    """Its folder."""
    return root / "job" / "site-1" / "task"


def big(value: int = 1, nbytes: int = BIG) -> bytes:
    """Bytes that do not fit into a message."""
    return bytes([value]) * nbytes


def files_below(root: Path) -> list[str]:
    """All that is left there."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))
