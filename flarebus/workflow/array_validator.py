"""ArrayValidator: a validator for models that are arrays, at sites whose script has none of its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flarebus.errors import ConfigError, UsageError
from flarebus.job.initial import load_initial
from flarebus.model import FLModel
from flarebus.workflow.executor import Executor, SiteTask
from flarebus.workflow.params import as_array, flatten, is_number_dtype

__all__ = ["ArrayValidator"]


class ArrayValidator(Executor):
    """Answers `validate` and `submit_model` without knowing what a model is for.

    It has no data, so its metrics say whether a model arrived and what its numbers are like, not how good it is: over
    all numbers of all arrays, in float64, `mean`, `std`, `max_abs`, `l2_norm`, and `not_finite`, how many are NaN or
    infinite; those take no part in the others. Integers and truth values count as numbers, and of complex numbers the
    absolute value.

    Args:
        model_file: what the site submits: a file below the site's folder that its script has written, in any format
            that a job may start from.
    """

    def __init__(self, model_file: str = "models/best_numpy.npy") -> None:
        self.model_file = model_file

    def execute(self, task: SiteTask) -> FLModel:
        """Do one of the two.

        Raises:
            UsageError: there is no model to submit, or none came.
        """
        if task.name == "submit_model":
            return FLModel(params=self._own_model(task.folder))
        if not task.model.params:
            raise UsageError("no model came with the task")
        return FLModel(metrics=_measured(task.model.params))

    def _own_model(self, folder: Path) -> dict[str, object]:
        path = folder / self.model_file
        if not path.is_file():
            raise UsageError(f"its script does not answer submit_model, and there is no {self.model_file}")
        try:
            return load_initial(path)
        except ConfigError as error:
            raise UsageError(f"{self.model_file}: {error.allowed}") from error


def _measured(params: dict[Any, Any]) -> dict[str, float | int]:
    """The metrics of one model."""
    found = [array for leaf in flatten(params).values() if (array := as_array(leaf)) is not None]
    arrays = [array for array in found if is_number_dtype(array.dtype) or array.dtype == bool]
    count = sum(_finite(array).size for array in arrays)
    mean = sum(float(_finite(array).sum()) for array in arrays) / (count or 1)
    # About the mean, in a second pass: the difference of two big sums would lose all digits.
    about = sum(float(np.square(_finite(array) - mean).sum()) for array in arrays)
    return {
        "mean": mean,
        "std": math.sqrt(about / (count or 1)),
        "max_abs": max((float(np.abs(_finite(array)).max(initial=0.0)) for array in arrays), default=0.0),
        "l2_norm": math.sqrt(sum(float(np.square(_finite(array)).sum()) for array in arrays)),
        "not_finite": sum(array.size for array in arrays) - count,
    }


def _finite(array: NDArray[Any]) -> NDArray[np.float64]:
    """The finite numbers of an array; one array at a time is held in float64."""
    values = (np.abs(array) if array.dtype.kind == "c" else array).astype(np.float64)
    return values[np.isfinite(values)]
