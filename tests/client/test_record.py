"""record: what a script may log, and what becomes of it before it is handed over."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flarebus.client.record import hand_over
from flarebus.errors import ConfigError
from flarebus.metric import MAX_KEY, AnalyticsDataType

SCALAR = AnalyticsDataType.SCALAR


def logged(
    key: Any = "x", value: Any = 1.0, data_type: Any = SCALAR, **fields: Any
) -> tuple[str, Any, AnalyticsDataType, dict[str, Any]]:
    """What arrives at the engine."""
    found: list[Any] = []
    hand_over(lambda *args: found.append(args), key, value, data_type, fields)
    (record,) = found
    return record  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, 0.5),
        (3, 3),
        (True, True),
        (1 << 80, 1 << 80),
        (np.float32(0.5), 0.5),
        (np.array([[2]]), 2),
        (np.bool_(True), True),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor([3], dtype=torch.bfloat16), 3.0),
        (math.inf, math.inf),
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", [SCALAR, AnalyticsDataType.METRIC])
def test_a_number_is_a_number(value: Any, expected: Any, kind: AnalyticsDataType) -> None:
    """Whatever wraps a single number, a plain one is handed over."""
    _, found, _, _ = logged(value=value, data_type=kind)

    assert found == expected
    assert type(found) is type(expected)


def test_dicts_have_plain_items() -> None:
    """Numbers in a dict are unwrapped; tensors of more are arrays, so that nobody who reads them needs PyTorch."""
    given = {"a": np.float32(0.5), "b": torch.ones(2), np.str_("c"): 1}
    _, found, _, _ = logged(value=given, data_type=AnalyticsDataType.SCALARS)

    assert type(found["a"]) is float
    assert type(found["b"]) is np.ndarray
    assert [type(name) for name in found] == [str] * 3


def test_parameters_and_tags_become_words() -> None:
    """What is no number and no string is written as people read it."""
    _, found, _, _ = logged(value=Path("/data"), data_type=AnalyticsDataType.TAG)
    assert found == "/data"
    given = {"layers": [1, 2], "lr": np.float64(0.1), "none": None}
    _, found, _, _ = logged(value=given, data_type=AnalyticsDataType.PARAMETERS)
    assert found == {"layers": "[1, 2]", "lr": 0.1, "none": None}


def test_an_image_becomes_an_array() -> None:
    """Tensors are arrays when they leave the script."""
    _, found, kind, _ = logged(value=torch.zeros(3, 4), data_type="IMAGE")

    assert type(found) is np.ndarray
    assert kind is AnalyticsDataType.IMAGE


def test_fields_go_along() -> None:
    """Steps are plain whole numbers; the rest is unwrapped."""
    _, _, _, fields = logged(global_step=np.int64(3), path="a", size=torch.tensor(2))
    assert fields == {"global_step": 3, "path": "a", "size": 2}
    assert logged(global_step=None)[3] == {"global_step": None}


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"key": ""}, "key"),
        ({"key": 3}, "key"),
        ({"key": "k" * (MAX_KEY + 1)}, "key"),
        ({"key": "\ud800"}, "key"),
        ({"value": "0.5"}, "value"),
        ({"value": None}, "value"),
        ({"value": [1.0]}, "value"),
        ({"value": torch.ones(2)}, "value"),
        ({"value": {"a": 1}}, "value"),
        ({"value": 1.0, "data_type": "METRICS"}, "value"),
        ({"value": {1: 1.0}, "data_type": "SCALARS"}, "value"),
        ({"value": 3, "data_type": "TEXT"}, "value"),
        ({"data_type": "NO_SUCH"}, "data_type"),
        ({"data_type": None}, "data_type"),
        ({"global_step": 0.5}, "global_step"),
        ({"global_step": True}, "global_step"),
        ({"global_step": "3"}, "global_step"),
        ({"global_step": 1 << 63}, "global_step"),
        ({"writer": "another"}, "writer"),
    ],
    ids=repr,
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], name: str) -> None:
    """Each is an error of the script, with the name of the argument."""
    with pytest.raises(ConfigError) as caught:
        logged(**wrong)

    assert caught.value.parameter == name


def test_names_in_any_language() -> None:
    """A key need not be ASCII."""
    assert logged(key="Genauigkeit für Größe")[0] == "Genauigkeit für Größe"
