"""Federated statistics without a bus: a controller in a fake job, whose sites are real executors over given columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flarebus.codec import decode, encode
from flarebus.model import FLModel
from flarebus.statistics import ColumnStatistics, Statistics, StatisticsExecutor, StatisticsPrivacyCleanser
from flarebus.workflow.executor import SiteTask
from tests.workflow.fake_job import FakeJob
from workflows.statistics import StatisticsController

__all__ = ["Columns", "StatsJob", "run"]


class Columns(ColumnStatistics):
    """Columns that a test made up: dataset -> feature -> values."""

    def __init__(self, datasets: Mapping[str, Mapping[str, Any]]) -> None:
        self.datasets = datasets

    def load(self, site_name: str) -> Mapping[str, Mapping[str, Any]]:
        return self.datasets


class StatsJob(FakeJob):
    """A job whose sites answer with executors.

    Args:
        sites: name -> its generator, or dataset -> feature -> values.
        cleansers: of every site.
        lost: (site, task) whose answer never comes.
        tampered: (site, task) -> what comes instead.
    """

    def __init__(
        self,
        sites: Mapping[str, Any],
        cleansers: Sequence[StatisticsPrivacyCleanser] = (),
        lost: Sequence[tuple[str, str]] = (),
        tampered: Mapping[tuple[str, str], FLModel] | None = None,
    ) -> None:
        super().__init__(self._answered, list(sites))
        self.reports: dict[str, Any] = {}
        self.fired: list[tuple[str, dict[str, Any]]] = []
        self.reasons: dict[str, str] = {}
        self._lost = set(lost)
        self._tampered = dict(tampered or {})
        self._executors = {
            site: StatisticsExecutor(given if isinstance(given, Statistics) else Columns(given), cleansers)
            for site, given in sites.items()
        }

    def _answered(self, site: str, round: int, params: dict[str, Any]) -> FLModel | None:
        task = self.rounds_done[-1].task
        if (site, task.name) in self._lost:
            return None
        if (site, task.name) in self._tampered:
            return self._tampered[site, task.name]
        try:
            here = SiteTask(task.name, round, task.total_rounds, FLModel(params=params), site, self.job_id, Path())
            answer = self._executors[site].execute(here)
        except Exception as error:
            self.reasons[site] = str(error)
            return None
        # There and back: what an executor gives must be fit to travel.
        encoded = encode(answer)
        found = decode(encoded.body, encoded.buffers)
        assert isinstance(found, FLModel)
        return found

    def save_report(self, path: str, report: Mapping[str, Any]) -> None:
        self.reports[path] = report

    def fire(self, event: str, **fields: Any) -> None:
        self.fired.append((event, fields))


def run(job: StatsJob, configs: Mapping[str, Any], **settings: Any) -> Any:
    """The report of one run with all digits, unless the settings say otherwise."""
    StatisticsController(statistic_configs=configs, **{"precision": None, **settings}).run(job)
    return job.reports["statistics/statistics.json"]
