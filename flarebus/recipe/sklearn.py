"""Recipes for models of scikit-learn: linear ones, k-means, support vector machines. They are federated averaging with
defaults, and with aggregators where a mean makes no sense.

Scripts are told hyper-parameters beside the model and answer with arrays. Models are safetensors files; nothing is ever
pickled, so there is nothing to fear from a file that somebody else wrote. `load_estimator` brings one back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flarebus.errors import ConfigError, DecodeError
from flarebus.job.checks import check_int, check_mapping
from flarebus.job.definition import JobDefinition
from flarebus.job.kinds import ExchangeFormat, FrameworkType
from flarebus.job.tensor_file import load_params
from flarebus.recipe.fedavg import FedAvgRecipe
from flarebus.recipe.validate import check_plain
from flarebus.workflow.params import as_array
from flarebus.workflow.sklearn import KMeansAggregator, SVMAggregator

__all__ = [
    "KMeansAggregator",
    "KMeansFedAvgRecipe",
    "SVMAggregator",
    "SVMFedAvgRecipe",
    "SklearnFedAvgRecipe",
    "load_estimator",
]

# What scripts work with are arrays, and what they are arrays of is nobody else's business.
_RAW = {"framework": FrameworkType.RAW, "server_expected_format": ExchangeFormat.RAW}


class SklearnFedAvgRecipe(FedAvgRecipe):
    """Federated averaging of what `fit` or `partial_fit` makes of a linear model, such as `SGDClassifier`: sites answer
    with arrays, `coef` and `intercept` say, and the mean is weighted with `NUM_STEPS_CURRENT_ROUND`.

    Args:
        model_params: what scripts make their estimator from: name -> number, string, True, False or None. Scripts find
            them in the `params` of every round. Arrays among them are the weights to start from; without any, the first
            round makes the model.
        name: name of the job, and of its run folder.
        fedavg: the parameters of `FedAvgRecipe`; instead of `model_params`, `model` and `hyper_params`.

    Raises:
        ConfigError: a parameter is wrong; names it, its value and what is allowed.
    """

    def __init__(
        self, *, model_params: dict[str, Any] | None = None, name: str = "sklearn_fedavg", **fedavg: Any
    ) -> None:
        if model_params is not None:
            for parameter in ("model", "hyper_params"):
                if fedavg.get(parameter) is not None:
                    raise ConfigError(parameter, fedavg[parameter], "None beside model_params, which say both")
            fedavg |= _parted(check_mapping("model_params", model_params))
        super().__init__(name=name, **(_RAW | fedavg))


class KMeansFedAvgRecipe(FedAvgRecipe):
    """k-means: in the first round sites send centres to begin with, later what their points make of the global ones.
    `KMeansAggregator` says what becomes of them. Scripts are told `n_clusters`.

    Args:
        n_clusters: how many clusters, from 1.
        num_rounds: rounds to run, from 1; the first one only finds the centres to begin with.
        key_metric: metric that tells the best model; "" for no best model.
        seed: of the k-means of the first round, and of drawing sites, from 0.
        name: name of the job, and of its run folder.
        fedavg: the other parameters of `FedAvgRecipe`.

    Raises:
        ConfigError: a parameter is wrong, or scikit-learn is not there; names it, its value and what is allowed.
    """

    def __init__(
        self,
        *,
        n_clusters: int = 3,
        num_rounds: int = 5,
        key_metric: str = "metrics",
        seed: int = 0,
        name: str = "kmeans_fedavg",
        **fedavg: Any,
    ) -> None:
        _refuse(fedavg, "n_clusters")
        args = {"n_clusters": check_int("n_clusters", n_clusters, 1), "seed": check_int("seed", seed, 0)}
        KMeansAggregator(**args)  # raises here what would end the job later
        super().__init__(
            name=name,
            num_rounds=num_rounds,
            key_metric=key_metric,
            seed=seed,
            hyper_params={"n_clusters": args["n_clusters"]},
            aggregator=_described(KMeansAggregator, args),
            **(_RAW | fedavg),
        )

    @classmethod
    def _parameters_of(cls, job: JobDefinition) -> dict[str, Any]:
        given = super()._parameters_of(job)
        return given | _own_parameters(cls, given, KMeansAggregator, ("n_clusters",))


class SVMFedAvgRecipe(FedAvgRecipe):
    """A support vector machine from those of the sites, of which they send the support vectors; see `SVMAggregator`.
    Scripts are told `kernel`, and `svc_args` by their names. The first round makes the model; in the second, sites can
    say how good it is, and send it back as it is.

    Args:
        kernel: `linear`, `poly`, `rbf` or `sigmoid`.
        svc_args: further arguments of `sklearn.svm.SVC`, such as `{"C": 10.0, "gamma": 0.01}`. Mind that with
            `gamma="scale"`, the default there, every site has a gamma of its own, and the server another.
        backend: only "sklearn".
        num_rounds: rounds to run, from 1.
        key_metric: metric that tells the best model; "" for no best model.
        name: name of the job, and of its run folder.
        fedavg: the other parameters of `FedAvgRecipe`.

    Raises:
        ConfigError: a parameter is wrong, or scikit-learn is not there; names it, its value and what is allowed.
        NotImplementedError: a parameter asks for what this version does not have.
    """

    def __init__(
        self,
        *,
        kernel: str = "rbf",
        svc_args: dict[str, Any] | None = None,
        backend: str = "sklearn",
        num_rounds: int = 2,
        key_metric: str = "AUC",
        name: str = "svm_fedavg",
        **fedavg: Any,
    ) -> None:
        _refuse(fedavg, "kernel and svc_args")
        if backend != "sklearn":
            raise NotImplementedError(f"backend={backend!r}: only 'sklearn' is there; scripts may use what they like")
        args = check_plain("svc_args", {} if svc_args is None else svc_args)
        if "kernel" in args:
            raise ConfigError("svc_args['kernel']", args["kernel"], "the kernel has a parameter of its own")
        SVMAggregator(kernel, **args)  # raises here what would end the job later
        args = {"kernel": kernel, **args}
        super().__init__(
            name=name,
            num_rounds=num_rounds,
            key_metric=key_metric,
            hyper_params=args,
            aggregator=_described(SVMAggregator, args),
            **(_RAW | fedavg),
        )

    @classmethod
    def _parameters_of(cls, job: JobDefinition) -> dict[str, Any]:
        given = super()._parameters_of(job)
        args = _own_parameters(cls, given, SVMAggregator, ("kernel",))
        return given | {"kernel": args.pop("kernel"), "svc_args": args}


def load_estimator(model_file: str | Path, estimator: Any, classes: Any = None) -> Any:
    """Give an estimator of scikit-learn what a finished job has learnt.

    Args:
        model_file: `server/models/FL_global_model.safetensors` of the run folder, or the best model beside it.
        estimator: a new one, made with the parameters that the sites used: for `center` a `KMeans`, for `support_x` an
            `SVC`, for `coef` a linear model. It is changed.
        classes: of a linear classifier, sorted; None: 0, 1, ...

    Returns:
        `estimator`, ready for `predict`.

    Raises:
        ConfigError: the file cannot be read, or holds a model of another kind.
    """
    try:
        params = load_params(Path(model_file))
    except (OSError, DecodeError) as error:
        raise ConfigError("model_file", str(model_file), f"a model of a finished job: {error}") from error
    if "support_x" in params:
        return estimator.fit(params["support_x"], params["support_y"])
    if "center" in params:
        center = params["center"]
        # `fit` knows what else a finished estimator has. Its centres are these, but for rounding.
        estimator.set_params(n_clusters=len(center), init=center, n_init=1).fit(center)
        estimator.cluster_centers_ = center
        return estimator
    if "coef" not in params:
        raise ConfigError("model_file", str(model_file), f"has {sorted(params)}, none of coef, center, support_x")
    estimator.coef_, estimator.intercept_ = params["coef"], params.get("intercept", 0.0)
    estimator.n_features_in_ = estimator.coef_.shape[-1]
    if hasattr(estimator, "decision_function"):  # a classifier
        n_classes = max(len(np.atleast_2d(estimator.coef_)), 2)
        estimator.classes_ = np.arange(n_classes) if classes is None else np.asarray(classes)
    return estimator


def _parted(model_params: Mapping[Any, Any]) -> dict[str, Any]:
    """`model` and `hyper_params`: arrays, and what is none."""
    found = {name: as_array(value) for name, value in model_params.items()}
    arrays = {name: array for name, array in found.items() if array is not None and array.ndim}
    plain = {name: value for name, value in model_params.items() if name not in arrays}
    return {"model": arrays or None, "hyper_params": check_plain("model_params", plain) or None}


def _refuse(fedavg: Mapping[str, Any], own: str) -> None:
    for parameter in ("aggregator", "hyper_params"):
        if fedavg.get(parameter) is not None:
            raise ConfigError(parameter, fedavg[parameter], f"None; made from {own} here. FedAvgRecipe takes any")


def _described(aggregator: type, args: Mapping[str, Any]) -> dict[str, Any]:
    return {"class_path": f"{aggregator.__module__}.{aggregator.__name__}", "args": dict(args)}


def _own_parameters(
    recipe: type[FedAvgRecipe], given: dict[str, Any], aggregator: type, needed: tuple[str, ...]
) -> dict[str, Any]:
    """Take out of the parameters of a job what the recipe makes of its own, and return those."""
    described, own = given.pop("aggregator"), given.pop("hyper_params") or {}
    path = _described(aggregator, {})["class_path"]
    if not isinstance(described, dict) or described["class_path"] != path or not own.keys() >= set(needed):
        raise ConfigError("aggregator", described, f"{path}; not a job of {recipe.__name__}, use FedAvgRecipe.load")
    return own
