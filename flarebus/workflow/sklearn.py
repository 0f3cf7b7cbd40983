"""Aggregators for models of scikit-learn that no mean of parameters makes: k-means, and support vector machines.

Both keep what they need of every site's result until the round is aggregated: centres, or support vectors. What comes
out does not depend on the order in which results came. Everything that a later round needs is in the model, so that a
job that is taken up again goes on as if nothing had happened.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from flarebus.errors import ConfigError, JobFailed, UpdateRefused
from flarebus.job.checks import check_int
from flarebus.model import FLModel, MetaKey, ParamsType
from flarebus.workflow.accumulator import Floats
from flarebus.workflow.aggregator import ModelAggregator
from flarebus.workflow.params import as_array, is_number_dtype

__all__ = ["KMeansAggregator", "SVMAggregator"]

_KERNELS = ("linear", "poly", "rbf", "sigmoid")
# How often k-means over the sites' centres begins anew; the best of all is taken.
_RESTARTS = 10
# What a float64 can count, and what class can be told from the next.
_MOST_POINTS = _LARGEST_CLASS = 2.0**53

Classes = NDArray[np.int64]

_Taken = TypeVar("_Taken", bound=tuple[Floats, NDArray[Any]])


class _Collector(ModelAggregator, Generic[_Taken]):
    """Keeps two arrays of every result of a round; the first has a column for each feature."""

    def __init__(self) -> None:
        self._model: Mapping[Any, Any] = {}
        self._taken: dict[str, _Taken] = {}

    @abstractmethod
    def _take(self, params: Mapping[Any, Any], site: str) -> _Taken:
        """Copies of what counts; raises `UpdateRefused` if it cannot be used."""

    def reset_stats(self) -> None:
        self._model, self._taken = {}, {}

    def expect_model(self, model: Mapping[Any, Any]) -> None:
        self._model = model

    def accept_model(self, model: FLModel) -> None:
        site = str(model.meta.get(MetaKey.CLIENT_NAME, len(self._taken)))
        if model.params_type is ParamsType.DIFF:
            raise UpdateRefused("a difference; what is gathered here are whole results", site=site)
        self._taken[site] = self._take(model.params or {}, site)

    def _check_columns(self, rows: Floats, name: str, site: str) -> None:
        """Where there is no model yet, the first result says how many features there are."""
        for others, _ in self._taken.values():
            if rows.shape[1] != others.shape[1]:
                raise UpdateRefused(f"{rows.shape[1]} features, other sites have {others.shape[1]}", name, site)

    def _gathered(self) -> list[_Taken]:
        """What was taken, in the order of the sites' names; let go of here."""
        taken, self._taken = self._taken, {}
        return [taken[site] for site in sorted(taken)]


class KMeansAggregator(_Collector[tuple[Floats, Floats]]):
    """k-means over the data of all sites (mini-batch k-means: Sculley, "Web-Scale K-Means Clustering", WWW 2010).

    In the first round sites send centres to begin with, and the k-means of all of these are the first c_j. From then on
    site k assigns its points to the c_j, and answers with the mean c_kj of those that went to c_j, and with how many
    they are, n_kj:

        c_j  <-  (n_j c_j + sum_k n_kj c_kj) / (n_j + sum_k n_kj)
        n_j  <-  n_j + sum_k n_kj

    n_j is 0 after the first round. So the second is one step of Lloyd's algorithm over the data of all sites, exactly;
    later ones move the centres less and less. A centre that nobody's point went to stays.

    Results: `center`, `(n_clusters, n_features)`, and `count`, `(n_clusters,)`, numbers from 0. In the first round
    `center` may have fewer rows, and `count` is not looked at. The model: `center` and `count`, float64.

    Args:
        n_clusters: how many centres, from 1.
        seed: of the k-means of the first round, from 0.

    Raises:
        ConfigError: one of them is something else, or scikit-learn is not there.
    """

    def __init__(self, n_clusters: int, seed: int = 0) -> None:
        super().__init__()
        self.n_clusters = check_int("n_clusters", n_clusters, 1)
        self.seed = check_int("seed", seed, 0)
        _sklearn("cluster")

    def expect_model(self, model: Mapping[Any, Any]) -> None:
        """As ever; raises `ConfigError` where the job began with a model that holds no such centres."""
        super().expect_model(model)
        if not model:
            return
        center, count = as_array(model.get("center")), as_array(model.get("count", np.zeros(self.n_clusters)))
        if center is None or center.ndim != 2 or len(center) != self.n_clusters:
            raise ConfigError("model", sorted(model), f"a 'center' of shape ({self.n_clusters}, n_features)")
        if count is None or count.shape != (self.n_clusters,):
            raise ConfigError("model['count']", model["count"], f"an array of shape ({self.n_clusters},), or nothing")

    def _take(self, params: Mapping[Any, Any], site: str) -> tuple[Floats, Floats]:
        center = _rows(params, "center", site)
        if not self._model:
            if len(center) > self.n_clusters:
                raise UpdateRefused(f"{len(center)} rows, at most {self.n_clusters} are asked for", "center", site)
            self._check_columns(center, "center", site)
            return center, np.zeros(len(center))
        if center.shape != self._model["center"].shape:
            raise UpdateRefused(f"shape {center.shape}, the model has {self._model['center'].shape}", "center", site)
        count = _numbers(params, "count", site)
        if count.shape != (self.n_clusters,) or (count < 0).any() or (count > _MOST_POINTS).any():
            raise UpdateRefused(f"needs {self.n_clusters} numbers of points, from 0", "count", site)
        return center, count

    def aggregate_model(self) -> FLModel:
        gathered = self._gathered()
        if not self._model:
            center, count = self._first([center for center, _ in gathered]), np.zeros(self.n_clusters)
        else:
            center, count = self._moved(gathered)
        return FLModel(ParamsType.FULL, {"center": center, "count": count})

    def _first(self, centers: list[Floats]) -> Floats:
        points = np.concatenate(centers)
        n_distinct = len(np.unique(points, axis=0))
        if n_distinct < self.n_clusters:
            raise JobFailed(f"the sites sent {n_distinct} different centres, too few for {self.n_clusters} clusters")
        kmeans = _sklearn("cluster").KMeans(self.n_clusters, n_init=_RESTARTS, random_state=self.seed)
        found: Floats = kmeans.fit(points).cluster_centers_
        return found

    def _moved(self, gathered: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
        before = np.asarray(self._model["center"], np.float64)
        counted = np.array(self._model.get("count", np.zeros(self.n_clusters)), np.float64)
        total = counted + np.sum([count for _, count in gathered], axis=0)
        shares = np.where(total > 0, total, 1)  # of what nobody has, the centre before has all
        moved = np.where(total > 0, counted / shares, 1)[:, None] * before
        for center, count in gathered:
            moved += (count / shares)[:, None] * center
        return moved, total


class SVMAggregator(_Collector[tuple[Floats, Classes]]):
    """One support vector machine from those of all sites (a cascade of two layers: Graf et al., "Parallel Support
    Vector Machines: The Cascade SVM", NIPS 2004).

    In the first round every site fits one to its data and sends its support vectors. One that is fitted to all of them
    has the support vectors that are the model. In later rounds sites may say how good it is, and send it back as it is.

    Results: `support_x`, `(n, n_features)`, and `support_y`, `(n,)`, their classes as whole numbers. The model: the
    same, as float64 and int64.

    Args:
        kernel: `linear`, `poly`, `rbf` or `sigmoid`.
        svc_args: further arguments of `sklearn.svm.SVC`.

    Raises:
        ConfigError: one of them is something else, or scikit-learn is not there.
    """

    def __init__(self, kernel: str = "rbf", **svc_args: Any) -> None:
        super().__init__()
        if kernel not in _KERNELS:
            raise ConfigError("kernel", kernel, "one of " + ", ".join(_KERNELS))
        try:
            self._svc = _sklearn("svm").SVC(kernel=kernel, **svc_args)
            self._svc.fit([[0.0], [1.0]], [0, 1])  # values are only looked at here
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError("svc_args", svc_args, f"arguments of sklearn.svm.SVC: {error}") from None

    def _take(self, params: Mapping[Any, Any], site: str) -> tuple[Floats, Classes]:
        if self._model:
            return np.empty((0, 0)), np.empty(0, np.int64)  # it stays what it is, whatever a site sends
        x = _rows(params, "support_x", site)
        self._check_columns(x, "support_x", site)
        y = _numbers(params, "support_y", site)
        if y.shape != (len(x),) or (y != np.rint(y)).any() or (np.abs(y) > _LARGEST_CLASS).any():
            raise UpdateRefused(f"needs one whole number for each of the {len(x)} support vectors", "support_y", site)
        return x, y.astype(np.int64)

    def aggregate_model(self) -> FLModel:
        gathered = self._gathered()
        if self._model:
            return FLModel(ParamsType.FULL, dict(self._model))
        x = np.concatenate([x for x, _ in gathered])
        y = np.concatenate([y for _, y in gathered])
        classes = np.unique(y)
        if len(classes) < 2:
            raise JobFailed(f"all support vectors are of class {classes[0]}; a support vector machine needs two")
        chosen = self._svc.fit(x, y).support_
        return FLModel(ParamsType.FULL, {"support_x": x[chosen], "support_y": y[chosen]})


def _sklearn(part: str) -> Any:
    """A module of scikit-learn."""
    try:
        return importlib.import_module(f"sklearn.{part}")
    except ImportError as error:
        raise ConfigError("aggregator", f"sklearn.{part}", f"{error}: pip install 'flarebus[sklearn]'") from error


def _numbers(params: Mapping[Any, Any], name: str, site: str) -> Floats:
    """A copy of an array of real, finite numbers."""
    array = as_array(params.get(name))
    if array is None or not (is_number_dtype(array.dtype) or array.dtype == bool) or array.dtype.kind == "c":
        found = type(params.get(name)).__name__ if array is None else array.dtype
        raise UpdateRefused(f"needs an array of real numbers, not {found}", name, site)
    copied = array.astype(np.float64)
    if not np.isfinite(copied).all():
        raise UpdateRefused("NaN or Inf", name, site)
    return copied


def _rows(params: Mapping[Any, Any], name: str, site: str) -> Floats:
    """A copy of a matrix that is not empty."""
    rows = _numbers(params, name, site)
    if rows.ndim != 2 or not rows.size:
        raise UpdateRefused(f"shape {rows.shape}, needs rows of features", name, site)
    return rows
