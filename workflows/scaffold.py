"""SCAFFOLD (Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020).

Federated averaging in which every site knows how its gradients differ from everybody's: by c - c_i, the *control
variates* of server and site. Site i takes each of its K steps from x with a corrected gradient, and answers with what
changed in its model and in its control variate,

    y_i  <-  y_i - lr (g_i(y_i) - c_i + c)
    c_i+  =  c_i - c + (x - y_i) / (K lr)                      that is, with plain steps, the mean of the K g_i

and the server, of N sites of which the ones in S answered, each with the weight n_i of federated averaging, makes

    x  <-  sum_S (n_i / n) y_i                                 n = sum_S n_i
    c  <-  c + |S| / N  sum_S (n_i / n) (c_i+ - c_i)           equal weights give the paper's 1/N sum_S (c_i+ - c_i)

`flarebus.client.algorithms.Scaffold` is the site's part. A round carries two models each way instead of one.

`python -m workflows.scaffold` trains a small network on handwritten digits; with arguments, anybody's training script.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flarebus.client.algorithms import SCAFFOLD_CONTROL
from flarebus.errors import ConfigError, UpdateRefused
from flarebus.model import FLModel
from flarebus.workflow.aggregator import RoundMean
from flarebus.workflow.controller import Job, Task
from flarebus.workflow.mean import WeightedMean
from flarebus.workflow.params import as_array, flatten, is_number_dtype
from workflows.fedavg import FedAvg

__all__ = ["Scaffold", "ScaffoldMean"]

Control = dict[str, NDArray[Any]]


class Scaffold(FedAvg):
    """The server side of SCAFFOLD. c lives as long as this object, and begins at zero.

    Args:
        settings: those of `FedAvg`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.control: Control = {}

    def new_task(self, number: int, model: dict[str, Any]) -> Task:
        """What the sites are given: model and c."""
        task = super().new_task(number, model)
        assert isinstance(task.model, FLModel)
        control = {SCAFFOLD_CONTROL: self._control_of(model)}
        return replace(task, model=FLModel(params=task.model.params, optimizer_params=control))

    def new_mean(self, model: dict[str, Any]) -> RoundMean:
        """Gathers models as federated averaging does, and changes of control variates."""
        return ScaffoldMean(super().new_mean(model), self._control_of(model))

    def update_model(self, job: Job, model: dict[str, Any], mean: RoundMean) -> dict[str, Any]:
        """The mean of the models; c follows the control variates of the sites."""
        assert isinstance(mean, ScaffoldMean)
        model = super().update_model(job, model, mean)
        self.control = mean.next_control(len(job.sites))
        return model

    def _control_of(self, model: Mapping[str, Any]) -> Control:
        if not self.control:
            self.control = _zeros_like(model)
        return self.control


class ScaffoldMean:
    """The mean of one round's models, and of what changed in the control variates.

    Args:
        mean: for the models.
        control: c; only read. Empty where there is no model yet: then the first one that comes says what c is of.
    """

    def __init__(self, mean: RoundMean, control: Control) -> None:
        self._mean = mean
        self._control = control
        self._changes = WeightedMean(control)
        self._n_models = 0

    @property
    def metrics(self) -> dict[str, float]:
        """The weighted mean of each metric."""
        return self._mean.metrics

    def add(self, model: FLModel, weight: Any, site: str) -> None:
        """Take one result; of one with metrics only, the metrics.

        Raises:
            UpdateRefused: it has no control variate, or one of the two cannot be used; neither counts then.
        """
        if model.params is None:
            self._mean.add(model, weight, site)
            return
        control = self._control or _zeros_of(model.params, site)
        changes = FLModel(params=self._changes_in(model, control, site))
        WeightedMean(control).add(changes, weight, site)  # raises if it is to be refused, before anything counts
        self._mean.add(model, weight, site)
        if not self._control:
            self._control, self._changes = control, WeightedMean(control)
        self._changes.add(changes, weight, site)
        self._n_models += 1

    @staticmethod
    def _changes_in(model: FLModel, control: Control, site: str) -> dict[str, Any]:
        changes = (model.optimizer_params or {}).get(SCAFFOLD_CONTROL)
        if not isinstance(changes, dict):
            reason = (
                "no control variate in it; its script sends what flarebus.client.algorithms.Scaffold.finish returns"
            )
            raise UpdateRefused(reason, site=site)
        # What a site does not train has no gradient there: nothing changed.
        still = {name: np.zeros_like(value) for name, value in control.items() if name not in changes}
        return {**changes, **still}

    def apply_to(self, model: Mapping[Any, Any], out: Mapping[str, NDArray[Any]] | None = None) -> dict[Any, Any]:
        """The new model; see `WeightedMean.apply_to`."""
        return self._mean.apply_to(model, out)

    def next_control(self, n_sites: int) -> Control:
        """c after this round, in new arrays.

        Args:
            n_sites: how many there are, whether they took part or not.
        """
        step = self._changes.apply_to(self._control)
        for name, change in step.items():
            change *= self._n_models / n_sites
            change += self._control[name]
        return step


def _zeros_like(model: Mapping[Any, Any]) -> Control:
    """c of a model to begin with: for arrays that have gradients, as far as can be told here."""
    arrays = {name: as_array(leaf) for name, leaf in flatten(model).items()}
    return {
        name: np.zeros(array.shape, np.promote_types(array.dtype, np.float32))
        for name, array in arrays.items()
        if array is not None and is_number_dtype(array.dtype) and array.dtype.kind not in "iuc"
    }


def _zeros_of(params: Mapping[Any, Any], site: str) -> Control:
    try:
        return _zeros_like(params)
    except ConfigError as error:
        raise UpdateRefused(str(error), site=site) from None


if __name__ == "__main__":
    from workflows._program import main

    raise SystemExit(main(workflow="scaffold"))
