"""The sentence of `stop_cond`."""

from __future__ import annotations

import math

import pytest

from flarebus.workflow.condition import Condition


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("accuracy >= 80", Condition("accuracy", ">=", 80.0)),
        ("  val loss<0.5 ", Condition("val loss", "<", 0.5)),
        ("a  =  -1e-3", Condition("a", "=", -0.001)),
        ("f1/macro <= .5", Condition("f1/macro", "<=", 0.5)),
        ("x>1", Condition("x", ">", 1.0)),
    ],
)
def test_blanks_are_free(text, parsed):
    """One blank, many, or none: the sentence means the same."""
    assert Condition.parse(text) == parsed


@pytest.mark.parametrize(
    ("op", "met"),
    [
        (">=", [False, True, True]),
        ("<=", [True, True, False]),
        (">", [False, False, True]),
        ("<", [True, False, False]),
        ("=", [False, True, False]),
    ],
)
def test_operators_mean_what_they_say(op, met):
    """Each operator compares the metric with the number; a missing metric and NaN fulfil nothing."""
    condition = Condition("m", op, 2.0)

    assert [condition.is_met({"m": value}) for value in (1.0, 2.0, 3.0)] == met
    assert not condition.is_met({})
    assert not condition.is_met({"m": math.nan})


def test_direction_is_that_of_the_operator():
    """`>` asks for more, `<` for less, `=` for neither."""
    assert [Condition("m", op, 0.0).mode for op in (">", ">=", "<", "<=", "=")] == ["max", "max", "min", "min", None]
