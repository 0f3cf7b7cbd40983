"""Changing an encoded model around its parameters: what changes, what stays, and what cannot be done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest

from flarebus.codec import decode, edit_model, encode, has_params
from flarebus.errors import ConfigError, DecodeError, EncodeError
from flarebus.model import FLModel, ParamsType


def a_model(**changes: Any) -> FLModel:
    """One with a large array, a small one, and text and numbers in its params."""
    fields: dict[str, Any] = {
        "params_type": "DIFF",
        "params": {"w": np.arange(1000.0), "b": np.ones(3, np.float32), "note": "x" * 5000, "deep": [{"n": 1}]},
        "optimizer_params": {"m": np.arange(300, dtype=np.int64)},
        "metrics": {"loss": 0.5, "steps": np.float32(2)},
        "meta": {"site_name": "a", "list": [1, (2, None)]},
        "current_round": 3,
        "total_rounds": 9,
    }
    return FLModel(**(fields | changes))


def edited(model: FLModel, edit: Callable[[FLModel], FLModel]) -> FLModel | None:
    """The model after an edit of its body, decoded with its own buffers; checked to leave them alone."""
    body, buffers = encode(model)
    kept = [bytes(each) for each in buffers]
    found = edit_model(body, edit)
    assert [bytes(each) for each in buffers] == kept
    if found is None:
        return None
    after = decode(found, buffers, copy=True)
    assert isinstance(after, FLModel)
    assert after.params is not None
    assert after.optimizer_params is not None
    for name in ("w", "b"):
        np.testing.assert_array_equal(after.params[name], (model.params or {})[name], strict=True)
    np.testing.assert_array_equal(after.optimizer_params["m"], (model.optimizer_params or {})["m"], strict=True)
    assert (after.params["note"], after.params["deep"]) == ("x" * 5000, [{"n": 1}])
    assert after.params_type is ParamsType.DIFF
    return after


def test_shows_and_replaces_what_is_around_the_params() -> None:
    """The edit sees metrics, meta and rounds, no params; what it returns takes their place."""
    seen: list[FLModel] = []

    def edit(model: FLModel) -> FLModel:
        seen.append(model)
        return FLModel(metrics={"accuracy": 1}, meta={"k": ["v" * 3000]}, start_round=1, current_round=None)

    after = edited(a_model(), edit)

    assert after is not None
    assert (seen[0].params, seen[0].optimizer_params, seen[0].params_type) == (None, None, None)
    assert (seen[0].metrics, seen[0].meta) == ({"loss": 0.5, "steps": 2}, {"site_name": "a", "list": [1, (2, None)]})
    assert (seen[0].start_round, seen[0].current_round, seen[0].total_rounds) == (0, 3, 9)
    assert (after.metrics, after.meta) == ({"accuracy": 1}, {"k": ["v" * 3000]})
    assert (after.start_round, after.current_round, after.total_rounds) == (1, None, None)


def test_edit_in_place_counts_as_well() -> None:
    """The model that the edit gets is its own to change and return."""

    def edit(model: FLModel) -> FLModel:
        assert model.metrics is not None
        model.metrics["loss"] = 0.25
        model.meta.clear()
        return model

    after = edited(a_model(), edit)

    assert after is not None
    assert (after.metrics, after.meta) == ({"loss": 0.25, "steps": 2}, {})


def test_edits_follow_each_other() -> None:
    """An edited body is a body like any other: edits of edits leave the params alone, small arrays too."""
    model = a_model()
    body, buffers = encode(model)
    for number in range(20):
        found = edit_model(body, lambda old, number=number: FLModel(metrics={"n": number}, meta=dict(old.meta)))
        assert found is not None
        body = found

    after = decode(body, buffers)
    assert (after.metrics, after.meta["site_name"]) == ({"n": 19}, "a")
    np.testing.assert_array_equal(after.params["b"], np.ones(3, np.float32), strict=True)


def test_small_arrays_may_come_in_once() -> None:
    """Metrics may get arrays, which stay in the body beside those of the params; the next edit then cannot."""
    body, buffers = encode(a_model())
    matrix = np.arange(900.0).reshape(30, 30)
    found = edit_model(body, lambda model: FLModel(metrics={"confusion": matrix}))
    assert found is not None

    after = decode(found, buffers)
    np.testing.assert_array_equal(after.metrics["confusion"], matrix, strict=True)
    np.testing.assert_array_equal(after.params["b"], np.ones(3, np.float32), strict=True)
    assert edit_model(found, lambda model: model) is None


def test_metrics_only_models_are_edited_too() -> None:
    """Params that are not there stay away."""
    body, buffers = encode(FLModel(metrics={"loss": 1.0}))
    found = edit_model(body, lambda model: FLModel(metrics={"loss": 2.0}))

    assert found is not None
    after = decode(found, buffers)
    assert (after.params, after.params_type, after.metrics) == (None, None, {"loss": 2.0})


SHARED = np.ones(4, np.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": {"m": np.ones(1000)}},
        {"metrics": {"m": np.ones(2)}},
        {"meta": {"deep": [{"m": SHARED}]}, "params": {"w": SHARED}},
        {"meta": {"note": "y" * 5000}},
        {"meta": {"note": b"y" * 5000}},
        {"metrics": {"m": np.ones((8, 8))[:, ::2]}},
        {"meta": {"x": bytearray(2000)}},
    ],
    ids=["array", "small array", "shared with params", "long text", "long bytes", "view", "bytearray"],
)
def test_what_is_not_in_the_tree_is_not_edited(changes: dict[str, Any]) -> None:
    """Arrays and long strings around the params need the whole model: the edit is not even called."""

    def edit(model: FLModel) -> FLModel:
        raise AssertionError("called")

    assert edit_model(encode(a_model(**changes)).body, edit) is None


def test_nothing_that_was_taken_out_is_left_in_the_body() -> None:
    """What the edit removes does not travel."""
    body = encode(a_model(meta={"patient": "somebody-in-particular"})).body
    found = edit_model(body, lambda model: FLModel())

    assert found is not None
    assert b"somebody-in-particular" in body
    assert b"somebody-in-particular" not in found


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"metrics": {"m": np.ones(2**20)}}, "fits"),
        ({"metrics": {"m": object()}}, r"value\.metrics\['m'\].*object"),
        ({"meta": {"deep": {"m": print}}}, r"value\.meta\['deep'\]\['m'\]"),
        ({"meta": {"m": "\ud800"}}, "cannot encode"),
        ({"meta": {"m": "x" * 2**20}}, "fits"),
    ],
)
def test_what_may_not_travel_is_refused(fields: dict[str, Any], said: str) -> None:
    """What an edit returns is checked as everything that travels."""
    with pytest.raises(EncodeError, match=said):
        edit_model(encode(a_model()).body, lambda model: FLModel(**fields))


def test_fields_are_checked_again() -> None:
    """A field that was set to something wrong after the model was made is refused."""

    def edit(model: FLModel) -> FLModel:
        model.current_round = -1
        return model

    with pytest.raises(ConfigError, match="current_round"):
        edit_model(encode(a_model()).body, edit)


def test_error_of_the_edit_passes_through() -> None:
    """What the edit raises is the caller's."""

    def edit(model: FLModel) -> FLModel:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        edit_model(encode(a_model()).body, edit)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00" * 20,
        encode({"metrics": {}}).body,
        encode(3).body,
        msgpack.packb([[20, None, None, None, [999], None, 0, None, None], 0, b""]),
        msgpack.packb([[20, None, None, None, 7, [2], 0, None, None], 0, b""]),
        msgpack.packb([[20, None, None, None, None, [2], -1, None, None], 0, b""]),
        msgpack.packb([[20, None, None, None, None, [2], 0, None], 0, b""]),
        msgpack.packb([[20, None, None, None, None, [2], 0, None, None], "0", b""]),
    ],
)
def test_what_is_no_model_is_a_decode_error(body: bytes) -> None:
    """Bytes that hold no model are refused as those of a peer."""
    with pytest.raises(DecodeError):
        edit_model(body, lambda model: model)


@pytest.mark.parametrize("params", [{}, {"w": 1.0}, {"w": np.zeros(3)}, {"w": np.zeros(3000)}], ids=repr)
def test_tells_a_model_with_parameters_from_one_without(params: dict[str, Any]) -> None:
    """An empty dict is parameters too; metrics are none."""
    assert has_params(encode(FLModel(params=params)).body)
    assert not has_params(encode(FLModel(metrics={"loss": 1.0})).body)


@pytest.mark.parametrize("body", [b"", b"\x00" * 20, encode(3).body])
def test_what_is_no_model_has_no_parameters_to_tell_of(body: bytes) -> None:
    """It is refused as that of a peer."""
    with pytest.raises(DecodeError):
        has_params(body)


@pytest.mark.parametrize("n_names", [0, 3, 300])
def test_more_parameters_go_beside_those_there(n_names: int) -> None:
    """A long list of names, cut into parts on the wire, too; of the same name, the new one counts."""
    params: dict[Any, Any] = {f"layer{index}": np.full(400, index) for index in range(n_names)}
    model = FLModel(params={**params, "rate": 0.5, ("a", 1): None}, metrics={"loss": 1.0})
    body, buffers = encode(model)

    edited = edit_model(body, lambda around: around, {"rate": 0.25, "loss": "hinge"})

    assert edited is not None
    found = decode(edited, buffers)
    assert found.params.keys() == {*params, "rate", "loss", ("a", 1)}
    assert (found.params["rate"], found.params["loss"]) == (0.25, "hinge")
    assert all(found.params[name].tolist() == array.tolist() for name, array in params.items())
    assert found.metrics == {"loss": 1.0}


def test_more_parameters_of_a_model_without_any() -> None:
    """They are all there is."""
    edited = edit_model(encode(FLModel(metrics={"loss": 1.0})).body, lambda around: around, {"rate": 0.5})

    assert edited is not None
    assert decode(edited, []).params == {"rate": 0.5}
