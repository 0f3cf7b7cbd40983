"""What the tests of `ShmPipe` share: ends for one job, a folder with a short path for them, and an exchange."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flarebus_pipes.shm_pipe import ShmPipe

from flarebus.pipes import Message
from tests.pipes.links import LIMIT_S, InThread

__all__ = ["BIG", "HEAD", "Ends", "big", "exchange", "make", "short_folder"]

BIG = 400_000
Ends = tuple[ShmPipe, ShmPipe]
HEAD = Message("train").head()


def make(root: Path, mode: str, **given: str) -> ShmPipe:
    """An end for the tests' job."""
    return ShmPipe(mode, str(root), **{"token": "job", "site_name": "site-1", **given})


def big(value: int = 1, nbytes: int = BIG) -> bytes:
    """Bytes that do not fit into a frame."""
    return bytes([value]) * nbytes


def exchange(sender: ShmPipe, receiver: ShmPipe, message: Message) -> Message:
    """Send and receive; what came."""
    sending = InThread(sender.send, message, LIMIT_S)
    received = receiver.receive(LIMIT_S)
    assert sending.result() is True
    assert received is not None
    return received


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder with a short path; at the end nothing may be in it."""
    made = Path(tempfile.mkdtemp(prefix="fb-"))
    yield made
    left = list(made.iterdir())
    shutil.rmtree(made)
    assert left == []
    assert list(Path("/dev/shm").glob("flarebus*")) == []
