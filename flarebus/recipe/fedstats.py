"""FedStatsRecipe: statistics of tables over all sites. Parameters, checked; the algorithm is a workflow elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from flarebus.address import check_name
from flarebus.errors import ConfigError
from flarebus.job.checks import check_flag, check_int, check_keys, check_number
from flarebus.job.class_ref import ClassRef
from flarebus.job.definition import JobDefinition
from flarebus.job.executor_ref import ExecutorRef
from flarebus.job.kinds import FrameworkType
from flarebus.job.report import check_report_path
from flarebus.job.site_config import SiteConfig
from flarebus.plugins import origin_of
from flarebus.recipe.described import code_folder, describe
from flarebus.recipe.recipe import Recipe
from flarebus.recipe.validate import check_site_name
from flarebus.statistics import (
    AddNoiseToMinMax,
    HistogramBinsCleanser,
    MinCountCleanser,
    StatisticConfigs,
    Statistics,
    StatisticsExecutor,
    StatisticsPrivacyCleanser,
)
from flarebus.statistics.executor import FIRST_TASK, PRE_RUN_TASK, SECOND_TASK

__all__ = ["FedStatsRecipe"]

_TASKS = (PRE_RUN_TASK, FIRST_TASK, SECOND_TASK)
_SETTINGS = (
    "statistic_configs",
    "stats_output_path",
    "wait_time_after_min_received",
    "result_wait_timeout",
    "precision",
    "min_clients",
    "enable_pre_run_task",
)
# In this order: a feature with few values is held back before anything is made of it.
_CLEANSERS = (MinCountCleanser, AddNoiseToMinMax, HistogramBinsCleanser)
_CLEANSER_SETTINGS = ("min_count", "min_noise_level", "max_noise_level", "max_bins_percent")


class FedStatsRecipe(Recipe):
    """Federated statistics: what is in the tables of all sites together, without a record leaving its site.

    The report is a JSON file in the server's folder of the run; `workflows.statistics.StatisticsController` says what
    is in it.

    Args:
        name: name of the job, and of its run folder.
        stats_output_path: where the report goes in the server's folder; ends in `.json`.
        sites: names of the sites; None takes those of the environment.
        statistic_configs: name of a statistic -> what it takes, see `StatisticsController`.
        stats_generator: works out a site's own statistics: `{"class_path": "pkg.mod.Class", "args": {...}}`, or a
            `Statistics` that keeps the arguments of its constructor, JSON values, as attributes of their names (`x` or
            `_x`). Sites import the class: from the folder of the running script, or from what is installed there.
        min_count: usable values that a feature must have at a site; with fewer nothing of it leaves the site. From 1.
        min_noise_level: the lowest and the highest value of a site are moved outwards by at least this part of what
            lies between them, above 0.
        max_noise_level: and at most by this part, up to 1.
        max_bins_percent: bins of a histogram for each hundred usable values, above 0, up to 100.
        cleansers: more of them, which see what those three have left, described as `stats_generator`.
        wait_time_after_min_received: seconds that the others have once `min_clients` have answered, from 0.
        result_wait_timeout: seconds for each pass, above 0; None leaves it to the sites' lives.
        precision: decimal places in the report, from 0; None keeps all digits.
        min_clients: sites that have to answer each pass, from 1; None: all of them.
        enable_pre_run_task: tell the generators first what will be asked for.

    Raises:
        ConfigError: a parameter is wrong; names it, its value and what is allowed.
    """

    workflow: ClassVar[str] = "statistics"

    def __init__(
        self,
        *,
        name: str = "fedstats",
        stats_output_path: str = "statistics/statistics.json",
        sites: Sequence[str] | None = None,
        statistic_configs: Mapping[str, Any],
        stats_generator: Any,
        min_count: int = 10,
        min_noise_level: float = 0.1,
        max_noise_level: float = 0.3,
        max_bins_percent: float = 10,
        cleansers: Sequence[Any] = (),
        wait_time_after_min_received: float = 1,
        result_wait_timeout: float | None = None,
        precision: int | None = 4,
        min_clients: int | None = None,
        enable_pre_run_task: bool = True,
    ) -> None:
        settings = _settings(dict(locals()))  # before any other local: exactly the parameters
        code_dir = code_folder()
        limits = (
            MinCountCleanser(min_count),
            AddNoiseToMinMax(min_noise_level, max_noise_level),
            HistogramBinsCleanser(max_bins_percent),
        )
        args = {
            "generator": _described(stats_generator, Statistics, "stats_generator", code_dir),
            "cleansers": [
                _described(each, StatisticsPrivacyCleanser, "cleansers", code_dir) for each in (*limits, *cleansers)
            ],
        }
        executor = ExecutorRef(ClassRef(origin_of(StatisticsExecutor), args), _TASKS)
        config = SiteConfig(framework=FrameworkType.NUMPY, executors=(executor,))
        self._definition = JobDefinition(
            name=check_name(name),
            workflow=self.workflow,
            workflow_settings=settings,
            site_defaults=config,
            sites=dict.fromkeys(_site_names(sites), config),
            code_dir=code_dir,
        )

    @classmethod
    def _parameters_of(cls, job: JobDefinition) -> dict[str, Any]:
        settings = dict(job.workflow_settings)
        check_keys(settings, _SETTINGS, ("statistic_configs",), "settings")
        args = _executor_of(job).ref.args
        first, own = args["cleansers"][: len(_CLEANSERS)], args["cleansers"][len(_CLEANSERS) :]
        limits = {name: value for each in first for name, value in each["args"].items()}
        check_keys(limits, _CLEANSER_SETTINGS, (), "cleansers")
        sites = None if job.open_to_others else list(job.sites) or None
        return {
            **settings,
            **limits,
            "name": job.name,
            "sites": sites,
            "stats_generator": args["generator"],
            "cleansers": own,
        }


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the workflow, each checked."""
    wait, limit = given["wait_time_after_min_received"], given["result_wait_timeout"]
    precision, minimum = given["precision"], given["min_clients"]
    return {
        "statistic_configs": StatisticConfigs.parse(given["statistic_configs"]).to_json(),
        "stats_output_path": check_report_path("stats_output_path", given["stats_output_path"]),
        "wait_time_after_min_received": check_number("wait_time_after_min_received", wait, minimum=0.0),
        "result_wait_timeout": None if limit is None else check_number("result_wait_timeout", limit, above=0.0),
        "precision": None if precision is None else check_int("precision", precision, 0),
        "min_clients": None if minimum is None else check_int("min_clients", minimum, 1),
        "enable_pre_run_task": check_flag("enable_pre_run_task", given["enable_pre_run_task"]),
    }


def _site_names(sites: object) -> tuple[str, ...]:
    if sites is None:
        return ()
    if not isinstance(sites, list | tuple) or not sites:
        raise ConfigError("sites", sites, "a list of names, or None for those of the environment")
    if "Global" in sites:
        raise ConfigError("sites", "Global", "another name: in the report this one stands for all sites together")
    return tuple(dict.fromkeys(check_site_name("sites", name) for name in sites))


def _described(value: object, kind: type, parameter: str, code_dir: Path) -> dict[str, Any]:
    """The description of an object, after one was made from it to see that it can be."""
    ref = describe(value, parameter, code_dir)
    made = ref.build(code_dir, parameter)
    if not isinstance(made, kind):
        raise ConfigError(parameter, ref.class_path, f"not a {kind.__name__}: derive it from {origin_of(kind)}")
    return ref.to_json()


def _executor_of(job: JobDefinition) -> ExecutorRef:
    for ref in job.site_defaults.executors:
        if ref.ref.class_path == origin_of(StatisticsExecutor):
            return ref
    raise ConfigError("site_defaults.executors", job.workflow, f"needs {origin_of(StatisticsExecutor)}")
