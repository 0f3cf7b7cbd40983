"""Runs: the arrays of a model as flat runs of numbers, and the work on them shared out to threads.

Not a mean: weights, names and policies are the caller's. A big array is a run of its own and keeps its memory; many
small ones of one dtype are copied together, because a call of NumPy costs more than their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from flarebus.errors import UpdateRefused
from flarebus.workflow.accumulator import Accumulator, Numbers, Scratch, is_finite
from flarebus.workflow.double_sum import DoubleSum
from flarebus.workflow.single_sum import SingleSum
from flarebus.workflow.template import ArraySpec

__all__ = ["Run", "Runs", "Span", "spans_of"]

# Arrays up to this size are gathered.
_SMALL_BYTES = 1 << 16
# A gathered run ends here, so that it stays in cache.
_RUN_BYTES = 1 << 20
# Starting threads takes 0.1 ms; less work than this is done sooner alone.
_THREADS_FROM_BYTES = 1 << 22
# Elements of one piece of the check: enough to make the hand-over of the interpreter lock rare.
_CHECK_BLOCK = 1 << 17

Span = tuple[int, int]
"""Where an array lies in memory: the addresses of its first byte and of the byte after its last."""

Item = TypeVar("Item")


class Run:
    """Arrays that are added as one: `specs` in order, at `indexes` of the model's list."""

    __slots__ = ("indexes", "specs", "staging", "sums")

    def __init__(self, specs: list[ArraySpec], indexes: list[int]) -> None:
        self.specs = specs
        self.indexes = indexes
        self.staging: NDArray[Any] | None = None
        dtype = specs[0].dtype
        real = _real_dtype(dtype)
        size = sum(math.prod(spec.shape) for spec in specs) * (dtype.itemsize // real.itemsize)
        self.sums: Accumulator = SingleSum(real, size) if real.itemsize <= 4 else DoubleSum(real, size)

    @property
    def n_bytes(self) -> int:
        """Size of one contribution."""
        return self.sums.size * self.sums.dtype.itemsize

    def flat(self, arrays: list[NDArray[Any]]) -> Numbers:
        """Return the arrays as one `(n,)` run of real numbers: the memory of a single contiguous one, else a copy."""
        if len(arrays) == 1:
            return np.ascontiguousarray(arrays[0]).reshape(-1).view(self.sums.dtype)
        if self.staging is None:
            self.staging = np.empty(self.n_bytes // self.specs[0].dtype.itemsize, self.specs[0].dtype)
        np.concatenate(arrays, axis=None, out=self.staging)
        return self.staging.view(self.sums.dtype)

    def split(self, values: Numbers, targets: Mapping[str, NDArray[Any]]) -> None:
        """Copy a run to the arrays it consists of."""
        whole, begin = values.view(self.specs[0].dtype), 0
        for spec in self.specs:
            end = begin + math.prod(spec.shape)
            targets[spec.name][...] = whole[begin:end].reshape(spec.shape)
            begin = end


class Runs:
    """All arrays of one model.

    Its methods look at results, not at operations: call them under `np.errstate(all="ignore")`.

    Args:
        specs: what they are.
        borrowed: memory that must never be written, whoever hands it in.
        threads: how many work at once, from 1.
        together: whether small arrays may be gathered; not if some of them may be absent.
    """

    def __init__(self, specs: list[ArraySpec], borrowed: list[Span], threads: int, together: bool) -> None:
        self._borrowed = borrowed
        self._scratch = [Scratch() for _ in range(threads)]
        self.runs = [Run([specs[index] for index in group], group) for group in _groups(specs, together)]

    def stage(self, arrays: list[NDArray[Any] | None]) -> list[tuple[Run, Numbers]]:
        """Return each run with its values from an update; runs whose array is None are left out."""
        staged = []
        for run in self.runs:
            present = [array for array in map(arrays.__getitem__, run.indexes) if array is not None]
            if present:
                staged.append((run, run.flat(present)))
        return staged

    def find_nonfinite(self, staged: list[tuple[Run, Numbers]]) -> str | None:
        """Return the name of the first array with NaN or Inf in it, or None."""
        failed: list[tuple[int, int]] = []

        def check(item: tuple[int, Numbers, int], scratch: Scratch) -> None:
            index, values, begin = item
            if not is_finite(values[begin : begin + _CHECK_BLOCK], scratch):
                failed.append((index, begin))

        self._share_out(
            check,
            [
                (index, values, begin)
                for index, (_, values) in enumerate(staged)
                for begin in range(0, len(values), _CHECK_BLOCK)
            ],
            sum(values.nbytes for _, values in staged),
        )
        if not failed:
            return None
        run, values = staged[min(failed)[0]]
        return self._name_nonfinite(run, values)

    def _name_nonfinite(self, run: Run, values: Numbers) -> str:
        begin, per_element = 0, run.specs[0].dtype.itemsize // run.sums.dtype.itemsize
        for spec in run.specs:
            end = begin + math.prod(spec.shape) * per_element
            if not is_finite(values[begin:end], self._scratch[0]):
                break
            begin = end
        return spec.name

    def fold(self, staged: list[tuple[Run, Numbers]], weight: float) -> None:
        """Add one update; its arrays belong to the runs from here on.

        Raises:
            MemoryError: no room for the sums; nothing was added.
        """
        self._open([run for run, _ in staged if run.sums.is_full and not run.sums.is_open], staged)
        adding = []
        for run, values in staged:
            if run.sums.is_open:
                run.sums.make_room(weight)
                adding.append((run, values))
            else:
                run.sums.hold(values, weight)
                run.staging = None

        def add(item: tuple[Accumulator, Numbers, int, int], scratch: Scratch) -> None:
            sums, values, begin, end = item
            sums.add(values, weight, begin, end, scratch)

        self._share_out(
            add,
            [(run.sums, values, begin, end) for run, values in adding for begin, end in run.sums.blocks()],
            sum(values.nbytes for _, values in adding),
        )
        for run, _ in adding:
            run.sums.added(weight)

    def _open(self, runs: list[Run], staged: list[tuple[Run, Numbers]]) -> None:
        if not runs:
            return
        held = [(run, values) for run in self.runs for _, values in run.sums.held]
        # Tied weights, or one array handed in twice: a sum written over one of them would change the others.
        arrays = [values for _, values in held] + [values for _, values in staged]
        shared = _overlapping(spans_of(arrays) + self._borrowed)
        tied = {id(run) for index, (run, _) in enumerate(held) if index in shared}
        made = [run.sums.make_lanes(id(run) not in tied and run.sums.can_open_in_place()) for run in runs]
        for run, (lanes, rest) in zip(runs, made, strict=True):
            run.sums.lanes, run.sums.rest = lanes, rest

    def write_means(self, base: Mapping[str, NDArray[Any]] | None, targets: Mapping[str, NDArray[Any]]) -> None:
        """Write the mean, or `base` plus the mean, of every run with contributions.

        Args:
            base: name -> array, of the dtypes and shapes of the specs.
            targets: name -> C-contiguous array of the same dtype and shape, written block by block.

        Raises:
            UpdateRefused: a result is beyond the range of its dtype; some targets are written.
        """
        items: list[tuple[Run, Numbers | None, Numbers, int, int]] = []
        gathered = []
        for run in self.runs:
            if not run.sums.weight_units:
                continue
            origin = None
            if base is not None:
                origin = run.flat([base[spec.name] for spec in run.specs])
                run.staging = None
            if len(run.specs) == 1:
                goal = targets[run.specs[0].name].reshape(-1).view(run.sums.dtype)
            else:
                goal = np.empty(run.sums.size, run.sums.dtype)
                gathered.append((run, goal))
            items.extend((run, origin, goal, begin, end) for begin, end in run.sums.blocks())
        self._share_out(_write, items, sum(run.n_bytes for run in self.runs))
        for run, values in gathered:
            run.split(values, targets)

    def _share_out(self, work: Callable[[Item, Scratch], None], items: list[Item], n_bytes: int) -> None:
        pending = iter(items)  # one iterator for all: whoever is done takes the next

        def labour(scratch: Scratch) -> None:
            for item in pending:
                work(item, scratch)

        def labour_elsewhere(scratch: Scratch) -> None:
            with np.errstate(all="ignore"):  # a thread begins with the default
                labour(scratch)

        others = min(len(self._scratch), len(items)) - 1 if n_bytes >= _THREADS_FROM_BYTES else 0
        if others < 1:
            labour(self._scratch[0])
            return
        with ThreadPoolExecutor(others, "mean") as pool:
            started = [pool.submit(labour_elsewhere, scratch) for scratch in self._scratch[1 : others + 1]]
            labour(self._scratch[0])
            for future in started:
                future.result()


def spans_of(arrays: Iterable[NDArray[Any]]) -> list[Span]:
    """Return where each array lies in memory."""
    return [np.lib.array_utils.byte_bounds(array) for array in arrays]


def _write(item: tuple[Run, Numbers | None, Numbers, int, int], scratch: Scratch) -> None:
    run, base, target, begin, end = item
    try:
        run.sums.write_mean(begin, end, base, target, scratch)
    except OverflowError:
        more = f" (or one of the {len(run.specs) - 1} small arrays after it)" if len(run.specs) > 1 else ""
        raise UpdateRefused(
            f"the new value is beyond the range of {run.specs[0].dtype}{more}", run.specs[0].name
        ) from None


def _real_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype itself, or that of the real and imaginary parts."""
    if dtype.kind != "c":
        return dtype
    return np.dtype(f"{dtype.byteorder}f{dtype.itemsize // 2}")


def _groups(specs: list[ArraySpec], together: bool) -> list[list[int]]:
    groups: list[list[int]] = []
    open_groups: dict[np.dtype[Any], tuple[list[int], int]] = {}
    for index, spec in enumerate(specs):
        n_bytes = math.prod(spec.shape) * spec.dtype.itemsize
        group, filled = open_groups.get(spec.dtype, ([], 0))
        if not together or n_bytes > _SMALL_BYTES:
            groups.append([index])
            continue
        if not group or filled + n_bytes > _RUN_BYTES:
            group, filled = [], 0
            groups.append(group)
        group.append(index)
        open_groups[spec.dtype] = (group, filled + n_bytes)
    return groups


def _overlapping(spans: list[Span]) -> set[int]:
    """Return the indexes of the spans that share a byte with another."""
    found: set[int] = set()
    top, owner = -1, -1
    for index in sorted(range(len(spans)), key=spans.__getitem__):
        low, high = spans[index]
        if low == high:
            continue
        if low < top:
            found.update((index, owner))
        if high > top:
            top, owner = high, index
    return found
