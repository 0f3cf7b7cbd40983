"""ExactMean: no rounding before the last."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flarebus.workflow.exact import ExactMean, from_units, to_units

FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(FINITE, st.floats(1e-30, 1e30)), min_size=1, max_size=20), st.randoms())
def test_rounds_once_whatever_the_order(pairs: list[tuple[float, float]], random: st.randoms) -> None:  # type: ignore[valid-type]
    """The result is the float nearest to the exact mean, in any order."""
    mean, other = ExactMean(), ExactMean()
    for value, weight in pairs:
        mean.add(value, weight)
    shuffled = list(pairs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for value, weight in shuffled:
        other.add(value, weight)

    total = sum(Fraction(weight) for _, weight in pairs)
    exact = sum(Fraction(weight) * Fraction(value) for value, weight in pairs) / total
    assert mean.real() == float(exact)
    assert other.real() == mean.real()


@given(FINITE)
def test_units_are_exact(value: float) -> None:
    """Every finite float is a whole number of units."""
    assert from_units(to_units(value)) == Fraction(value)


def test_complex_numbers_and_bases() -> None:
    """Components are averaged apart, and a base is added before the rounding."""
    mean = ExactMean()
    assert mean.is_empty
    mean.add(1 + 2j, 1.0)
    mean.add(3, 1.0)

    assert mean.complex() == 2 + 1j
    assert mean.complex(1j) == 2 + 2j
    small = ExactMean()
    small.add(1e-30, 1.0)
    assert small.real(1.0) == 1.0
    assert small.real(-1e-30) == 0


def test_beyond_the_range_is_an_error() -> None:
    """A result that no float can hold is an error and not Inf."""
    mean = ExactMean()
    mean.add(math.nextafter(math.inf, 0), 1.0)

    with pytest.raises(OverflowError):
        mean.real(1e308)
