"""JobDefinition: all that a server job has to know, frozen. Made by a recipe, or read from a job folder.

It holds no socket, thread or open file; files are read only by the methods that say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flarebus.errors import ConfigError
from flarebus.job.checks import check_enum, check_keys, check_mapping, nearest
from flarebus.job.class_ref import ClassRef, code_folder_first
from flarebus.job.code import CodeLayout, file_content, lay_out
from flarebus.job.file_names import KERAS_MODEL, KERAS_SUFFIXES, stem_of, suffix_of
from flarebus.job.filter_ref import FilterRef
from flarebus.job.initial import load_initial, params_of
from flarebus.job.keras_models import is_keras_model, load_keras, weights_in
from flarebus.job.kinds import DataKind, FrameworkType
from flarebus.job.model_ref import ModelRef, read_model_refs
from flarebus.job.plugins import load_workflow
from flarebus.job.site_config import SiteConfig
from flarebus.job.tracking_ref import TrackingRef
from flarebus.job.workflow_ref import WorkflowRef
from flarebus.plugins import is_path
from flarebus.workflow.params import as_array, flatten, rebuild

__all__ = ["JobDefinition"]


@dataclass(frozen=True, slots=True, eq=False)
class JobDefinition:
    """A job, ready to be started or written to a folder.

    Two definitions are equal when they describe the same job: settings, sites, the bytes of the code files and the
    initial parameters. Where the files lie and `job_id` do not count. Comparing reads the code files.

    Args:
        name: of the job; also of its run folder.
        workflow: entry-point name or dotted path of the workflow.
        workflow_settings: keyword arguments of the workflow. Held by reference, not to be changed.
        site_defaults: what a site runs that is not in `sites`.
        sites: site name -> its own configuration. When there are any, these are the sites of the job, unless
            `open_to_others`.
        code_dir: absolute folder of the main training script; where classes named by path are looked for first.
        model: `ClassRef`, a module, named arrays or a list of them, or None. Held by reference until the job starts.
        initial_ckpt: absolute path of a checkpoint to start from, or None.
        ckpt_is_bundled: whether the checkpoint is part of the job, rather than a file that the server has.
        best_model_filename: name of the best model's file, or None for the default of the framework.
        aggregator_data_kind: what a custom aggregator is given; None when that is left open.
        open_to_others: whether sites that are not in `sites` take part as well.
        tracking: trackers that are told what happens, at the server or at the sites.
        output_filters: what every task goes through before it leaves the server.
        input_filters: what every result goes through when it has come to the server.
        afterwards: workflows that run after the first one, in this order, with the same sites.
        models: name -> a model that the workflows find at the server, besides those that they make.
        job_id: 32 hexadecimal digits once the job is started, "" before.
    """

    name: str
    workflow: str
    workflow_settings: Mapping[str, Any]
    site_defaults: SiteConfig
    sites: Mapping[str, SiteConfig]
    code_dir: Path
    model: Any = None
    initial_ckpt: Path | None = None
    ckpt_is_bundled: bool = False
    best_model_filename: str | None = None
    aggregator_data_kind: DataKind | None = DataKind.WEIGHTS
    open_to_others: bool = False
    tracking: tuple[TrackingRef, ...] = ()
    output_filters: tuple[FilterRef, ...] = ()
    input_filters: tuple[FilterRef, ...] = ()
    afterwards: tuple[WorkflowRef, ...] = ()
    models: Mapping[str, ModelRef] = field(default_factory=dict)
    job_id: str = ""

    @property
    def framework(self) -> FrameworkType:
        """The framework of the job; decides which model files the server writes."""
        return self.site_defaults.framework

    @property
    def best_stem(self) -> str:
        """The name of the best model's files without suffix: the same for safetensors and for the framework's own."""
        return "best_FL_global_model" if self.best_model_filename is None else stem_of(Path(self.best_model_filename))

    @property
    def sites_steer(self) -> bool:
        """Whether sites give tasks to each other."""
        configs = (self.site_defaults, *self.sites.values())
        return any(ref.steers for config in configs for ref in config.executors)

    def site_config(self, site: str) -> SiteConfig:
        """What `site` runs."""
        return self.sites.get(site, self.site_defaults)

    def with_sites_changed(
        self, change: Callable[[SiteConfig], SiteConfig], sites: Iterable[str] | None = None
    ) -> JobDefinition:
        """The same job with another configuration of all sites, or of some.

        Args:
            change: makes the new configuration of a site from the one it has.
            sites: whose; None for all. Where any site may join, naming some does not keep the others out.

        Raises:
            ConfigError: the sites of this job are known, and one of `sites` is none of them.
        """
        if sites is None:
            changed = {site: change(config) for site, config in self.sites.items()}
            return replace(self, site_defaults=change(self.site_defaults), sites=changed)
        is_open = self.open_to_others or not self.sites
        named = list(sites)
        for site in named:
            if not is_open and site not in self.sites:
                raise ConfigError("clients", site, f"no site of this job; {nearest(self.sites, site)}")
        changed = {site: change(self.site_config(site)) for site in named}
        return replace(self, sites={**self.sites, **changed}, open_to_others=is_open)

    def check_sites(self, sites: Iterable[str]) -> None:
        """See that this job can run on exactly these sites.

        Raises:
            ConfigError: too few sites, or a site of the job is missing, or one of them has no part in the job.
        """
        present = list(sites)
        settings = dict(self.workflow_settings)
        for ref in self.afterwards:
            settings |= {name: each for name, each in ref.settings.items() if name == "participating_clients"}
        for parameter, needed in (("min_clients", "needs"), ("clients_per_round", "asks for")):
            count = settings.get(parameter)
            if isinstance(count, int) and count > len(present):
                raise ConfigError(parameter, count, f"{needed} more sites than there are: {len(present)}")
        for parameter, named in (
            ("clients" if self.open_to_others else "per_site_config", self.sites),
            ("aggregation_weights", settings.get("aggregation_weights") or {}),
            ("participating_clients", settings.get("participating_clients") or ()),
        ):
            for site in named:
                if site not in present:
                    raise ConfigError(f"{parameter}[{site!r}]", site, f"no such site; {nearest(present, site)}")
        is_closed = self.sites and not self.open_to_others
        left_out = [site for site in present if site not in self.sites] if is_closed else []
        if left_out:
            allowed = (
                f"{left_out[0]} has no entry; give it one, {{}} for the settings of the job, or leave the site out"
            )
            raise ConfigError("per_site_config", sorted(self.sites), allowed)

    def initial_params(self) -> dict[Any, Any]:
        """Build, load or convert the initial model; reads files and may import the job's own code.

        Returns:
            name -> array or other value, owned by the caller unless `model` is a module or arrays held by the recipe:
            then they may share memory with it. Empty when the job starts without a model.

        Raises:
            ConfigError: a class or file is not there or not usable, or checkpoint and model do not fit.
        """
        if self.model is None:
            return {} if self.initial_ckpt is None else load_initial(self.initial_ckpt)
        model = self._built_model()
        if self.initial_ckpt is not None and is_keras_model(model) and suffix_of(self.initial_ckpt) in KERAS_SUFFIXES:
            return dict(weights_in(self.initial_ckpt, model))
        params = params_of(model)
        if self.initial_ckpt is None:
            return params
        loaded = load_initial(self.initial_ckpt)
        _check_fit(flatten(loaded), flatten(params), self.initial_ckpt)
        return rebuild(params, flatten(loaded))

    def keras_model(self) -> Any:
        """The Keras model whose parameters the job trains: the recipe's own object, or one that is built now.

        None where the job knows the arrays only, and not how they are used.

        Raises:
            ConfigError: as `initial_params`.
        """
        ckpt = self.initial_ckpt
        if self.model is None and ckpt is not None and suffix_of(ckpt) == KERAS_MODEL:
            return load_keras(ckpt)
        model = self._built_model()
        return model if is_keras_model(model) else None

    def _built_model(self) -> Any:
        return self.model.build(self.code_dir, "model") if isinstance(self.model, ClassRef) else self.model

    def make_workflow(self) -> Any:
        """Load the workflow, from the code of the job if it is there, and build it with its settings; a custom
        aggregator given by its path is built first."""
        settings = dict(self.workflow_settings)
        with code_folder_first(self.code_dir) if is_path(self.workflow) else nullcontext():
            aggregator = settings.get("aggregator")
            if isinstance(aggregator, ClassRef):
                settings["aggregator"] = aggregator.build(self.code_dir, "aggregator")
            return load_workflow(self.workflow)(**settings)

    def make_workflows(self) -> list[Any]:
        """Load and build the workflow and those that run after it, in their order."""
        return [self.make_workflow(), *(ref.make(self.code_dir) for ref in self.afterwards)]

    def check_models(self) -> None:
        """See that the files in `models` are there.

        Raises:
            ConfigError: one is not.
        """
        for name, ref in self.models.items():
            if not ref.path.is_file():
                raise ConfigError(f"models[{name!r}]", str(ref.path), "the path of a file that the server can read")

    def code_layout(self) -> CodeLayout:
        """The names of the code files inside a job folder. Walks the folders of the scripts."""
        scripts = [self.site_defaults.train_script, *(self.sites[site].train_script for site in sorted(self.sites))]
        return lay_out(self.code_dir, [script for script in scripts if script])

    def with_id(self, job_id: str) -> JobDefinition:
        """The same job, started under `job_id`."""
        return replace(self, job_id=job_id)

    def to_json(self) -> dict[str, Any]:
        """Everything but arrays and objects, as plain data; paths as they are.

        `model` is a description of a class, or "params" where the arrays have to travel beside it, or None.

        Raises:
            ConfigError: the custom aggregator is an object; only one described by its path can be written down.
        """
        settings = dict(self.workflow_settings)
        aggregator = settings.get("aggregator")
        if isinstance(aggregator, ClassRef):
            settings["aggregator"] = aggregator.to_json()
        elif aggregator is not None:
            allowed = 'an object cannot be written down; give {"class_path": "pkg.mod.Class", "args": {...}}'
            raise ConfigError("aggregator", aggregator, allowed)
        kind = self.aggregator_data_kind
        return {
            "name": self.name,
            "workflow": self.workflow,
            "settings": settings,
            "site_defaults": self.site_defaults.to_json(),
            "sites": {site: config.to_json() for site, config in self.sites.items()},
            "model": self.model.to_json()
            if isinstance(self.model, ClassRef)
            else "params"
            if self.model is not None
            else None,
            "initial_ckpt": None if self.initial_ckpt is None else str(self.initial_ckpt),
            "ckpt_is_bundled": self.ckpt_is_bundled,
            "best_model_filename": self.best_model_filename,
            "aggregator_data_kind": None if kind is None else kind.value,
            "open_to_others": self.open_to_others,
            "tracking": [ref.to_json() for ref in self.tracking],
            "output_filters": [ref.to_json() for ref in self.output_filters],
            "input_filters": [ref.to_json() for ref in self.input_filters],
            "afterwards": [ref.to_json() for ref in self.afterwards],
            "models": {name: ref.to_json() for name, ref in self.models.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], code_dir: Path, model: Any = None) -> JobDefinition:
        """Read what `to_json` wrote.

        Args:
            code_dir: see the class.
            model: the parameters, where the description says that they travel beside it.

        Raises:
            ConfigError: a key is unknown or missing, or a value has a wrong type. The workflow's own settings are
                checked by the recipe and by the workflow.
        """
        check_keys(data, _JSON_KEYS, _JSON_KEYS, "job")
        for key, allowed in _JSON_KEYS.items():
            if not isinstance(data[key], allowed) or (isinstance(data[key], bool) and bool not in allowed):
                raise ConfigError(f"job.{key}", data[key], " or ".join(_WORDS[each] for each in allowed))
        settings = dict(data["settings"])
        if settings.get("aggregator") is not None:
            settings["aggregator"] = ClassRef.parse(check_mapping("aggregator", settings["aggregator"]), "aggregator")
        kind, described, ckpt = data["aggregator_data_kind"], data["model"], data["initial_ckpt"]
        if isinstance(described, str) and (described != "params" or model is None):
            raise ConfigError("job.model", described, 'a description of a class, "params" with the arrays, or null')
        return cls(
            name=data["name"],
            workflow=data["workflow"],
            workflow_settings=settings,
            site_defaults=SiteConfig.from_json(data["site_defaults"], "site_defaults"),
            sites={
                site: SiteConfig.from_json(check_mapping(f"sites[{site!r}]", config), f"sites[{site!r}]")
                for site, config in data["sites"].items()
            },
            code_dir=code_dir,
            model=ClassRef.parse(described, "model") if isinstance(described, dict) else model if described else None,
            initial_ckpt=None if ckpt is None else Path(ckpt),
            ckpt_is_bundled=data["ckpt_is_bundled"],
            best_model_filename=data["best_model_filename"],
            aggregator_data_kind=None if kind is None else check_enum("aggregator_data_kind", kind, DataKind),
            open_to_others=data["open_to_others"],
            tracking=tuple(
                TrackingRef.from_json(each, f"tracking[{index}]") for index, each in enumerate(data["tracking"])
            ),
            output_filters=_filters(data, "output_filters"),
            input_filters=_filters(data, "input_filters"),
            afterwards=tuple(
                WorkflowRef.from_json(each, f"afterwards[{index}]") for index, each in enumerate(data["afterwards"])
            ),
            models=read_model_refs(data["models"]),
        )

    def _described(self, layout: CodeLayout) -> dict[str, Any]:
        """`to_json` with names instead of places, and the aggregator as it is: what two equal jobs share."""
        data = replace(self, workflow_settings={**self.workflow_settings, "aggregator": None}).to_json()
        for config in (data["site_defaults"], *data["sites"].values()):
            config["train_script"] = layout.scripts.get(config["train_script"], "")
        if self.ckpt_is_bundled and self.initial_ckpt is not None:
            data["initial_ckpt"] = (self.initial_ckpt.name, file_content(self.initial_ckpt))
        for name, ref in self.models.items():
            if ref.is_bundled:
                data["models"][name] = (ref.path.name, file_content(ref.path))
        data["aggregator"] = self.workflow_settings.get("aggregator")
        return data

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, JobDefinition):
            return NotImplemented
        mine, theirs = self.code_layout(), other.code_layout()
        if self._described(mine) != other._described(theirs) or not mine.same_code(theirs):
            return False
        if self.model is other.model or isinstance(self.model, ClassRef):
            return True
        return _same_params(params_of(self.model), params_of(other.model))

    __hash__ = None  # type: ignore[assignment]  # arrays and files take part in equality


_JSON_KEYS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "workflow": (str,),
    "settings": (dict,),
    "site_defaults": (dict,),
    "sites": (dict,),
    "model": (dict, str, type(None)),
    "initial_ckpt": (str, type(None)),
    "ckpt_is_bundled": (bool,),
    "best_model_filename": (str, type(None)),
    "aggregator_data_kind": (str, type(None)),
    "open_to_others": (bool,),
    "tracking": (list,),
    "output_filters": (list,),
    "input_filters": (list,),
    "afterwards": (list,),
    "models": (dict,),
}
_WORDS = {str: "a string", dict: "an object", list: "a list", bool: "true or false", type(None): "null"}


def _filters(data: Mapping[str, Any], name: str) -> tuple[FilterRef, ...]:
    return tuple(FilterRef.from_json(each, f"{name}[{index}]") for index, each in enumerate(data[name]))


def _check_fit(loaded: Mapping[str, Any], params: Mapping[str, Any], ckpt: Path) -> None:
    for names, said in (
        (sorted(params.keys() - loaded.keys()), "the model has {}, the checkpoint has not"),
        (sorted(loaded.keys() - params.keys()), "the checkpoint has {}, the model has not"),
    ):
        if names:
            raise ConfigError("initial_ckpt", str(ckpt), said.format(", ".join(repr(name) for name in names[:5])))
    for name, value in params.items():
        if np.shape(loaded[name]) != np.shape(value):
            shapes = f"{np.shape(loaded[name])}, the model has {np.shape(value)}"
            raise ConfigError("initial_ckpt", str(ckpt), f"{name!r} has shape {shapes}")


def _same_params(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    """Bit for bit, so that NaN equals NaN; the order of names does not count."""
    mine, theirs = flatten(one), flatten(other)
    return mine.keys() == theirs.keys() and all(_same_leaf(leaf, theirs[name]) for name, leaf in mine.items())


def _same_leaf(one: Any, other: Any) -> bool:
    mine, theirs = as_array(one), as_array(other)
    if mine is None or theirs is None:
        # A text of its type and digits: NaN equals NaN here too, and 1 is not 1.0.
        return mine is theirs and repr(one) == repr(other)
    return mine.dtype == theirs.dtype and mine.shape == theirs.shape and mine.tobytes() == theirs.tobytes()
