"""Template: what an update must look like to enter a mean, taken from the model it is an update of.

Looks at names, types, dtypes and shapes, never at values of arrays. Three kinds of leaves: *arrays* (also NumPy scalars
and tensors) and *numbers* (Python's) are averaged; all others are *fixed*: they must come back as the same type, and
the model keeps its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flarebus.errors import ConfigError, UpdateRefused
from flarebus.workflow.params import as_array, flatten, is_flat, is_number_dtype

__all__ = ["ArraySpec", "Checked", "Template"]

_MISSING = object()
# How many names an error lists.
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of the model: dotted name, dtype with byte order, shape."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checked:
    """The leaves of an update that count, in the order of the template; None for those it lacks by permission."""

    arrays: list[NDArray[Any] | None]
    numbers: list[complex | None]


class Template:
    """What every update of one model has in common.

    Args:
        like: the model; its arrays are not kept.
        exclude: names in which this regular expression is found are neither wanted nor looked at.
        partial: whether an update may lack keys.

    Raises:
        ConfigError: `exclude` is no regular expression, or the model cannot be flattened.
    """

    def __init__(self, like: Mapping[Any, Any], exclude: str | None = None, partial: bool = False) -> None:
        try:
            self._exclude = re.compile(exclude) if exclude else None
        except (re.error, TypeError) as error:
            raise ConfigError("exclude_vars", exclude, f"a regular expression: {error}") from None
        self._partial = partial
        self._flat = is_flat(like)
        self.arrays: list[ArraySpec] = []
        self.numbers: dict[str, type] = {}
        self._fixed: dict[str, Any] = {}
        leaves = flatten(like)
        self._known = frozenset(leaves)
        for name, leaf in leaves.items():
            if not self.is_excluded(name):
                self._sort_in(name, leaf)

    def _sort_in(self, name: str, leaf: Any) -> None:
        array = as_array(leaf)
        if array is not None:
            spec = ArraySpec(name, array.dtype, array.shape)
            if is_number_dtype(array.dtype):
                self.arrays.append(spec)
            else:
                self._fixed[name] = spec
        elif isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool):
            self.numbers[name] = complex if isinstance(leaf, complex) else float
        else:
            self._fixed[name] = type(leaf)

    def is_excluded(self, name: str) -> bool:
        """Whether `exclude` is found in `name`."""
        return self._exclude is not None and self._exclude.search(name) is not None

    def check(self, params: Any, site: str) -> Checked:
        """Return what counts of an update, by reference.

        Raises:
            UpdateRefused: a key is missing or unknown, or a value has a wrong type, dtype or shape.
        """
        leaves = self._leaves_of(params, site)
        arrays: list[NDArray[Any] | None] = []
        for spec in self.arrays:
            value = leaves.get(spec.name, _MISSING)
            if type(value) is np.ndarray and value.dtype == spec.dtype and value.shape == spec.shape:
                arrays.append(value)  # the common case, fast
            else:
                arrays.append(self._array(spec, value, site))
        numbers = [self._number(name, kind, leaves.get(name, _MISSING), site) for name, kind in self.numbers.items()]
        for name, wanted in self._fixed.items():
            self._check_fixed(name, wanted, leaves.get(name, _MISSING), site)
        return Checked(arrays, numbers)

    def _leaves_of(self, params: Any, site: str) -> Mapping[str, Any]:
        if not isinstance(params, dict):
            raise UpdateRefused(f"params are {type(params).__name__}, not a dict", site=site)
        try:
            leaves = params if self._flat else flatten(params)
        except ConfigError as error:
            raise UpdateRefused(str(error), site=site) from None
        extra = [name for name in leaves.keys() - self._known if not self.is_excluded(str(name))]
        if extra:
            raise UpdateRefused(f"key{_listed(extra)} not in the model", str(min(extra, key=str)), site)
        if not self._partial and not self._known <= leaves.keys():
            missing = [name for name in self._known - leaves.keys() if not self.is_excluded(name)]
            if missing:
                raise UpdateRefused(f"missing key{_listed(missing)}", min(missing), site)
        return leaves

    def _array(self, spec: ArraySpec, value: Any, site: str) -> NDArray[Any] | None:
        if value is _MISSING:
            return None
        array = as_array(value)
        if array is None:
            raise UpdateRefused(f"{_named(value)} where the model has an array", spec.name, site)
        self._check_spec(spec, array, site)
        return array

    @staticmethod
    def _check_spec(spec: ArraySpec, array: NDArray[Any], site: str) -> None:
        if array.dtype != spec.dtype:
            raise UpdateRefused(f"dtype {array.dtype}, the model has {spec.dtype}", spec.name, site)
        if array.shape != spec.shape:
            raise UpdateRefused(f"shape {array.shape}, the model has {spec.shape}", spec.name, site)

    @staticmethod
    def _number(name: str, kind: type, value: Any, site: str) -> complex | None:
        if value is _MISSING:
            return None
        if isinstance(value, np.number):
            value = value.item()
        allowed = (int, float, complex) if kind is complex else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise UpdateRefused(f"{_named(value)} where the model has a number", name, site)
        try:
            finite = math.isfinite(value.real) and math.isfinite(value.imag)
        except OverflowError:
            raise UpdateRefused("an integer beyond the range of a float", name, site) from None
        if not finite:
            raise UpdateRefused("NaN or Inf", name, site)
        return value

    def _check_fixed(self, name: str, wanted: Any, value: Any, site: str) -> None:
        if value is _MISSING:
            return
        if isinstance(wanted, ArraySpec):
            self._array(wanted, value, site)
        elif type(value) is not wanted:
            raise UpdateRefused(f"{_named(value)} where the model has {wanted.__name__}", name, site)


def _named(value: Any) -> str:
    return type(value).__name__


def _listed(names: list[Any]) -> str:
    shown = ", ".join(repr(str(name)[:80]) for name in sorted(names, key=str)[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{'s' * (len(names) > 1)} {shown}{more}"
