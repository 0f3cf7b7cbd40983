"""Slabs: memory for what comes in, kept and used again from round to round.

The first touch of fresh memory costs more than the copy that fills it, so a slab that nobody looks at any more goes
back to its pool instead of to the operating system. Whoever holds an array on a slab holds the slab: it returns when
the last view is gone, never earlier. A pool with a folder keeps its slabs in unlinked files there, whose pages the
kernel may drop.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flarebus.message import Bundle
from flarebus.wire import ALIGNMENT

__all__ = ["SlabPool", "unbundle"]

# Below this the allocator of the process is as good.
SMALL_BYTES = 64 * 1024
_HUGE = 2 * 1024 * 1024


class SlabPool:
    """A pool of slabs of a few sizes.

    Args:
        folder: where to put slabs as files, or None for memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        # Whoever holds the lock may take from it; anybody may append, at any time.
        self._unused: list[mmap.mmap] = []
        self._mapped = self._most_leased = 0
        self._lock = threading.Lock()

    def take(self, lengths: Sequence[int]) -> list[memoryview]:
        """Writable, aligned, disjoint byte views of these lengths, all on one slab; contents are arbitrary.

        Raises:
            OSError: the folder's disk is full.
            MemoryError: there is not that much memory.
        """
        places, total = [], 0
        for length in lengths:
            places.append(total)
            total += -(-length // ALIGNMENT) * ALIGNMENT
        slab = self._slab(max(total, 1))
        return [slab[begin : begin + length] for begin, length in zip(places, lengths, strict=True)]

    def _slab(self, nbytes: int) -> memoryview:
        if nbytes < SMALL_BYTES and self._folder is None:
            raw = np.empty(nbytes + ALIGNMENT, np.uint8)
            return raw[-raw.ctypes.data % ALIGNMENT :].data
        unit = _HUGE if nbytes > _HUGE else mmap.PAGESIZE
        nbytes = -(-nbytes // unit) * unit
        memory = self._reuse(nbytes) or self._grow(nbytes)
        # Arrays cut from the lease keep it alive through their base; it dies with the last of them.
        lease = np.frombuffer(memory, np.uint8)
        # Appending needs no lock, and must not: the garbage collector calls this on a thread that may hold it.
        weakref.finalize(lease, self._unused.append, memory).atexit = False
        return lease.data

    def _reuse(self, nbytes: int) -> mmap.mmap | None:
        with self._lock:
            for index, memory in enumerate(self._unused):
                if len(memory) == nbytes:
                    return self._unused.pop(index)
        return None

    def _grow(self, nbytes: int) -> mmap.mmap:
        with self._lock:
            before = self._most_leased
            self._most_leased = max(before, self._leased() + nbytes)
            self._mapped += nbytes
            # Never more than was once in use together. The oldest go first: sizes that nobody asks for any more.
            while self._mapped > self._most_leased:
                self._mapped -= len(self._unused.pop(0))
        try:
            return self._map(nbytes)
        except BaseException:
            with self._lock:
                self._mapped -= nbytes
                self._most_leased = max(before, self._leased())
            raise

    def _map(self, nbytes: int) -> mmap.mmap:
        if self._folder is None:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            return memory
        with tempfile.TemporaryFile(dir=self._folder) as file:
            # Reserve now: a disk that fills up later would be a SIGBUS in the middle of a copy.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:
                file.truncate(nbytes)
            return mmap.mmap(file.fileno(), nbytes)

    @property
    def leased_bytes(self) -> int:
        """Bytes of the slabs in use; small ones, which no pool keeps, do not count."""
        with self._lock:
            return self._leased()

    def _leased(self) -> int:
        return self._mapped - sum(map(len, self._unused))

    def clear(self) -> None:
        """Give all unused slabs back to the system."""
        with self._lock:
            while self._unused:
                self._mapped -= len(self._unused.pop())


def unbundle(bundle: Bundle) -> list[memoryview]:
    """The buffers of a bundle, copied once: writable, aligned, the caller's own."""
    raw = np.empty(len(bundle.data) + ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    raw = raw[begin : begin + len(bundle.data)]
    raw[:] = np.frombuffer(bundle.data, np.uint8)
    view = raw.data
    found, begin = [], 0
    for length in bundle.lengths:
        found.append(view[begin : begin + length])
        begin += length + -length % ALIGNMENT
    return found
