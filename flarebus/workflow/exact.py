"""ExactMean: the weighted mean of single numbers, without any rounding before the last."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

__all__ = ["ExactMean", "from_units", "to_units"]

# Every finite float is a whole multiple of 2**-1074.
_UNIT = 1074


def to_units(value: float) -> int:
    """Return a finite `value` as a whole number of 2**-1074."""
    numerator, denominator = value.as_integer_ratio()
    return numerator << (_UNIT + 1 - denominator.bit_length())


def from_units(units: int) -> Fraction:
    """Return a sum of what `to_units` gave."""
    return Fraction(units, 1 << _UNIT)


class ExactMean:
    """A weighted mean of Python numbers; the order of `add` calls does not matter to a single bit.

    Integers keep all their digits. About half a microsecond a number: for metrics and lone parameters, not for arrays.
    """

    __slots__ = ("_imag", "_real", "_weight")

    def __init__(self) -> None:
        self._real = 0
        self._imag = 0
        self._weight = 0

    @property
    def is_empty(self) -> bool:
        """Whether no weight has come in."""
        return not self._weight

    def add(self, value: complex, weight: float) -> None:
        """Add a finite `value` with a finite `weight` >= 0."""
        factor = to_units(weight)
        self._weight += factor
        self._real += factor * to_units(value.real)
        if value.imag:
            self._imag += factor * to_units(value.imag)

    def real(self, base: Any = 0) -> float:
        """Return `base` plus the mean, rounded once.

        Raises:
            OverflowError: the result is beyond the range of a float.
        """
        return self._divided(self._real, base)

    def complex(self, base: Any = 0) -> complex:
        """Return `base` plus the mean, each component rounded once.

        Raises:
            OverflowError: the result is beyond the range of a float.
        """
        return complex(self._divided(self._real, base.real), self._divided(self._imag, base.imag))

    def _divided(self, total: int, base: float) -> float:
        # Division of integers rounds correctly, whatever their size.
        return (total + to_units(base) * self._weight) / (self._weight << _UNIT)
