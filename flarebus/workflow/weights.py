"""The weight of a result in the mean of a round."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from flarebus.model import MetaKey
from flarebus.workflow.controller import Result

__all__ = ["weight_of"]


def weight_of(result: Result, factors: Mapping[str, float]) -> Any:
    """n_k: what the site says it trained on, times what the recipe gives the site. Checked by the mean."""
    steps = result.model.meta.get(MetaKey.NUM_STEPS_CURRENT_ROUND, 1)
    factor = factors.get(result.site)
    if factor is None or isinstance(steps, bool) or not isinstance(steps, numbers.Real):
        return steps
    try:
        return float(steps) * factor
    except OverflowError:  # an integer beyond the range of a float
        return math.inf
