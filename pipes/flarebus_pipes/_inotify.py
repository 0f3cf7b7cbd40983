"""Inotify: hears from the kernel that something in a folder changed. Linux only; elsewhere `Inotify.start` is None."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path

__all__ = ["IN_ARRIVED", "IN_LEFT", "IN_MADE", "Inotify", "file_system_of"]

IN_ARRIVED = 0x80
"""A file was moved here."""
IN_LEFT = 0x40 | 0x200
"""A file was moved away or removed."""
IN_MADE = 0x100 | 0x8
"""A file was made here, and what was written to it is there."""
_SELF = 0x400 | 0x800 | 0x1000000  # the folder itself was removed or moved; and it has to be a folder
_EVENT = struct.Struct("iIII")
_BUFFER_BYTES = 64 * 1024


class Inotify:
    """One inotify instance; from `start`, or None where there is none to have."""

    def __init__(self, handle: int, libc: ctypes.CDLL) -> None:
        self._handle = handle
        self._libc = libc

    @classmethod
    def start(cls) -> Inotify | None:
        """A new one; None on other systems, or when this user has as many as are allowed."""
        if sys.platform != "linux":
            return None
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "inotify_init1"):
            return None
        handle = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        return cls(handle, libc) if handle >= 0 else None

    def fileno(self) -> int:
        """For a poll: readable when something happened."""
        return self._handle

    def watch(self, folder: Path, mask: int) -> int:
        """Hear of `mask` in `folder`, and of its end; the number that its events carry, -1 if that cannot be."""
        return int(self._libc.inotify_add_watch(self._handle, os.fsencode(folder), mask | _SELF))

    def read(self) -> set[int]:
        """The numbers of the folders in which something happened since."""
        found: set[int] = set()
        while True:
            try:
                data = os.read(self._handle, _BUFFER_BYTES)
            except BlockingIOError:
                return found
            at = 0
            while at < len(data):
                number, _, _, name_bytes = _EVENT.unpack_from(data, at)
                found.add(number)
                at += _EVENT.size + name_bytes

    def close(self) -> None:
        """Stop. Not idempotent: the number may belong to somebody else by then."""
        os.close(self._handle)


def file_system_of(path: Path, mounts: str = "/proc/self/mountinfo") -> str:
    """The type of file system that `path` is on, such as ``ext4`` or ``nfs4``; "" where that cannot be known."""
    try:
        with open(mounts, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return ""
    place = path.resolve()
    best, found = -1, ""
    for line in lines:
        fields, _, rest = line.partition(" - ")
        point = Path(_plain(fields.split(" ")[4]))
        # Of two mounts at one point the later one covers the earlier.
        if place.is_relative_to(point) and len(point.parts) >= best:
            best, found = len(point.parts), rest.split(" ")[0]
    return found


def _plain(text: str) -> str:
    """A path of mountinfo without its escapes of blanks and the like."""
    for code in ("040", "011", "012", "134"):
        text = text.replace(f"\\{code}", chr(int(code, 8)))
    return text
