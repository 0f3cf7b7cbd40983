"""RunFolder: the folder one simulated run writes to, locked for as long as the run lives.

`<root>/<job name>/` with `<root>/<job name>.lock` beside it. An old run of the same name is emptied, and only of what
a run puts there: the list stands in its `run.json`. A folder without one is somebody else's and is left alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from flarebus.address import check_name
from flarebus.errors import ConfigError

__all__ = ["ROOT_VARIABLE", "RunFolder", "default_root"]

ROOT_VARIABLE = "FLAREBUS_SIMULATION_ROOT"
"""Environment variable that replaces the default root."""

_MARK = "run.json"
_SCHEMA_VERSION = 1
# What a run has beside its sites' folders.
_OWN_ENTRIES = ("server",)
_OTHER_ROOT = f"choose another folder with workspace_root or the environment variable {ROOT_VARIABLE}"


def default_root() -> Path:
    """Where simulations go when nobody says: the user's own cache folder, or what the environment variable names."""
    named = os.environ.get(ROOT_VARIABLE)
    if named:
        return Path(named).absolute()
    try:
        home = Path.home()
    except RuntimeError as error:
        raise ConfigError("workspace_root", None, f"no home folder is known; {_OTHER_ROOT}") from error
    if sys.platform == "darwin":
        cache = home / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not cache.is_absolute():  # unset, empty or relative: to be ignored
            cache = home / ".cache"
    return cache / "flarebus" / "simulation"


class RunFolder:
    """A folder that this run alone writes to. Made by `open`; `close` gives the lock back and keeps the folder."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        self._closing = threading.Lock()

    @classmethod
    def open(cls, root: Path, name: str, sites: Sequence[str]) -> RunFolder:
        """Lock `<root>/<name>`, empty it of an old run, and make it ready, all with access for the user only.

        Raises:
            ConfigError: another live run has it, it belongs to something else, or it cannot be written.
        """
        check_name(name)
        try:
            _make_private(root)
            lock = _lock(root / f"{name}.lock", name)
            try:
                _prepare(root / name, sites)
            except BaseException:
                os.close(lock)
                raise
        except OSError as error:
            said = f"cannot write there: {error.strerror or error} ({error.filename or root}); {_OTHER_ROOT}"
            raise ConfigError("workspace_root", str(root), said) from error
        return cls(root / name, lock)

    def close(self) -> None:
        """Give the lock back, which is free when this returns. Any thread may call; closing twice does nothing."""
        with self._closing:
            lock, self._lock = self._lock, -1
            if lock >= 0:
                os.close(lock)


def _make_private(folder: Path) -> None:
    """Create `folder` and its missing parents for the user only; what exists keeps its mode."""
    if not folder.is_dir():
        _make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def _lock(path: Path, name: str) -> int:
    # The file is never removed: a lock on a removed file would not keep out who makes a new one.
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(lock)
        allowed = f"process {holder} is running a job of this name in {path.parent}; use another name or workspace_root"
        raise ConfigError("name", name, allowed) from None
    except BaseException:
        os.close(lock)
        raise
    return lock


def _prepare(folder: Path, sites: Sequence[str]) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError("workspace_root", str(folder), "is a link or a file; a run needs a folder of its own there")
    if folder.is_dir():
        for entry in _entries_of_old_run(folder):
            _remove(folder / entry)
    _make_private(folder)
    folder.chmod(0o700)
    mark = {"schema_version": _SCHEMA_VERSION, "pid": os.getpid(), "entries": [*_OWN_ENTRIES, *sites]}
    # Written before anything else is: whatever this run leaves behind can be told from what is not its own.
    folder.joinpath(_MARK).write_text(json.dumps(mark) + "\n", encoding="utf-8")


def _entries_of_old_run(folder: Path) -> list[str]:
    if not any(folder.iterdir()):
        return []
    try:
        mark = json.loads(folder.joinpath(_MARK).read_text(encoding="utf-8"))
        return [check_name(entry) for entry in mark["entries"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        allowed = f"is not empty and was not made by a run; use another name, or {_OTHER_ROOT}"
        raise ConfigError("workspace_root", str(folder), allowed) from None


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
