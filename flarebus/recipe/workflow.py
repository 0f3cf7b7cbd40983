"""WorkflowRecipe: a job whose workflow has no recipe of its own, because somebody else wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from flarebus.address import check_name
from flarebus.errors import ConfigError
from flarebus.job.class_ref import ClassRef
from flarebus.job.definition import JobDefinition
from flarebus.job.executor_ref import ExecutorRef
from flarebus.job.kinds import ExchangeFormat, FrameworkType, TransferType
from flarebus.job.site_config import DEFAULT_COMMAND, SiteConfig
from flarebus.recipe.described import code_folder
from flarebus.recipe.executors import check_executor
from flarebus.recipe.recipe import Recipe
from flarebus.recipe.sites import make_sites, site_parameters
from flarebus.recipe.validate import check_best_filename, check_ckpt, check_model, check_plain

__all__ = ["WorkflowRecipe"]


class WorkflowRecipe(Recipe):
    """A workflow that is installed, or that the job brings: a `Controller`, and what its sites run.

    Args:
        workflow: name of an installed workflow, or the path of a `Controller`, `package.module:Class`, which is looked
            for in the folder of the code first: that of the training script, else that of the running script.
        settings: keyword arguments of the controller, JSON values. `aggregator`, if it takes one, may be
            `{"class_path", "args"}` and is made when the job starts.
        name: name of the job, and of its run folder.
        model: what to start from; see `FedAvgRecipe`. None: the workflow begins without one.
        initial_ckpt: weights to start from; see `FedAvgRecipe`.
        train_script: the Python file that every site runs; None where executors do all the work.
        executors: pairs of an executor and the names of its tasks, as `add_executor` takes them; of those that take a
            task the first one has it.
        best_model_filename: name of the best model's file.
        train_args, framework, server_expected_format, params_transfer_type, launch_external_process, command,
            launch_once, shutdown_timeout, launch_timeout, attach, client_memory_gc_rounds, cuda_empty_cache,
            per_site_config: of the script; see `FedAvgRecipe`.

    Raises:
        ConfigError: a parameter is wrong, the workflow is not there or does not take the settings, or there is neither
            a script nor an executor.
    """

    workflow: ClassVar[str] = ""

    def __init__(
        self,
        *,
        workflow: str,
        settings: Mapping[str, Any] | None = None,
        name: str = "workflow",
        model: Any = None,
        initial_ckpt: str | None = None,
        train_script: str | None = None,
        train_args: str = "",
        executors: Sequence[tuple[Any, Sequence[str]]] = (),
        framework: FrameworkType = FrameworkType.NUMPY,
        server_expected_format: ExchangeFormat = ExchangeFormat.NUMPY,
        params_transfer_type: TransferType = TransferType.FULL,
        launch_external_process: bool = False,
        command: str | Sequence[str] = DEFAULT_COMMAND,
        launch_once: bool = True,
        shutdown_timeout: float = 0.0,
        launch_timeout: float | None = 300.0,
        attach: bool = False,
        client_memory_gc_rounds: int = 0,
        cuda_empty_cache: bool = False,
        per_site_config: dict[str, dict[str, Any]] | None = None,
        best_model_filename: str | None = None,
    ) -> None:
        given = dict(locals())  # before any other local: exactly the parameters
        code_dir = code_folder()
        if train_script is not None:
            defaults, sites = make_sites(given)
            code_dir = Path(defaults.train_script).parent
        refs = _executors(executors, code_dir)
        if train_script is None:
            if not refs:
                raise ConfigError("train_script", None, "the path of a Python file, where there are no executors")
            if per_site_config is not None:
                raise ConfigError("per_site_config", per_site_config, "None where no site runs a script")
            defaults, sites = SiteConfig(framework=framework, executors=refs), {}
        ckpt, bundled = check_ckpt(initial_ckpt)
        self._definition = JobDefinition(
            name=check_name(name),
            workflow=workflow,
            workflow_settings=_settings(settings or {}),
            site_defaults=replace(defaults, executors=refs),
            sites={site: replace(config, executors=refs) for site, config in sites.items()},
            code_dir=code_dir,
            model=check_model(model),
            initial_ckpt=ckpt,
            ckpt_is_bundled=bundled,
            best_model_filename=check_best_filename(best_model_filename, None, defaults.framework),
        )
        self._check_workflow()

    def _check_workflow(self) -> None:
        """Make the controller once: what it raises about its settings is wanted now, not when the job starts."""
        try:
            self._definition.make_workflow()
        except ConfigError:
            raise
        except Exception as error:  # it is somebody else's code
            said = f"{self._definition.workflow} raised {type(error).__name__}: {error}"
            raise ConfigError("settings", dict(self._definition.workflow_settings), said) from error

    @classmethod
    def _parameters_of(cls, job: JobDefinition) -> dict[str, Any]:
        settings = dict(job.workflow_settings)
        if isinstance(settings.get("aggregator"), ClassRef):
            settings["aggregator"] = settings["aggregator"].to_json()
        defaults = job.site_defaults
        script = site_parameters(defaults) if defaults.train_script else {"framework": defaults.framework}
        own = {site: site_parameters(config) for site, config in job.sites.items() if config.train_script}
        return {
            **script,
            "workflow": job.workflow,
            "settings": settings,
            "name": job.name,
            "model": job.model.to_json() if isinstance(job.model, ClassRef) else job.model,
            "initial_ckpt": None if job.initial_ckpt is None else str(job.initial_ckpt),
            "executors": [(ref.ref.to_json(), ref.tasks) for ref in defaults.executors],
            "per_site_config": None if job.open_to_others else own or None,
            "best_model_filename": job.best_model_filename,
        }


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    settings = check_plain("settings", given)
    aggregator = settings.get("aggregator")
    if isinstance(aggregator, Mapping) and ClassRef.is_description(aggregator):
        settings["aggregator"] = ClassRef.parse(aggregator, "settings['aggregator']")
    return settings


def _executors(given: Sequence[tuple[Any, Sequence[str]]], code_dir: Path) -> tuple[ExecutorRef, ...]:
    pairs = [tuple(each) if isinstance(each, tuple | list) else () for each in given]
    if any(len(pair) != 2 for pair in pairs):
        raise ConfigError("executors", given, "pairs of an executor and a list of names of tasks")
    return tuple(check_executor(executor, tasks, code_dir) for executor, tasks in pairs)
