"""ArrayValidator: what it says of a model without knowing what it is for, and the model that it submits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from flarebus.errors import UsageError
from flarebus.model import FLModel
from flarebus.workflow.array_validator import ArrayValidator
from flarebus.workflow.executor import SiteTask


def done(name: str, params: Any = None, folder: Path = Path(), **settings: Any) -> FLModel:
    """The answer to one task."""
    task = SiteTask(name, 0, None, FLModel(params=params), "site-1", "1" * 32, folder)
    return ArrayValidator(**settings).execute(task)


def test_measures_all_numbers_of_a_model_together() -> None:
    """Worked by hand: 1, 2, 3 and -6 are 0 on average; nested arrays and integers count, text does not."""
    params = {
        "a": np.array([1.0, 2.0], np.float32),
        "b": [np.array(3), {"c": np.array([[-6]])}],
        "name": "net",
        "x": None,
    }

    assert done("validate", params).metrics == {
        "mean": 0.0,
        "std": math.sqrt(50 / 4),
        "max_abs": 6.0,
        "l2_norm": math.sqrt(50),
        "not_finite": 0,
    }


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    """Also in types that NumPy does not know; of complex numbers the absolute value counts, of truth values 1."""
    params = {
        "half": np.array([np.nan, 4.0], ml_dtypes.bfloat16),
        "complex": np.array([3 + 4j, complex(np.inf, 0)]),
        "flag": np.array([True, False]),
        "text": np.array(["a"]),
    }
    metrics = done("validate", params).metrics or {}

    assert (metrics["not_finite"], metrics["max_abs"], metrics["mean"]) == (2, 5.0, 2.5)


def test_deviation_of_big_numbers_is_not_lost() -> None:
    """A difference of sums of squares would have no digit left."""
    metrics = done("validate", {"w": np.array([1e9, 1e9 + 1])}).metrics or {}

    assert metrics["std"] == 0.5


@pytest.mark.parametrize("params", [{"w": np.zeros(0)}, {"name": "net"}])
def test_a_model_without_numbers_is_zero(params: Any) -> None:
    """And no error."""
    assert set((done("validate", params).metrics or {}).values()) == {0}


@pytest.mark.parametrize("params", [None, {}])
def test_no_model_is_an_error(params: Any) -> None:
    """There is nothing to measure."""
    with pytest.raises(UsageError, match="no model came"):
        done("validate", params)


def test_submits_what_the_script_has_left(tmp_path: Path) -> None:
    """A file in the folder of the site, under its usual name or one of the recipe's."""
    (tmp_path / "models").mkdir()
    np.save(tmp_path / "models" / "best_numpy.npy", np.arange(3.0))
    np.savez(tmp_path / "mine.npz", w=np.ones(2))

    assert (done("submit_model", folder=tmp_path).params or {})["numpy_key"].tolist() == [0, 1, 2]
    assert (done("submit_model", folder=tmp_path, model_file="mine.npz").params or {})["w"].tolist() == [1, 1]


def test_says_why_there_is_no_model(tmp_path: Path) -> None:
    """It becomes the reason of the gap."""
    with pytest.raises(UsageError, match=r"does not answer submit_model, and there is no models/best_numpy.npy"):
        done("submit_model", folder=tmp_path)
    (tmp_path / "m.npy").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"m.npy: is damaged"):
        done("submit_model", folder=tmp_path, model_file="m.npy")
