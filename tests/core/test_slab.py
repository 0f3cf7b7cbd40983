"""Slabs: whoever looks at one has it for themselves, and the pool never holds more than was needed at once."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flarebus.message import Bundle
from flarebus.slab import SMALL_BYTES, SlabPool, unbundle
from flarebus.wire import ALIGNMENT, bundle
from tests.core.halves import WHICH, explore, thorough

PAGE = mmap.PAGESIZE
BIG = 25 * PAGE

assert SMALL_BYTES < BIG


class CountedMap(mmap.mmap):
    """Memory that is counted as long as it is mapped."""

    living: ClassVar[weakref.WeakSet[CountedMap]] = weakref.WeakSet()
    made = 0

    def __new__(cls, *args: int, **more: int) -> CountedMap:
        made = super().__new__(cls, *args, **more)
        cls.living.add(made)
        cls.made += 1
        return made

    __hash__ = object.__hash__


def mapped_bytes() -> int:
    """Bytes of all maps that pools have now."""
    return sum(map(len, CountedMap.living))


@pytest.fixture(autouse=True)
def _counted() -> Iterator[None]:
    CountedMap.living = weakref.WeakSet()
    CountedMap.made = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmap, "mmap", CountedMap)
        yield


def place(view: memoryview) -> int:
    """Where a view begins in memory; keeps nothing of it."""
    return int(np.frombuffer(view, np.uint8).ctypes.data)


@given(st.lists(st.integers(0, 3000) | st.integers(0, 2 * BIG), max_size=8), st.booleans())
@thorough(60)
def test_views_are_writable_aligned_and_apart(lengths: list[int], in_files: bool) -> None:
    """Whatever the lengths: each view has its own, on a cache line, and writing one changes no other."""
    pool = SlabPool(Path(tempfile.gettempdir()) if in_files else None)
    views = pool.take(lengths)
    for index, view in enumerate(views):
        view[:] = bytes([index + 1]) * len(view)

    assert [view.nbytes for view in views] == lengths
    assert all(place(view) % ALIGNMENT == 0 for view in views if view)
    assert all(view.tobytes() == bytes([index + 1]) * len(view) for index, view in enumerate(views))
    assert not any(view.readonly for view in views)


# What people make of a view; the view itself is not kept.
DERIVED: dict[str, Callable[[memoryview], object]] = {
    "view": lambda view: view,
    "slice": lambda view: view[100:200],
    "cast": lambda view: view[: len(view) // 8 * 8].cast("q"),
    "array": lambda view: np.frombuffer(view, np.uint8),
    "numbers": lambda view: np.frombuffer(view[: len(view) // 8 * 8], np.int64),
    "every other": lambda view: np.asarray(view)[1::2],
    "transposed": lambda view: np.asarray(view)[:1000].reshape(10, 100).T,
    "one number": lambda view: np.frombuffer(view, np.int16, count=1)[0:1].reshape(()),
}


class PoolMachine(RuleBasedStateMachine):
    """Slabs that are taken, looked at in all ways, and let go in any order."""

    folder: Path | None = None

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlabPool(self.folder)
        # What earlier machines left is not ours to count.
        CountedMap.living = weakref.WeakSet()
        self.held: list[tuple[int, object, np.ndarray]] = []
        self.most = 0

    @rule(pages=st.sampled_from([17, 18, 18, 20, 40]), kind=st.sampled_from(sorted(DERIVED)), seed=st.integers(0, 1000))
    def take(self, pages: int, kind: str, seed: int) -> None:
        [view] = self.pool.take([pages * PAGE - 5])
        view[:] = Random(seed).randbytes(len(view))
        derived = DERIVED[kind](view)
        self.held.append((pages * PAGE, derived, np.array(derived)))
        self.most = max(self.most, self.leased())

    @precondition(lambda self: self.held)
    @rule(which=WHICH)
    def let_go(self, which: int) -> None:
        self.held.pop(which % len(self.held))

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        assert mapped_bytes() == self.leased()

    def leased(self) -> int:
        return sum(nbytes for nbytes, _, _ in self.held)

    @invariant()
    def nobody_else_writes_what_somebody_looks_at(self) -> None:
        for _, derived, content in self.held:
            assert np.array_equal(np.asarray(derived), content)

    @invariant()
    def memory_is_bounded_by_what_was_needed_at_once(self) -> None:
        assert self.pool.leased_bytes == self.leased()
        assert self.leased() <= mapped_bytes() <= self.most


@pytest.mark.parametrize("in_files", [False, True])
def test_a_slab_belongs_to_whoever_looks_at_it(tmp_path: Path, in_files: bool) -> None:
    """It is used again only after the last view of any kind is gone, and no more is kept than was in use together."""

    class Machine(PoolMachine):
        folder = tmp_path if in_files else None

    explore(Machine, examples=40, steps=30)


def test_a_slab_is_used_again() -> None:
    """The second round gets the memory of the first, whose pages are there already; another size does not."""
    pool = SlabPool()
    [view] = pool.take([BIG])
    first = place(view)
    del view
    [view] = pool.take([BIG - 3])
    assert place(view) == first
    assert CountedMap.made == 1
    [other] = pool.take([BIG])
    assert place(other) != first
    del view, other
    views = [pool.take([BIG]) for _ in range(2)]
    assert CountedMap.made == 2
    del views
    pool.take([BIG - 2 * PAGE])

    assert CountedMap.made == 3


def test_the_oldest_slab_makes_room() -> None:
    """When another size is wanted, what was given back last is kept."""
    pool = SlabPool()
    old, new = pool.take([BIG]), pool.take([2 * BIG])
    del old
    del new
    pool.take([BIG - PAGE])
    assert CountedMap.made == 3
    pool.take([2 * BIG])

    assert CountedMap.made == 3


@pytest.mark.parametrize("kind", sorted(DERIVED))
def test_any_view_keeps_its_slab(kind: str) -> None:
    """While anything made of it lives, its slab is leased; when that is gone, it is not, without help."""
    pool = SlabPool()
    derived = DERIVED[kind](pool.take([BIG])[0])
    assert pool.leased_bytes == BIG
    del derived

    assert pool.leased_bytes == 0


def test_one_of_many_views_keeps_them_all() -> None:
    """Views that were taken together come back together."""
    pool = SlabPool()
    views = pool.take([BIG, 1, 0, BIG])
    leased = pool.leased_bytes
    last = views[1]
    del views
    assert pool.leased_bytes == leased > 2 * BIG
    del last

    assert pool.leased_bytes == 0


def test_small_slabs_are_none_of_the_pools_business() -> None:
    """They come from the process and go back to it; only in a folder every byte counts."""
    pool = SlabPool()
    views = pool.take([SMALL_BYTES // 2])

    assert views
    assert pool.leased_bytes == 0
    assert mapped_bytes() == 0


def test_huge_slabs_are_rounded_to_huge_pages() -> None:
    """Beyond 2 MiB sizes that differ a little share slabs, and pages are large."""
    pool = SlabPool()
    views = pool.take([(2 << 20) + 1])
    assert pool.leased_bytes == 4 << 20
    del views
    [view] = pool.take([3 << 20])

    assert pool.leased_bytes == mapped_bytes() == 4 << 20
    assert len(view) == 3 << 20


def test_files_leave_no_trace(tmp_path: Path) -> None:
    """Slabs of a folder are files without a name, small ones too, and gone with the process."""
    pool = SlabPool(tmp_path)
    [view] = pool.take([10])
    view[:] = b"0123456789"

    assert list(tmp_path.iterdir()) == []
    assert pool.leased_bytes == PAGE
    assert view.tobytes() == b"0123456789"


def test_a_full_disk_is_an_error_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The space is reserved before anybody writes; if there is none the pool is as it was."""
    pool = SlabPool(tmp_path)

    def refuse(_fd: int, _first: int, _nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(OSError, match="No space"):
            pool.take([1000 * PAGE])
    assert pool.leased_bytes == mapped_bytes() == 0
    assert list(tmp_path.iterdir()) == []
    for pages in (1, 2, 3, 4):
        pool.take([pages * PAGE])

    # What could not be had is not what was once in use: no more than the largest of these is kept.
    assert mapped_bytes() == 4 * PAGE


def test_files_work_where_space_cannot_be_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On systems without that call a file is only made as long as it must be."""
    monkeypatch.delattr(os, "posix_fallocate")
    [view] = SlabPool(tmp_path).take([PAGE + 1])
    view[PAGE] = 7

    assert view[PAGE] == 7


def test_no_huge_pages_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems that do not know them give plain memory."""
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)

    assert len(SlabPool().take([BIG])[0]) == BIG


def test_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    """The error is the system's own, and nothing is leased."""
    pool = SlabPool(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        pool.take([10])

    assert pool.leased_bytes == 0


@pytest.mark.timeout(20)
def test_the_garbage_collector_may_give_back_at_any_point() -> None:
    """A view in a cycle is let go wherever memory is asked for next, also inside the pool that it belongs to."""
    pool = SlabPool()
    views = pool.take([BIG])
    threshold = gc.get_threshold()
    gc.freeze()
    try:
        for count in range(1, 40):
            gc.collect()
            gc.disable()
            cycle: list[object] = [pool.take([BIG])]
            cycle.append(cycle)
            del cycle
            gc.set_threshold(count)
            gc.enable()
            pool.take([2 * BIG])
            assert pool.leased_bytes >= len(views[0])
    finally:
        gc.set_threshold(*threshold)
        gc.enable()
        gc.unfreeze()
    gc.collect()

    assert pool.leased_bytes == BIG


def test_threads_share_a_pool() -> None:
    """Slabs that are taken and let go by many threads at once are never shared, nor lost."""
    pool = SlabPool()
    start = threading.Barrier(4)
    torn: list[int] = []

    def work(mark: int) -> None:
        start.wait()
        for turn in range(100):
            [view] = pool.take([BIG + turn % 3 * PAGE])
            view[:64] = bytes([mark]) * 64
            view[-64:] = bytes([mark]) * 64
            if {*view[:64], *view[-64:]} != {mark}:
                torn.append(mark)
            del view

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert torn == []
    assert pool.leased_bytes == 0
    assert mapped_bytes() <= 4 * (BIG + 2 * PAGE)


@given(st.lists(st.binary(max_size=200), max_size=8))
@thorough(80)
def test_a_bundle_is_unpacked_into_memory_of_ones_own(buffers: list[bytes]) -> None:
    """The buffers come back as they were: writable, aligned, apart, and with no tie to the frame."""
    bundled = bundle([memoryview(buffer) for buffer in buffers])
    assert bundled is not None
    frame = bytearray(bundled.data)
    views = unbundle(Bundle(bundled.lengths, frame))
    frame[:] = bytes(len(frame))

    assert [view.tobytes() for view in views] == buffers
    assert all(place(view) % ALIGNMENT == 0 for view in views if view)
    for index, view in enumerate(views):
        view[:] = bytes([index]) * len(view)
    assert [view.tobytes() for view in views] == [bytes([index]) * len(view) for index, view in enumerate(views)]
