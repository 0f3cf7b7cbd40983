"""ServerOptimizer: what a server makes of the mean difference of a round, instead of adding it (Reddi et al., "Adaptive
Federated Optimization", ICLR 2021, algorithm 2). In NumPy; it does no I/O and knows nothing of sites.

With d the mean of what the sites changed, the *pseudo-gradient*, and all operations element by element:

    sgd        m <- momentum m + d                                                    w <- w + lr m
    adagrad    m <- beta m + (1 - beta) d    v <- v + d^2                             w <- w + lr m / (sqrt(v) + tau)
    adam       m <- b1 m + (1 - b1) d        v <- b2 v + (1 - b2) d^2                 w <- w + lr m / (sqrt(v) + tau)
    yogi       m <- b1 m + (1 - b1) d        v <- v - (1 - b2) d^2 sign(v - d^2)      w <- w + lr m / (sqrt(v) + tau)

m begins at 0 and v at tau^2, the least that the paper allows; as there, nothing corrects for these beginnings. `sgd`
with lr = 1 and momentum = 0 is federated averaging.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flarebus.errors import ConfigError, JobFailed
from flarebus.job.checks import check_keys, check_mapping, check_number, check_regex, nearest
from flarebus.workflow.accumulator import Floats, Numbers, cast
from flarebus.workflow.params import as_array, flatten, is_number_dtype, rebuild, restore

__all__ = ["BATCH_STATISTICS", "ServerOptimizer", "check_optimizer_args"]

BATCH_STATISTICS = r"(running_mean|running_var|num_batches_tracked)$"
"""Names that PyTorch gives to what batch normalisation counts: no parameters, though they are in the model."""

# Numbers of a block: a handful of float64 rows of this size fit a second-level cache.
_BLOCK = 1 << 15


def _sgd(d: Floats, m: Floats, *, lr: float, momentum: float) -> Floats:
    m[:] = momentum * m + d
    return lr * m


def _adagrad(d: Floats, m: Floats, v: Floats, *, lr: float, beta: float, tau: float) -> Floats:
    m[:] = beta * m + (1 - beta) * d
    v += d**2
    return lr * m / (np.sqrt(v) + tau)


def _adam(d: Floats, m: Floats, v: Floats, *, lr: float, betas: Sequence[float], tau: float) -> Floats:
    m[:] = betas[0] * m + (1 - betas[0]) * d
    v[:] = betas[1] * v + (1 - betas[1]) * d**2
    return lr * m / (np.sqrt(v) + tau)


def _yogi(d: Floats, m: Floats, v: Floats, *, lr: float, betas: Sequence[float], tau: float) -> Floats:
    m[:] = betas[0] * m + (1 - betas[0]) * d
    v -= (1 - betas[1]) * d**2 * np.sign(v - d**2)
    return lr * m / (np.sqrt(v) + tau)


# Each with its parameters and their defaults. What has a tau has a v.
_RULES: dict[str, tuple[Callable[..., Floats], dict[str, Any]]] = {
    "sgd": (_sgd, {"lr": 1.0, "momentum": 0.6}),
    "adagrad": (_adagrad, {"lr": 0.03, "beta": 0.0, "tau": 1e-3}),
    "adam": (_adam, {"lr": 0.03, "betas": [0.9, 0.99], "tau": 1e-3}),
    "yogi": (_yogi, {"lr": 0.03, "betas": [0.9, 0.99], "tau": 1e-3}),
}


def _share(parameter: str, value: object) -> float:
    """How much of what was is kept."""
    number = check_number(parameter, value, minimum=0.0)
    if number >= 1.0:
        raise ConfigError(parameter, value, "a number from 0 to below 1")
    return number


def _shares(parameter: str, value: object) -> list[float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ConfigError(parameter, value, "two numbers, such as [0.9, 0.99]")
    return [_share(parameter, each) for each in value]


def _above_zero(parameter: str, value: object) -> float:
    return check_number(parameter, value, above=0.0)


_CHECKS: dict[str, Callable[[str, object], Any]] = {
    "lr": _above_zero,
    "tau": _above_zero,
    "momentum": _share,
    "beta": _share,
    "betas": _shares,
}


def check_optimizer_args(server_optimizer: object, optimizer_args: object) -> dict[str, Any]:
    """All parameters of an optimizer, as JSON keeps them: those given, and the defaults of the others.

    Raises:
        ConfigError: there is no such optimizer, or a parameter is not one of its own or is wrong.
    """
    if not isinstance(server_optimizer, str) or server_optimizer not in _RULES:
        raise ConfigError("server_optimizer", server_optimizer, nearest(_RULES, server_optimizer))
    defaults = _RULES[server_optimizer][1]
    given = {} if optimizer_args is None else check_mapping("optimizer_args", optimizer_args)
    check_keys(given, defaults, (), "optimizer_args")
    return {name: _CHECKS[name](f"optimizer_args[{name!r}]", value) for name, value in (defaults | given).items()}


class ServerOptimizer:
    """One of the optimizers above, with its m and v: one or two more models in memory, float32, or float64 for models
    that are. Its arithmetic is float64.

    Args:
        server_optimizer: `sgd`, `adagrad`, `adam` or `yogi`.
        optimizer_args: what differs from its defaults; see `check_optimizer_args`.
        average_vars: regular expression; what it finds takes the mean as it is. So do numbers and integer and complex
            arrays, whatever their names.

    Raises:
        ConfigError: one of them is wrong.
    """

    def __init__(
        self,
        server_optimizer: str,
        optimizer_args: Mapping[str, Any] | None = None,
        average_vars: str | None = BATCH_STATISTICS,
    ) -> None:
        self._args = check_optimizer_args(server_optimizer, optimizer_args)
        self._rule = _RULES[server_optimizer][0]
        self._average = None if average_vars is None else re.compile(check_regex("average_vars", average_vars))
        self._moments: dict[str, list[Numbers]] = {}

    def step(
        self, model: Mapping[Any, Any], mean: Mapping[Any, Any], out: Mapping[str, NDArray[Any]]
    ) -> dict[Any, Any]:
        """Return the next model.

        Args:
            model: the one that the sites received; only read.
            mean: the one that their answers average to; may be written over.
            out: dotted name -> array, as `WeightedMean.apply_to` takes it; may be the arrays of `mean`.

        Raises:
            JobFailed: a number left the range of the model's dtype; `out` may be half written.
        """
        leaves, found = flatten(model), flatten(mean)
        stepped = {}
        for name, leaf in found.items():
            old, new = as_array(leaves.get(name)), as_array(leaf)
            if old is not None and new is not None and self._is_stepped(name, new):
                target = out.get(name)
                stepped[name] = restore(
                    self._write(name, old, new, np.empty_like(new) if target is None else target), leaf
                )
        return rebuild(mean, stepped)

    def _is_stepped(self, name: str, array: Numbers) -> bool:
        is_real = is_number_dtype(array.dtype) and array.dtype.kind not in "iuc"
        return is_real and (self._average is None or not self._average.search(name))

    def _write(self, name: str, old: Numbers, new: Numbers, target: Numbers) -> Numbers:
        flat_old, flat_new = (np.ascontiguousarray(array).reshape(-1) for array in (old, new))
        flat_target = target.reshape(-1)
        moments = self._moments_of(name, new)
        with np.errstate(over="ignore", invalid="ignore"):  # what leaves the range is found when it is rounded
            for begin in range(0, flat_new.size, _BLOCK):
                block = slice(begin, begin + _BLOCK)
                w = flat_old[block].astype(np.float64)
                rows = [moment[block].astype(np.float64) for moment in moments]
                w += self._rule(flat_new[block].astype(np.float64) - w, *rows, **self._args)
                for moment, row in zip(moments, rows, strict=True):
                    moment[block] = row
                self._round(name, w, flat_target[block])
        return target

    def _moments_of(self, name: str, like: Numbers) -> list[Numbers]:
        moments = self._moments.get(name)
        if moments is None:
            beginnings = [0.0] + [tau**2 for tau in (self._args.get("tau"),) if tau is not None]
            dtype = np.float32 if like.dtype.itemsize <= 4 else np.float64
            moments = self._moments[name] = [np.full(like.size, value, dtype) for value in beginnings]
        return moments

    @staticmethod
    def _round(name: str, values: Floats, target: Numbers) -> None:
        try:
            cast(values, target)
            if not np.isfinite(values).all():
                raise OverflowError
        except OverflowError:
            raise JobFailed(
                f"the server's optimizer took {name!r} beyond the range of {target.dtype}; a smaller lr may help"
            ) from None
