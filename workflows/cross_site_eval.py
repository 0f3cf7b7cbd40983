"""Cross-site evaluation: every site's model and the server's, measured on every site's data.

    for model j, for site i:    table[i][j]  =  metrics of model j on the data of site i

The server's models are served from their files. A site's model stays with the site; the server passes on where it is,
and whoever evaluates it fetches it there. The sites go round in waves: in wave k site i evaluates model (i + k) mod n,
so that all of them work, each model is fetched by about one site at a time, and none moves twice to the same site.

`python -m workflows.cross_site_eval` trains a small network on handwritten digits and evaluates it everywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flarebus.errors import FilterFailed, QuorumNotReached
from flarebus.job.checks import check_number
from flarebus.model import FLModel
from flarebus.workflow.controller import Controller, Job, Result, Task
from flarebus.workflow.held import HeldModel
from flarebus.workflow.params import as_array, flatten
from workflows._evaluation_report import draw
from workflows._evaluations import GAPS_FILE, RESULTS_FILE, Evaluations

__all__ = ["CrossSiteEval", "draw"]

Model = FLModel | HeldModel

# How many sites' models are out at once where their size is not known.
_MODELS_AT_ONCE = 8
# Where a model is while it is evaluated: with its holder, and with the evaluator's host and script.
_COPIES = 3


class CrossSiteEval(Controller):
    """The server side of cross-site evaluation. No site's failure is a failure of the job: it leaves a gap.

    The results are a JSON file, `cross_site_val/cross_val_results.json`: site whose data it is -> owner of the model ->
    metric -> value. Owners are sites, and `SRV_<file name>` for the server's models. What is missing stands in
    `cross_val_gaps.json` beside it: `models`, site -> why it has no model; `evaluations`, site whose data it is ->
    owner of the model -> why there is no value.

    Args:
        submit_model_timeout: seconds that sites have to say that they have a model.
        validation_timeout: seconds that a site has for one evaluation. Who needs longer is given no more of them.
        participating_clients: sites that take part, with their models and their data; None for all.
        hyper_params: go to the sites beside the parameters of every model.
        memory_budget: bytes that all models may take which are out at once; it says how many sites are asked for
            theirs at a time. For sites that share a machine.
    """

    def __init__(
        self,
        *,
        submit_model_timeout: float = 600,
        validation_timeout: float = 6000,
        participating_clients: Sequence[str] | None = None,
        hyper_params: Mapping[str, Any] | None = None,
        memory_budget: float = 4e9,
    ) -> None:
        self.submit_model_timeout = check_number("submit_model_timeout", submit_model_timeout, above=0.0)
        self.validation_timeout = check_number("validation_timeout", validation_timeout, above=0.0)
        self.participating_clients = participating_clients
        self.hyper_params = dict(hyper_params or {})
        self.memory_budget = check_number("memory_budget", memory_budget, above=0.0)

    def run(self, job: Job) -> None:
        """Evaluate everything everywhere; after every wave the reports say as much as is known."""
        _Run(self, job).run()


class _Run:
    """One evaluation of everything."""

    def __init__(self, settings: CrossSiteEval, job: Job) -> None:
        self._settings = settings
        self._job = job
        self._sites = sorted(settings.participating_clients or job.sites)
        self._found = Evaluations()
        self._late: dict[str, str] = {}
        """Sites that took too long for a model, whose it was: nothing more is asked of them."""
        self._waves = itertools.count()

    def run(self) -> None:
        models = self._job.models()
        served: dict[str, Model] = {f"SRV_{name}": FLModel(params=params) for name, params in models.items()}
        self._job.fire("evaluation_started", sites=self._sites, models=[*self._sites, *served])
        # The sites' first: a script that fails, and begins anew, may have forgotten its own.
        size = self._group_size(served.values())
        for at in range(0, len(self._sites), size):
            self._evaluate_models_of(self._sites[at : at + size])
        self._evaluate(served)
        self._save()
        self._job.fire("evaluation_ended")

    def _group_size(self, served: Iterable[Model]) -> int:
        """How many sites' models may be out at once; they are taken to be as big as the server's."""
        nbytes = max((_nbytes(model) for model in served), default=0)
        return max(1, int(self._settings.memory_budget // (_COPIES * nbytes))) if nbytes else _MODELS_AT_ONCE

    def _evaluate_models_of(self, owners: Sequence[str]) -> None:
        held: dict[str, Model] = {}
        try:
            for result in self._ask_for_models(owners):
                assert result.held is not None, "it was not fetched"
                if result.held.has_params:
                    held[result.site] = result.held
                else:
                    result.refuse("it answered without params")
                    self._miss_model(result.site, "it answered without params")
            self._evaluate(dict(sorted(held.items())))
        finally:
            for model in held.values():
                assert isinstance(model, HeldModel)
                model.release()

    def _ask_for_models(self, owners: Sequence[str]) -> Iterator[Result]:
        task = Task("submit_model", FLModel(), beside=self._settings.hyper_params)
        there, limit_s = self._there(owners, self._miss_model), self._settings.submit_model_timeout
        silent = set(there)

        def failed(site: str, reason: str) -> None:
            silent.discard(site)
            self._miss_model(site, reason)

        for result in self._answers(dict.fromkeys(there, task), limit_s, failed, fetch=False):
            silent.discard(result.site)
            yield result
        for site in sorted(silent):
            self._miss_model(site, f"no answer within {limit_s:g} s")

    def _evaluate(self, models: Mapping[str, Model]) -> None:
        """Have every site evaluate each of `models`, in as many waves as there are models."""
        owners = list(models)
        for step in range(len(owners)):
            self._wave({site: owners[(at + step) % len(owners)] for at, site in enumerate(self._sites)}, models)
            self._save()

    def _wave(self, owner_of: Mapping[str, str], models: Mapping[str, Model]) -> None:
        """Have each site evaluate one model."""
        number, limit_s = next(self._waves), self._settings.validation_timeout
        tasks = {
            owner: Task("validate", models[owner], number, beside=self._settings.hyper_params)
            for owner in set(owner_of.values())
        }

        def missed(site: str, reason: str) -> None:
            silent.discard(site)
            self._miss(site, owner_of[site], reason)

        silent = set[str]()
        there = self._there(owner_of, missed)
        silent.update(there)
        for result in self._answers({site: tasks[owner_of[site]] for site in there}, limit_s, missed):
            silent.discard(result.site)
            self._note(result.site, owner_of[result.site], result.model.metrics)
        for site in sorted(silent):
            self._late[site] = owner_of[site]
            self._miss(site, owner_of[site], f"no answer within {limit_s:g} s")

    def _there(self, sites: Iterable[str], missed: Callable[[str, str], None]) -> list[str]:
        """Those of `sites` that can be given work; `missed` is told of the others, and why they cannot."""
        alive, there = set(self._job.sites), []
        for site in sites:
            if site not in alive:
                missed(site, "the site is gone")
            elif site in self._late:
                missed(site, f"it took too long for the model of {self._late[site]}")
            else:
                there.append(site)
        return there

    def _answers(
        self, tasks: Mapping[str, Task], limit_s: float, failed: Callable[[str, str], None], fetch: bool = True
    ) -> Iterator[Result]:
        if not tasks:
            return
        try:
            yield from self._job.broadcast(tasks, min_responses=1, timeout=limit_s, fetch=fetch, on_failed=failed)
        except QuorumNotReached:
            return  # not one of them; why is known
        except FilterFailed as error:  # on the way out
            for site in tasks:
                failed(site, str(error))

    def _note(self, data_site: str, owner: str, metrics: Mapping[str, Any] | None) -> None:
        reason = self._found.add(data_site, owner, metrics)
        if reason:
            self._job.fire("evaluation_missing", data_site=data_site, owner=owner, reason=reason)
        if metrics:
            self._job.fire("site_evaluated", data_site=data_site, owner=owner, metrics=self._found.of(data_site, owner))

    def _miss(self, data_site: str, owner: str, reason: str) -> None:
        self._found.miss(data_site, owner, reason)
        self._job.fire("evaluation_missing", data_site=data_site, owner=owner, reason=reason)

    def _miss_model(self, site: str, reason: str) -> None:
        self._found.models[site] = reason
        self._job.fire("model_missing", site=site, reason=reason)

    def _save(self) -> None:
        self._job.save_report(RESULTS_FILE, self._found.results_report())
        self._job.save_report(GAPS_FILE, self._found.gaps_report())


def _nbytes(model: Model) -> int:
    if isinstance(model, HeldModel):
        return model.nbytes
    arrays = (as_array(leaf) for leaf in flatten(model.params or {}).values())
    return sum(array.nbytes for array in arrays if array is not None)


if __name__ == "__main__":
    from workflows._program import main

    raise SystemExit(main(workflow="cross_site_eval"))
