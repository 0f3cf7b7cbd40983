"""Aggregators for scikit-learn: known answers, what is refused, and that nothing hangs on the order of results."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import pairwise_distances_argmin
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from flarebus.errors import ConfigError, JobFailed, UpdateRefused
from flarebus.model import FLModel
from flarebus.workflow.aggregator import ModelAggregator
from flarebus.workflow.robust import MedianAggregator
from flarebus.workflow.sklearn import KMeansAggregator, SVMAggregator
from tests.workflow.fake_job import Answer, FakeJob
from workflows.fedavg import FedAvg

SITES = ("a", "b", "c")


def aggregated(aggregator: ModelAggregator, results: list[dict[str, Any]], model: Any = None) -> dict[str, Any]:
    """What comes out of results, each a site's."""
    aggregator.reset_stats()
    aggregator.expect_model(model or {})
    for result in results:
        aggregator.accept_model(FLModel(params=result))
    found = aggregator.aggregate_model().params
    assert found is not None
    return found


def lloyd(x: Any, center: Any) -> dict[str, Any]:
    """What a site answers: the mean of the points that are nearest to each centre, and how many they are."""
    labels = pairwise_distances_argmin(x, center)
    count = np.bincount(labels, minlength=len(center))
    moved = [x[labels == index].mean(axis=0) if n else center[index] for index, n in enumerate(count)]
    return {"center": np.array(moved), "count": count}


def clustering(shares: dict[str, Any], n_clusters: int) -> Answer:
    """Sites that begin with clusters of their own."""

    def answer(site: str, number: int, params: dict[str, Any]) -> FLModel:
        if "center" not in params:
            own = KMeans(n_clusters, n_init=10, random_state=0).fit(shares[site])
            return FLModel(params={"center": own.cluster_centers_, "count": None})
        return FLModel(params=lloyd(shares[site], params["center"]))

    return answer


def shares_of(x: Any, seed: int = 0) -> dict[str, Any]:
    """The rows of `x`, shuffled and dealt out."""
    print(f"seed {seed}")
    return dict(zip(SITES, np.array_split(np.random.default_rng(seed).permutation(x), len(SITES)), strict=True))


def run(job: FakeJob, **settings: Any) -> FakeJob:
    FedAvg(min_clients=len(job.sites), **settings).run(job)
    return job


# --- k-means


def test_centres_move_to_the_mean_of_all_points_so_far() -> None:
    """Each centre becomes the mean of all points it ever stood for: the sites' means, weighted with their numbers."""
    model = {"center": np.array([[1.0, 0.0], [5.0, 5.0]]), "count": np.array([2.0, 0.0])}
    results = [
        {"center": np.array([[4.0, 3.0], [9.0, 9.0]]), "count": np.array([1, 0])},
        {"center": np.array([[7.0, 1.0], [6.0, 4.0]], np.float32), "count": np.array([3.0, 2.0])},
    ]

    moved = aggregated(KMeansAggregator(2), results, model)

    # (2 (1, 0) + 1 (4, 3) + 3 (7, 1)) / 6; and the second from site b alone, for the first of its points
    assert moved["center"] == pytest.approx(np.array([[27 / 6, 1.0], [6.0, 4.0]]), abs=1e-14)
    assert moved["count"].tolist() == [6, 2]
    assert (moved["center"].dtype, moved["count"].dtype) == (np.float64, np.float64)


def test_a_centre_without_points_stays_to_the_bit() -> None:
    """Where nobody had a point, neither now nor before, the centre is what it was."""
    model = {"center": np.array([[0.1], [1 / 3]]), "count": np.zeros(2)}

    moved = aggregated(KMeansAggregator(2), [{"center": np.array([[9.0], [7.0]]), "count": np.array([4, 0])}], model)

    assert moved["center"].tolist() == [[9.0], [1 / 3]]
    assert moved["count"].tolist() == [4, 0]


def test_the_first_round_clusters_the_centres_of_the_sites() -> None:
    """The first centres are the k-means of those that sites sent, be they fewer than asked for; nothing counts yet."""
    sent = [{"center": np.array([[0.0], [10.0]]), "count": None}, {"center": np.array([[1.0]])}]

    first = aggregated(KMeansAggregator(2), sent)

    assert sorted(first["center"].ravel().tolist()) == [0.5, 10.0]
    assert first["count"].tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_the_second_round_is_a_step_of_lloyds_over_all_data(seed: int) -> None:
    """After the first round comes exactly the step that k-means makes with all data in one place."""
    x = np.random.default_rng(seed).normal(size=(90, 4))
    job = run(FakeJob(clustering(shares_of(x, seed), 5), SITES), num_rounds=2, aggregator=KMeansAggregator(5))

    first, second = (done.params["center"] for done in job.rounds_done)

    assert second == pytest.approx(lloyd(x, first)["center"], abs=1e-12)
    assert job.model["count"].sum() == len(x)


def test_iris_is_clustered_as_well_as_in_one_place() -> None:
    """Three sites come within 0.5 % of the inertia that is published for the iris flowers, 78.85 for three clusters."""
    x, _ = load_iris(return_X_y=True)
    job = run(FakeJob(clustering(shares_of(x), 3), SITES), num_rounds=10, aggregator=KMeansAggregator(3))

    center = job.model["center"]
    inertia = np.square(x - center[pairwise_distances_argmin(x, center)]).sum()

    assert KMeans(3, n_init=10, random_state=0).fit(x).inertia_ == pytest.approx(78.85, abs=0.005)
    assert inertia == pytest.approx(78.85, rel=0.005)


def test_a_job_that_is_taken_up_again_ends_with_the_same_centres() -> None:
    """All that later rounds need is in the model: another aggregator goes on with it, bit for bit."""
    answer = clustering(shares_of(load_iris(return_X_y=True)[0]), 3)
    whole = run(FakeJob(answer, SITES), num_rounds=6, aggregator=KMeansAggregator(3))
    resumed = FakeJob(answer, SITES, whole.rounds_done[2].params, first_round=3)

    run(resumed, num_rounds=6, aggregator=KMeansAggregator(3))

    assert resumed.model["center"].tolist() == whole.model["center"].tolist()


def test_too_few_different_centres_fail_the_job() -> None:
    """If all sites together have fewer different centres than are asked for, the job says so."""
    with pytest.raises(JobFailed, match="2 different centres, too few for 3"):
        aggregated(KMeansAggregator(3), [{"center": np.array([[1.0], [2.0]])}, {"center": np.array([[2.0]])}])


@pytest.mark.parametrize(
    "model", [{"w": np.ones(3)}, {"center": np.ones((3, 4))}, {"center": np.ones(2)}, {"center": [[1.0], [2.0]]}]
)
def test_a_job_must_not_begin_with_something_else(model: dict[str, Any]) -> None:
    """A model to begin with needs as many centres as are asked for."""
    with pytest.raises(ConfigError, match=r"'center' of shape \(2, n_features\)"):
        KMeansAggregator(2).expect_model(model)
    with pytest.raises(ConfigError, match=r"of shape \(2,\), or nothing"):
        KMeansAggregator(2).expect_model({"center": GOOD, "count": np.ones(3)})


# --- support vector machines

LINE = [
    {"support_x": np.array([[0.0], [5.0]]), "support_y": np.array([0, 1])},
    {"support_x": np.array([[1.0], [4.0]]), "support_y": np.array([0.0, 1.0])},
]


def test_the_widest_margin_of_all_sites_is_found() -> None:
    """On a line the two points that face each other are the support vectors, whichever sites they come from."""
    found = aggregated(SVMAggregator("linear", C=1e6), LINE)

    assert sorted(zip(found["support_x"].ravel().tolist(), found["support_y"].tolist(), strict=True)) == [
        (1, 0),
        (4, 1),
    ]
    assert (found["support_x"].dtype, found["support_y"].dtype) == (np.float64, np.int64)


def test_later_rounds_keep_the_support_vectors() -> None:
    """Once there is a model it stays, whatever sites send along with their metrics."""
    aggregator = SVMAggregator("linear")
    model = aggregated(aggregator, LINE)

    kept = aggregated(aggregator, [model, {"support_x": np.array([[9.0]])}], model)

    assert kept == model


def machines(n_sites: int, kernel: str, seed: int) -> tuple[SVC, SVC, Any, Any]:
    """One machine from those of the sites, one that has the data of all, and data to test them with."""
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    print(f"seed {seed}")
    order = np.random.default_rng(seed).permutation(len(x))
    test, train = np.split(order, [150])
    sites = SITES[:n_sites]
    shares = dict(zip(sites, np.array_split(train, n_sites), strict=True))

    def fitted(x: Any, y: Any) -> SVC:
        return SVC(kernel=kernel, gamma=0.02).fit(x, y)

    def answer(site: str, number: int, params: dict[str, Any]) -> FLModel:
        own = shares[site]
        chosen = own[fitted(x[own], y[own]).support_]
        return FLModel(params={"support_x": x[chosen], "support_y": y[chosen]})

    model = run(FakeJob(answer, sites), num_rounds=1, aggregator=SVMAggregator(kernel, gamma=0.02)).model
    return fitted(model["support_x"], model["support_y"]), fitted(x[train], y[train]), x[test], y[test]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_breast_cancer_is_told_apart_as_in_one_place(kernel: str, seed: int) -> None:
    """Three sites agree in 97 % of the cases with a machine that has all data, and are as accurate within 0.02."""
    ours, pooled, x, y = machines(3, kernel, seed)

    assert (ours.predict(x) == pooled.predict(x)).mean() >= 0.97
    assert ours.score(x, y) == pytest.approx(pooled.score(x, y), abs=0.02)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_of_a_single_site_the_same_machine_comes_out(kernel: str) -> None:
    """Support vectors are all that a machine is: without the other data it decides as before, within its tolerance."""
    ours, alone, x, _ = machines(1, kernel, 0)

    assert ours.decision_function(x) == pytest.approx(alone.decision_function(x), abs=0.02)


def test_one_class_alone_fails_the_job() -> None:
    """Without a second class there is nothing to tell apart."""
    with pytest.raises(JobFailed, match="all support vectors are of class 7"):
        aggregated(SVMAggregator(), [{"support_x": np.ones((2, 1)), "support_y": np.array([7, 7])}])


@pytest.mark.parametrize(
    ("arguments", "parameter", "said"),
    [
        ({"kernel": "rbff"}, "kernel", "linear, poly, rbf, sigmoid"),
        ({"kernel": "precomputed"}, "kernel", "linear, poly, rbf, sigmoid"),
        ({"c": 1.0}, "svc_args", "unexpected keyword argument 'c'"),
        ({"C": -1.0}, "svc_args", "The 'C' parameter"),
        ({"gamma": "wide"}, "svc_args", "The 'gamma' parameter"),
    ],
)
def test_wrong_arguments_of_a_machine_are_named(arguments: dict[str, Any], parameter: str, said: str) -> None:
    """What scikit-learn would not take is refused before there is any data."""
    with pytest.raises(ConfigError) as caught:
        SVMAggregator(**arguments)

    assert caught.value.parameter == parameter
    assert said in str(caught.value)


# --- linear models need no aggregator: their answer is that of the mean


def test_sites_with_the_same_data_train_as_one_does() -> None:
    """The mean of sites that do the same is what each does: the coefficients of a single SGD over all rounds."""
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x)

    def fitted(number: int, params: dict[str, Any]) -> dict[str, Any]:
        start = {f"{name}_init": params[name].copy() for name in params}  # `fit` writes to what it begins with
        model = SGDClassifier("log_loss", learning_rate="constant", eta0=0.01, max_iter=1, tol=None)
        model.set_params(random_state=number).fit(x, y, **start)
        return {"coef": model.coef_, "intercept": model.intercept_}

    job = run(FakeJob(lambda _, number, params: FLModel(params=fitted(number, params)), SITES), num_rounds=4)

    alone: dict[str, Any] = {}
    for number in range(4):
        alone = fitted(number, alone)
    assert job.model["coef"] == pytest.approx(alone["coef"], abs=1e-12)
    assert job.model["intercept"] == pytest.approx(alone["intercept"], abs=1e-12)


def test_a_robust_aggregator_takes_the_place_of_the_mean() -> None:
    """It sees coefficients alone, from the first round on, though sites are told hyper-parameters beside them."""

    def answer(site: str, number: int, params: dict[str, Any]) -> FLModel:
        assert params["loss"] == "hinge"
        return FLModel(params={"coef": params.get("coef", np.zeros((1, 2))) + {"a": 1, "b": 2, "c": 1e6}[site]})

    job = run(FakeJob(answer, SITES), num_rounds=2, aggregator=MedianAggregator(), hyper_params={"loss": "hinge"})

    assert [done.refused for done in job.rounds_done] == [{}, {}]
    assert job.model["coef"].tolist() == [[4.0, 4.0]]


# --- both aggregators

SEEDS = [{"center": np.array(rows, float)} for rows in ([[0, 1], [9, 8]], [[1, 0], [7, 9]], [[5, 4], [0.3, 0.1]])]
MACHINES = [
    {"support_x": np.array(rows, float), "support_y": np.array(classes)}
    for rows, classes in (([[0, 1], [9, 8]], [0, 1]), ([[1, 0], [7, 9]], [0, 1]), ([[5, 4], [4, 5]], [1, 0]))
]
MOVES = [{"center": np.array([[a, b], [b, a]]) / 7, "count": np.array([a, b])} for a, b in ((1, 2), (3, 5), (11, 4))]


@pytest.mark.parametrize(
    ("make", "results", "model"),
    [
        (lambda: KMeansAggregator(2), SEEDS, None),
        (lambda: KMeansAggregator(2), MOVES, {"center": np.array([[0.1, 0.2], [0.3, 0.4]]), "count": np.ones(2)}),
        (lambda: SVMAggregator("rbf"), MACHINES, None),
    ],
    ids=["k-means begins", "k-means goes on", "machines"],
)
def test_the_order_of_results_does_not_matter(
    make: Callable[[], ModelAggregator], results: list[dict[str, Any]], model: Any
) -> None:
    """The same results give the same bits whichever comes first."""
    found = []
    for order in itertools.permutations(zip(SITES, results, strict=True)):
        aggregator = make()
        aggregator.reset_stats()
        aggregator.expect_model(model or {})
        for site, result in order:
            aggregator.accept_model(FLModel(params=result, meta={"client_name": site}))
        params = aggregator.aggregate_model().params
        assert params is not None
        found.append({name: array.tolist() for name, array in params.items()})

    assert all(each == found[0] for each in found)


def test_results_are_only_lent() -> None:
    """What a site sent may be written over as soon as it was taken."""
    for aggregator, results in ((KMeansAggregator(2), SEEDS), (SVMAggregator(), MACHINES)):
        expected = aggregated(aggregator, results)
        aggregator.reset_stats()
        for result in results:
            copy = {name: array.copy() for name, array in result.items()}
            aggregator.accept_model(FLModel(params=copy))
            for array in copy.values():
                array.fill(99)
        found = aggregator.aggregate_model().params
        assert found is not None
        assert {name: array.tolist() for name, array in found.items()} == {
            name: array.tolist() for name, array in expected.items()
        }


CENTERS = {"center": np.zeros((2, 3)), "count": np.zeros(2)}
GOOD = np.ones((2, 3))


@pytest.mark.parametrize(
    ("model", "sent", "said"),
    [
        ({}, {}, "'center': needs an array of real numbers, not NoneType"),
        ({}, {"center": [[1.0, 2.0]]}, "not list"),
        ({}, {"center": np.array(["x"])}, "not <U1"),
        ({}, {"center": np.ones((2, 3), complex)}, "not complex128"),
        ({}, {"center": np.ones(3)}, r"shape \(3,\)"),
        ({}, {"center": np.ones((0, 3))}, r"shape \(0, 3\)"),
        ({}, {"center": np.ones((3, 3))}, "3 rows, at most 2"),
        ({}, {"center": np.full((2, 3), np.nan)}, "NaN or Inf"),
        ({}, {"center": np.ones((2, 4))}, "4 features, other sites have 3"),
        (CENTERS, {"center": np.ones((2, 4)), "count": np.ones(2)}, r"shape \(2, 4\), the model has \(2, 3\)"),
        (CENTERS, {"center": GOOD, "count": None}, "'count': needs an array"),
        (CENTERS, {"center": GOOD}, "'count': needs an array"),
        (CENTERS, {"center": GOOD, "count": np.ones(3)}, "needs 2 numbers of points"),
        (CENTERS, {"center": GOOD, "count": np.array([1, -1])}, "needs 2 numbers of points"),
        (CENTERS, {"center": GOOD, "count": np.array([1, 1e30])}, "needs 2 numbers of points"),
        (CENTERS, {"center": GOOD, "count": np.array([1, np.inf])}, "NaN or Inf"),
    ],
)
def test_centres_that_cannot_be_used_are_refused(model: dict[str, Any], sent: dict[str, Any], said: str) -> None:
    """A result that is wrong is refused with its key and reason, and the round goes on without it."""
    good = {"center": GOOD, "count": np.ones(2)} if model else {"center": np.arange(6.0).reshape(2, 3)}
    aggregator = KMeansAggregator(2)
    aggregator.reset_stats()
    aggregator.expect_model(model)
    aggregator.accept_model(FLModel(params=good, meta={"client_name": "good"}))

    with pytest.raises(UpdateRefused, match=said) as caught:
        aggregator.accept_model(FLModel(params=sent, meta={"client_name": "bad"}))

    assert caught.value.site == "bad"
    found = aggregator.aggregate_model().params
    assert found is not None
    assert sorted(found["center"].ravel().tolist()) == sorted(good["center"].ravel().tolist())


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({"support_x": GOOD}, "'support_y': needs an array"),
        ({"support_x": GOOD, "support_y": np.ones(3)}, "one whole number for each of the 2"),
        ({"support_x": GOOD, "support_y": np.array([0.5, 1])}, "one whole number for each of the 2"),
        ({"support_x": GOOD, "support_y": np.array([1e300, 1])}, "one whole number for each of the 2"),
        ({"support_x": GOOD, "support_y": np.array(["a", "b"])}, "not <U1"),
        ({"support_x": np.ones((2, 2)), "support_y": np.ones(2)}, "2 features, other sites have 3"),
        ({"support_x": np.full((2, 3), np.inf), "support_y": np.ones(2)}, "NaN or Inf"),
    ],
)
def test_support_vectors_that_cannot_be_used_are_refused(sent: dict[str, Any], said: str) -> None:
    """The same for support vectors and their classes."""
    good = {"support_x": np.arange(6.0).reshape(2, 3), "support_y": np.array([0, 1])}
    aggregator = SVMAggregator()
    aggregator.accept_model(FLModel(params=good, meta={"client_name": "good"}))

    with pytest.raises(UpdateRefused, match=said):
        aggregator.accept_model(FLModel(params=sent, meta={"client_name": "bad"}))

    found = aggregator.aggregate_model().params
    assert found is not None
    assert found["support_x"].shape == (2, 3)


def test_differences_are_refused() -> None:
    """What is gathered are centres and support vectors, not how they changed."""
    for aggregator in (KMeansAggregator(2), SVMAggregator()):
        with pytest.raises(UpdateRefused, match="a difference"):
            aggregator.accept_model(FLModel("DIFF", {"center": GOOD, "support_x": GOOD}))


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where scikit-learn is not installed, the error says how to install it."""
    for part, make in (("cluster", lambda: KMeansAggregator(2)), ("svm", SVMAggregator)):
        monkeypatch.setitem(sys.modules, f"sklearn.{part}", None)
        with pytest.raises(ConfigError, match=r"pip install 'flarebus\[sklearn\]'"):
            make()
