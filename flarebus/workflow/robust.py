"""Aggregators that a few bad sites cannot lead astray: median and trimmed mean of every coordinate (Yin et al.,
"Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018), Krum and multi-Krum (Blanchard
et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017).

**Memory.** A mean needs three models whatever the number of sites. These need the results of all sites at once: a round
of N results holds copies of N models, in memory, until it is aggregated. On top of that come a few megabytes: the work
goes block by block.

All of them take sites for equal, because a bad one would claim whatever weight helps it. They look at what a site sends
before they keep it, as the mean does; and they turn differences into models, so that no site decides what the others
may send. Arithmetic is float64. What comes out does not depend on the order in which results came.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flarebus.errors import ConfigError, JobFailed, QuorumNotReached, UpdateRefused
from flarebus.job.checks import check_int, check_number
from flarebus.model import FLModel, MetaKey, ParamsType
from flarebus.workflow.accumulator import Floats, Numbers, Scratch, cast, is_finite
from flarebus.workflow.aggregator import ModelAggregator
from flarebus.workflow.params import as_array, flatten, rebuild, restore
from flarebus.workflow.template import Template

__all__ = ["KrumAggregator", "MedianAggregator", "TrimmedMeanAggregator"]

# Numbers, of all sites together, in one block: 8 MiB as float64.
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class _Update:
    """One site's model: arrays `(n,)` of real numbers, and Python's numbers, in the order of the template."""

    arrays: list[Numbers]
    numbers: list[complex]


class _RobustAggregator(ModelAggregator):
    """Keeps all results of a round, and combines them coordinate by coordinate."""

    def __init__(self) -> None:
        self._updates: dict[str, _Update] = {}
        self._model: Mapping[Any, Any] = {}
        self._template: Template | None = None
        self._scratch = Scratch()

    @abstractmethod
    def _needed(self, count: int) -> int:
        """How many results it takes, where there are `count`."""

    @abstractmethod
    def _combine(self, rows: Floats) -> Floats:
        """`(sites, n)` to `(n,)`; `rows` may be written to."""

    def _choose(self, updates: list[_Update]) -> list[_Update]:
        """Those that are combined."""
        return updates

    def reset_stats(self) -> None:
        self._updates = {}
        self._model, self._template = {}, None

    def expect_model(self, model: Mapping[Any, Any]) -> None:
        if model:
            self._model, self._template = model, Template(model)

    def accept_model(self, model: FLModel) -> None:
        site = str(model.meta.get(MetaKey.CLIENT_NAME, len(self._updates)))
        is_difference = model.params_type is ParamsType.DIFF
        if self._template is None:
            self._learn(model.params or {}, is_difference, site)
        assert self._template is not None
        checked = self._template.check(model.params, site)
        base: dict[str, Any] = flatten(self._model) if is_difference else {}
        arrays = []
        for spec, value in zip(self._template.arrays, checked.arrays, strict=True):
            whole = np.array(value)  # a copy, for what came is only lent
            if is_difference:
                with np.errstate(over="ignore"):
                    whole += as_array(base[spec.name])
            flat = _real(whole)
            if not is_finite(flat, self._scratch):
                raise UpdateRefused("NaN or Inf", spec.name, site)
            arrays.append(flat)
        numbers = [
            value + base[name] if is_difference else value
            for name, value in zip(self._template.numbers, checked.numbers, strict=True)
            if value is not None
        ]
        self._updates[site] = _Update(arrays, numbers)

    def _learn(self, params: Mapping[Any, Any], is_difference: bool, site: str) -> None:
        """Without a model to begin with, the first result says what the others must look like."""
        if is_difference:
            raise UpdateRefused("a difference, but there is no model yet to add it to", site=site)
        try:
            leaves = {name: as_array(leaf) for name, leaf in flatten(params).items()}
            copies = {name: array.copy() for name, array in leaves.items() if array is not None}
            self.expect_model(rebuild(params, copies))
        except ConfigError as error:
            raise UpdateRefused(str(error), site=site) from None

    def aggregate_model(self) -> FLModel:
        updates = [self._updates[site] for site in sorted(self._updates)]
        needed = self._needed(len(updates))
        if len(updates) < needed:
            raise QuorumNotReached(needed, len(updates), {})
        self._updates = {}
        with np.errstate(over="ignore", invalid="ignore"):
            new = self._combined(self._choose(updates))
        return FLModel(ParamsType.FULL, rebuild(self._model, new))

    def _combined(self, updates: list[_Update]) -> dict[str, Any]:
        assert self._template is not None
        leaves = flatten(self._model)
        new: dict[str, Any] = {}
        for index, spec in enumerate(self._template.arrays):
            array = np.empty(spec.shape, spec.dtype)
            target = _real(array)
            for begin, rows in _blocks([update.arrays[index] for update in updates]):
                values = self._combine(rows)
                if target.dtype.kind in "iu":
                    np.rint(values, out=values)
                try:
                    cast(values, target[begin : begin + len(values)])
                except OverflowError:
                    raise JobFailed(f"{spec.name!r} is beyond the range of {spec.dtype}") from None
            new[spec.name] = restore(array, leaves[spec.name])
        for index, (name, kind) in enumerate(self._template.numbers.items()):
            rows = np.array([[update.numbers[index].real, update.numbers[index].imag] for update in updates], float)
            real, imaginary = self._combine(rows).tolist()
            new[name] = complex(real, imaginary) if kind is complex else real
        return new


class MedianAggregator(_RobustAggregator):
    """The median of every coordinate; of two in the middle, what is between them. Good as long as fewer than half of
    the sites are bad. All results of a round are held in memory."""

    def _needed(self, count: int) -> int:
        return 1

    def _combine(self, rows: Floats) -> Floats:
        rows.sort(axis=0)  # along this axis a third of the time of `np.median`
        middle: Floats = rows[(len(rows) - 1) // 2 : len(rows) // 2 + 1].mean(axis=0)
        return middle


class TrimmedMeanAggregator(_RobustAggregator):
    """The mean of every coordinate without its largest and its smallest values. All results of a round are held in
    memory.

    Args:
        trim_ratio: the share of the results that is left out at each end, above 0 and below 0.5; at least the share of
            bad sites. What it comes to is rounded up.

    Raises:
        ConfigError: it is something else.
    """

    def __init__(self, trim_ratio: float = 0.1) -> None:
        super().__init__()
        self.trim_ratio = check_number("trim_ratio", trim_ratio, above=0.0)
        if self.trim_ratio >= 0.5:
            raise ConfigError("trim_ratio", trim_ratio, "below 0.5: something must be left between the ends")

    def _trimmed(self, count: int) -> int:
        # Products such as 0.1 * 30 lie a little above the whole number that is meant.
        return math.ceil(self.trim_ratio * count - 1e-9)

    def _needed(self, count: int) -> int:
        return next(enough for enough in itertools.count(max(count, 1)) if 2 * self._trimmed(enough) < enough)

    def _combine(self, rows: Floats) -> Floats:
        rows.sort(axis=0)
        cut = self._trimmed(len(rows))
        mean: Floats = rows[cut : len(rows) - cut].mean(axis=0)
        return mean


class KrumAggregator(_RobustAggregator):
    """Krum: the model of the site whose neighbours are nearest; multi-Krum: the mean of several such models.

    With n results, f of them perhaps bad, the score of result V_i is the sum of ||V_i - V_j||^2 over the n - f - 2
    results V_j that are nearest to it. The results with the least scores are taken. Distances are those of
    floating-point parameters, if there are any: counters would drown them. All results of a round are held in memory,
    and the work grows with the square of their number.

    Args:
        num_byzantine: f, from 0. A round needs 2 f + 3 results.
        num_selected: how many are taken; 1 is Krum. A round needs f more.

    Raises:
        ConfigError: one of them is something else.
    """

    def __init__(self, num_byzantine: int, num_selected: int = 1) -> None:
        super().__init__()
        self.num_byzantine = check_int("num_byzantine", num_byzantine, 0)
        self.num_selected = check_int("num_selected", num_selected, 1)

    def _needed(self, count: int) -> int:
        return max(2 * self.num_byzantine + 3, self.num_selected + self.num_byzantine)

    def _choose(self, updates: list[_Update]) -> list[_Update]:
        apart = np.zeros((len(updates), len(updates)))
        for columns in self._coordinates(updates):
            for _, rows in _blocks(columns):
                for index in range(len(rows) - 1):
                    difference = rows[index + 1 :] - rows[index]
                    apart[index, index + 1 :] += np.einsum("ij,ij->i", difference, difference)
        apart += apart.T
        np.fill_diagonal(apart, math.inf)
        nearest = np.sort(apart, axis=1)[:, : len(updates) - self.num_byzantine - 2]
        order = np.argsort(nearest.sum(axis=1), kind="stable")
        return [updates[index] for index in order[: self.num_selected]]

    def _coordinates(self, updates: list[_Update]) -> Iterator[list[Numbers]]:
        assert self._template is not None
        kinds = [spec.dtype.kind for spec in self._template.arrays]
        floating = [index for index, kind in enumerate(kinds) if kind not in "iu"]
        for index in floating or range(len(kinds)):
            yield [update.arrays[index] for update in updates]
        yield [_real(np.array(update.numbers, complex)) for update in updates]

    def _combine(self, rows: Floats) -> Floats:
        mean: Floats = rows.mean(axis=0)
        return mean


def _real(array: NDArray[Any]) -> Numbers:
    """A contiguous array as `(n,)` real numbers, on its memory: complex ones are pairs."""
    flat = array.reshape(-1)
    return flat.view(flat.real.dtype) if flat.dtype.kind == "c" else flat


def _blocks(columns: Sequence[Numbers]) -> Iterator[tuple[int, Floats]]:
    """The same part of every array, as rows of float64, with where it begins; the rows are free to be used."""
    width = max(1, _BLOCK // len(columns))
    for begin in range(0, len(columns[0]), width):
        yield begin, np.stack([column[begin : begin + width].astype(np.float64) for column in columns])
