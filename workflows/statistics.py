"""Federated statistics: what is in the tables of all sites together, without a record leaving its site.

Two passes over the sites. The first asks for counts, sums and noised extremes, which give the mean and the range of all
values. The second asks for what is worked out about those: squares about the mean, counts in the bins of one histogram,
groups of sorted values for quantiles. `workflows/_statistics_global.py` has the formulas.

`python -m workflows.statistics` describes a table of tumours that comes with scikit-learn, split over three clinics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flarebus.errors import UpdateRefused
from flarebus.job.checks import check_int
from flarebus.model import FLModel
from flarebus.statistics import StatisticConfigs
from flarebus.statistics.executor import FIRST_TASK, PRE_RUN_TASK, SECOND_TASK
from flarebus.workflow.controller import Controller, Job, Result, Task
from workflows._statistics_answers import Answer, Feature, read_answer
from workflows._statistics_global import Common, first_pass, in_common, report
from workflows._statistics_picture import draw

__all__ = ["StatisticsController", "draw"]


class StatisticsController(Controller):
    """The server side of federated statistics.

    The report is a JSON file: feature -> statistic -> site, or "Global" -> dataset -> value. What sites leave out, and
    why, stands in a second file beside it, `..._left_out.json`, if there is anything of that kind.

    Args:
        statistic_configs: name of a statistic -> what it takes. `count failure_count sum mean var stddev min max` take
            `{}`; `histogram` takes, for each feature or "*" for all others, `{"bins": 20}`, also with `"range": [low,
            high]`; `quantile` takes in the same way a list of shares between 0 and 1.
        stats_output_path: where the report goes in the server's folder of the run; ends in `.json`.
        wait_time_after_min_received: seconds that the others have once `min_clients` have answered.
        result_wait_timeout: seconds for each pass; None leaves it to the sites' lives.
        precision: decimal places in the report; None keeps all digits.
        min_clients: sites that have to answer each pass; None: all of them.
        enable_pre_run_task: tell the generators first what will be asked for.

    Raises:
        ConfigError: `statistic_configs` or a number makes no sense.
    """

    def __init__(
        self,
        *,
        statistic_configs: Mapping[str, Any],
        stats_output_path: str = "statistics/statistics.json",
        wait_time_after_min_received: float = 1,
        result_wait_timeout: float | None = None,
        precision: int | None = 4,
        min_clients: int | None = None,
        enable_pre_run_task: bool = True,
    ) -> None:
        self.configs = StatisticConfigs.parse(statistic_configs)
        self.stats_output_path = stats_output_path
        self.wait_time_after_min_received = wait_time_after_min_received
        self.result_wait_timeout = result_wait_timeout
        self.precision = None if precision is None else check_int("precision", precision, 0)
        self.min_clients = min_clients
        self.enable_pre_run_task = enable_pre_run_task

    def run(self, job: Job) -> None:
        """Ask twice, and write the report."""
        asked: Sequence[str] = job.sites
        sites = self._prepare(job, asked) if self.enable_pre_run_task else asked
        answers = self._ask(job, FIRST_TASK, sites, {"statistics": first_pass(self.configs)}, {})
        common: dict[Feature, Common] = {}
        if self.configs.needs_second_pass:
            common = in_common({site: answer.values for site, answer in answers.items()}, self.configs)
            more = self._ask(job, SECOND_TASK, sorted(answers), {"features": _nested(common)}, common)
            answers = {site: answers[site].joined(answer) for site, answer in more.items()}
        values = {site: answers[site].values for site in sorted(answers)}
        job.save_report(self.stats_output_path, report(values, common, self.configs, self.precision))
        left_out = _left_out(asked, answers)
        if left_out:
            job.save_report(f"{self.stats_output_path.removesuffix('.json')}_left_out.json", left_out)

    def _prepare(self, job: Job, sites: Sequence[str]) -> list[str]:
        """Tell the generators what comes; the sites that are ready for it."""
        ready = []
        for result in self._broadcast(job, PRE_RUN_TASK, sites, {"statistic_configs": self.configs.to_json()}):
            ready.append(result.site)
            job.fire("pre_run_result", site=result.site, told=(result.model.params or {}).get("pre_run"))
        return sorted(ready)

    def _ask(
        self, job: Job, task: str, sites: Sequence[str], asked: dict[str, Any], common: Mapping[Feature, Common]
    ) -> dict[str, Answer]:
        """One pass: site -> what can be used of its answer."""
        bins = {feature: told["histogram"][0] for feature, told in common.items() if "histogram" in told}
        answers = {}
        for result in self._broadcast(job, task, sites, asked):
            try:
                answers[result.site] = read_answer(result.model, bins)
            except UpdateRefused as why:
                result.refuse(why)
        return answers

    def _broadcast(self, job: Job, task: str, sites: Sequence[str], asked: dict[str, Any]) -> Iterator[Result]:
        tasks = [PRE_RUN_TASK] * self.enable_pre_run_task + [FIRST_TASK]
        tasks += [SECOND_TASK] * self.configs.needs_second_pass
        return job.broadcast(
            Task(task, FLModel(params=asked), tasks.index(task), len(tasks)),
            sites=sites,
            min_responses=self.min_clients or 0,
            wait_time_after_min_received=self.wait_time_after_min_received,
            timeout=self.result_wait_timeout,
        )


def _nested(common: Mapping[Feature, Common]) -> dict[str, dict[str, Common]]:
    found: dict[str, dict[str, Common]] = {}
    for (dataset, name), told in common.items():
        found.setdefault(dataset, {})[name] = told
    return found


def _left_out(asked: Sequence[str], answers: Mapping[str, Answer]) -> dict[str, Any]:
    """Site -> dataset -> feature -> statistic -> why it is not in the report; or site -> why all of it is not."""
    found: dict[str, Any] = {
        site: "no usable answer; the log of the server says why" for site in asked if site not in answers
    }
    for site, answer in answers.items():
        for (dataset, name), reasons in answer.left_out.items():
            found.setdefault(site, {}).setdefault(dataset, {})[name] = reasons
    return dict(sorted(found.items()))


if __name__ == "__main__":
    from workflows._statistics_program import main

    raise SystemExit(main())
