"""CyclicRecipe: cyclic weight transfer, in which the model goes from site to site and nothing is averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from flarebus.errors import ConfigError
from flarebus.job.checks import check_flag, check_number
from flarebus.job.definition import JobDefinition
from flarebus.recipe.fedavg import FedAvgRecipe
from flarebus.recipe.validate import check_site_name
from flarebus.workflow.controller import Order

__all__ = ["CyclicRecipe"]

# Parameters of federated averaging that mean nothing where nothing is averaged, with the value that says so.
_WITHOUT = {
    "aggregator": None,
    "aggregation_weights": None,
    "clients_per_round": None,
    "wait_time_after_min_received": None,
    "round_timeout": None,
    "stop_cond": None,
    "patience": None,
    "enable_tensor_disk_offload": False,
}
# Settings of federated averaging that this workflow has as well.
_SHARED = (
    "num_rounds",
    "min_clients",
    "seed",
    "exclude_vars",
    "key_metric",
    "key_metric_mode",
    "memory_gc_rounds",
    "hyper_params",
)
_OWN = ("order", "task_assignment_timeout", "task_result_timeout", "allow_early_termination")


class CyclicRecipe(FedAvgRecipe):
    """Cyclic weight transfer (Chang et al. 2018): one site after the other trains the model, and hands it on.

    Training scripts are those of federated averaging. A site that is lost in its turn is passed over.

    Args:
        order: "FIXED", in the order of the names; "RANDOM", drawn anew each round; "RANDOM_WITHOUT_SAME_IN_A_ROW", such
            that no site begins a round that has ended the one before; or the names of the sites one after the other,
            each as often as its turn comes in a round.
        task_assignment_timeout: seconds that a site which is not there has to come in its turn, above 0; None gives up
            only who will not come.
        task_result_timeout: seconds that a site may train, above 0; None leaves it to its life.
        allow_early_termination: a site ends the job, with the update that it sends, by `"EARLY_TERMINATION": True` in
            the update's meta.
        min_clients: sites that have to be there when a round begins, from 2.
        seed: of random orders, from 0.
        key_metric: metric that tells the best model, "" for no best model. The first site of a round reports it, so
            orders in which that is always the same compare best.
        name: name of the job, and of its run folder.
        server_memory_gc_rounds: clean up the server's memory every so many rounds; 0 for never.
        fedavg: the other parameters of `FedAvgRecipe`; those about gathering results, sampling and stopping early do
            not apply. The same run gives the same bits, whether `deterministic` or not.

    Raises:
        ConfigError: a parameter is wrong, or does not apply; names it, its value and what is allowed.
    """

    workflow: ClassVar[str] = "cyclic"

    def __init__(
        self,
        *,
        order: Order | str | Sequence[str] = Order.FIXED,
        task_assignment_timeout: float | None = 10.0,
        task_result_timeout: float | None = None,
        allow_early_termination: bool = False,
        min_clients: int = 2,
        name: str = "cyclic",
        server_memory_gc_rounds: int = 0,
        **fedavg: Any,
    ) -> None:
        for parameter, neutral in _WITHOUT.items():
            if fedavg.get(parameter, neutral) != neutral:
                allowed = f"{neutral} in cyclic weight transfer, where one site after the other has the model"
                raise ConfigError(parameter, fedavg[parameter], allowed)
        super().__init__(name=name, min_clients=min_clients, server_memory_gc_rounds=server_memory_gc_rounds, **fedavg)
        if min_clients < 2:
            raise ConfigError("min_clients", min_clients, "at least 2: a single site has nobody to hand the model to")
        settings = self._definition.workflow_settings
        turns = _order(order)
        if isinstance(turns, list) and len(set(turns)) < min_clients:
            raise ConfigError("order", turns, f"at least min_clients={min_clients} sites")
        own = {
            "order": turns,
            "task_assignment_timeout": _seconds("task_assignment_timeout", task_assignment_timeout),
            "task_result_timeout": _seconds("task_result_timeout", task_result_timeout),
            "allow_early_termination": check_flag("allow_early_termination", allow_early_termination),
        }
        self._definition = replace(self._definition, workflow_settings={key: settings[key] for key in _SHARED} | own)

    @classmethod
    def _parameters_of(cls, job: JobDefinition) -> dict[str, Any]:
        settings = job.workflow_settings
        shared = {key: value for key, value in settings.items() if key not in _OWN}
        own = {key: settings[key] for key in _OWN if key in settings}
        return super()._parameters_of(replace(job, workflow_settings=shared)) | own


def _order(value: object) -> str | list[str]:
    if isinstance(value, str) and value in Order.__members__:
        return Order(value).value
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError("order", value, f"{', '.join(Order.__members__)}, or a list of names of sites")
    return [check_site_name("order", name) for name in value]


def _seconds(parameter: str, value: float | None) -> float | None:
    return None if value is None else check_number(parameter, value, above=0.0)
