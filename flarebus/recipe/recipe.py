"""Recipe: what all recipes can do with the job they describe. A recipe itself starts nothing until it is told to."""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

from flarebus.errors import ConfigError, JobAborted, JobFailed
from flarebus.job.checks import nearest
from flarebus.job.definition import JobDefinition
from flarebus.job.filter_ref import FilterRef, check_tasks
from flarebus.job.folder import read_job, write_job
from flarebus.job.plugins import known_workflows
from flarebus.job.site_config import SiteConfig
from flarebus.plugins import is_path
from flarebus.recipe.described import check_filter, code_in
from flarebus.recipe.env import ExecEnv
from flarebus.recipe.executors import check_executor
from flarebus.recipe.run import Run
from flarebus.recipe.validate import check_clients, check_site_name
from flarebus.tracking.loading import check_tracking

__all__ = ["Recipe"]

# How long an interrupted job may take to end in an orderly way, in seconds; a second interrupt cuts it short.
_INTERRUPT_GRACE_S = 30.0
_DEFAULT_EXPORT_DIR = "fl_job"
# What the recipe for workflows that have none of their own says its workflow is.
_OTHERS = ""


class Recipe(ABC):
    """A job description that can be run, started, written down and read back.

    A concrete recipe checks its parameters in `__init__` and sets `_definition`; two recipes are equal when their
    definitions are.
    """

    workflow: ClassVar[str]
    """Name of the workflow, set by each recipe class that can be read back from a job folder; "" for all others."""

    _by_workflow: ClassVar[dict[str, type[Recipe]]] = {}
    _definition: JobDefinition

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "workflow" in cls.__dict__:
            Recipe._by_workflow[cls.workflow] = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Python's own message does not say which of thirty parameters was meant.
        names = _parameters(cls)
        for name in kwargs:
            if names is not None and name not in names:
                raise TypeError(f"{cls.__name__} has no parameter {name!r}; {nearest(names, name)}")
        return super().__new__(cls)

    @property
    def definition(self) -> JobDefinition:
        """The job that this recipe describes."""
        return self._definition

    @property
    def name(self) -> str:
        """The name of the job."""
        return self._definition.name

    def start(self, env: ExecEnv) -> Run:
        """Start the job in `env` and return at once.

        Raises:
            ConfigError: the job does not fit the environment; nothing was started.
        """
        if not isinstance(env, ExecEnv):
            raise ConfigError("env", env, "an environment such as SimEnv(num_clients=2)")
        return Run(env, env.deploy(self._definition))

    def execute(self, env: ExecEnv) -> Run:
        """Run the job in `env` and wait for its end.

        If the process was started with `--export`, the job is written to `./fl_job`, or to the folder given by
        `--export-dir`, and the process exits instead.

        Raises:
            ConfigError: the job does not fit the environment; nothing was started.
            JobFailed: the job failed; says why and where its run folder is.
            JobAborted: the job was aborted.
            KeyboardInterrupt: the user interrupted; the job has been told to end and has had time to do so.
        """
        target = _export_target(sys.argv[1:])
        if target is not None:
            print(f"job written to {self.export(target)}")
            raise SystemExit(0)
        run = self.start(env)
        try:
            run_dir = run.get_result(clean_up=False)
        except KeyboardInterrupt:
            _end_early(env, run)
            raise
        if run_dir is None:
            raise JobFailed("how it ended could not be seen; the log says why")
        status = run.get_status()
        reason = env.get_job_reason(run.get_job_id()) if status in ("failed", "aborted") else None
        if status == "failed":
            raise JobFailed(reason or "no reason was given", run_dir)
        if status == "aborted":
            raise JobAborted((reason or "somebody").removeprefix("aborted by "))
        return run

    def add_client_config(self, config: dict[str, Any], clients: Sequence[str] | None = None) -> None:
        """Change the trainer's configuration; what is said last counts.

        Args:
            config: any of `submit_result_timeout download_complete_timeout heartbeat_timeout heartbeat_interval`
                (seconds above 0), `launch_timeout` (the same, or None for no limit), `max_resends` (a whole number, or
                None for no limit), `train_with_eval`, `exchange_format`, `train_task_name eval_task_name
                submit_model_task_name`, `memory_gc_rounds cuda_empty_cache`, and `pipe`: the name of an installed pipe,
                or `{"CLASS_NAME": "package.module.Class", "ARG": {...}}`.
            clients: for these sites only; None for all.

        Raises:
            TypeError: `config` is no dict.
            ConfigError: a key is unknown (names the nearest known one), a value is wrong or does not go with another
                one, or a site has no part in the job. Nothing was changed.
        """
        if not isinstance(config, dict):
            raise TypeError(f"add_client_config needs a dict such as {{'max_resends': 5}}, not {type(config).__name__}")
        self._definition = self._definition.with_sites_changed(
            lambda site: site.with_client_config(config), check_clients(clients)
        )

    def add_client_input_filter(
        self, filter: Any, tasks: Sequence[str] | None = None, clients: Sequence[str] | None = None
    ) -> None:
        """Let every received model go through a filter before the script sees it, after the filters added before.

        Args:
            filter: `{"class_path": "pkg.mod.Class", "args": {...}}`, or an instance of a `Filter` that keeps the
                arguments of its constructor, JSON values, as attributes of their names (`x` or `_x`). Sites import the
                class: from the code of the job, or from what is installed there.
            tasks: for models of these tasks only; None for all.
            clients: at these sites only; None for all.

        Raises:
            ConfigError: it is no filter or cannot be described, or a site has no part in the job.
        """
        self._add_filter(SiteConfig.with_input_filter, filter, tasks, clients)

    def add_client_output_filter(
        self, filter: Any, tasks: Sequence[str] | None = None, clients: Sequence[str] | None = None
    ) -> None:
        """Let every answer go through a filter before it leaves the site; as `add_client_input_filter`."""
        self._add_filter(SiteConfig.with_output_filter, filter, tasks, clients)

    def add_server_output_filter(self, filter: Any, tasks: Sequence[str] | None = None) -> None:
        """Let every model go through a filter before it leaves the server; as `add_client_input_filter`."""
        ref = FilterRef(check_filter(filter, self._definition.code_dir), check_tasks("tasks", tasks))
        filters = (*self._definition.output_filters, ref)
        self._definition = replace(self._definition, output_filters=filters)

    def add_server_input_filter(self, filter: Any, tasks: Sequence[str] | None = None) -> None:
        """Let every result go through a filter when it has come to the server; as `add_client_input_filter`."""
        ref = FilterRef(check_filter(filter, self._definition.code_dir), check_tasks("tasks", tasks))
        filters = (*self._definition.input_filters, ref)
        self._definition = replace(self._definition, input_filters=filters)

    def add_executor(self, executor: Any, tasks: Sequence[str], clients: Sequence[str] | None = None) -> None:
        """Let tasks of some names be done at the site by a class, not by the training script.

        Args:
            executor: an `Executor`, or a `SiteController`, which may give tasks to other sites; described as a filter
                in `add_client_input_filter`, or `{"class_path": "name", "args": {...}}` with the name of an installed
                one.
            tasks: their names, or patterns such as `swarm_*`.
            clients: at these sites only; None for all.

        Raises:
            ConfigError: it cannot be described or loaded, is neither, or a site has no part in the job.
        """
        ref = check_executor(executor, tasks, self._definition.code_dir)
        self._definition = self._definition.with_sites_changed(
            lambda site: site.with_executor(ref), check_clients(clients)
        )

    def _add_filter(
        self, add: Callable[[SiteConfig, FilterRef], SiteConfig], filter: Any, tasks: object, clients: object
    ) -> None:
        ref = FilterRef(check_filter(filter, self._definition.code_dir), check_tasks("tasks", tasks))
        self._definition = self._definition.with_sites_changed(lambda site: add(site, ref), check_clients(clients))

    def export(self, job_dir: str | Path) -> Path:
        """Write the job to a folder, in place of a job that is there already, whole or not at all.

        Returns:
            The absolute path of the folder.

        Raises:
            ConfigError: it cannot be written, or it would take the place of something that is no job.
        """
        write_job(self._definition, Path(job_dir))
        return Path(job_dir).absolute()

    @classmethod
    def load(cls, job_dir: str | Path) -> Self:
        """Read back what `export` wrote, through the same checks that a new recipe goes through.

        Raises:
            ConfigError: the folder holds no job, or one with a mistake, or one of another recipe.
        """
        job = read_job(Path(job_dir))
        kind = Recipe._by_workflow.get(job.workflow)
        if kind is None and (is_path(job.workflow) or job.workflow in known_workflows()):
            kind = Recipe._by_workflow[_OTHERS]
        where = f"{Path(job_dir).absolute() / 'job.json'}: "
        if kind is None:
            known = nearest(Recipe._by_workflow, job.workflow)
            raise ConfigError(f"{where}workflow", job.workflow, f"no recipe for this workflow; {known}")
        # `FedAvgRecipe.load` gives one; so does `Recipe.load`, and a subclass that only adds defaults gives its own,
        # unless it has another workflow.
        made = cls if issubclass(cls, kind) and cls.workflow == job.workflow else kind
        if not issubclass(made, cls):
            raise ConfigError(
                f"{where}workflow", job.workflow, f"not a job of {cls.__name__}; use {kind.__name__}.load"
            )
        try:
            with code_in(job.code_dir):
                recipe = made(**made._parameters_of(job))
            recipe._definition = _with_additions(recipe._definition, job)
        except ConfigError as error:
            raise ConfigError(f"{where}{error.parameter}", error.value, error.allowed) from error
        # Paths inside the folder are absolute by now; that the checkpoint belongs to the job is known from the folder.
        recipe._definition = replace(
            recipe._definition, code_dir=job.code_dir, ckpt_is_bundled=job.ckpt_is_bundled, models=job.models
        )
        return recipe

    @classmethod
    @abstractmethod
    def _parameters_of(cls, job: JobDefinition) -> dict[str, Any]:
        """The keyword arguments of `__init__` that describe `job`."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Recipe):
            return NotImplemented
        return self._definition == other._definition

    __hash__ = None  # type: ignore[assignment]  # arrays and files take part in equality


def _parameters(cls: type) -> list[str] | None:
    """The parameters of a recipe, those that its `__init__` hands on to other classes included; None: it takes any."""
    names: list[str] = []
    for each in cls.__mro__:
        if "__init__" not in vars(each):
            continue
        parameters = inspect.signature(vars(each)["__init__"]).parameters.values()
        names += [one.name for one in parameters if one.kind is not one.VAR_KEYWORD and one.name != "self"]
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            return names
    return None


def _export_target(arguments: Sequence[str]) -> str | None:
    """Where the command line asks to export to; None when it does not."""
    if "--export" not in arguments:
        return None
    target = _DEFAULT_EXPORT_DIR
    for index, argument in enumerate(arguments):
        if argument == "--export-dir":
            target = arguments[index + 1] if index + 1 < len(arguments) else ""
        elif argument.startswith("--export-dir="):
            target = argument.partition("=")[2]
    if not target:
        raise ConfigError("--export-dir", target, "the path of a folder")
    return target


# What `add_...` calls change in the configuration of a site, besides what a parameter of the recipe sets as well.
_ADDED = ("client_config", "input_filters", "output_filters", "executors")
_ADDED_TO_SOME = (*_ADDED, "launch_timeout", "memory_gc_rounds", "cuda_empty_cache")


def _with_additions(made: JobDefinition, job: JobDefinition) -> JobDefinition:
    """The job that the parameters of `job` make, with what was added to it later."""
    made = replace(
        made,
        tracking=job.tracking,
        output_filters=job.output_filters,
        input_filters=job.input_filters,
        afterwards=job.afterwards,
    )
    for ref in job.tracking:
        check_tracking(ref)
    for later in job.afterwards:
        later.make(job.code_dir)
    defaults = _taken_over(made.site_defaults, job.site_defaults, _ADDED)
    sites = {site: _taken_over(config, job.sites[site], _ADDED) for site, config in made.sites.items()}
    if not job.open_to_others:
        return replace(made, site_defaults=defaults, sites=sites)
    for site, config in job.sites.items():
        check_site_name("sites", site)
        sites[site] = _taken_over(defaults, config, _ADDED_TO_SOME)
        if config != _taken_over(job.site_defaults, config, _ADDED_TO_SOME):
            allowed = (
                f"differs from site_defaults in more than {', '.join(_ADDED_TO_SOME)}; set open_to_others to false"
            )
            raise ConfigError(f"sites[{site!r}]", site, allowed)
    return replace(made, site_defaults=defaults, sites=sites, open_to_others=True)


def _taken_over(config: SiteConfig, source: SiteConfig, names: Sequence[str]) -> SiteConfig:
    return replace(config, **{name: getattr(source, name) for name in names})


def _end_early(env: ExecEnv, run: Run) -> None:
    """After an interrupt: abort and wait a while. An interrupt of the waiting passes through."""
    # Not logged: the log of a running job is a file, and the one who interrupted sits at the terminal.
    print("interrupted: ending the job; interrupt again to leave at once", file=sys.stderr)
    run.abort()
    try:
        run.get_result(timeout=_INTERRUPT_GRACE_S, clean_up=False)
    finally:
        env.stop()
