"""Cross-site evaluation without a bus: a job in memory, whose sites have numbers for models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flarebus.cell import Payload
from flarebus.codec import decode, encode
from flarebus.errors import QuorumNotReached
from flarebus.model import FLModel
from flarebus.workflow.controller import Result, Task
from flarebus.workflow.held import HeldModel
from tests.workflow.fake_job import FakeJob
from workflows.cross_site_eval import CrossSiteEval

__all__ = ["EvalJob", "run"]

Answer = FLModel | str | None
"""What a site sends; the reason why it fails; or nothing, however long one waits."""


class EvalJob(FakeJob):
    """Sites submit models that are one number, and evaluate others.

    Args:
        own: site -> the number in its model; or a reason, or None for silence; or any model.
        served: the same for the server's models, numbers only.
        evaluate: (site, number) -> what it answers; by default a metric that tells both.
        order: results arrive in an order drawn from this seed.
    """

    def __init__(
        self,
        own: Mapping[str, Any],
        served: Mapping[str, float] | None = None,
        evaluate: Callable[[str, float], Answer] | None = None,
        order: int = 0,
    ) -> None:
        super().__init__(lambda *_: None, list(own), order=order)
        self.waves: list[dict[str, float]] = []
        """Each wave: site -> the number of the model that it was given."""
        self.asked: list[tuple[Task, dict[str, Any]]] = []
        self.held: list[str] = []
        """Whose models are out now."""
        self.most_held = 0
        self.reports: dict[str, Any] = {}
        self.fired: list[tuple[str, dict[str, Any]]] = []
        self._own, self._served = own, served or {}
        self._evaluate = evaluate or (lambda site, number: FLModel(metrics={"v": f"{site} on {number:g}"}))

    def models(self) -> dict[str, Any]:
        return {name: {"w": np.full(2, number, np.float32)} for name, number in self._served.items()}

    def broadcast(  # type: ignore[override]
        self,
        task: Mapping[str, Task],
        *,
        min_responses: int,
        on_failed: Callable[[str, str], None],
        fetch: bool = True,
        **how: Any,
    ) -> Iterator[Result]:
        self.asked.append((next(iter(task.values())), how))
        if fetch:
            self.waves.append({site: self._number(each.model) for site, each in task.items()})
        usable, failed = 0, {}
        for site in self._order.sample(sorted(task), len(task)):
            answer = self._model_of(site) if not fetch else self._evaluate(site, self._number(task[site].model))
            if isinstance(answer, str):
                failed[site] = answer
                on_failed(site, answer)
            elif answer is not None:
                usable += 1
                held = None if fetch else self._hold(site, answer)
                yield Result(site, task[site].round, answer if held is None else held.around, self._refused, held)
        if usable < min_responses:
            raise QuorumNotReached(min_responses, usable, failed)

    def save_report(self, path: str, report: Mapping[str, Any]) -> None:
        self.reports[path.rpartition("/")[2]] = report

    def fire(self, event: str, **fields: Any) -> None:
        self.fired.append((event, fields))

    @property
    def results(self) -> dict[str, Any]:
        found: dict[str, Any] = self.reports["cross_val_results.json"]
        return found

    @property
    def gaps(self) -> dict[str, Any]:
        found: dict[str, Any] = self.reports["cross_val_gaps.json"]
        return found

    def _model_of(self, site: str) -> Answer:
        own = self._own[site]
        return FLModel(params={"w": np.full(2, own, np.float32)}) if isinstance(own, int | float) else own

    def _hold(self, site: str, model: FLModel) -> HeldModel:
        body, buffers = encode(model)
        assert not buffers, "small arrays stay in the body"
        self.held.append(site)
        self.most_held = max(self.most_held, len(self.held))
        return HeldModel(body, Payload(body, None, None), lambda _: self.held.remove(site))

    def _refused(self, site: str, reason: str) -> None:
        self.held.remove(site)

    @staticmethod
    def _number(model: FLModel | HeldModel) -> float:
        """The number in a model, as its receivers get it."""
        if isinstance(model, HeldModel):
            model = decode(model.payload_around(FLModel(), {}).body, [])
            assert isinstance(model, FLModel)
        assert model.params is not None
        return float(model.params["w"][0])


def run(job: EvalJob, participating: Sequence[str] | None = None, **settings: Any) -> EvalJob:
    """The job after its evaluation."""
    CrossSiteEval(participating_clients=participating, **settings).run(job)
    return job
