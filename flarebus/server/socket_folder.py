"""SocketFolder: where a run on one machine has its socket: a folder of its own that only this user may enter.

Not the run folder: the path of a socket may have little more than 100 bytes. A run that is killed cannot remove its
folder; the next run on the machine does it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from pathlib import Path

import zmq

from flarebus.errors import ConfigError

__all__ = ["SocketFolder"]

_PREFIX = "flarebus-bus-"
_SOCKET = "bus"
# The router's own files there; the lock is held for as long as it lives.
_LOCK = f"{_SOCKET}.lock"
# Younger folders may belong to a run that is about to take its lock.
_STALE_S = 60.0


class SocketFolder:
    """Made at once; `remove` takes it away.

    Raises:
        ConfigError: there is no folder where a socket could be.
    """

    def __init__(self) -> None:
        root = _root()
        _sweep(root)
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))

    @property
    def endpoint(self) -> str:
        """What to bind."""
        return f"ipc://{self._folder / _SOCKET}"

    def remove(self) -> None:
        """Remove the folder with what is in it. Idempotent; from any thread."""
        _remove(self._folder)


def _root() -> Path:
    """The first folder that is there, may be written to, and has a path short enough for a socket."""
    longest = zmq.IPC_PATH_MAX_LEN - len(f"/{_PREFIX}12345678/{_SOCKET}")
    roots = [os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"]
    for root in roots:
        if root and len(os.fsencode(root)) <= longest and os.access(root, os.W_OK | os.X_OK):
            return Path(root)
    raise ConfigError("TMPDIR", tempfile.gettempdir(), f"a writable folder with a path of at most {longest} bytes")


def _sweep(root: Path) -> None:
    """Remove what runs that were killed have left there."""
    for folder in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            found = folder.stat(follow_symlinks=False)
            if found.st_uid == os.geteuid() and time.time() - found.st_mtime > _STALE_S and not _is_alive(folder):
                _remove(folder)


def _is_alive(folder: Path) -> bool:
    with open(folder / _LOCK, "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _remove(folder: Path) -> None:
    # By name, so that nothing else can ever be meant.
    for name in (_SOCKET, _LOCK):
        with contextlib.suppress(OSError):
            folder.joinpath(name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
