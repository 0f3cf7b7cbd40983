"""Segments: shared memory that has no name, and so is gone with the last process that has it.

A segment is a memory file; its descriptor goes to the other end over a socket, once, and both map it once. It belongs
to one end at a time: the sender writes it, the receiver has it until the last view is dropped, and says so. Then it is
written again, over pages that are there already: the first touch is what costs.
All of a segment is reserved when it is made, and it is sealed so that nobody can make it shorter: a mapping of it
never fails later.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import mmap
import os
import secrets
import stat
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from flarebus.errors import DecodeError
from flarebus_pipes._record import cut, room_for

__all__ = ["Mappings", "Segment", "SegmentPool", "available_memory"]

# Sizes are rounded up to this, so that models which differ by a counter use the same segments.
_UNIT = 64 * 1024
# So often a copy looks whether it is still wanted, and reports that it moves.
_STEP_BYTES = 16 * 1024 * 1024
# Segments that wait to be used again; more sizes than this do not alternate.
_MAX_SPARE = 2
# More than any honest sender has at once: a receiver maps no more.
_MAX_MAPPED = 64
# Linux; the module fcntl does not name them on other systems.
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1, 2, 4


class Segment:
    """Shared memory of this end."""

    __slots__ = ("handle", "holds", "known_by", "memory", "nbytes", "number")

    def __init__(self, number: int, nbytes: int) -> None:
        self.number = number
        self.nbytes = nbytes
        self.holds = ""
        """What was written there, if it may be sent again as it is."""
        self.known_by = 0
        """Which peer, counted by the pool, has it mapped."""
        self.handle = _make(nbytes)
        try:
            self.memory = np.frombuffer(mmap.mmap(self.handle, nbytes), np.uint8)
        except BaseException:
            os.close(self.handle)
            raise

    def close(self) -> None:
        """Let go of it here; the other end may still have it."""
        os.close(self.handle)


def available_memory() -> int | None:
    """Bytes that this process may still take, as the machine and its control group say; None if they do not."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        group = Path("/sys/fs/cgroup") / next(line[4:] for line in groups if line.startswith("0::/"))
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        found.append(limit - used + int(counts["inactive_file"]))
    return max(min(found), 0) if found else None


def _make(nbytes: int) -> int:
    """The descriptor of a new memory file, all of it reserved."""
    available = available_memory()
    if available is not None and nbytes > available:
        # Reserving it would have the system kill somebody instead of failing.
        raise OSError(errno.ENOMEM, f"no space for {nbytes} bytes of shared memory: {available} are available")
    handle = _memory_file()
    try:
        os.ftruncate(handle, nbytes)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, nbytes)
        with contextlib.suppress(OSError):  # not every kind of memory file can be sealed
            fcntl.fcntl(handle, _F_ADD_SEALS, _F_SEAL_SEAL | _F_SEAL_SHRINK | _F_SEAL_GROW)
    except OSError as error:
        os.close(handle)
        raise OSError(error.errno, f"no space for {nbytes} bytes of shared memory: {error.strerror}") from error
    return handle


def _memory_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("flarebus", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    # What `multiprocessing.shared_memory` is made of, without its table of names.
    posix = importlib.import_module("_posixshmem")
    name = f"/flarebus-{secrets.token_hex(8)}"
    handle = int(posix.shm_open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    # At once: what has no name cannot be left behind.
    posix.shm_unlink(name)
    return handle


class SegmentPool:
    """The segments of one sending end.

    Args:
        on_moved: called with the number of bytes that were just copied; raises to stop.
        on_dropped: called with the number of a segment that the other end knows and that will not be used again.
    """

    def __init__(self, on_moved: Callable[[int], None], on_dropped: Callable[[int], None]) -> None:
        self._on_moved = on_moved
        self._on_dropped = on_dropped
        self._spare: list[Segment] = []
        self._out: dict[int, Segment] = {}
        self._made = 0
        self._peers = 1
        self._lock = threading.Lock()

    def store(self, key: str, views: Sequence[memoryview]) -> Segment:
        """Copy buffers to a segment, one that came back if there is one of the size.

        What was stored under the same key, and came back without having been read, is not copied again.

        Raises:
            OSError: there is not that much memory.
        """
        nbytes = -(-max(room_for([view.nbytes for view in views]), 1) // _UNIT) * _UNIT
        segment = self._take(key, nbytes) or self._grow(nbytes)
        try:
            if segment.holds != key:
                segment.holds = ""
                self._copy(segment, views)
                segment.holds = key
        except BaseException:
            self._drop(segment)
            raise
        with self._lock:
            self._out[segment.number] = segment
        return segment

    def _take(self, key: str, nbytes: int) -> Segment | None:
        with self._lock:
            fitting = [segment for segment in self._spare if segment.nbytes == nbytes]
            held = [segment for segment in fitting if segment.holds == key]
            found = next(iter(held or fitting), None)
            if found is not None:
                self._spare.remove(found)
            return found

    def _grow(self, nbytes: int) -> Segment:
        with self._lock:
            dropped = [self._spare.pop(0) for _ in range(len(self._spare) - _MAX_SPARE + 1)]
        self._made += 1
        try:
            for segment in dropped:
                self._drop(segment)
            return Segment(self._made, nbytes)
        except OSError:
            with self._lock:
                dropped, self._spare = self._spare, []
            if not dropped:
                raise
            for segment in dropped:
                self._drop(segment)
            return Segment(self._made, nbytes)

    def _copy(self, segment: Segment, views: Sequence[memoryview]) -> None:
        begin = 0
        for view in views:
            source = np.frombuffer(view, np.uint8)
            for at in range(0, len(source), _STEP_BYTES):
                part = source[at : at + _STEP_BYTES]
                segment.memory[begin + at : begin + at + len(part)] = part
                self._on_moved(len(part))
            begin += len(source) + -len(source) % 64

    def _drop(self, segment: Segment) -> None:
        segment.close()
        if segment.known_by == self._peers:
            self._on_dropped(segment.number)

    def hand_over(self, number: int) -> int | None:
        """The descriptor that the peer needs to map a segment; -1 if it has it mapped, None if that is not out."""
        with self._lock:
            segment = self._out.get(number)
            if segment is None:
                return None
            is_known, segment.known_by = segment.known_by == self._peers, self._peers
            return -1 if is_known else segment.handle

    def settle(self, number: int) -> None:
        """The receiver has it, and may write there."""
        with self._lock:
            if number in self._out:
                self._out[number].holds = ""

    def take_back(self, number: int) -> None:
        """The receiver has let go of it, or never had it. Numbers that are not out are ignored."""
        with self._lock:
            segment = self._out.pop(number, None)
            if segment is not None:
                self._spare.append(segment)

    def forget(self, key: str) -> None:
        """What was stored under `key` will not be sent again."""
        with self._lock:
            for segment in (*self._spare, *self._out.values()):
                if segment.holds == key:
                    segment.holds = ""

    def reset(self) -> None:
        """The peer is gone: the next one knows none of them, and what this one had will not come back."""
        with self._lock:
            lost, self._out = list(self._out.values()), {}
            self._peers += 1
        for segment in lost:
            segment.close()

    def close(self) -> None:
        """Let go of all."""
        self.reset()
        with self._lock:
            spare, self._spare = self._spare, []
        for segment in spare:
            segment.close()


class Mappings:
    """The segments of the other end, as this one has them mapped. For one thread, but for what leases do at their end.

    Args:
        on_released: called with the number of a segment when the last view of its lease is dropped, on whatever thread
            that happens, the garbage collector's as well: it must not lock.
    """

    def __init__(self, on_released: Callable[[int], None]) -> None:
        self._on_released = on_released
        self._mapped: dict[int, mmap.mmap] = {}
        self._leased: set[int] = set()

    def add(self, number: int, handle: int) -> None:
        """Map a segment. The descriptor is not needed after that.

        Raises:
            DecodeError: it is no memory that can be relied on.
        """
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            raise DecodeError("a segment is no memory")
        if hasattr(os, "memfd_create") and not _seals(handle) & _F_SEAL_SHRINK:
            raise DecodeError("a segment is not sealed: it could be cut off")
        if len(self._mapped) >= _MAX_MAPPED or number in self._mapped:
            raise DecodeError(f"segment {number} is known already, or one too many")
        self._mapped[number] = mmap.mmap(handle, status.st_size)

    def lease(self, number: int, lengths: Sequence[int]) -> list[memoryview]:
        """The buffers in a segment: aligned, writable, the caller's until it drops them.

        Raises:
            DecodeError: there is no such segment, it is shorter than claimed, or in use.
        """
        memory = self._mapped.get(number)
        total = room_for(lengths)
        if memory is None or number in self._leased:
            raise DecodeError(f"segment {number} is not known, or not free")
        if total > len(memory):
            raise DecodeError(f"segment {number} has {len(memory)} bytes, its message claims {total}")
        # Arrays cut from the lease keep it alive through their base; it dies with the last of them.
        lease = np.frombuffer(memory, np.uint8)
        self._leased.add(number)
        weakref.finalize(lease, self._end_of_lease, number, os.getpid()).atexit = False
        return cut(lease.data, lengths)

    def _end_of_lease(self, number: int, pid: int) -> None:
        # A forked process has copies of the views, and its dropping them says nothing about the others.
        if os.getpid() == pid:
            self._leased.discard(number)
            self._on_released(number)

    def drop(self, number: int) -> None:
        """It will not be used again; views of it stay valid."""
        self._mapped.pop(number, None)


def _seals(handle: int) -> int:
    try:
        return fcntl.fcntl(handle, _F_GET_SEALS)
    except OSError:
        return 0
