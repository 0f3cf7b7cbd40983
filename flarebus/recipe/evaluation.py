"""Cross-site evaluation: after the training of another recipe (`add_cross_site_evaluation`), or alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from flarebus.address import check_name
from flarebus.errors import AddedAlready, ConfigError
from flarebus.job.checks import check_keys, check_mapping, check_number, nearest
from flarebus.job.class_ref import ClassRef
from flarebus.job.definition import JobDefinition
from flarebus.job.executor_ref import ExecutorRef
from flarebus.job.file_names import KERAS_WEIGHTS, suffix_of
from flarebus.job.kinds import ExchangeFormat, FrameworkType, TransferType
from flarebus.job.model_ref import ModelRef, check_model_name
from flarebus.job.script_answers import names_used
from flarebus.job.site_config import DEFAULT_COMMAND, SiteConfig
from flarebus.job.workflow_ref import WorkflowRef
from flarebus.plugins import origin_of
from flarebus.recipe.recipe import Recipe
from flarebus.recipe.sites import make_sites, site_parameters
from flarebus.recipe.validate import check_ckpt, check_clients, check_plain
from flarebus.workflow.array_validator import ArrayValidator

__all__ = ["CrossSiteEvalRecipe", "add_cross_site_evaluation"]

_WORKFLOW = "cross_site_eval"
_SETTINGS = ("submit_model_timeout", "validation_timeout", "participating_clients", "memory_budget", "hyper_params")
# How a script says that it answers a task. Who tells training from the rest, or asks for names, may answer any.
_ANSWERS = {
    "validate": ("is_evaluate", "@evaluate", "is_train", "get_task_name"),
    "submit_model": ("is_submit_model", "is_train", "get_task_name"),
}


def add_cross_site_evaluation(
    recipe: Recipe,
    submit_model_timeout: float = 600,
    validation_timeout: float = 6000,
    participating_clients: Sequence[str] | None = None,
    memory_budget: float = 4e9,
) -> None:
    """Evaluate, once the training of `recipe` has ended and in the same job, every model on every site's data.

    The models are the last and the best one of the server, and one of each site. Training scripts answer two more
    tasks: `flare.is_submit_model()`, the site's best model, and `flare.is_evaluate()`, metrics of the model received.
    For what a NumPy script does not answer, as far as its code tells, an `ArrayValidator` is added. The results are in
    `server/cross_site_val/cross_val_results.json` of the run folder.

    Args:
        recipe: changed.
        submit_model_timeout: seconds that sites have to come up with a model, above 0.
        validation_timeout: seconds that a site has to evaluate one model, above 0.
        participating_clients: sites that take part with their models and their data; None for all.
        memory_budget: bytes, above 0, that models may take which are out at once, with their holders and evaluators
            together; it says how many sites are asked for theirs at a time. For sites that share a machine.

    Raises:
        ConfigError: a ValueError; `recipe` is no recipe with a training script, or a parameter is wrong.
        AddedAlready: a RuntimeError; the recipe has a cross-site evaluation.
    """
    if not isinstance(recipe, Recipe):
        raise ConfigError("recipe", recipe, "a recipe such as FedAvgRecipe(...)")
    job = recipe.definition
    if _WORKFLOW in (job.workflow, *(ref.workflow for ref in job.afterwards)):
        raise AddedAlready(f"the recipe {job.name!r} has a cross-site evaluation: it is added once")
    if not job.site_defaults.train_script:
        allowed = "a recipe with a training script: there is nothing that models could be evaluated with"
        raise ConfigError("recipe", type(recipe).__name__, allowed)
    settings = {
        **_checked(submit_model_timeout, validation_timeout, participating_clients, memory_budget),
        "hyper_params": job.workflow_settings.get("hyper_params"),
    }
    for site in settings["participating_clients"] or ():
        if job.sites and not job.open_to_others and site not in job.sites:
            allowed = f"no site of this job; {nearest(job.sites, site)}"
            raise ConfigError(f"participating_clients[{site!r}]", site, allowed)
    job = replace(job, afterwards=(*job.afterwards, WorkflowRef(_WORKFLOW, settings)))
    recipe._definition = _with_validators(job)


class CrossSiteEvalRecipe(Recipe):
    """Cross-site evaluation alone: models from files, and those that the sites have, on the data of every site.

    Args:
        name: name of the job, and of its run folder.
        server_models: the server's models: a path, a list of paths, or name -> path, of files that a `FedAvgRecipe`
            could start from without a `model`. In the results they are `SRV_<name>`; without a name that of the file.
            An absolute path may exist on the server only; a relative one must exist and travels with the job. None:
            the sites' models only.
        eval_script: the Python file that every site runs. It answers `flare.is_evaluate()` and, if the site has a
            model, `flare.is_submit_model()`. None, with `FrameworkType.NUMPY`: an `ArrayValidator` does.
        eval_args: its arguments, in one string, split as a shell would.
        submit_model_timeout: seconds that sites have to come up with a model, above 0.
        validation_timeout: seconds that a site has to evaluate one model, above 0.
        participating_clients: sites that take part; None for all.
        memory_budget: as in `add_cross_site_evaluation`.
        hyper_params: as in `FedAvgRecipe`.
        framework: what the script is written with.
        server_expected_format: what parameters are on their way to the server.
        launch_external_process: run the script in a process of its own, as in `FedAvgRecipe`; also `command`,
            `launch_once`, `shutdown_timeout`, `launch_timeout` and `attach`.
        client_memory_gc_rounds: clean up a site's memory every so many evaluations; 0 for never.
        cuda_empty_cache: give back cached GPU memory at each of these clean-ups.
        per_site_config: site name -> what is different there, of the parameters from `eval_script` and `eval_args` to
            `cuda_empty_cache`, but for the timeouts and `hyper_params`. When given, its sites are the sites of the job.

    Raises:
        ConfigError: a parameter is wrong; names it, its value and what is allowed.
    """

    workflow: ClassVar[str] = _WORKFLOW

    def __init__(
        self,
        *,
        name: str = "cross_site_eval",
        server_models: str | Path | Sequence[str | Path] | Mapping[str, str | Path] | None = None,
        eval_script: str | None = None,
        eval_args: str = "",
        submit_model_timeout: float = 600,
        validation_timeout: float = 6000,
        participating_clients: Sequence[str] | None = None,
        memory_budget: float = 4e9,
        hyper_params: Mapping[str, Any] | None = None,
        framework: FrameworkType = FrameworkType.PYTORCH,
        server_expected_format: ExchangeFormat = ExchangeFormat.NUMPY,
        launch_external_process: bool = False,
        command: str | Sequence[str] = DEFAULT_COMMAND,
        launch_once: bool = True,
        shutdown_timeout: float = 0.0,
        launch_timeout: float | None = 300.0,
        attach: bool = False,
        client_memory_gc_rounds: int = 0,
        cuda_empty_cache: bool = False,
        per_site_config: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        given = dict(locals())  # before any other local: exactly the parameters
        settings = {
            **_checked(submit_model_timeout, validation_timeout, participating_clients, memory_budget),
            "hyper_params": None if hyper_params is None else check_plain("hyper_params", hyper_params),
        }
        defaults, sites = _with_script(given) if eval_script is not None else (_without_script(given), {})
        script = defaults.train_script
        self._definition = JobDefinition(
            name=check_name(name),
            workflow=self.workflow,
            workflow_settings=settings,
            site_defaults=defaults,
            sites=sites,
            code_dir=Path(script).parent if script else Path.cwd(),
            models=_server_models(server_models),
        )

    @classmethod
    def _parameters_of(cls, job: JobDefinition) -> dict[str, Any]:
        check_keys(job.workflow_settings, _SETTINGS, (), "settings")
        defaults = _renamed(site_parameters(job.site_defaults), _TO_EVAL)
        sites = {site: _renamed(site_parameters(config), _TO_EVAL) for site, config in job.sites.items()}
        return {
            **job.workflow_settings,
            **defaults,
            "eval_script": defaults["eval_script"] or None,
            "name": job.name,
            "server_models": {name: str(ref.path) for name, ref in job.models.items()},
            "per_site_config": None if job.open_to_others else sites or None,
        }


def _checked(submit_s: object, validation_s: object, clients: object, budget: object) -> dict[str, Any]:
    """The settings of the workflow that both ways share."""
    try:
        names = check_clients(clients)
    except ConfigError as error:
        parameter = error.parameter.replace("clients", "participating_clients", 1)
        raise ConfigError(parameter, error.value, error.allowed) from None
    return {
        "submit_model_timeout": check_number("submit_model_timeout", submit_s, above=0.0),
        "validation_timeout": check_number("validation_timeout", validation_s, above=0.0),
        "participating_clients": None if names is None else list(names),
        "memory_budget": check_number("memory_budget", budget, above=0.0),
    }


def _with_validators(job: JobDefinition) -> JobDefinition:
    """The same job with a validator for what the scripts of NumPy sites leave unanswered."""
    configs = (job.site_defaults, *job.sites.values())
    if all(config.framework is not FrameworkType.NUMPY for config in configs):
        return job
    used = names_used(_code_of(job), {name for answers in _ANSWERS.values() for name in answers})

    def change(site: SiteConfig) -> SiteConfig:
        tasks = [
            task
            for task, answers in _ANSWERS.items()
            if used.isdisjoint(answers) and not any(ref.takes(task) for ref in site.executors)
        ]
        if site.framework is not FrameworkType.NUMPY or not tasks:
            return site
        # Last: whoever adds an executor himself means that one.
        return replace(site, executors=(*site.executors, _validator(*tasks)))

    return job.with_sites_changed(change)


def _code_of(job: JobDefinition) -> Iterable[Path]:
    """The files that a script may have its loop in."""
    try:
        return job.code_layout().files.values()
    except ConfigError:  # too much to be the code of a job; exporting it would say so
        return [Path(config.train_script) for config in (job.site_defaults, *job.sites.values())]


def _validator(*tasks: str) -> ExecutorRef:
    return ExecutorRef(ClassRef(origin_of(ArrayValidator), {}), tasks)


# What a recipe with training calls otherwise.
_TO_EVAL = {"train_script": "eval_script", "train_args": "eval_args"}
_TO_TRAIN = {name: other for other, name in _TO_EVAL.items()}
# Evaluation sends no parameters that could be a difference.
_NOT_HERE = ("params_transfer_type",)


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items() if name not in _NOT_HERE}


def _with_script(given: Mapping[str, Any]) -> tuple[SiteConfig, dict[str, SiteConfig]]:
    """What the sites run; errors are in the words of this recipe."""
    per_site = given["per_site_config"]
    if per_site is not None:
        per_site = {
            site: _to_train(f"per_site_config[{site!r}]", own)
            for site, own in check_mapping("per_site_config", per_site).items()
        }
    values = {**_renamed(given, _TO_TRAIN), "per_site_config": per_site, "params_transfer_type": TransferType.FULL}
    try:
        return make_sites(values)
    except ConfigError as error:
        parameter = error.parameter
        for name, other in _TO_EVAL.items():
            parameter = parameter.replace(name, other)
        raise ConfigError(parameter, error.value, error.allowed) from error


def _to_train(label: str, own: object) -> dict[str, Any]:
    found = check_mapping(label, own)
    for name in (*_TO_EVAL, *_NOT_HERE):
        if name in found:
            near = f"; did you mean {_TO_EVAL[name]!r}?" if name in _TO_EVAL else ""
            raise ConfigError(f"{label}[{name!r}]", found[name], f"unknown key{near}")
    return _renamed(found, _TO_TRAIN)


def _without_script(given: Mapping[str, Any]) -> SiteConfig:
    if given["framework"] is not FrameworkType.NUMPY:
        allowed = "needed, unless the framework is FrameworkType.NUMPY: only plain arrays are validated without one"
        raise ConfigError("eval_script", None, allowed)
    for name in ("eval_args", "launch_external_process", "attach", "per_site_config"):
        if given[name]:
            raise ConfigError(name, given[name], "needs an eval_script")
    return SiteConfig(framework=FrameworkType.NUMPY, executors=(_validator(*_ANSWERS),))


def _server_models(value: Any) -> dict[str, ModelRef]:
    """Name -> where it is."""
    if value is None:
        return {}
    if isinstance(value, str | Path):
        value = [value]
    if isinstance(value, Mapping):
        named = [(check_model_name("server_models", name), path) for name, path in value.items()]
    elif isinstance(value, Sequence) and all(isinstance(path, str | Path) for path in value):
        named = [(check_model_name("server_models", Path(path).name), path) for path in value]
    else:
        raise ConfigError("server_models", value, "a path, a list of paths, or a dict from names to paths")
    found: dict[str, ModelRef] = {}
    for name, given in named:
        if name in found:
            raise ConfigError("server_models", str(given), f"another file is called {name} too; give names to them")
        found[name] = _server_model(f"server_models[{name!r}]", given)
    return found


def _server_model(parameter: str, value: object) -> ModelRef:
    if value is None:
        raise ConfigError(parameter, None, "the path of a file")
    try:
        path, is_bundled = check_ckpt(value)
    except ConfigError as error:
        raise ConfigError(parameter, error.value, error.allowed) from None
    assert path is not None
    if suffix_of(path) == KERAS_WEIGHTS:
        raise ConfigError(parameter, str(value), "weights without their model; give a .keras file")
    return ModelRef(path, is_bundled)
