"""DoubleSum: sums in pairs of float64 by error-free transformations (Knuth's sum, Dekker's product), 106 bits."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from flarebus.workflow.accumulator import Accumulator, Floats, Numbers, Scratch, cast, is_even_mean, write_even_mean

__all__ = ["DoubleSum"]

# Ten rows are in use at once, and should stay in a second-level cache. All of them are scratch: fresh arrays of this
# size would be mapped and unmapped by the kernel every time.
_BLOCK = 1 << 14
# The top 26 bits of a float64's significand: what is left over has 27, and both multiply exactly with 26 bits.
_UPPER_HALF = np.int64(-1 << 27)
# Sums of weights are kept between these powers of two, so that neither a sum of the largest float64 values overflows
# nor one more of the smallest is lost.
_SCALED_WEIGHT, _SCALED_TOTAL = -24, -4
_LARGEST = float(np.finfo(np.float64).max)


class DoubleSum(Accumulator):
    """Sums in pairs of float64: for float64, 64-bit integers and long doubles.

    Weights are scaled by a power of two, which changes no digit, to keep sums of the largest values finite.
    """

    block = _BLOCK

    def __init__(self, dtype: np.dtype[Any], size: int) -> None:
        super().__init__(dtype, size)
        self._exponent: int | None = None

    @property
    def slots(self) -> int:
        return max(1, 16 // self.dtype.itemsize)

    def can_open_in_place(self) -> bool:
        return self.dtype.itemsize == 8 and super().can_open_in_place()

    def make_lanes(self, in_place: bool) -> tuple[list[Floats], Floats]:
        if in_place:
            return [values.view(np.float64) for _, values in self.held], np.empty(0)
        return [np.empty(self.size), np.empty(self.size)], np.empty(0)

    def make_room(self, weight: float) -> None:
        top = math.frexp(float(self.total + Fraction(weight)))[1]
        if self._exponent is None:
            self._exponent = _SCALED_WEIGHT - top
        elif top + self._exponent > _SCALED_TOTAL:
            exponent = _SCALED_WEIGHT - top
            for lane in self.lanes:
                np.multiply(lane, math.ldexp(1.0, exponent - self._exponent), out=lane)
            self._exponent = exponent

    def add(self, values: Numbers, weight: float, begin: int, end: int, scratch: Scratch) -> None:
        if not self.held:
            self._add_to(self.lanes[0][begin:end], self.lanes[1][begin:end], values[begin:end], weight, scratch)
            return
        high, low = self._sum_held(begin, end, scratch)
        self._add_to(high, low, values[begin:end], weight, scratch)
        self.lanes[0][begin:end] = high
        self.lanes[1][begin:end] = low

    def _sum_held(self, begin: int, end: int, scratch: Scratch) -> tuple[Floats, Floats]:
        high, low = scratch.row(0, end - begin), scratch.row(1, end - begin)
        for index, (weight, values) in enumerate(self.held):
            self._add_to(high, low, values[begin:end], weight, scratch, is_first=not index)
        return high, low

    def _add_to(
        self, high: Floats, low: Floats, values: Numbers, weight: float, scratch: Scratch, is_first: bool = False
    ) -> None:
        assert self._exponent is not None  # set with the first contribution
        scaled = math.ldexp(weight, self._exponent)
        for part in _exact_parts(values, scratch):
            if is_first:
                np.multiply(part, scaled, out=high)
                _product_error(part, scaled, high, low, scratch)
                is_first = False
            else:
                _add_product(high, low, part, scaled, scratch)

    def write_mean(self, begin: int, end: int, base: Numbers | None, out: Numbers, scratch: Scratch) -> None:
        if base is None and is_even_mean(self.held, out.dtype):
            write_even_mean(self.held, begin, end, out, scratch)
            return
        if self.held:
            high, low = self._sum_held(begin, end, scratch)
        else:
            high, low = self.lanes[0][begin:end], self.lanes[1][begin:end]
        first, second = self._quotient(high, low, scratch)
        target = out[begin:end]
        origin = None if base is None else base[begin:end]
        if self.is_integer:
            _write_integers(first, second, origin, target)
        elif self.dtype.itemsize > 8:
            wide = first.astype(np.longdouble) + second
            cast(wide if origin is None else wide + origin, target)
        else:
            _write_floats(first, second, origin, target, scratch)

    def _quotient(self, high: Floats, low: Floats, scratch: Scratch) -> tuple[Floats, Floats]:
        """Return (high + low) / total as a sum of two, in rows 8 and 6."""
        assert self._exponent is not None
        divisor = self.total * Fraction(2) ** self._exponent
        top = float(divisor)
        rest = float(divisor - Fraction(top))
        first, remainder, error = (scratch.row(index, len(high)) for index in (8, 6, 7))
        np.divide(high, top, out=first)
        # A mean of the largest values may round to what lies beyond them; the remainder makes up for what is cut off.
        np.clip(first, -_LARGEST, _LARGEST, out=first)
        np.multiply(first, top, out=remainder)
        _product_error(first, top, remainder, error, scratch)
        np.subtract(high, remainder, out=remainder)
        np.subtract(remainder, error, out=remainder)
        np.add(remainder, low, out=remainder)
        if rest:
            np.multiply(first, rest, out=error)
            np.subtract(remainder, error, out=remainder)
        np.divide(remainder, top, out=remainder)
        return first, remainder


def _exact_parts(values: Numbers, scratch: Scratch) -> list[Floats]:
    """Return float64 arrays whose sum is exactly `values`: themselves, or in rows 2 and 9."""
    row, other = scratch.row(2, len(values)), scratch.row(9, len(values))
    if values.dtype == np.float64:
        if values.dtype.isnative and values.flags.aligned:
            return [values]
        np.copyto(row, values)
        return [row]
    if values.dtype.kind in "iu":
        np.multiply(values >> 32, 4294967296.0, out=row)
        np.copyto(other, values & 0xFFFFFFFF, casting="unsafe")
        return [row, other]
    np.copyto(row, values, casting="unsafe")
    np.copyto(other, values - row, casting="unsafe")
    return [row, other]


def _product_error(values: Floats, weight: float, product: Floats, error: Floats, scratch: Scratch) -> None:
    """Write `values * weight - product` to `error`, where `product` is the rounded one: Dekker's product."""
    upper, lower = scratch.row(3, len(values)), scratch.row(4, len(values))
    term = scratch.row(5, len(values))
    big, small = _halves(weight)
    # Cutting bits off instead of the usual multiplication: it cannot overflow.
    np.bitwise_and(values.view(np.int64), _UPPER_HALF, out=upper.view(np.int64))
    np.subtract(values, upper, out=lower)
    np.multiply(upper, big, out=error)
    np.subtract(error, product, out=error)
    if small:
        np.multiply(upper, small, out=term)
        np.add(error, term, out=error)
    np.multiply(lower, big, out=term)
    np.add(error, term, out=error)
    if small:
        np.multiply(lower, small, out=term)
        np.add(error, term, out=error)


def _halves(weight: float) -> tuple[float, float]:
    """Return two numbers of at most 26 significant bits with the sum `weight`."""
    fraction, exponent = math.frexp(weight)
    big = round(math.ldexp(fraction, 26))
    return math.ldexp(big, exponent - 26), math.ldexp(math.ldexp(fraction, 26) - big, exponent - 26)


def _add_product(high: Floats, low: Floats, values: Floats, weight: float, scratch: Scratch) -> None:
    """Add `values * weight` to the pair, in place."""
    product, error = scratch.row(6, len(values)), scratch.row(7, len(values))
    np.multiply(values, weight, out=product)
    _product_error(values, weight, product, error, scratch)
    np.add(low, error, out=low)
    _add_exactly(high, low, product, scratch)


def _add_exactly(high: Floats, low: Floats, values: Floats, scratch: Scratch) -> None:
    """Add `values` to `high` and what rounding lost to `low`: Knuth's sum. `values` is used up."""
    total, back, own = (scratch.row(index, len(values)) for index in (3, 4, 5))
    np.add(high, values, out=total)
    np.subtract(total, high, out=back)
    np.subtract(total, back, out=own)
    np.subtract(high, own, out=own)
    np.subtract(values, back, out=values)
    np.add(own, values, out=own)
    np.add(low, own, out=low)
    high[...] = total


def _write_floats(first: Floats, second: Floats, base: Numbers | None, out: Numbers, scratch: Scratch) -> None:
    if base is not None:
        origin = scratch.row(2, len(first))
        np.copyto(origin, base)
        _add_exactly(first, second, origin, scratch)
    np.add(first, second, out=first)
    if base is not None and not np.isfinite(first).all():
        raise OverflowError
    np.copyto(out, first)


def _write_integers(first: Floats, second: Floats, base: Numbers | None, out: Numbers) -> None:
    native = out.dtype.newbyteorder("=")
    limits = np.iinfo(native)
    if base is not None:
        reached = base.astype(np.float64) + first
        if reached.max() >= float(limits.max) or reached.min() < float(limits.min):
            raise OverflowError
    # The nearest float64 to the largest integer lies beyond it, and must not be converted.
    whole = np.clip(np.rint(first), float(limits.min), math.nextafter(float(limits.max), 0.0))
    part = np.rint((first - whole) + second)
    # Two's complement: a negative part added to an unsigned whole wraps around to the right sum.
    result = whole.astype(native).view(np.int64) + part.astype(np.int64)
    if base is not None:
        result += base.astype(native).view(np.int64)
    np.copyto(out, result.view(native))
