"""SwarmRecipe: swarm learning, in which the sites aggregate by turns and the server only watches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from flarebus.errors import ConfigError
from flarebus.job.checks import check_flag, check_int, check_number
from flarebus.job.class_ref import ClassRef
from flarebus.job.definition import JobDefinition
from flarebus.recipe.described import describe
from flarebus.recipe.fedavg import FedAvgRecipe
from flarebus.recipe.validate import check_site_name

__all__ = ["SwarmRecipe"]

# How long a site may take to accept a model, if the recipe does not limit its rounds.
ACK_S = 3600.0
_SITE_HALF = "workflows.swarm:SwarmClientController"
_TASKS = ("swarm_*",)
# Parameters of federated averaging that mean nothing where no server averages, with the value that says so.
_WITHOUT = {
    "clients_per_round": None,
    "stop_cond": None,
    "patience": None,
    "enable_tensor_disk_offload": False,
}
# Settings of federated averaging that the server's half of a swarm has as well.
_SHARED = (
    "num_rounds",
    "min_clients",
    "seed",
    "deterministic",
    "exclude_vars",
    "aggregation_weights",
    "key_metric",
    "key_metric_mode",
    "hyper_params",
)
_OWN = ("aggr_clients", "train_clients", "progress_timeout")
# Parameter of the recipe -> that of the site's half.
_AT_SITES = {
    "round_timeout": "learn_task_timeout",
    "wait_time_after_min_received": "wait_time_after_min_resps_received",
    "min_responses": "min_responses_required",
    "max_concurrent_submissions": "max_concurrent_submissions",
    "server_memory_gc_rounds": "memory_gc_rounds",
    "aggregator_cuda_empty_cache": "cuda_empty_cache",
    "metric_comparator": "metric_comparator_id",
}


class SwarmRecipe(FedAvgRecipe):
    """Swarm learning (Warnat-Herresthal et al. 2021): no model is at the server until the end.

    Training scripts are those of federated averaging, and without faults the model is the same, bit for bit with
    `deterministic=True`. Every site ends with the last and the best model in its own folder.

    Args:
        min_responses: usable results that a round needs; None is `min_clients`.
        max_concurrent_submissions: results that the aggregating site fetches at once.
        aggr_clients: sites that aggregate; None for all.
        train_clients: sites that train; None for all.
        metric_comparator: `{"class_path", "args"}` of a class with `compare(a, b)`, which decides on the best model
            instead of `key_metric_mode`; or an instance of one that keeps its arguments as attributes.
        progress_timeout: seconds without news from any site after which the job fails.
        aggregator_cuda_empty_cache: give cached GPU memory back when an aggregating site cleans up, every
            `server_memory_gc_rounds` rounds.
        name: name of the job, and of its run folder.
        fedavg: the parameters of `FedAvgRecipe`; those about stopping early, sampling and offloading do not apply. A
            custom `aggregator` has to be one that can be described, for each site makes its own.

    Raises:
        ConfigError: a parameter is wrong, or does not apply; names it, its value and what is allowed.
    """

    workflow: ClassVar[str] = "swarm"

    def __init__(
        self,
        *,
        min_responses: int | None = None,
        max_concurrent_submissions: int = 1,
        aggr_clients: Sequence[str] | None = None,
        train_clients: Sequence[str] | None = None,
        metric_comparator: Any = None,
        progress_timeout: float = 3600.0,
        aggregator_cuda_empty_cache: bool = False,
        name: str = "swarm",
        server_memory_gc_rounds: int = 0,
        **fedavg: Any,
    ) -> None:
        for parameter, neutral in _WITHOUT.items():
            if fedavg.get(parameter, neutral) != neutral:
                raise ConfigError(parameter, fedavg[parameter], f"{neutral} in a swarm, where no server averages")
        super().__init__(name=name, server_memory_gc_rounds=server_memory_gc_rounds, **fedavg)
        job = self._definition
        settings = job.workflow_settings
        needed = settings["min_clients"] if min_responses is None else check_int("min_responses", min_responses, 1)
        own: dict[str, Any] = {
            "aggr_clients": _names("aggr_clients", aggr_clients),
            "train_clients": _names("train_clients", train_clients),
            "progress_timeout": check_number("progress_timeout", progress_timeout, above=0.0),
        }
        trainers = own["train_clients"]
        if trainers is not None and len(trainers) < needed:
            raise ConfigError("train_clients", trainers, f"at least {needed} sites, as many results as a round needs")
        self._definition = replace(job, workflow_settings={key: settings[key] for key in _SHARED} | own)
        at_sites = {
            "learn_task_timeout": settings["round_timeout"],
            # A model comes with what is acknowledged, and takes what it takes; a death is noticed anyway.
            "learn_task_ack_timeout": settings["round_timeout"] or ACK_S,
            "final_result_ack_timeout": settings["round_timeout"] or ACK_S,
            "wait_time_after_min_resps_received": settings["wait_time_after_min_received"],
            "min_responses_required": needed,
            "max_concurrent_submissions": check_int("max_concurrent_submissions", max_concurrent_submissions, 1),
            "memory_gc_rounds": settings["memory_gc_rounds"],
            "cuda_empty_cache": check_flag("aggregator_cuda_empty_cache", aggregator_cuda_empty_cache),
        }
        if settings["aggregator"] is not None:
            at_sites["aggregator_id"] = self._described(settings["aggregator"], "aggregator")
        if metric_comparator is not None:
            at_sites["metric_comparator_id"] = self._described(metric_comparator, "metric_comparator")
        self.add_executor({"class_path": _SITE_HALF, "args": at_sites}, _TASKS)

    def _described(self, value: object, noun: str) -> dict[str, Any]:
        ref = value if isinstance(value, ClassRef) else describe(value, noun, self._definition.code_dir)
        return ref.to_json()

    @classmethod
    def _parameters_of(cls, job: JobDefinition) -> dict[str, Any]:
        halves = [ref.ref.args for ref in job.site_defaults.executors if ref.ref.class_path == _SITE_HALF]
        if len(halves) != 1:
            raise ConfigError("site_defaults['executors']", len(halves), f"one {_SITE_HALF}")
        own = {key: job.workflow_settings[key] for key in _OWN if key in job.workflow_settings}
        shared = {key: value for key, value in job.workflow_settings.items() if key not in _OWN}
        found = super()._parameters_of(replace(job, workflow_settings=shared)) | own
        found |= {name: halves[0][key] for name, key in _AT_SITES.items() if key in halves[0]}
        return found | {"aggregator": halves[0].get("aggregator_id")}


def _names(parameter: str, value: Sequence[str] | None) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ConfigError(parameter, value, "a list of names of sites, or None for all")
    for name in value:
        check_site_name(parameter, name)
    return list(value)
