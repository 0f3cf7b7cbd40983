"""The site's half of federated statistics: asks the generator, lets the cleansers judge, and answers with what is left.

A question is answered once: asked the same again, the site gives the same answer, with the same noise in it; asked
anything else, it refuses. Otherwise a server could ask for ever new ranges until it has found every single value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flarebus.errors import ConfigError, JobFailed
from flarebus.job.class_ref import ClassRef
from flarebus.model import FLModel
from flarebus.plugins import origin_of
from flarebus.statistics.cleansers import StatisticsPrivacyCleanser, cleanse, max_groups
from flarebus.statistics.config import StatisticConfigs
from flarebus.statistics.groups import QuantileGroups
from flarebus.statistics.spec import DataType, Feature, Histogram, Statistics
from flarebus.workflow.executor import Executor, SiteTask

__all__ = ["FIRST_TASK", "LARGEST", "PRE_RUN_TASK", "SECOND_TASK", "StatisticsExecutor"]

PRE_RUN_TASK = "fed_stats_pre_run"
FIRST_TASK = "fed_stats_first"
SECOND_TASK = "fed_stats_second"

LARGEST = 1e300
"""Larger values are not told: what is made of those of several sites has to be within the range of a float."""

# Quantiles read from fewer groups could have any rank.
_LEAST_GROUPS = 5


class StatisticsExecutor(Executor):
    """Answers the tasks of `workflows.statistics.StatisticsController` at one site.

    Args:
        generator: works the statistics out; not initialised yet. Or its description, as in a recipe.
        cleansers: judge them, in this order; or their descriptions.

    Raises:
        ConfigError: one of them cannot be made from its description, or is not what it should be.
    """

    def __init__(
        self,
        generator: Statistics | Mapping[str, Any],
        cleansers: Sequence[StatisticsPrivacyCleanser | Mapping[str, Any]],
    ) -> None:
        self._generator: Statistics = _made(generator, Statistics, "stats_generator")
        self._cleansers: list[StatisticsPrivacyCleanser] = [
            _made(each, StatisticsPrivacyCleanser, "cleansers") for each in cleansers
        ]
        self._is_ready = False
        self._answered: dict[str, tuple[dict[Any, Any], FLModel]] = {}
        self._tasks: dict[str, Callable[[Mapping[str, Any]], FLModel]] = {
            PRE_RUN_TASK: self._pre_run,
            FIRST_TASK: self._first,
            SECOND_TASK: self._second,
        }

    def execute(self, task: SiteTask) -> FLModel:
        """Answer one task. The generator loads its data before the first, and lets go of them after the last.

        Raises:
            FilterFailed: a cleanser did not do its work; nothing leaves the site.
            JobFailed: the task is none of these, or asks again and for something else.
        """
        if task.name not in self._tasks:
            raise JobFailed(f"task {task.name!r} is none of {', '.join(self._tasks)}")
        asked = dict(task.model.params or {})
        before = self._answered.get(task.name)
        if before is None:
            if not self._is_ready:
                self._generator.initialize(task.site)
                self._is_ready = True
            before = self._answered[task.name] = (asked, self._tasks[task.name](asked))
            if task.round + 1 == task.total_rounds:
                self._generator.finalize()
        elif before[0] != asked:
            raise JobFailed(f"task {task.name!r} asks for something else than before; a site answers it once")
        return before[1]

    def _pre_run(self, asked: Mapping[str, Any]) -> FLModel:
        configs = StatisticConfigs.parse(asked["statistic_configs"])
        bins = {name: config.bins for name, config in configs.histograms.items()} or None
        ranges = {name: config.range and list(config.range) for name, config in configs.histograms.items()} or None
        told = self._generator.pre_run(list(configs.names), bins, ranges)
        return FLModel(params={"pre_run": told or {}})

    def _first(self, asked: Mapping[str, Any]) -> FLModel:
        answer = _Answer(self._cleansers)
        for feature in self._features():
            feature.values |= {"count": feature.count, "failure_count": feature.failures}
            if feature.has_numbers:
                for name in asked["statistics"]:
                    feature.tell(name)
            answer.add(feature)
        return answer.to_model()

    def _second(self, asked: Mapping[str, Any]) -> FLModel:
        answer = _Answer(self._cleansers)
        for feature in self._features():
            wanted = asked["features"].get(feature.dataset, {}).get(feature.name)
            if wanted is not None and feature.has_numbers:
                feature.tell_about(wanted, max_groups(self._cleansers, feature.usable))
                answer.add(feature)
        return answer.to_model()

    def _features(self) -> Iterator[_Feature]:
        for dataset, features in self._generator.features().items():
            for feature in features:
                yield _Feature(self._generator, dataset, feature)


def _made(given: Any, kind: type, parameter: str) -> Any:
    made = ClassRef.parse(given, parameter).make(parameter) if isinstance(given, Mapping) else given
    if not isinstance(made, kind):
        raise ConfigError(parameter, origin_of(type(made)), f"derive it from {kind.__name__} of flarebus.statistics")
    return made


class _Feature:
    """A feature of the site, with what the generator has told of it, and why the rest is missing."""

    def __init__(self, generator: Statistics, dataset: str, feature: Feature) -> None:
        self.dataset = dataset
        self.name = feature.feature_name
        self.values: dict[str, Any] = {}
        self.missing: dict[str, str] = {}
        self._generator = generator
        self._where = (dataset, self.name)
        self.count = int(generator.count(*self._where))
        self.failures = int(generator.failure_count(*self._where))
        self.usable = self.count - self.failures
        self.has_numbers = feature.data_type in (DataType.INT, DataType.FLOAT) and self.usable > 0

    def tell(self, name: str) -> None:
        """One value of the first pass."""
        methods = {"sum": "sum", "mean": "mean", "min": "min_value", "max": "max_value"}
        if name in methods:
            self._put(name, lambda: float(getattr(self._generator, methods[name])(*self._where)))

    def tell_about(self, wanted: Mapping[str, Any], n_groups: int) -> None:
        """What the second pass wants, about what the sites have in common."""
        if "mean" in wanted:
            mean, count = wanted["mean"], wanted["count"]
            self._put("squares", lambda: self._variance(mean, count) * (count - 1))
            if self.usable > 1:
                # About its own mean and count, a site's part in the variance is its own variance.
                self._put("var", lambda: self._variance(self._generator.mean(*self._where), self.usable))
        if "histogram" in wanted:
            self._put("histogram", lambda: _counts_in(self._generator.histogram(*self._where, *wanted["histogram"])))
        if "quantile" in wanted and n_groups >= min(_LEAST_GROUPS, self.usable):
            self._put("quantile", lambda: _groups_in(self._generator.quantile_groups(*self._where, n_groups)))
        elif "quantile" in wanted:
            self.missing["quantile"] = "too few values for groups that may be told"

    def _variance(self, mean: float, count: int) -> float:
        return float(self._generator.variance_with_mean(*self._where, mean, count))

    def _put(self, name: str, ask: Callable[[], Any]) -> None:
        """Ask the generator for one value; without it, note why."""
        try:
            value = ask()
            if isinstance(value, float) and not abs(value) <= LARGEST:
                raise OverflowError
            self.values[name] = value
        except NotImplementedError:
            self.missing[name] = f"{origin_of(type(self._generator))} does not tell it"
        except OverflowError:
            self.missing[name] = f"it is not within {LARGEST:g}"


class _Answer:
    """Dataset -> feature -> statistic: values that may leave the site, and the reasons why others do not."""

    def __init__(self, cleansers: Sequence[StatisticsPrivacyCleanser]) -> None:
        self._cleansers = cleansers
        self._values: dict[str, dict[str, Any]] = {}
        self._left_out: dict[str, dict[str, Any]] = {}

    def add(self, feature: _Feature) -> None:
        kept, withheld = cleanse(self._cleansers, feature.values, feature.usable)
        if "quantile" in kept:
            kept["quantile"] = kept["quantile"]._asdict()
        if kept:
            self._values.setdefault(feature.dataset, {})[feature.name] = kept
        reasons = {**feature.missing, **withheld}
        reasons.pop("squares", None)  # nobody has asked for those; what has been made of them has its own reason
        if reasons:
            self._left_out.setdefault(feature.dataset, {})[feature.name] = reasons

    def to_model(self) -> FLModel:
        return FLModel(params={"values": self._values, "left_out": self._left_out})


def _counts_in(histogram: Histogram) -> NDArray[np.int64]:
    return np.array([int(each.sample_count) for each in histogram.bins], np.int64)


def _groups_in(groups: QuantileGroups) -> QuantileGroups:
    if not (np.abs(groups.means) <= LARGEST).all():
        raise OverflowError
    return groups
