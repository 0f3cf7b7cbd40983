"""Which model is the best, and when to stop. Pure: metrics in, decisions out.

The metrics that sites send with a train result describe the model they *received*. So the averaged metrics of a round
judge the model that entered it: in the first round the initial model, and the result of the last round is judged by
nobody unless it is evaluated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from flarebus.errors import ConfigError
from flarebus.workflow.condition import Condition

__all__ = ["BestModelSelector", "StopRule"]

# Words in the name of a metric of which less is better: `val_loss`, `trainLoss`, `logloss`, `RMSE`.
_LESS_IS_BETTER = frozenset(
    ["mse", "mae", "rmse", "mape", "nll", "ppl", "wer", "cer", "err", "error", "errors", "divergence", "distance"]
)
_LESS_IS_BETTER_ENDS = ("loss", "losses", "perplexity", "entropy")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


class BestModelSelector:
    """Keeps in mind the best value of one metric.

    Args:
        key_metric: name of the metric; "" never finds anything better.
        mode: "max" or "min"; None takes the direction of `stop_cond` if that is about this metric, else "min" for a
            name that speaks of a loss or an error, else "max".
        stop_cond: the condition that ends the job, or None.

    Raises:
        ConfigError: `mode` is something else, or `stop_cond` is no condition.
    """

    def __init__(self, key_metric: str, mode: str | None = None, stop_cond: str | None = None) -> None:
        if mode not in (None, "max", "min"):
            raise ConfigError("key_metric_mode", mode, "max, min or None")
        self.key_metric = key_metric
        if mode is None and stop_cond is not None:
            condition = Condition.parse(stop_cond)
            mode = condition.mode if condition.key == key_metric else None
        self.mode = mode or ("min" if _is_loss(key_metric) else "max")
        self.best: float | None = None

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether the model with these metrics is better than all before; then it is the one to beat.

        A missing or non-finite value is never better.
        """
        value = metrics.get(self.key_metric) if self.key_metric else None
        if value is None or not math.isfinite(value):
            return False
        if self.best is not None and not (value > self.best if self.mode == "max" else value < self.best):
            return False
        self.best = value
        return True


def _is_loss(name: str) -> bool:
    words = [word.lower() for word in _WORD.findall(name)]
    return any(word in _LESS_IS_BETTER or word.endswith(_LESS_IS_BETTER_ENDS) for word in words)


class StopRule:
    """Early stopping.

    Args:
        condition: such as "accuracy >= 0.9": stop once a round's metrics meet it; None never does.
        patience: stop after so many rounds without a strictly better value of the condition's metric; a round that
            lacks the metric is one of them. None waits for ever.

    Raises:
        ConfigError: `condition` is no condition, or `patience` comes without one.
    """

    def __init__(self, condition: str | None, patience: int | None = None) -> None:
        if patience is not None and condition is None:
            raise ConfigError("patience", patience, "needs stop_cond: it says which metric is watched")
        self._condition = None if condition is None else Condition.parse(condition)
        self._patience = patience
        self._rounds_without = 0
        key, mode = ("", None) if self._condition is None else (self._condition.key, self._condition.mode)
        self._watched = BestModelSelector(key, mode)

    def is_met(self, metrics: Mapping[str, float]) -> bool:
        """Whether to stop after a round with these metrics."""
        if self._condition is None:
            return False
        if self._watched.is_best(metrics):
            self._rounds_without = 0
        else:
            self._rounds_without += 1
        if self._condition.is_met(metrics):
            return True
        return self._patience is not None and self._rounds_without >= self._patience
