"""Handwritten digits for the demo: the data that come with scikit-learn, split over sites, and a small NumPy network.

Everything follows from a seed, so that the program and every site's script work out the same split by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALPHA", "CLASSES", "HIDDEN", "Digits", "accuracy", "initial_model", "load_digits", "partition", "train"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

CLASSES = 10
HIDDEN = 64
# The Dirichlet parameter: small enough that sites differ plainly in what they have, large enough that all can learn.
ALPHA = 1.0
_TEST_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Digits:
    """Images `(n, 64) float32` in 0 to 1, labels `(n,) int64`; the test part belongs to no site."""

    train_x: Floats
    train_y: Ints
    test_x: Floats
    test_y: Ints


def load_digits(seed: int) -> Digits:
    """Shuffle the 1797 digits and hold out a fifth of them.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits as from_sklearn

    images, labels = from_sklearn(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = (images[order] / 16).astype(np.float32), labels[order].astype(np.int64)
    n_test = int(len(y) * _TEST_SHARE)
    return Digits(x[n_test:], y[n_test:], x[:n_test], y[:n_test])


def partition(labels: Ints, n_sites: int, alpha: float, seed: int) -> list[Ints]:
    """Deal the examples out: of each class, a share to every site drawn from Dirichlet(`alpha`).

    Returns:
        For each site the indices of its examples; at least one for every site.

    Raises:
        ValueError: there are more sites than examples.
    """
    if not 0 < n_sites <= len(labels):
        raise ValueError(f"{n_sites} sites cannot share {len(labels)} examples")
    random = np.random.default_rng(seed)
    shares: list[list[int]] = [[] for _ in range(n_sites)]
    for label in range(CLASSES):
        of_class = random.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(random.dirichlet([alpha] * n_sites))[:-1] * len(of_class)
        for share, part in zip(shares, np.split(of_class, cuts.astype(int)), strict=True):
            share.extend(part.tolist())
    for share in shares:
        if not share:
            share.append(max(shares, key=len).pop())
    return [np.array(share, np.int64) for share in shares]


def initial_model(seed: int) -> dict[str, Floats]:
    """A network of one hidden layer: 64 pixels, 64 rectified units, 10 classes."""
    random = np.random.default_rng(seed)

    def layer(inputs: int, outputs: int) -> Floats:
        weights: Floats = random.standard_normal((inputs, outputs), dtype=np.float32) * np.float32((2 / inputs) ** 0.5)
        return weights

    return {
        "hidden.weight": layer(64, HIDDEN),
        "hidden.bias": np.zeros(HIDDEN, np.float32),
        "output.weight": layer(HIDDEN, CLASSES),
        "output.bias": np.zeros(CLASSES, np.float32),
    }


def _forward(model: dict[str, Any], x: Floats) -> tuple[Floats, Floats]:
    hidden = np.maximum(x @ model["hidden.weight"] + model["hidden.bias"], 0)
    return hidden, hidden @ model["output.weight"] + model["output.bias"]


def accuracy(model: dict[str, Any], x: Floats, y: Ints) -> float:
    """The share of `x` that `model` names right, 0 to 1."""
    return float(np.mean(_forward(model, x)[1].argmax(axis=1) == y))


def train(
    model: dict[str, Any],
    x: Floats,
    y: Ints,
    random: np.random.Generator,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    mu: float = 0.0,
    correct: Callable[[dict[str, Floats]], None] | None = None,
) -> int:
    """Train `model` in place by stochastic gradient descent on the cross entropy; return the number of steps.

    Args:
        mu: of FedProx, which adds mu/2 times the squared distance from where training began.
        correct: changes the gradient of each step, name -> array, in place.
    """
    n_steps = 0
    begun = {name: value.copy() for name, value in model.items()} if mu else {}
    for _ in range(epochs):
        order = random.permutation(len(y))
        for begin in range(0, len(y), batch_size):
            batch = order[begin : begin + batch_size]
            gradient = _gradient(model, x[batch], y[batch])
            for name, value in begun.items():
                gradient[name] += mu * (model[name] - value)
            if correct is not None:
                correct(gradient)
            for name, value in gradient.items():
                model[name] -= learning_rate * value
            n_steps += 1
    return n_steps


def _gradient(model: dict[str, Any], x: Floats, y: Ints) -> dict[str, Floats]:
    hidden, logits = _forward(model, x)
    error = np.exp(logits - logits.max(axis=1, keepdims=True))
    error /= error.sum(axis=1, keepdims=True)
    error[np.arange(len(y)), y] -= 1
    error /= len(y)
    back = (error @ model["output.weight"].T) * (hidden > 0)
    return {
        "hidden.weight": x.T @ back,
        "hidden.bias": back.sum(axis=0),
        "output.weight": hidden.T @ error,
        "output.bias": error.sum(axis=0),
    }
