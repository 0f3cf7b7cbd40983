"""Folder: what a `FilePipe` has on disk for one channel, and the file operations that hold across machines.

    <root>/<token>/<site>/<channel>/
        ACTIVE.owner PASSIVE.owner   which process holds each end
        x/ y/                        messages on their way: ACTIVE reads x and writes y
        t/                           what is being made or taken, and the buffers that are too big to ride along

Nothing here relies on locks or on files that are open but removed, which mean something else on a network file system.
What two processes may want at once is settled by a rename: it happens or it does not. A lock only makes the rare
races of two ends that come and go at the same moment rarer still, on file systems that have one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from pathlib import Path

from flarebus.address import safe_path
from flarebus.errors import ConfigError, DecodeError
from flarebus.pipes import Mode
from flarebus_pipes._owner import Owner, claim, is_dead, is_surely_dead, locked, read_owner
from flarebus_pipes._record import MAX_RECORD_BYTES, aligned

__all__ = ["FREE", "LENT", "OTHER", "SEQUENCE_DIGITS", "Folder", "is_message_name"]

OTHER = {Mode.ACTIVE: Mode.PASSIVE, Mode.PASSIVE: Mode.ACTIVE}
LENT, FREE = ".lent", ".free"
"""Behind the name of a segment: its reader has it mapped; its reader has let go of it."""
SEQUENCE_DIGITS = 16

_SUBFOLDERS = ("x", "y", "t")
_READS = {Mode.ACTIVE: "x", Mode.PASSIVE: "y"}
_MESSAGE = re.compile(rf"[0-9]{{{SEQUENCE_DIGITS}}}\.[A-Za-z0-9_.]+")
_TEMPORARY = re.compile(r"(ACTIVE|PASSIVE)-[0-9a-f]{16}[-.].*")
_RECORD = re.compile(r"(ACTIVE|PASSIVE)\.owner")
_PROBE = re.compile(r"(ACTIVE|PASSIVE)\.owner\.now-[0-9a-f]+")
# Another end may remove an empty folder between any two steps of making it.
_TRIES = 100
# What says that a file or its folder is not there any more, also on a network file system.
_GONE = frozenset({errno.ENOENT, errno.ESTALE, errno.ENOTDIR})


def is_message_name(name: str) -> bool:
    """Whether a file of this name may be a message."""
    return _MESSAGE.fullmatch(name) is not None


class Folder:
    """The folder of one channel, for one end.

    Args:
        root: below it everything is ours.
        names: of the folders below it, the channel last.
        mode: of this end.
        owns_root: whether the root is ours as well, to be removed when it is empty. It is if this end makes it.

    Raises:
        ConfigError: a name cannot be one of a folder.
    """

    def __init__(self, root: Path, names: tuple[str, ...], mode: Mode, owns_root: bool = False) -> None:
        self.root = root
        self.path = safe_path(root, *names)
        self.mode = mode
        self.inbox = self.path / _READS[mode]
        self.outbox = self.path / _READS[OTHER[mode]]
        self.temporary = self.path / "t"
        self.record = self.path / f"{mode.value}.owner"
        self.peer_record = self.path / f"{OTHER[mode].value}.owner"
        self._depth = len(names)
        self._owns_root = owns_root

    # -- coming and going --

    def enter(self) -> Owner:
        """Make the folder, take this end's place in it, and remove what dead ends have left.

        Raises:
            UsageError: another live process has the place.
            OSError: the folder cannot be made, or others may write to it.
        """
        for _ in range(_TRIES):
            try:
                self._make()
                with locked(self.path):
                    owner = claim(self.record, f"the {self.mode.value} end of {self.path}")
                    self._sweep(whole=not self.has_live_peer())
            except FileNotFoundError:
                continue
            self._sweep_neighbours()
            return owner
        raise FileNotFoundError(errno.ENOENT, "it is removed again and again", str(self.path))

    def leave(self, owner: Owner) -> None:
        """Remove what this end made, and all the rest if it is the last one. Never raises for what is gone."""
        mine = read_owner(self.record)
        if mine is None or mine.nonce != owner.nonce:
            return  # somebody else has this place now, or nobody has a folder
        with contextlib.suppress(OSError), locked(self.path):
            # First: of two ends that leave at once, at least one then finds itself to be the last.
            self.record.unlink(missing_ok=True)
            self._sweep(whole=not self.has_live_peer())
        self._remove_empty()

    def has_live_peer(self) -> bool:
        """Whether the other end is open in a process that lives."""
        return self.peer_record.exists() and not is_dead(self.peer_record)

    def _make(self) -> None:
        if not self.root.exists():
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._owns_root = True
        steps = self.path.relative_to(self.root).parts
        for count in range(1, len(steps) + 1):
            self.root.joinpath(*steps[:count]).mkdir(mode=0o700, exist_ok=True)
        if stat.S_IMODE(self.path.stat().st_mode) & 0o077:
            self.path.chmod(0o700)  # it fails where it is somebody else's
        for name in _SUBFOLDERS:
            (self.path / name).mkdir(mode=0o700, exist_ok=True)

    def _sweep(self, whole: bool) -> None:
        """Remove what no live end needs; called by an end that has only just come, or is about to go."""
        for folder in (self.outbox, self.inbox) if whole else (self.outbox,):
            _remove(folder, _MESSAGE)
        if whole:
            _remove(self.temporary, _TEMPORARY)
            self.peer_record.unlink(missing_ok=True)
            return
        with contextlib.suppress(OSError):
            for name in os.listdir(self.temporary):
                # What the peer has mapped is the peer's to remove; what this end has mapped of its is this end's.
                is_ours = name.startswith(f"{self.mode.value}-") is not name.endswith(LENT)
                if _TEMPORARY.fullmatch(name) and is_ours:
                    (self.temporary / name).unlink(missing_ok=True)

    def _sweep_neighbours(self) -> None:
        """Remove what other jobs below the same root have left whose processes are all dead."""
        for path in self.root.glob("/".join("*" * self._depth)):
            if path == self.path or path.is_symlink() or not all((path / name).is_dir() for name in _SUBFOLDERS):
                continue
            records = [path / f"{mode.value}.owner" for mode in Mode]
            with contextlib.suppress(OSError, ConfigError):
                if not all(is_surely_dead(record) for record in records):
                    continue
                neighbour = Folder(self.root, path.relative_to(self.root).parts, Mode.ACTIVE)
                with locked(path):
                    if all(is_surely_dead(record) for record in records):
                        neighbour._sweep(whole=True)
                        _remove(path, _RECORD)
                neighbour._remove_empty()

    def _remove_empty(self) -> None:
        with contextlib.suppress(OSError):
            if any(map(_RECORD.fullmatch, os.listdir(self.path))):
                return
            _remove(self.path, _PROBE)
            for name in _SUBFOLDERS:
                with contextlib.suppress(FileNotFoundError):
                    (self.path / name).rmdir()
            for path in (self.path, *self.path.parents):
                if path == self.root and not self._owns_root:
                    return
                path.rmdir()
                if path == self.root:
                    return

    def revive(self) -> None:
        """Make again what subfolders are missing, for somebody who has something to put there.

        Raises:
            BrokenPipeError: the whole folder is gone.
        """
        self.check()
        try:
            for name in _SUBFOLDERS:
                (self.path / name).mkdir(mode=0o700, exist_ok=True)
        except FileNotFoundError as error:
            raise self._gone() from error

    def check(self) -> None:
        """Raise BrokenPipeError if the folder is gone."""
        try:
            self.record.stat()
        except OSError as error:
            if error.errno not in _GONE:
                raise
            raise self._gone() from error

    def _gone(self) -> BrokenPipeError:
        return BrokenPipeError(f"the folder {self.path} of this pipe is gone")

    # -- messages --

    def waiting(self) -> list[str]:
        """Names of what waits to be read, in the order of sending.

        Raises:
            BrokenPipeError: the folder is gone.
        """
        try:
            names = os.listdir(self.inbox)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            self.check()
            return []  # whoever sends makes it again
        # A name that begins with a dot belongs to the file system.
        return sorted(name for name in names if not name.startswith("."))

    def put(self, name: str, data: bytes, nonce: str) -> None:
        """Send a file of this name: it is there whole, or not at all.

        Raises:
            OSError: the disk is full, or the folder is not writable.
            BrokenPipeError: the folder is gone.
        """
        path = self.temporary / f"{self.mode.value}-{nonce}.new"
        for is_last_try in (False, True):
            try:
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                with open(handle, "wb", buffering=0, closefd=True) as file:
                    left = memoryview(data)
                    while left:
                        left = left[file.write(left) :]
                os.rename(path, self.outbox / name)
            except OSError as error:
                if error.errno in _GONE and not is_last_try:
                    self.revive()
                    continue
                with contextlib.suppress(OSError):
                    path.unlink()
                raise OSError(error.errno, f"{error.strerror} (a message of {len(data)} bytes)", str(path)) from error
            return

    def is_read(self, name: str) -> bool:
        """Whether the peer has taken the message of this name.

        Raises:
            BrokenPipeError: the folder is gone, so that nobody can know.
        """
        try:
            # Listing makes a network file system look again; it may be behind, so an absence is looked at twice.
            if name in os.listdir(self.outbox):
                return False
        except OSError as error:
            if error.errno not in _GONE:
                raise
        try:
            (self.outbox / name).lstat()
        except OSError as error:
            if error.errno not in _GONE:
                raise
            self.check()  # it is no answer if everything is gone
            return True
        return False

    def withdraw(self, name: str, nonce: str) -> bool:
        """Take back what was put; False if the peer has it."""
        return self._take(self.outbox / name, f"{nonce}.back-{name[:SEQUENCE_DIGITS]}")

    def accept(self, name: str, nonce: str) -> bool:
        """Take a message that waits; False if its sender has withdrawn it."""
        return self._take(self.inbox / name, f"{nonce}.read-{name[:SEQUENCE_DIGITS]}")

    def _take(self, path: Path, to: str) -> bool:
        target = self.temporary / f"{self.mode.value}-{to}"
        try:
            os.rename(path, target)
        except OSError as error:
            # A request to a file server may be repeated, and the repetition does not find what the first one moved.
            if error.errno not in _GONE or not target.exists():
                return False
        with contextlib.suppress(OSError):
            target.unlink()
            return True
        with contextlib.suppress(OSError):
            target.rmdir()  # no message of ours, but it has to go
        return True

    def read(self, name: str) -> memoryview | None:
        """The bytes of a message that waits, aligned and writable; None if it does not wait any more.

        Raises:
            DecodeError: it is no file, or too long to be a message.
        """
        try:
            handle = os.open(self.inbox / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise DecodeError(f"{self.inbox / name} is no message: {error.strerror}") from error
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_RECORD_BYTES:
                raise DecodeError(f"{self.inbox / name} is no message: {found.st_size} bytes")
            data = aligned(found.st_size)
            got = os.preadv(handle, [data], 0) if found.st_size else 0
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise
        finally:
            os.close(handle)
        if got != found.st_size:
            raise DecodeError(f"{self.inbox / name} ends after {got} of {found.st_size} bytes")
        return data


def _remove(folder: Path, pattern: re.Pattern[str]) -> None:
    """Remove the files there whose names match, so that nothing else can ever be meant."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if pattern.fullmatch(name):
                with contextlib.suppress(OSError):
                    (folder / name).unlink()
