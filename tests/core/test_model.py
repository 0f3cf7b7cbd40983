"""FLModel: the words that a server and a training script share, and their rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flarebus.errors import ConfigError
from flarebus.model import FLModel, MetaKey, ParamsType


def test_an_empty_model() -> None:
    """Nothing is needed; what was not said is None, the first round is 0, and meta is a dict of its own."""
    model = FLModel()

    assert (model.params_type, model.params, model.optimizer_params, model.metrics) == (None, None, None, None)
    assert (model.start_round, model.current_round, model.total_rounds) == (0, None, None)
    assert model.meta == {}
    assert model.meta is not FLModel().meta


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, ParamsType.FULL),
        ("FULL", ParamsType.FULL),
        ("DIFF", ParamsType.DIFF),
        (ParamsType.DIFF, ParamsType.DIFF),
    ],
)
def test_params_have_a_type(given: ParamsType | str | None, found: ParamsType) -> None:
    """Said as the enum or as its word, or FULL when nothing is said."""
    model = FLModel(given, {"w": 1})

    assert model.params_type is found
    assert model.params_type == found.value


def test_empty_params_are_params() -> None:
    """A model without a single parameter still has a type."""
    assert FLModel(params={}).params_type is ParamsType.FULL
    assert FLModel("DIFF", {}).params_type is ParamsType.DIFF


def test_a_type_needs_params() -> None:
    """A type of nothing is a mistake, and the error says so."""
    with pytest.raises(ConfigError, match="params_type='FULL': needs params") as caught:
        FLModel("FULL", metrics={"accuracy": 1.0})

    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", ["full", "WEIGHTS", "", 1, b"FULL", object()])
def test_an_unknown_type_is_refused(value: Any) -> None:
    """The error names what is allowed."""
    with pytest.raises(ConfigError, match=r"params_type=.*FULL or ParamsType\.DIFF"):
        FLModel(value, {"w": 1})


@pytest.mark.parametrize("name", ["params", "optimizer_params", "metrics", "meta"])
@pytest.mark.parametrize("value", [[], "text", 0, 1.5, np.zeros(2), {"a"}])
def test_a_field_that_is_no_dict_is_refused(name: str, value: object) -> None:
    """The error names the field and the type that it got."""
    with pytest.raises(ConfigError, match=f"^{name}=.*not {type(value).__name__}") as caught:
        FLModel(**{name: value})  # type: ignore[arg-type]

    assert caught.value.parameter == name


def test_a_list_of_weights_gets_a_name() -> None:
    """What Keras' `get_weights` returns is a list; the error says where to put it."""
    with pytest.raises(ConfigError, match=r'not list; give {"weights": \[...\]}'):
        FLModel(params=[np.zeros(2)])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["start_round", "current_round", "total_rounds"])
def test_rounds_are_whole_numbers_from_zero(name: str) -> None:
    """Or None; neither a bool, nor a float, nor what looks like a number."""
    for value in (0, 7, None):
        assert getattr(FLModel(**{name: value}), name) == value
    for wrong in (-1, 1.0, True, False, "1"):
        with pytest.raises(ConfigError, match=f"^{name}="):
            FLModel(**{name: wrong})  # type: ignore[arg-type]


def test_fields_are_kept_by_reference() -> None:
    """Nothing is copied: a model is as large as what is in it."""
    params, optimizer, metrics, meta = {"w": np.ones(2)}, {"m": 1}, {"loss": 0.5}, {MetaKey.NUM_STEPS_CURRENT_ROUND: 3}
    model = FLModel(None, params, optimizer, metrics, 1, 2, 3, meta)

    assert model.params is params
    assert model.optimizer_params is optimizer
    assert model.metrics is metrics
    assert model.meta is meta
    assert (model.start_round, model.current_round, model.total_rounds) == (1, 2, 3)


def test_a_misspelt_field_is_an_error() -> None:
    """A model has its fields and no others."""
    model = FLModel()
    with pytest.raises(AttributeError):
        model.metric = {"loss": 1.0}  # type: ignore[attr-defined]


def test_a_summary_has_sizes_and_no_values() -> None:
    """Dicts are counted, types and rounds named, and what is empty or 0 is left out."""
    model = FLModel(
        "DIFF", {"secret": 1, "w": 2}, metrics={"loss": 0.125}, current_round=4, total_rounds=9, meta={"k": "v"}
    )

    assert model.summary() == {
        "params": 2,
        "metrics": 1,
        "meta": 1,
        "params_type": "DIFF",
        "current_round": 4,
        "total_rounds": 9,
    }
    assert repr(model) == "FLModel(params=2, metrics=1, meta=1, params_type='DIFF', current_round=4, total_rounds=9)"
    assert FLModel(metrics={}, current_round=0).summary() == {}
    assert repr(FLModel()) == "FLModel()"


def test_the_keys_people_write_are_the_keys() -> None:
    """The words of the Client API are spelt as scripts spell them."""
    assert MetaKey.NUM_STEPS_CURRENT_ROUND == "NUM_STEPS_CURRENT_ROUND"
    assert MetaKey.CURRENT_ROUND == "current_round"
    assert MetaKey.TOTAL_ROUNDS == "total_rounds"
    assert MetaKey.JOB_ID == "job_id"
    assert MetaKey.SITE_NAME == "site_name"
    assert MetaKey.CLIENT_NAME == "client_name"
    assert [kind.value for kind in ParamsType] == ["FULL", "DIFF"]
