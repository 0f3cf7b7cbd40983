"""SingleSum: sums in float64, for numbers of up to 32 bits."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from flarebus.workflow.accumulator import Accumulator, Floats, Numbers, Scratch, cast, is_even_mean, write_even_mean

__all__ = ["SingleSum"]

# The same work in bigger pieces means fewer hand-overs of the interpreter lock between threads; two rows of this still
# fit a second-level cache of 2 MiB.
_BLOCK = 1 << 17


class SingleSum(Accumulator):
    """Sums in float64: exact to far below one unit in the last place of anything with 32 bits or fewer."""

    block = _BLOCK

    @property
    def slots(self) -> int:
        return 8 // self.dtype.itemsize

    def make_lanes(self, in_place: bool) -> tuple[list[Floats], Floats]:
        if not in_place:
            return [np.empty(self.size)], np.empty(0)
        filled = self.size - self.size % self.slots
        lanes = [values[:filled].view(np.float64) for _, values in self.held]
        return lanes, np.empty(self.size - filled)

    def add(self, values: Numbers, weight: float, begin: int, end: int, scratch: Scratch) -> None:
        product = scratch.row(0, end - begin)
        if not self.held:
            _multiply(values[begin:end], weight, product)
            for lane, place in self._parts(begin, end):
                np.add(lane, product[place], out=lane)
            return
        total = self._sum_held([weight for weight, _ in self.held], begin, end, scratch)
        _multiply(values[begin:end], weight, product)
        np.add(total, product, out=total)
        for lane, place in self._parts(begin, end):
            lane[...] = total[place]

    def _parts(self, begin: int, end: int) -> list[tuple[Floats, slice]]:
        """Where the block lies in the lanes: (part of a lane, which elements of the block it holds)."""
        count = len(self.lanes)
        share = (end - begin) // count  # the last block may leave a rest
        parts = [
            (lane[begin // count : begin // count + share], slice(index * share, (index + 1) * share))
            for index, lane in enumerate(self.lanes if share else [])
        ]
        if share * count < end - begin:
            parts.append((self.rest, slice(share * count, end - begin)))
        return parts

    def _sum_held(self, factors: list[float], begin: int, end: int, scratch: Scratch) -> Floats:
        total = scratch.row(1, end - begin)
        for index, (factor, (_, values)) in enumerate(zip(factors, self.held, strict=True)):
            product = scratch.row(0, end - begin) if index else total
            _multiply(values[begin:end], factor, product)
            if index:
                np.add(total, product, out=total)
        return total

    def write_mean(self, begin: int, end: int, base: Numbers | None, out: Numbers, scratch: Scratch) -> None:
        if base is None and is_even_mean(self.held, out.dtype):
            write_even_mean(self.held, begin, end, out, scratch)
            return
        place = slice(begin, end)
        # Integers are divided, not multiplied by a share: that is exact where the mean is, and decides about halves.
        if self.held and not self.is_integer:
            shares = [float(Fraction(weight) / self.total) for weight, _ in self.held]
            self._write(self._sum_held(shares, begin, end, scratch), place, base, out, scratch)
            return
        total = float(self.total)
        if self.held:
            mean = self._sum_held([weight for weight, _ in self.held], begin, end, scratch)
            np.divide(mean, total, out=mean)
            self._write(mean, place, base, out, scratch)
            return
        for lane, place in self._parts(begin, end):
            mean = scratch.row(0, len(lane))
            if self.is_integer:
                np.divide(lane, total, out=mean)
            else:
                np.multiply(lane, 1.0 / total, out=mean)
            self._write(mean, slice(begin + place.start, begin + place.stop), base, out, scratch)

    def _write(self, mean: Floats, place: slice, base: Numbers | None, out: Numbers, scratch: Scratch) -> None:
        if base is not None:
            origin = scratch.row(2, len(mean))
            np.copyto(origin, base[place], casting="unsafe")
            np.add(mean, origin, out=mean)
        if self.is_integer:
            np.rint(mean, out=mean)
            limits = np.iinfo(out.dtype)
            if base is not None and (mean.max() > limits.max or mean.min() < limits.min):
                raise OverflowError
        cast(mean, out[place])


def _multiply(values: Numbers, weight: float, out: Floats) -> None:
    # Convert, then multiply in place: NumPy's own mixed-type loop goes through small buffers and takes longer.
    np.copyto(out, values, casting="unsafe")
    np.multiply(out, weight, out=out)
