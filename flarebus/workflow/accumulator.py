"""Accumulators: weighted sums of one flat run of numbers, block by block, in memory that is there already.

Not a mean of models: no names, no checks, no threads. Every method works on one block `[begin, end)`, and blocks are
independent, so that threads may share them out and the bits stay the same.

The first contributions are only held. When they have used up `slots`, the sum moves into *lanes*: where the held arrays
allow it, these are the memory of the held arrays themselves. Block by block, the sum has just the bytes that the
`slots` arrays have there, so lane `i` lies in array `i`:

    held[0]  | block 0     | block 1     | ...      slots = 2, float32
    held[1]  | block 0     | block 1     | ...
    lane 0   | sum[0:b/2]  | sum[b:3b/2] | ...      float64 in the bytes of held[0]
    lane 1   | sum[b/2:b]  | sum[3b/2:2b]| ...      float64 in the bytes of held[1]

Two kinds implement it: `SingleSum` for numbers of up to 32 bits, `DoubleSum` for all others.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flarebus.workflow.exact import from_units, to_units

__all__ = ["Accumulator", "Floats", "Numbers", "Scratch", "cast", "is_even_mean", "is_finite", "write_even_mean"]

Floats = NDArray[np.float64]
Numbers = NDArray[Any]


class Scratch:
    """Working rows of one thread, reused from block to block. Not shared."""

    def __init__(self) -> None:
        self._rows: dict[int, Floats] = {}

    def row(self, index: int, length: int) -> Floats:
        """Return row `index` as `(length,)` float64; its content is whatever was left there."""
        row = self._rows.get(index)
        if row is None or len(row) < length:
            row = self._rows[index] = np.empty(length)
        return row[:length]


class Accumulator(ABC):
    """The weighted sum of arrays `(size,)` of one real `dtype`.

    Args:
        dtype: integer or float of any width and byte order; complex numbers come as pairs of floats.
        size: number of elements.
    """

    block: int

    def __init__(self, dtype: np.dtype[Any], size: int) -> None:
        self.dtype = dtype
        self.size = size
        self.is_integer = dtype.kind in "iu"
        self.held: list[tuple[float, Numbers]] = []
        self.lanes: list[Floats] = []
        self.rest: Floats = np.empty(0)
        self.weight_units = 0  # exact, and cheaper to add to than a fraction
        self._total = (0, Fraction(0))  # the fraction of how many units: every block asks for it

    @property
    def total(self) -> Fraction:
        """The sum of all weights."""
        units, total = self._total
        if units != self.weight_units:
            total = from_units(self.weight_units)
            self._total = (self.weight_units, total)
        return total

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many contributions are held before they are added: as many as have room for the sum."""

    @property
    def is_open(self) -> bool:
        """Whether there are lanes."""
        return bool(self.lanes)

    @property
    def is_full(self) -> bool:
        """Whether the next contribution needs lanes."""
        return len(self.held) >= self.slots

    def blocks(self) -> list[tuple[int, int]]:
        """The ranges that the methods below take; always the same for one accumulator."""
        return [(begin, min(begin + self.block, self.size)) for begin in range(0, self.size, self.block)]

    def hold(self, values: Numbers, weight: float) -> None:
        """Keep `values` by reference; they belong to the accumulator from here on."""
        self.make_room(weight)
        self.held.append((weight, values))
        self.weight_units += to_units(weight)

    def can_open_in_place(self) -> bool:
        """Whether the held arrays may become the lanes, as far as they can tell themselves."""
        return all(
            values.flags.writeable and values.flags.c_contiguous and values.ctypes.data % 8 == 0
            for _, values in self.held
        )

    @abstractmethod
    def make_lanes(self, in_place: bool) -> tuple[list[Floats], Floats]:
        """Return lanes and the rest that does not fill them; nothing is written yet.

        Raises:
            MemoryError: there is no room; the accumulator is as it was.
        """

    @abstractmethod
    def add(self, values: Numbers, weight: float, begin: int, end: int, scratch: Scratch) -> None:
        """Add `weight * values[begin:end]`; with what is held while `held` is not empty. `values` is only read."""

    @abstractmethod
    def write_mean(self, begin: int, end: int, base: Numbers | None, out: Numbers, scratch: Scratch) -> None:
        """Write the mean, or `base` plus the mean, of the block to `out[begin:end]`, rounded to its dtype.

        Raises:
            OverflowError: a value is beyond the range of the dtype.
        """

    def make_room(self, weight: float) -> None:  # noqa: B027  (most sums have room without doing anything)
        """Get ready for one more contribution of `weight`; called before its blocks are added."""

    def added(self, weight: float) -> None:
        """Count a contribution of which all blocks were added."""
        self.held.clear()
        self.weight_units += to_units(weight)


def is_finite(values: Numbers, scratch: Scratch) -> bool:
    """Whether no element of `(n,)` values, integers or floats, is NaN or infinite."""
    dtype = values.dtype
    if dtype.kind in "iu" or not len(values):
        return True
    if dtype.kind == "f" and dtype.itemsize in (4, 8) and dtype.isnative:
        # NaN wins every comparison here, so two reductions say it all, in a third of the time of `isfinite`.
        return math.isfinite(values.max()) and math.isfinite(values.min())
    if dtype.itemsize == 2 and dtype.isnative:
        exponent = np.uint16(0x7C00 if dtype.kind == "f" else 0x7F80)
        bits = scratch.row(0, len(values)).view(np.uint16)[: len(values)]
        np.bitwise_and(values.view(np.uint16), exponent, out=bits)
        return bool(bits.max() != exponent)
    return bool(np.isfinite(values.astype(np.float64)).all())


def is_even_mean(held: list[tuple[float, Numbers]], dtype: np.dtype[Any]) -> bool:
    """Whether the shares of what is held are powers of two, and the mean exact in the dtype itself."""
    if not dtype.isnative or dtype.kind != "f" or dtype.itemsize not in (4, 8) or not held:
        return False
    return len(held) == 1 or (len(held) == 2 and held[0][0] == held[1][0])


def write_even_mean(held: list[tuple[float, Numbers]], begin: int, end: int, out: Numbers, scratch: Scratch) -> None:
    target = out[begin:end]
    if len(held) == 1:
        target[...] = held[0][1][begin:end]
        return
    # Halving first keeps the sum in range; it is exact, so only the addition rounds.
    half = scratch.row(0, end - begin).view(out.dtype)[: end - begin]
    np.multiply(held[0][1][begin:end], 0.5, out=target)
    np.multiply(held[1][1][begin:end], 0.5, out=half)
    np.add(target, half, out=target)


def cast(values: Numbers, out: Numbers) -> None:
    """Round `values` to the dtype of `out`.

    Raises:
        OverflowError: a value is beyond its range.
    """
    try:
        with np.errstate(over="raise"):
            np.copyto(out, values, casting="unsafe")
    except FloatingPointError:
        raise OverflowError from None
