"""WeightedMean: the exact weighted mean of updates, folded in as they arrive. It does no I/O, knows of sites only their
names, and decides nothing about who takes part.

- An update is checked whole before any of it counts.
- The first two updates (four of 16-bit numbers) are only kept; with the next one their own memory becomes the sum. So N
  updates need the memory of two, and the mean of two needs no sum at all.
- The bits of the result depend on the order of `add` calls and on nothing else.

How exact: within one unit in the last place of the model's dtype, however many updates there are. Sums of numbers with
up to 32 bits are kept in float64, so this holds until values cancel each other to less than about a millionth of their
size; sums of wider ones are kept in pairs of float64.
"""

from __future__ import annotations

import logging
import math
import numbers
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flarebus.errors import ConfigError, QuorumNotReached, UpdateRefused
from flarebus.model import FLModel, ParamsType
from flarebus.workflow.exact import ExactMean
from flarebus.workflow.params import as_array, flatten, rebuild, restore
from flarebus.workflow.runs import Runs, spans_of
from flarebus.workflow.template import Checked, Template

__all__ = ["WeightedMean"]

log = logging.getLogger(__name__)

# Beyond these a weight is a mistake or an attack; within them no product with a float32 leaves the range of a float64.
_LEAST_WEIGHT, _MOST_WEIGHT = 1e-30, 1e30
# What one result may report.
_MOST_METRICS, _LONGEST_METRIC = 1000, 128


class WeightedMean:
    """The weighted mean of the updates of one round.

    Ownership: `add` takes over the arrays of an update; the caller must neither read nor write them afterwards, because
    they may become the sum. (Once an array has as many contributions as are kept, later updates are only read, and are
    free again when `add` returns.) Arrays that share memory with `like` or with each other are never written.

    One thread at a time may call it; inside, heavy work is shared out to a few threads.

    Args:
        like: the model that the updates are of; None or empty: the first update says what the others must look like.
        exclude: regular expression; keys in which it is found keep the value of the model.
        partial: whether an update may lack keys; each key is then averaged over those that have it.
        threads: how many threads work at once on big models; None: one per core, at most 4.

    Attributes:
        kind: FULL or DIFF, set by the first update that counts; updates of the other kind are refused.
        n_results: updates accepted, those of weight 0 and those with metrics only among them.
        sites: who sent them, in order.
        total_weight: sum of the weights of updates with parameters.

    Raises:
        ConfigError: `exclude` is no regular expression, or `like` is nested too deep or has a name twice.
    """

    def __init__(
        self,
        like: Mapping[Any, Any] | None,
        exclude: str | None = None,
        *,
        partial: bool = False,
        threads: int | None = None,
    ) -> None:
        self._exclude = exclude
        self._partial = partial
        self._threads = threads or min(os.cpu_count() or 1, 4)
        self._own_model: dict[Any, Any] | None = None
        self._use_template(like or {})
        self._has_template = bool(like)
        self._metrics: dict[str, ExactMean] = {}
        self._odd_metrics: set[str] = set()
        self.kind: ParamsType | None = None
        self.n_results = 0
        self.sites: list[str] = []
        self.total_weight = 0.0

    def _use_template(self, like: Mapping[Any, Any]) -> None:
        self._template = Template(like, self._exclude, self._partial)
        arrays = [array for array in map(as_array, flatten(like).values()) if array is not None]
        self._runs = Runs(self._template.arrays, spans_of(arrays), self._threads, together=not self._partial)
        self._numbers = [ExactMean() for _ in self._template.numbers]

    def add(self, model: FLModel, weight: float, site: str = "") -> None:
        """Fold in one update and its metrics.

        Args:
            model: parameters as a whole model or as differences to it; or metrics alone.
            weight: share in the mean, relative to the others; 0: it is accepted but does not count.
            site: who sent it, for errors.

        Raises:
            UpdateRefused: a key is missing or unknown; a type, dtype or shape is not the model's; NaN or Inf; a weight
                or metrics that make no sense; FULL and DIFF in one round; the mean is unchanged.
        """
        weight = _checked_weight(weight, site)
        metrics = self._checked_metrics(model.metrics, site)
        if model.params is None:
            if not model.metrics:
                raise UpdateRefused("neither parameters nor metrics in it", site=site)
        else:
            with np.errstate(all="ignore"):
                self._add_params(model, weight, site)
        self.n_results += 1
        self.sites.append(site)
        if weight:
            for name, value in metrics.items():
                self._metrics.setdefault(name, ExactMean()).add(value, weight)

    def _add_params(self, model: FLModel, weight: float, site: str) -> None:
        kind = model.params_type or ParamsType.FULL
        if self.kind is not None and kind is not self.kind:
            raise UpdateRefused(f"{kind.value} in a round of {self.kind.value} results", site=site)
        if not self._has_template:
            self._learn_template(model.params, kind, site)
        checked = self._template.check(model.params, site)
        staged = self._runs.stage(checked.arrays)
        bad = self._runs.find_nonfinite(staged)
        if bad is not None:
            raise UpdateRefused("NaN or Inf", bad, site)
        if not weight:
            return
        self._runs.fold(staged, weight)
        self._count(checked, weight)
        self.kind = kind
        if not self._has_template:
            self._has_template, self._own_model = True, model.params

    def _learn_template(self, params: Any, kind: ParamsType, site: str) -> None:
        if kind is ParamsType.DIFF:
            raise UpdateRefused("a difference, but there is no model yet to add it to", site=site)
        try:
            self._use_template(params if isinstance(params, dict) else {})
        except ConfigError as error:
            raise UpdateRefused(str(error), site=site) from None

    def _count(self, checked: Checked, weight: float) -> None:
        for mean, value in zip(self._numbers, checked.numbers, strict=True):
            if value is not None:
                mean.add(value, weight)
        self.total_weight += weight

    def _checked_metrics(self, metrics: Any, site: str) -> dict[str, float]:
        if metrics is None:
            return {}
        if not isinstance(metrics, dict):
            raise UpdateRefused(f"metrics are {type(metrics).__name__}, not a dict", site=site)
        if len(metrics) > _MOST_METRICS:
            raise UpdateRefused(f"{len(metrics)} metrics; at most {_MOST_METRICS} are allowed", site=site)
        found = {}
        for name, value in metrics.items():
            if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_METRIC:
                raise UpdateRefused(f"a metric's name must be a string of 1 to {_LONGEST_METRIC} letters", site=site)
            number = _metric_value(value)
            if number is not None and math.isfinite(number):
                found[name] = number
            elif name not in self._odd_metrics:
                self._odd_metrics.add(name)
                log.warning("metric %r left out: %s is no finite number", name, type(value).__name__)
        return found

    @property
    def metrics(self) -> dict[str, float]:
        """The weighted mean of each metric over the results that carry it, rounded once."""
        return {name: mean.real() for name, mean in self._metrics.items()}

    def apply_to(
        self, model: Mapping[Any, Any] | None, out: Mapping[str, NDArray[Any]] | None = None
    ) -> dict[Any, Any]:
        """Return the new model: the mean, or `model` plus the mean difference, rounded once.

        Keys without a contribution, excluded keys and values that are no numbers are those of `model`. Integer arrays
        are rounded to the nearest; Python integers become floats. It may be called again.

        Args:
            model: the model the updates are of; read only. None or empty if the mean was made without one.
            out: dotted name -> C-contiguous array of the model's dtype and shape, such as pages of a mapped file: they
                are filled (also with values that stay) and become part of the result. Arrays without one are new.

        Raises:
            QuorumNotReached: nothing was contributed; nothing is written.
            UpdateRefused: a result is beyond the range of its dtype; `out` may be half written.
            ConfigError: `model` or `out` does not fit the updates.
        """
        if self.kind is None:
            raise QuorumNotReached(1, 0, dict.fromkeys(self.sites, "no parameters, or weight 0"))
        model = model or self._own_model or {}
        leaves = flatten(model)
        arrays = {name: array for name, leaf in leaves.items() if (array := as_array(leaf)) is not None}
        self._check_model(leaves, arrays)
        averaged = {spec.name for run in self._runs.runs if run.sums.weight_units for spec in run.specs}
        targets = _targets(arrays, averaged, out or {})
        for name in targets.keys() - averaged:
            np.copyto(targets[name], arrays[name])
        with np.errstate(all="ignore"):
            self._runs.write_means(arrays if self.kind is ParamsType.DIFF else None, targets)
        new: dict[str, Any] = {name: restore(target, leaves[name]) for name, target in targets.items()}
        self._write_numbers(leaves, new)
        return rebuild(model, new)

    def _check_model(self, leaves: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        for spec in self._template.arrays:
            array = arrays.get(spec.name)
            if array is None or array.dtype != spec.dtype or array.shape != spec.shape:
                raise ConfigError("model", spec.name, "the model is not the one that the updates are of")
        if not self._template.numbers.keys() <= leaves.keys():
            raise ConfigError("model", sorted(leaves), "the model is not the one that the updates are of")

    def _write_numbers(self, leaves: Mapping[str, Any], new: dict[str, Any]) -> None:
        is_diff = self.kind is ParamsType.DIFF
        for (name, kind), mean in zip(self._template.numbers.items(), self._numbers, strict=True):
            if mean.is_empty:
                continue
            base = leaves[name] if is_diff else 0
            try:
                new[name] = mean.complex(base) if kind is complex else mean.real(base)
            except OverflowError:
                raise UpdateRefused("the new value is beyond the range of a float", name) from None


def _checked_weight(weight: Any, site: str) -> float:
    if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
        raise UpdateRefused(f"weight of type {type(weight).__name__}; it must be a number", site=site)
    try:
        value = float(weight)
    except OverflowError:
        value = math.inf
    if value and not _LEAST_WEIGHT <= value <= _MOST_WEIGHT:
        raise UpdateRefused(f"weight {value!r}; it must be 0, or from {_LEAST_WEIGHT} to {_MOST_WEIGHT}", site=site)
    return value


def _metric_value(value: Any) -> float | None:
    if not isinstance(value, (int, float)):
        array = as_array(value)
        if array is None or array.shape or array.dtype.kind not in "iuf":
            return None
        value = array.item()
    elif isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _targets(
    arrays: Mapping[str, NDArray[Any]], averaged: set[str], out: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    targets = {}
    for name, array in arrays.items():
        target = out.get(name)
        if target is None:
            if name not in averaged:
                continue
            target = np.empty(array.shape, array.dtype)
        elif target.dtype != array.dtype or target.shape != array.shape or not target.flags.c_contiguous:
            raise ConfigError("out", name, f"must be a contiguous array of {array.dtype} {array.shape}")
        targets[name] = target
    return targets
