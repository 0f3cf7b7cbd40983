"""Filters: what they see, in which order, with and without values, and that nothing passes unfiltered."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flarebus.codec import decode, encode
from flarebus.errors import ConfigError, DecodeError, EncodeError, FilterFailed
from flarebus.job.class_ref import ClassRef
from flarebus.job.filter_ref import FilterRef
from flarebus.model import FLModel, ParamsType
from flarebus.workflow.filter import Filter, FilterChain, FilterTask, _Link

TRAIN = FilterTask("train", 3, "site-1")

CODE = '''
from flarebus.model import FLModel
from flarebus.workflow.filter import Filter


class Scale(Filter):
    """Needs values."""

    def __init__(self, factor=2.0):
        self.factor = factor

    def process(self, model, task):
        params = {name: value * self.factor for name, value in model.params.items()}
        return FLModel(model.params_type, params, metrics=model.metrics, meta={**model.meta, "by": self.factor})


class Round(Filter):
    """Needs none."""

    needs_values = False

    def __init__(self, digits=1):
        self.digits = digits
        self.seen = []

    def process(self, model, task):
        self.seen.append((model.params, task))
        metrics = {name: round(value, self.digits) for name, value in (model.metrics or {}).items()}
        return FLModel(metrics=metrics, meta={"site": task.site, "log": [*model.meta.get("log", []), self.digits]},
                       current_round=task.round)


class Raises(Filter):
    needs_values = False

    def __init__(self, values=False):
        self.needs_values = values

    def process(self, model, task):
        raise ValueError("no such thing")


class Returns(Filter):
    def __init__(self, what, values=False):
        self.what, self.needs_values = what, values

    def process(self, model, task):
        if self.what == "params":
            return FLModel(params={"w": 1})
        if self.what == "optimizer":
            return FLModel(optimizer_params={"w": 1})
        if self.what == "object":
            return FLModel(metrics={"x": object()})
        return None


class Clears(Filter):
    """Changes what it is given."""

    needs_values = False

    def process(self, model, task):
        model.metrics.clear()
        model.meta.clear()
        return model


class Plain:
    """No subclass, and says nothing about values."""

    def process(self, model, task):
        return model


class Maybe(Plain):
    needs_values = "yes"


class Idle:
    pass
'''

Build = Callable[..., FilterChain]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """A chain of the classes above: names, or tuples of name, arguments and tasks."""
    code = tmp_path / "code"
    code.mkdir()
    code.joinpath("site_filters.py").write_text(CODE)

    def made(*links: str | tuple[Any, ...]) -> FilterChain:
        refs = []
        for link in links:
            name, args, tasks = (link, {}, None) if isinstance(link, str) else (*link, None)[:3]
            refs.append(FilterRef(ClassRef(f"site_filters.{name}", args), tasks))
        return FilterChain.build(refs, code)

    return made


def a_model() -> FLModel:
    return FLModel(
        params_type="DIFF",
        params={"w": np.arange(2000.0)},
        optimizer_params={"m": np.ones(2)},
        metrics={"loss": 0.123},
        meta={"NUM_STEPS_CURRENT_ROUND": 5},
        current_round=1,
        total_rounds=4,
    )


def test_filter_of_values_replaces_the_model(build: Build) -> None:
    """What such a filter returns is what goes on."""
    model = a_model()

    found = build(("Scale", {"factor": 3.0})).apply(model, TRAIN)

    assert found.params is not None
    np.testing.assert_array_equal(found.params["w"], np.arange(2000.0) * 3)
    assert (found.params_type, found.meta["by"]) == (ParamsType.DIFF, 3.0)
    assert (model.params or {})["w"][1] == 1


def test_filter_without_values_never_sees_params_and_leaves_them(build: Build) -> None:
    """Metrics, meta and rounds are replaced by what it returns; params are the same objects."""
    chain, model = build("Round"), a_model()

    found = chain.apply(model, TRAIN)

    assert not chain.needs_values
    assert found.params is model.params
    assert found.optimizer_params is model.optimizer_params
    assert found.params_type is ParamsType.DIFF
    assert (found.metrics, found.current_round, found.total_rounds) == ({"loss": 0.1}, 3, None)
    assert found.meta == {"site": "site-1", "log": [1]}
    assert chain._links[0].filter.seen == [(None, TRAIN)]
    assert (model.metrics, model.meta) == ({"loss": 0.123}, {"NUM_STEPS_CURRENT_ROUND": 5})


def test_metrics_and_meta_are_the_filters_own(build: Build) -> None:
    """A filter without values may change the dicts it is given; the model that came in keeps its own."""
    model = a_model()

    found = build("Clears").apply(model, TRAIN)

    assert (found.metrics, found.meta) == ({}, {})
    assert (model.metrics, model.meta) == ({"loss": 0.123}, {"NUM_STEPS_CURRENT_ROUND": 5})


def test_filters_follow_each_other_in_order(build: Build) -> None:
    """Each gets what the one before returned, whatever kinds they are."""
    chain = build(("Round", {"digits": 2}), "Scale", ("Round", {"digits": 1}), "Plain")

    found = chain.apply(a_model(), TRAIN)

    assert chain.needs_values
    assert found.metrics == {"loss": 0.1}
    assert found.meta["log"] == [2, 1]
    assert (found.params or {})["w"][1] == 2


def test_encoded_model_is_filtered_without_its_values(build: Build) -> None:
    """Params and their buffers are not touched, and the result is that of `apply`."""
    links = (("Round", {"digits": 2}), ("Round", {"digits": 1}))
    body, buffers = encode(a_model())

    found = build(*links).apply_to_body(body, TRAIN)

    assert found is not None
    after, expected = decode(found, buffers), build(*links).apply(a_model(), TRAIN)
    np.testing.assert_array_equal(after.params["w"], np.arange(2000.0), strict=True)
    for name in ("params_type", "metrics", "meta", "start_round", "current_round", "total_rounds"):
        assert getattr(after, name) == getattr(expected, name)


def test_body_is_left_to_the_values_where_they_are_needed(build: Build) -> None:
    """With a filter of values, or arrays among the metrics, there is no body to return and no filter was called."""
    mixed, around = build("Raises", "Scale"), build("Raises")

    assert mixed.apply_to_body(encode(a_model()).body, TRAIN) is None
    with_array = encode(FLModel(metrics={"confusion": np.ones((2, 2))})).body
    assert around.apply_to_body(with_array, TRAIN) is None


def test_chain_for_a_task_has_the_filters_of_that_task(build: Build) -> None:
    """A filter for certain tasks is not called for others, and does not make them fetch values."""
    chain = build(("Round", {"digits": 2}, ("train", "validate")), ("Scale", {}, ("train",)), ("Round", {"digits": 1}))

    train, validate, other = (chain.for_task(name) for name in ("train", "validate", "submit_model"))
    assert (len(train), len(validate), len(other)) == (3, 2, 1)
    assert [each.needs_values for each in (train, validate, other)] == [True, False, False]
    assert other.apply(a_model(), TRAIN).meta["log"] == [1]
    assert chain.for_task("train")._links[0].filter is train._links[0].filter


def test_empty_chain_passes_everything_on() -> None:
    """Without filters a model, or a body, is itself."""
    model, body = a_model(), encode(a_model()).body

    assert len(FilterChain()) == 0
    assert FilterChain().apply(model, TRAIN) is model
    assert FilterChain().apply_to_body(body, TRAIN) == body
    assert not FilterChain().needs_values


@pytest.mark.parametrize(
    ("link", "said"),
    [
        (("Raises", {"values": False}), "filter site_filters.Raises raised ValueError: no such thing"),
        (("Raises", {"values": True}), "filter site_filters.Raises raised ValueError: no such thing"),
        (("Returns", {"what": "None"}), "filter site_filters.Returns returned an object of type NoneType"),
        (
            ("Returns", {"what": "None", "values": True}),
            "filter site_filters.Returns returned an object of",
        ),
        (("Returns", {"what": "params"}), "filter site_filters.Returns returned params"),
        (("Returns", {"what": "optimizer"}), "filter site_filters.Returns returned params"),
    ],
    ids=str,
)
def test_failing_filter_lets_nothing_pass(build: Build, link: tuple[Any, ...], said: str) -> None:
    """A filter that raises, or returns what it must not, is named; nobody gets a model, filters after it included."""
    chain = build(link, "Round")

    with pytest.raises(FilterFailed) as caught:
        chain.apply(a_model(), TRAIN)

    assert said in str(caught.value)
    assert chain._links[1].filter.seen == []
    if not chain.needs_values:
        with pytest.raises(FilterFailed) as caught:
            chain.apply_to_body(encode(a_model()).body, TRAIN)
        assert said in str(caught.value)


def test_cause_of_a_failure_is_kept(build: Build) -> None:
    """The filter's own exception is the cause, for whoever looks for the line."""
    with pytest.raises(FilterFailed) as caught:
        build("Raises").apply(a_model(), TRAIN)

    assert isinstance(caught.value.__cause__, ValueError)


def test_body_that_cannot_be_made_lets_nothing_pass(build: Build) -> None:
    """What may not travel, or is no model, is an error, not the old body."""
    with pytest.raises(EncodeError, match="metrics"):
        build(("Returns", {"what": "object"})).apply_to_body(encode(a_model()).body, TRAIN)
    with pytest.raises(DecodeError):
        build("Round").apply_to_body(b"nonsense", TRAIN)


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("Missing", r"filters\[0\].*has no 'Missing'"),
        (("Scale", {"factors": 1}), r"filters\[0\].*raised TypeError"),
        ("Idle", "a Idle has no method process"),
        ("Maybe", "needs_values is True or False, not 'yes'"),
    ],
)
def test_what_is_no_filter_is_refused_when_the_chain_is_built(build: Build, link: Any, said: str) -> None:
    """A chain is there whole or not at all."""
    with pytest.raises(ConfigError, match=said):
        build(link)


def test_filter_that_says_nothing_gets_values() -> None:
    """To see everything is the default: what a filter is not given it cannot take out."""
    assert Filter.needs_values is True


def test_a_filter_sees_one_model_at_a_time() -> None:
    """Scripts and executors of a site share its filters, each from a thread of its own."""
    inside, go_on, second = threading.Event(), threading.Event(), threading.Event()

    class Waits(Filter):
        def process(self, model: FLModel, task: FilterTask) -> FLModel:
            (second if inside.is_set() else inside).set()
            assert go_on.wait(30)
            return model

    chain = FilterChain([_Link("Waits", Waits(), None, True)])
    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(chain.for_task("train").apply, FLModel(), TRAIN) for _ in range(2)]
        assert inside.wait(30)
        came = second.wait(0.05)
        go_on.set()
        assert [each.result(30).params for each in running] == [None, None]

    assert not came
