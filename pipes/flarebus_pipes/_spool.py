"""Spools: the files that hold the buffers of a `FilePipe` which are too big to ride in a message.

A file belongs to one end at a time and changes hands by a rename, so nobody ever writes where somebody else reads:

    NAME         the sender's: being written, or waiting with its message
    NAME.lent    the reader's: mapped, and written to as the receiver likes
    NAME.free    the sender's again: the reader has dropped the last view

So the receiver may get the file's own pages, shared: what it writes there costs no memory that the kernel could not
drop, and nobody sees it. Only where a mapped write may fail or would travel (a network file system, one that copies
on writing) is the mapping private; the pages that the receiver changes are then memory of its own. The sender writes
the next message over the pages of a file that came back, which costs a copy; a fresh file costs several.
Every use of a file has a name of its own, so a reader that is late finds nothing instead of something else.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import stat
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from flarebus.errors import DecodeError
from flarebus_pipes._folder import FREE, LENT, Folder
from flarebus_pipes._record import cut, room_for

__all__ = ["Borrower", "Spool"]

# Sizes are rounded up to this, so that models which differ by a counter use the same files.
_UNIT = 64 * 1024
# So often a write looks whether it is still wanted, and reports that it moves.
_STEP_BYTES = 16 * 1024 * 1024
# As many parts as one system call takes.
_MAX_PARTS = 1024
# Files that wait to be used again; more sizes than this do not alternate.
_MAX_SPARE = 2
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


class _File:
    """One file of this end."""

    __slots__ = ("holds", "name", "nbytes", "number", "uses")

    def __init__(self, number: int, nbytes: int) -> None:
        self.number = number
        self.nbytes = nbytes
        self.name = ""
        self.uses = 0
        self.holds = ""
        """What was written there, if it may be sent again as it is."""


class Spool:
    """The files in which one end puts buffers. Not for several threads at once, but for `forget`.

    Args:
        folder: where.
        nonce: of this end.
        reserves: whether to reserve space first: cheap on a local disk, a write of everything over a network.
        on_moved: called with the number of bytes that were just written; raises to stop.
    """

    def __init__(self, folder: Folder, nonce: str, reserves: bool, on_moved: Callable[[int], None]) -> None:
        self._folder = folder
        self._stem = f"{folder.mode.value}-{nonce}"
        self._reserves = reserves and hasattr(os, "posix_fallocate")
        self._on_moved = on_moved
        self._spare: list[_File] = []
        self._out: dict[str, _File] = {}
        self._made = 0

    def store(self, key: str, views: Sequence[memoryview]) -> str:
        """Write buffers to a file, the one that came back earliest if there is one of the size; its name.

        What was stored under the same key and was not read is not written again.

        Raises:
            OSError: the disk is full; nothing is left of it.
        """
        self._reclaim()
        nbytes = -(-max(room_for([view.nbytes for view in views]), 1) // _UNIT) * _UNIT
        fitting = [file for file in self._spare if file.nbytes == nbytes]
        held = [file for file in fitting if file.holds == key]
        file = next(iter(held or fitting), None)
        if file is None:
            file = self._grow(nbytes)
        else:
            self._spare.remove(file)
            self._rename(file, file.name)
        if file.holds != key:
            file.holds = ""
            try:
                self._write(file, views)
            except BaseException:
                self._unlink(file)
                raise
        file.holds = key
        self._out[file.name] = file
        return file.name

    def forget(self, key: str) -> None:
        """What was stored under `key` will not be sent again."""
        for file in (*self._spare, *self._out.values()):
            if file.holds == key:
                file.holds = ""

    def _rename(self, file: _File, old: str) -> None:
        file.uses += 1
        file.name = f"{self._stem}-{file.number}-{file.uses}"
        os.rename(self._folder.temporary / old, self._folder.temporary / file.name)

    def _reclaim(self) -> None:
        """Take back what readers have let go of, and what no reader ever had."""
        for name, file in tuple(self._out.items()):
            for old in (name + FREE, name):
                try:
                    self._rename(file, old)
                except OSError:
                    continue
                if old != name:
                    file.holds = ""  # a receiver may have written there
                del self._out[name]
                self._spare.append(file)
                break
            else:
                if not (self._folder.temporary / (name + LENT)).exists():
                    del self._out[name]  # the reader went and took it along

    def _grow(self, nbytes: int) -> _File:
        while len(self._spare) >= _MAX_SPARE:
            self._unlink(self._spare.pop(0))
        try:
            return self._make(nbytes)
        except OSError as error:
            if error.errno not in _NO_SPACE or not self._spare:
                raise
        while self._spare:
            self._unlink(self._spare.pop())
        return self._make(nbytes)

    def _make(self, nbytes: int) -> _File:
        self._made += 1
        file = _File(self._made, nbytes)
        file.name = f"{self._stem}-{file.number}-0"
        path = self._folder.temporary / file.name
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            self._folder.revive()
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(handle, nbytes)
            if self._reserves:
                _reserve(handle, nbytes)
        except OSError as error:
            self._unlink(file)
            raise OSError(error.errno, f"{error.strerror} (no room for {nbytes} bytes)", str(path)) from error
        finally:
            os.close(handle)
        return file

    def _write(self, file: _File, views: Sequence[memoryview]) -> None:
        """From the arrays into the file, in steps; closed before anybody hears of it, so that all of it is there."""
        path = self._folder.temporary / file.name
        handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            at = 0
            for parts in _steps(views):
                left = [part for part in parts if part]
                while left:
                    count = os.pwritev(handle, left, at)
                    at += count
                    while left and count >= len(left[0]):
                        count -= len(left.pop(0))
                    if count:
                        left[0] = left[0][count:]
                self._on_moved(sum(map(len, parts)))
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise OSError(error.errno, f"{error.strerror} (no room for {file.nbytes} bytes)", str(path)) from error
        finally:
            os.close(handle)

    def _unlink(self, file: _File) -> None:
        with contextlib.suppress(OSError):
            (self._folder.temporary / file.name).unlink()


def _reserve(handle: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(handle, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise  # where it cannot be done, writing finds out


_PADDING = memoryview(bytes(64))


def _steps(views: Sequence[memoryview]) -> list[list[memoryview]]:
    """The buffers with their padding, cut into lists for one system call each."""
    steps: list[list[memoryview]] = [[]]
    held = 0
    for view in views:
        for begin in range(0, len(view), _STEP_BYTES):
            part = view[begin : begin + _STEP_BYTES]
            if held + len(part) > _STEP_BYTES or len(steps[-1]) + 2 > _MAX_PARTS:
                steps.append([])
                held = 0
            steps[-1].append(part)
            held += len(part)
        if padding := -len(view) % 64:
            steps[-1].append(_PADDING[:padding])
            held += padding
    return steps


class Borrower:
    """Maps the files of the other end.

    Args:
        folder: where they are.
        in_place: whether the receiver may get the pages of the file itself.
        is_peers: whether a nonce is that of the peer as it is now, who wants its files back.
    """

    def __init__(self, folder: Folder, in_place: bool, is_peers: Callable[[str], bool]) -> None:
        self._folder = folder
        self._flags = mmap.MAP_SHARED if in_place else mmap.MAP_PRIVATE
        self._is_peers = is_peers
        self._name = re.compile(rf"{'PASSIVE' if folder.mode.value == 'ACTIVE' else 'ACTIVE'}-([0-9a-f]{{16}})-\d+-\d+")

    def borrow(self, name: str, lengths: Sequence[int]) -> list[memoryview] | None:
        """The buffers in a file, mapped: aligned, writable, the caller's until it drops them. None if it is gone.

        Raises:
            DecodeError: it is no file of the peer's, or shorter than its message claims.
        """
        found = self._name.fullmatch(name)
        if not found:
            raise DecodeError(f"a message names a file that cannot be its own: {name:.80}")
        lent = self._folder.temporary / (name + LENT)
        try:
            os.rename(self._folder.temporary / name, lent)
            handle = os.open(lent, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ESTALE:
                return None
            raise DecodeError(f"{lent} cannot be mapped: {error.strerror}") from error
        giving_back = (lent, self._folder.temporary / (name + FREE), found[1], os.getpid())
        try:
            status = os.fstat(handle)
            total = room_for(lengths)
            if not stat.S_ISREG(status.st_mode) or status.st_size < total:
                raise DecodeError(f"{lent} has {status.st_size} bytes, its message claims {total}")
            memory = mmap.mmap(handle, max(total, 1), flags=self._flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            self._give_back(*giving_back)
            raise
        finally:
            os.close(handle)
        # Arrays cut from the lease keep it alive through their base; it dies with the last of them.
        lease = np.frombuffer(memory, np.uint8)
        weakref.finalize(lease, self._give_back, *giving_back).atexit = False
        return cut(lease.data, lengths)

    def _give_back(self, lent: Path, free: Path, nonce: str, pid: int) -> None:
        # On whatever thread drops the last view, the garbage collector's as well: no locks. A forked process has
        # copies of the views, and its dropping them says nothing about the others.
        if os.getpid() != pid:
            return
        with contextlib.suppress(OSError):
            if self._is_peers(nonce):
                os.rename(lent, free)
            else:
                lent.unlink()
