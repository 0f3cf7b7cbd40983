"""FedAvgRecipe: federated averaging for any framework. Parameters, checked; the algorithm is a workflow elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from flarebus.address import check_name
from flarebus.errors import ConfigError
from flarebus.job.checks import (
    check_enum,
    check_flag,
    check_int,
    check_keys,
    check_number,
    check_regex,
    check_text,
)
from flarebus.job.class_ref import ClassRef
from flarebus.job.definition import JobDefinition
from flarebus.job.kinds import DataKind, ExchangeFormat, FrameworkType, TransferType
from flarebus.job.site_config import DEFAULT_COMMAND, SiteConfig
from flarebus.recipe.recipe import Recipe
from flarebus.recipe.sites import make_sites, site_parameters
from flarebus.recipe.validate import (
    check_aggregator,
    check_best_filename,
    check_ckpt,
    check_model,
    check_plain,
    check_weights,
)
from flarebus.workflow.condition import Condition

__all__ = ["FedAvgRecipe"]

# The workflow is built with exactly these.
_SETTINGS = (
    "num_rounds",
    "min_clients",
    "clients_per_round",
    "seed",
    "deterministic",
    "wait_time_after_min_received",
    "round_timeout",
    "exclude_vars",
    "aggregation_weights",
    "aggregator",
    "key_metric",
    "key_metric_mode",
    "stop_cond",
    "patience",
    "enable_tensor_disk_offload",
    "memory_gc_rounds",
    "hyper_params",
)


class FedAvgRecipe(Recipe):
    """Federated averaging: every round each site trains the global model, and the weighted mean becomes the next one.

    All parameters are checked here, and each either works or is refused. Files are looked for; nothing is written.

    Args:
        name: name of the job, and of its run folder.
        model: what to start from: a PyTorch or Keras model; `{"class_path": "pkg.mod.Class", "args": {...}}` (or
            `"path"`), built when the job starts, with the training script's folder searched first; an array, or a list
            or dict of arrays or numbers. None needs an `initial_ckpt`, except with `FrameworkType.RAW`: the first round
            makes the model.
        initial_ckpt: weights to start from, `.npy .npz .pt .pth .safetensors .keras`, and `.weights.h5` for a Keras
            `model`; with a `model`, names and shapes must fit. An absolute path may exist on the server only; a
            relative one must exist and travels with the job.
        min_clients: usable results a round needs, from 1.
        num_rounds: rounds to run, from 1.
        train_script: the Python file that every site runs; looked for in the working directory, then beside the running
            script.
        train_args: its arguments, in one string, split as a shell would.
        aggregator: replaces the mean: an object with `accept_model`, `aggregate_model`, `reset_stats` (see
            `ModelAggregator`), or `{"class_path", "args"}` for one, which can be exported too.
        aggregator_data_kind: what is aggregated; WEIGHT_DIFF is checked against `params_transfer_type`.
        launch_external_process: run the script in a process of its own, which the site starts and watches.
        command: what starts that process, before script and arguments: one string, split as a shell would, or a list of
            words. A plain `python3` or `python` is the interpreter that the site runs on.
        framework: what the script is written with; decides the model files.
        server_expected_format: what parameters are on their way to the server.
        params_transfer_type: whether sites answer with whole models or differences; the same for all sites.
        model_persistor: only None; models are saved as files of the framework and as safetensors.
        per_site_config: site name -> what is different there: any of `train_script train_args framework
            server_expected_format params_transfer_type client_memory_gc_rounds cuda_empty_cache
            launch_external_process command launch_once shutdown_timeout launch_timeout attach`. When given, its sites
            are the sites of the job. None means the same as leaving a key out, except for `launch_timeout`.
        launch_once: one process for the whole job; False: a new one for every task.
        shutdown_timeout: seconds that the process may take to leave at the end of the job, from 0.
        key_metric: metric that tells the best model; "" for no best model.
        stop_cond: end early once the averaged metrics fulfil `"<metric> <op> <number>"`, op one of `>= <= > < =`.
        patience: end early after so many rounds without a better metric of `stop_cond`, from 1.
        best_model_filename: name of the best model's file, `.safetensors` or, for PyTorch, `.pt`, for TensorFlow
            `.keras` or `.weights.h5`.
        save_filename: old name of `best_model_filename`; both must be the same if both are given.
        exclude_vars: regular expression searched in each parameter's name; what it finds is not averaged.
        aggregation_weights: site -> factor on its weight, from 0; 1 for a site not listed.
        server_memory_gc_rounds: clean up the server's memory every so many rounds; 0 for never.
        enable_tensor_disk_offload: keep results in files, not in memory, until they are averaged.
        client_memory_gc_rounds: clean up a site's memory every so many rounds; 0 for never.
        cuda_empty_cache: give back cached GPU memory at each of these clean-ups.
        key_metric_mode: "max" or "min"; None takes it from `stop_cond` if that names the same metric, else "min" for a
            name that speaks of a loss or an error, else "max".
        wait_time_after_min_received: seconds to wait for the others once `min_clients` results are there, from 0; None
            waits for every live site.
        round_timeout: seconds until a round ends with what it has, above 0; None for no limit.
        clients_per_round: take part in a round: that many sites, drawn anew each time; None for all.
        seed: of that draw, from 0.
        deterministic: bit for bit the same mean whatever the order of arrival.
        launch_timeout: seconds until the script in its own process must have called `flare.init()`, above 0; None for
            no limit.
        attach: somebody else starts the process, with the client configuration that the site publishes; instead of
            `launch_external_process`.
        hyper_params: name -> number, string, True, False, None, or lists and dicts of them. Scripts find them in the
            `params` of every model that they receive, beside its parameters, and answer without them; not averaged,
            and not in the model files.

    Raises:
        ConfigError: a parameter is wrong; names it, its value and what is allowed.
        NotImplementedError: a parameter asks for what this version does not have.
    """

    workflow: ClassVar[str] = "fedavg"
    _own_settings: ClassVar[tuple[str, ...]] = ()
    """What the workflow of a subclass is built with besides: parameters of its recipe, under the same names."""

    def __init__(
        self,
        *,
        name: str = "fedavg",
        model: Any = None,
        initial_ckpt: str | None = None,
        min_clients: int,
        num_rounds: int = 2,
        train_script: str,
        train_args: str = "",
        aggregator: Any = None,
        aggregator_data_kind: DataKind | None = DataKind.WEIGHTS,
        launch_external_process: bool = False,
        command: str | Sequence[str] = DEFAULT_COMMAND,
        framework: FrameworkType = FrameworkType.PYTORCH,
        server_expected_format: ExchangeFormat = ExchangeFormat.NUMPY,
        params_transfer_type: TransferType = TransferType.FULL,
        model_persistor: Any = None,
        per_site_config: dict[str, dict[str, Any]] | None = None,
        launch_once: bool = True,
        shutdown_timeout: float = 0.0,
        key_metric: str = "accuracy",
        stop_cond: str | None = None,
        patience: int | None = None,
        best_model_filename: str | None = None,
        save_filename: str | None = None,
        exclude_vars: str | None = None,
        aggregation_weights: dict[str, float] | None = None,
        server_memory_gc_rounds: int = 0,
        enable_tensor_disk_offload: bool = False,
        client_memory_gc_rounds: int = 0,
        cuda_empty_cache: bool = False,
        key_metric_mode: str | None = None,
        wait_time_after_min_received: float | None = None,
        round_timeout: float | None = None,
        clients_per_round: int | None = None,
        seed: int = 0,
        deterministic: bool = False,
        launch_timeout: float | None = 300.0,
        attach: bool = False,
        hyper_params: dict[str, Any] | None = None,
    ) -> None:
        given = dict(locals())  # before any other local: exactly the parameters
        if model_persistor is not None:
            raise NotImplementedError(
                f"model_persistor={model_persistor!r}: custom persistors belong to a later version; models are saved "
                "as safetensors and as files of the framework"
            )
        settings = _settings(given)
        defaults, sites = make_sites(given)
        if sites and len(sites) < settings["min_clients"]:
            raise ConfigError("per_site_config", sorted(sites), f"at least min_clients={min_clients} sites")
        configs = list(sites.values()) or [defaults]
        data_kind = _data_kind(aggregator_data_kind, settings["aggregator"], configs)
        ckpt, bundled = check_ckpt(initial_ckpt)
        start_model = check_model(model)
        _check_beside(settings["hyper_params"], start_model, configs)
        if start_model is None and ckpt is None and defaults.framework is not FrameworkType.RAW:
            raise ConfigError("model", None, "needed, unless there is an initial_ckpt or the framework is RAW")
        self._definition = JobDefinition(
            name=check_name(name),
            workflow=self.workflow,
            workflow_settings=settings,
            site_defaults=defaults,
            sites=sites,
            code_dir=Path(defaults.train_script).parent,
            model=start_model,
            initial_ckpt=ckpt,
            ckpt_is_bundled=bundled,
            best_model_filename=_best_filename(best_model_filename, save_filename, key_metric, defaults.framework),
            aggregator_data_kind=data_kind,
        )

    def _set(self, **settings: Any) -> None:
        """Add checked settings to those of the workflow: `_own_settings` of a subclass."""
        job = self._definition
        self._definition = replace(job, workflow_settings={**job.workflow_settings, **settings})

    @classmethod
    def _parameters_of(cls, job: JobDefinition) -> dict[str, Any]:
        settings = dict(job.workflow_settings)
        check_keys(settings, _SETTINGS + cls._own_settings, ("min_clients",), "settings")
        settings["server_memory_gc_rounds"] = settings.pop("memory_gc_rounds", 0)
        if settings.get("aggregator") is not None:
            settings["aggregator"] = settings["aggregator"].to_json()
        return {
            **settings,
            **site_parameters(job.site_defaults),
            "per_site_config": None
            if job.open_to_others
            else {site: site_parameters(config) for site, config in job.sites.items()} or None,
            "name": job.name,
            "model": job.model.to_json() if isinstance(job.model, ClassRef) else job.model,
            "initial_ckpt": None if job.initial_ckpt is None else str(job.initial_ckpt),
            "best_model_filename": job.best_model_filename,
            "aggregator_data_kind": job.aggregator_data_kind,
        }


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the workflow, each checked."""
    aggregator = check_aggregator(given["aggregator"])
    minimum = check_int("min_clients", given["min_clients"], 1)
    sample = _optional(check_int, "clients_per_round", given, 1)
    if sample is not None and sample < minimum:
        raise ConfigError("clients_per_round", sample, f"at least min_clients={minimum}, or None")
    mode = given["key_metric_mode"]
    if mode not in (None, "max", "min"):
        raise ConfigError("key_metric_mode", mode, '"max", "min" or None')
    wait, limit = given["wait_time_after_min_received"], given["round_timeout"]
    settings = {
        "num_rounds": check_int("num_rounds", given["num_rounds"], 1),
        "min_clients": minimum,
        "clients_per_round": sample,
        "seed": check_int("seed", given["seed"], 0),
        "deterministic": check_flag("deterministic", given["deterministic"]),
        "wait_time_after_min_received": (
            None if wait is None else check_number("wait_time_after_min_received", wait, minimum=0.0)
        ),
        "round_timeout": None if limit is None else check_number("round_timeout", limit, above=0.0),
        "exclude_vars": _optional(check_regex, "exclude_vars", given),
        "aggregation_weights": check_weights(given["aggregation_weights"]),
        "aggregator": aggregator,
        "key_metric": check_text("key_metric", given["key_metric"]),
        "key_metric_mode": mode,
        "stop_cond": given["stop_cond"],
        "patience": _optional(check_int, "patience", given, 1),
        "enable_tensor_disk_offload": check_flag("enable_tensor_disk_offload", given["enable_tensor_disk_offload"]),
        "memory_gc_rounds": check_int("server_memory_gc_rounds", given["server_memory_gc_rounds"], 0),
        "hyper_params": _optional(check_plain, "hyper_params", given),
    }
    _check_together(settings)
    return settings


def _optional(check: Callable[..., Any], parameter: str, given: Mapping[str, Any], *bounds: Any) -> Any:
    return None if given[parameter] is None else check(parameter, given[parameter], *bounds)


def _check_together(settings: Mapping[str, Any]) -> None:
    """What only makes sense, or no sense, beside another parameter."""
    stop = settings["stop_cond"]
    if stop is not None:
        condition = Condition.parse(stop)
        mode = settings["key_metric_mode"]
        if mode is not None and condition.key == settings["key_metric"] and condition.mode not in (None, mode):
            raise ConfigError(
                "key_metric_mode", mode, f"contradicts stop_cond={stop!r}, which asks for the {condition.mode}"
            )
    elif settings["patience"] is not None:
        raise ConfigError("patience", settings["patience"], "needs a stop_cond, whose metric it watches")
    if settings["aggregator"] is not None:
        for parameter in ("exclude_vars", "aggregation_weights"):
            if settings[parameter] is not None:
                allowed = "None beside a custom aggregator, which alone decides what it averages and how"
                raise ConfigError(parameter, settings[parameter], allowed)


def _check_beside(hyper_params: Mapping[str, Any] | None, model: object, sites: list[SiteConfig]) -> None:
    """That hyper-parameters can travel beside the parameters of the model."""
    if not hyper_params:
        return
    both = sorted(hyper_params.keys() & model.keys()) if isinstance(model, Mapping) else []
    if both:
        raise ConfigError(f"hyper_params[{both[0]!r}]", hyper_params[both[0]], "a name that the model has not")
    if any(config.params_transfer_type is TransferType.DIFF for config in sites):
        allowed = "TransferType.FULL beside hyper_params: what a site answers lacks them, so it is no difference"
        raise ConfigError("params_transfer_type", "DIFF", allowed)


def _data_kind(value: object, aggregator: object, sites: list[SiteConfig]) -> DataKind | None:
    """The kind, after a look at whether the sites agree with it and with each other."""
    types = {config.params_transfer_type for config in sites}
    if len(types) > 1 and aggregator is None:
        raise ConfigError("params_transfer_type", "FULL and DIFF", "the same for all sites; a mean never mixes them")
    if value is None:
        return None
    kind = check_enum("aggregator_data_kind", value, DataKind)
    if kind is DataKind.WEIGHT_DIFF and TransferType.FULL in types:
        raise ConfigError(
            "aggregator_data_kind", kind.value, "needs params_transfer_type=TransferType.DIFF at every site"
        )
    return kind


def _best_filename(best: object, save: object, key_metric: str, framework: FrameworkType) -> str | None:
    found = check_best_filename(best, save, framework)
    if save is not None:
        # Three levels up: this function, __init__, the caller.
        warnings.warn("save_filename is the old name of best_model_filename", DeprecationWarning, stacklevel=3)
    if found is not None and not key_metric:
        raise ConfigError("best_model_filename", found, "needs a key_metric that tells the best model")
    return found
