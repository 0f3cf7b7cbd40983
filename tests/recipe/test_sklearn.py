"""Recipes for scikit-learn: what they are made of, what they refuse, that they come back, and what is left of a job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.linear_model import LinearRegression, SGDClassifier
from sklearn.svm import SVC

from flarebus.errors import ConfigError
from flarebus.job.class_ref import ClassRef
from flarebus.job.kinds import FrameworkType
from flarebus.job.tensor_file import save_params
from flarebus.recipe import FedAvgRecipe, FedOptRecipe, Recipe
from flarebus.recipe.sklearn import (
    KMeansAggregator,
    KMeansFedAvgRecipe,
    SklearnFedAvgRecipe,
    SVMAggregator,
    SVMFedAvgRecipe,
    load_estimator,
)

MODEL_PARAMS = {"n_classes": 2, "loss": "log_loss", "eta0": 1e-4, "fit_intercept": True, "class_weight": None}
CHANGED: list[tuple[type[FedAvgRecipe], dict[str, Any]]] = [
    (SklearnFedAvgRecipe, {"model_params": {**MODEL_PARAMS, "coef": np.ones((1, 3)), "intercept": np.zeros(1)}}),
    (SklearnFedAvgRecipe, {"model_params": MODEL_PARAMS, "aggregation_weights": {"site-1": 2.0}}),
    (KMeansFedAvgRecipe, {"n_clusters": 7, "seed": 5, "num_rounds": 9, "key_metric": "homogeneity"}),
    (SVMFedAvgRecipe, {"kernel": "poly", "svc_args": {"C": 3.0, "degree": 2}, "num_rounds": 1}),
]


@pytest.fixture
def basic(code: Path) -> dict[str, Any]:
    """What every recipe needs."""
    return {"min_clients": 1, "train_script": str(code / "client.py")}


def test_model_params_are_parted(basic: dict[str, Any]) -> None:
    """What is no array is told to the sites in every round; arrays are the model to start from."""
    coef = np.ones((1, 3))

    job = SklearnFedAvgRecipe(**basic, model_params={**MODEL_PARAMS, "coef": coef}).definition

    assert job.workflow_settings["hyper_params"] == MODEL_PARAMS
    assert job.model == {"coef": coef}
    assert (job.name, job.workflow, job.framework) == ("sklearn_fedavg", "fedavg", FrameworkType.RAW)
    assert job.workflow_settings["aggregator"] is None


def test_k_means_has_its_aggregator_and_tells_how_many_clusters(basic: dict[str, Any]) -> None:
    """Defaults as they are known: 3 clusters, 5 rounds."""
    job = KMeansFedAvgRecipe(**basic, seed=4).definition

    settings = job.workflow_settings
    assert settings["hyper_params"] == {"n_clusters": 3}
    assert settings["aggregator"] == ClassRef(
        "flarebus.workflow.sklearn.KMeansAggregator", {"n_clusters": 3, "seed": 4}
    )
    assert (job.name, settings["num_rounds"], settings["key_metric"]) == ("kmeans_fedavg", 5, "metrics")
    built = settings["aggregator"].build(job.code_dir, "aggregator")
    assert isinstance(built, KMeansAggregator)
    assert (built.n_clusters, built.seed) == (3, 4)


def test_a_machine_has_its_aggregator_and_tells_its_kernel(basic: dict[str, Any]) -> None:
    """Defaults as they are known: radial basis functions, one round to train and one to validate."""
    job = SVMFedAvgRecipe(**basic, svc_args={"gamma": "auto"}).definition

    settings = job.workflow_settings
    assert settings["hyper_params"] == {"kernel": "rbf", "gamma": "auto"}
    assert settings["aggregator"] == ClassRef(
        "flarebus.workflow.sklearn.SVMAggregator", {"kernel": "rbf", "gamma": "auto"}
    )
    assert (job.name, settings["num_rounds"], settings["key_metric"]) == ("svm_fedavg", 2, "AUC")
    assert isinstance(settings["aggregator"].build(job.code_dir, "aggregator"), SVMAggregator)


@pytest.mark.parametrize(("kind", "changes"), CHANGED, ids=lambda value: getattr(value, "__name__", ""))
def test_comes_back_equal(
    kind: type[FedAvgRecipe], changes: dict[str, Any], basic: dict[str, Any], tmp_path: Path
) -> None:
    """Export and load give an equal recipe, of its own class if that is asked for it."""
    recipe = kind(**basic, **changes)

    target = recipe.export(tmp_path / "job")

    loaded = kind.load(target)
    assert type(loaded) is kind
    assert loaded == recipe
    assert loaded.definition.workflow_settings == recipe.definition.workflow_settings
    plain = Recipe.load(target)
    assert type(plain) is FedAvgRecipe
    assert plain == recipe
    assert recipe != kind(**basic)


def test_a_job_of_another_recipe_is_refused(basic: dict[str, Any], tmp_path: Path) -> None:
    """A job of federated averaging is not read back as k-means, nor k-means as a machine."""
    mean = FedAvgRecipe(**basic, model=[1.0]).export(tmp_path / "mean")
    kmeans = KMeansFedAvgRecipe(**basic).export(tmp_path / "kmeans")

    for kind, target in ((KMeansFedAvgRecipe, mean), (SVMFedAvgRecipe, mean), (SVMFedAvgRecipe, kmeans)):
        with pytest.raises(ConfigError, match=rf"not a job of {kind.__name__}, use FedAvgRecipe\.load"):
            kind.load(target)


WRONG: list[tuple[type[FedAvgRecipe], dict[str, Any], str, str]] = [
    (SklearnFedAvgRecipe, {"model_params": [1]}, "model_params", "a dict, not list"),
    (SklearnFedAvgRecipe, {"model_params": {"loss": object()}}, "model_params['loss']", "numbers, strings"),
    (SklearnFedAvgRecipe, {"model_params": {"eta0": float("nan")}}, "model_params['eta0']", "numbers, strings"),
    (SklearnFedAvgRecipe, {"model_params": {"rows": [[object()], [1, 2]]}}, "model_params['rows']", "numbers, strings"),
    (SklearnFedAvgRecipe, {"model_params": {"coef": np.array([None])}}, "model['coef']", "not a Python object"),
    (SklearnFedAvgRecipe, {"model_params": {3: 1}}, "model_params", "names that are strings"),
    (SklearnFedAvgRecipe, {"model_params": MODEL_PARAMS, "model": [1.0]}, "model", "None beside model_params"),
    (SklearnFedAvgRecipe, {"model_params": {}, "hyper_params": {"a": 1}}, "hyper_params", "None beside model_params"),
    (
        SklearnFedAvgRecipe,
        {"model_params": MODEL_PARAMS, "params_transfer_type": "DIFF"},
        "params_transfer_type",
        "FULL",
    ),
    (KMeansFedAvgRecipe, {"n_clusters": 0}, "n_clusters", "a whole number from 1"),
    (KMeansFedAvgRecipe, {"n_clusters": 2.5}, "n_clusters", "a whole number from 1"),
    (KMeansFedAvgRecipe, {"seed": -1}, "seed", "a whole number from 0"),
    (KMeansFedAvgRecipe, {"aggregator": KMeansAggregator(2)}, "aggregator", "made from n_clusters"),
    (KMeansFedAvgRecipe, {"hyper_params": {"n_clusters": 2}}, "hyper_params", "made from n_clusters"),
    (KMeansFedAvgRecipe, {"exclude_vars": "count"}, "exclude_vars", "beside a custom aggregator"),
    (SVMFedAvgRecipe, {"kernel": "rbff"}, "kernel", "linear, poly, rbf, sigmoid"),
    (SVMFedAvgRecipe, {"kernel": ["rbf"]}, "kernel", "linear, poly, rbf, sigmoid"),
    (SVMFedAvgRecipe, {"svc_args": {"c": 1}}, "svc_args", "unexpected keyword argument 'c'"),
    (SVMFedAvgRecipe, {"svc_args": {"C": 0}}, "svc_args", "The 'C' parameter"),
    (SVMFedAvgRecipe, {"svc_args": {"kernel": "rbf"}}, "svc_args['kernel']", "a parameter of its own"),
    (SVMFedAvgRecipe, {"svc_args": {1: 2}}, "svc_args", "names that are strings"),
    (SVMFedAvgRecipe, {"aggregator": SVMAggregator()}, "aggregator", "made from kernel and svc_args"),
]


@pytest.mark.parametrize(("kind", "changes", "parameter", "said"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_parameter_is_named(
    kind: type[FedAvgRecipe], changes: dict[str, Any], parameter: str, said: str, basic: dict[str, Any]
) -> None:
    """A wrong parameter is refused at construction, as the user wrote it."""
    with pytest.raises(ConfigError) as caught:
        kind(**basic, **changes)

    assert caught.value.parameter == parameter
    assert said in str(caught.value)


def test_another_backend_is_not_there(basic: dict[str, Any]) -> None:
    """What the server does not compute with is refused, not ignored."""
    with pytest.raises(NotImplementedError, match="backend='cuml'"):
        SVMFedAvgRecipe(**basic, backend="cuml")


def test_an_unknown_parameter_names_the_nearest_known_one(basic: dict[str, Any]) -> None:
    """A misspelt parameter is a TypeError, be it one of the recipe or one of federated averaging."""
    with pytest.raises(
        TypeError, match=r"KMeansFedAvgRecipe has no parameter 'n_cluster'; did you mean 'n_clusters'\?"
    ):
        KMeansFedAvgRecipe(**basic, n_cluster=3)
    with pytest.raises(TypeError, match=r"did you mean 'num_rounds'\?"):
        SVMFedAvgRecipe(**basic, num_round=3)


def test_without_scikit_learn_the_extra_is_named(basic: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server will need scikit-learn, making the recipe says so; a mean does not need it."""
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)

    for kind in (KMeansFedAvgRecipe, SVMFedAvgRecipe):
        with pytest.raises(ConfigError, match=r"pip install 'flarebus\[sklearn\]'"):
            kind(**basic)
    SklearnFedAvgRecipe(**basic, model_params=MODEL_PARAMS)


# --- hyper-parameters of any recipe on the frame


@pytest.mark.parametrize(
    ("changes", "parameter", "said"),
    [
        ({"hyper_params": 3}, "hyper_params", "a dict"),
        ({"hyper_params": {"a": np.ones(3)}}, "hyper_params['a']", "numbers, strings"),
        ({"hyper_params": {"w": 1}, "model": {"w": np.ones(3)}}, "hyper_params['w']", "a name that the model has not"),
        ({"hyper_params": {"a": 1}, "params_transfer_type": "DIFF"}, "params_transfer_type", "TransferType.FULL"),
        (
            {"hyper_params": {"a": 1}, "per_site_config": {"x": {"params_transfer_type": "DIFF"}}},
            "params_transfer_type",
            "TransferType.FULL",
        ),
    ],
)
def test_wrong_hyper_params_are_named(changes: dict[str, Any], parameter: str, said: str, make: Any) -> None:
    """Hyper-parameters are plain values under names of their own, beside whole models."""
    with pytest.raises(ConfigError) as caught:
        make(**changes)

    assert caught.value.parameter == parameter
    assert said in str(caught.value)


def test_every_recipe_on_the_frame_takes_hyper_params(basic: dict[str, Any], tmp_path: Path) -> None:
    """They are settings of the workflow, as JSON gives them back, before an export and after it."""
    recipe = FedOptRecipe(**basic, model=[1.0], hyper_params={"sizes": (1, np.int64(2)), "name": None})

    assert recipe.definition.workflow_settings["hyper_params"] == {"sizes": [1, 2], "name": None}
    assert Recipe.load(recipe.export(tmp_path / "job")) == recipe


# --- models of finished jobs


def test_a_linear_model_is_brought_back(tmp_path: Path) -> None:
    """Two classes and three, classes of any name, with and without an intercept, and regression."""
    x = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    model = tmp_path / "model.safetensors"

    save_params({"coef": np.array([[2.0, -1.0]]), "intercept": np.array([0.5])}, model)
    assert load_estimator(model, SGDClassifier()).predict(x).tolist() == [1, 0, 0]
    assert load_estimator(str(model), SGDClassifier(), classes=["no", "yes"]).predict(x).tolist() == ["yes", "no", "no"]

    save_params({"coef": x}, model)
    assert load_estimator(model, SGDClassifier(fit_intercept=False)).predict(x).tolist() == [0, 1, 2]

    save_params({"coef": np.array([2.0, -1.0]), "intercept": np.array(0.5)}, model)
    assert load_estimator(model, LinearRegression()).predict(x).tolist() == [2.5, -0.5, -0.5]


def test_clusters_are_brought_back(tmp_path: Path) -> None:
    """The centres are those of the file to the bit, and points go to the nearest, which keeps its number."""
    center = np.random.default_rng(1).normal(size=(4, 3)) * [1e-3, 1.0, 1e6]
    save_params({"center": center, "count": np.ones(4)}, tmp_path / "model.safetensors")

    model = load_estimator(tmp_path / "model.safetensors", KMeans())

    assert model.cluster_centers_.tolist() == center.tolist()
    assert model.predict(center[[2, 0, 3, 1]] + 1e-6).tolist() == [2, 0, 3, 1]


def test_a_machine_is_brought_back(tmp_path: Path) -> None:
    """It is fitted to the support vectors."""
    vectors = {"support_x": np.array([[1.0], [4.0]]), "support_y": np.array([3, 5])}
    save_params(vectors, tmp_path / "model.safetensors")

    model = load_estimator(tmp_path / "model.safetensors", SVC(kernel="linear"))

    assert model.predict([[2.4], [2.6]]).tolist() == [3, 5]


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    """A file that is not there, is damaged or holds something else is named; a pickle is never looked into."""
    (tmp_path / "model.joblib").write_bytes(b"\x80\x04cos\nsystem\n")
    save_params({"w": np.ones(1)}, tmp_path / "other.safetensors")

    for name, said in (("none", "No such file"), ("model.joblib", "not a whole"), ("other.safetensors", r"\['w'\]")):
        with pytest.raises(ConfigError, match=said) as caught:
            load_estimator(tmp_path / name, KMeans())
        assert caught.value.parameter == "model_file"
