"""SocketPlace: the private folder in which the two ends of a `ShmPipe` find each other's socket.

Not in the site's workspace: the path of a socket may have little more than 100 bytes. Its name follows from what both
ends know. The end that leaves last removes it; what ends that were killed have left, the next one to open does.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
import time
from pathlib import Path

from flarebus.address import check_name
from flarebus.errors import ConfigError
from flarebus.pipes import Mode
from flarebus_pipes._owner import Owner, claim, is_dead, is_surely_dead, locked, read_owner

__all__ = ["SocketPlace", "short_root"]

_PREFIX = "flarebus-shm-"
_SOCKET = "s"
_SOCKETS = (_SOCKET, f"{_SOCKET}.new")
_ALL = (*_SOCKETS, *(f"{mode.value}.owner" for mode in Mode))
_HASH_DIGITS = 16
# Of the address of a socket, without the zero at its end: 108 bytes on Linux, 104 elsewhere.
_MAX_PATH_BYTES = 103
_LONGEST_ROOT = _MAX_PATH_BYTES - len(f"/{_PREFIX}/{_SOCKET}.new") - _HASH_DIGITS
# Another end may remove the empty folder between any two steps of making it.
_TRIES = 100
# A younger folder without owners may belong to an end that is just coming.
_STALE_S = 60.0


def short_root(root_path: str) -> str:
    """`root_path`, or the first folder for temporary things whose path is short enough.

    Raises:
        ConfigError: it is too long, or there is none.
    """
    if root_path:
        root = os.path.abspath(root_path)
        if len(os.fsencode(root)) > _LONGEST_ROOT:
            raise ConfigError("root_path", root_path, f"at most {_LONGEST_ROOT} bytes: it will hold a socket")
        return root
    for candidate in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):
        if candidate and len(os.fsencode(candidate)) <= _LONGEST_ROOT and os.access(candidate, os.W_OK | os.X_OK):
            return os.path.abspath(candidate)
    raise ConfigError(
        "TMPDIR", tempfile.gettempdir(), f"a writable folder with a path of at most {_LONGEST_ROOT} bytes"
    )


class SocketPlace:
    """The place of one channel, for one end.

    Args:
        root: where its folder is made.
        identity: what tells this pipe from others.
        name: the channel.
        mode: of this end.

    Raises:
        ConfigError: the channel's name breaks the grammar.
    """

    def __init__(self, root: Path, identity: tuple[str, ...], name: str, mode: Mode) -> None:
        words = "\0".join((str(os.geteuid()), *identity, check_name(name)))
        self.root = root
        self.path = root / f"{_PREFIX}{hashlib.sha256(words.encode()).hexdigest()[:_HASH_DIGITS]}"
        self.socket = self.path / _SOCKET
        self.record = self.path / f"{mode.value}.owner"
        self.name = name
        self.mode = mode
        self._made_root = False

    def enter(self) -> Owner:
        """Take this end's place; sweep up after dead ones.

        Raises:
            UsageError: another live process has it.
            OSError: the folder cannot be made, or is somebody else's.
        """
        self._sweep_others()
        for _ in range(_TRIES):
            try:
                if not self.root.exists():
                    self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
                    self._made_root = True
                self.path.mkdir(mode=0o700, exist_ok=True)
                self._check()
                with locked(self.path):
                    owner = claim(self.record, f"the {self.mode.value} end of channel {self.name!r}")
                    for record in filter(is_dead, self._records()):
                        record.unlink(missing_ok=True)
                    if self.mode is Mode.PASSIVE:
                        _remove(self.path, _SOCKETS)
            except FileNotFoundError:
                continue
            return owner
        raise FileNotFoundError(errno.ENOENT, "it is removed again and again", str(self.path))

    def leave(self, owner: Owner) -> None:
        """Give the place up; remove the folder if nobody else is there."""
        mine = read_owner(self.record)
        if mine is None or mine.nonce != owner.nonce:
            return
        with contextlib.suppress(OSError), locked(self.path):
            if self.mode is Mode.PASSIVE:
                _remove(self.path, _SOCKETS)
            self.record.unlink(missing_ok=True)
            if all(map(is_surely_dead, self._records())):
                _remove(self.path, _ALL)
        if self._made_root:
            with contextlib.suppress(OSError):
                self.root.rmdir()

    def _records(self) -> list[Path]:
        return [self.path / f"{mode.value}.owner" for mode in Mode]

    def _check(self) -> None:
        found = self.path.stat(follow_symlinks=False)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise PermissionError(errno.EPERM, "it is not a folder that only this user may enter", str(self.path))

    def _sweep_others(self) -> None:
        for folder in self.root.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                found = folder.stat(follow_symlinks=False)
                if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode) or folder == self.path:
                    continue
                records = [folder / f"{mode.value}.owner" for mode in Mode]
                if not any(record.exists() for record in records) and time.time() - found.st_mtime < _STALE_S:
                    continue
                with locked(folder):
                    if all(is_surely_dead(record) for record in records):
                        _remove(folder, _ALL)


def _remove(folder: Path, names: tuple[str, ...]) -> None:
    # By name, so that nothing else can ever be meant.
    for name in names:
        with contextlib.suppress(OSError):
            folder.joinpath(name).unlink(missing_ok=True)
    if names == _ALL:
        with contextlib.suppress(OSError):
            folder.rmdir()
