"""Condition: the `<metric> <op> <number>` sentence of `stop_cond`, parsed once and asked every round."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flarebus.errors import ConfigError

__all__ = ["Condition"]

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}
# A metric name is any text without an operator in it; blanks around the operator are free.
_SENTENCE = re.compile(r"\s*([^<>=]*[^<>=\s])\s*(>=|<=|>|<|=)\s*([^<>=\s]+)\s*")


@dataclass(frozen=True, slots=True)
class Condition:
    """A comparison of one averaged metric with a number.

    Args:
        key: name of the metric.
        op: one of `>= <= > < =`.
        value: a finite number.
    """

    key: str
    op: str
    value: float

    @classmethod
    def parse(cls, text: object, parameter: str = "stop_cond") -> Condition:
        """Read `text`.

        Raises:
            ConfigError: it is no such sentence; names `parameter`.
        """
        found = _SENTENCE.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ConfigError(parameter, text, "'<metric> <op> <number>' with op one of >= <= > < =, or None")
        try:
            value = float(found[3])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ConfigError(parameter, text, f"{found[3]!r} must be a finite number")
        return cls(found[1], found[2], value)

    def is_met(self, metrics: Mapping[str, float]) -> bool:
        """Whether `metrics` has the key and its value fulfils the comparison; NaN never does."""
        return self.key in metrics and _OPERATORS[self.op](metrics[self.key], self.value)

    @property
    def mode(self) -> str | None:
        """The direction the comparison asks for: "max", "min", or None for `=`."""
        return {">": "max", "<": "min"}.get(self.op[0])
