"""The data and the network of the demo."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflows._digits import CLASSES, accuracy, initial_model, load_digits, partition, train


def test_a_fifth_is_held_out_and_the_seed_decides_which() -> None:
    """The held-out part is a fifth, the same for the same seed and another for another."""
    digits, again, other = load_digits(3), load_digits(3), load_digits(4)

    assert len(digits.test_y) == 1797 // 5
    assert len(digits.train_y) + len(digits.test_y) == 1797
    np.testing.assert_array_equal(digits.test_x, again.test_x)
    assert not np.array_equal(digits.test_x, other.test_x)
    assert digits.train_x.dtype == np.float32
    assert (digits.train_x.min(), digits.train_x.max()) == (0.0, 1.0)


@settings(max_examples=50)
@given(st.integers(1, 60), st.floats(0.01, 100), st.integers(0, 1000))
def test_every_example_belongs_to_exactly_one_site(n_sites: int, alpha: float, seed: int) -> None:
    """Whatever the number of sites and the parameter, all examples are dealt out once and nobody is left without."""
    labels = np.arange(300) % CLASSES

    shares = partition(labels, n_sites, alpha, seed)

    assert len(shares) == n_sites
    assert min(len(share) for share in shares) >= 1
    assert sorted(np.concatenate(shares)) == list(range(300))


def test_more_sites_than_examples_are_refused() -> None:
    """A split in which somebody must get nothing is an error."""
    with pytest.raises(ValueError, match="4 sites"):
        partition(np.zeros(3, np.int64), 4, 1.0, 0)


def test_the_gradient_is_the_gradient() -> None:
    """One small step changes the loss by what the step's own gradient predicts."""
    digits = load_digits(0)
    x, y = digits.train_x[:64], digits.train_y[:64]
    model = {name: value.astype(np.float64) for name, value in initial_model(0).items()}

    def loss() -> float:
        hidden = np.maximum(x @ model["hidden.weight"] + model["hidden.bias"], 0)
        logits = hidden @ model["output.weight"] + model["output.bias"]
        logits -= logits.max(axis=1, keepdims=True)
        return float(np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]))

    before, start = loss(), {name: value.copy() for name, value in model.items()}
    rate = 1e-4
    assert train(model, x, y, np.random.default_rng(0), epochs=1, batch_size=64, learning_rate=rate) == 1
    squared = sum(float(np.sum((model[name] - start[name]) ** 2)) for name in model)

    assert before - loss() == pytest.approx(squared / rate, rel=1e-2)


def test_it_learns_where_it_is() -> None:
    """Training works on the given arrays and ends well above chance."""
    digits = load_digits(0)
    model = initial_model(0)
    arrays = list(model.values())

    steps = train(
        model,
        digits.train_x,
        digits.train_y,
        np.random.default_rng(0),
        epochs=3,
        batch_size=16,
        learning_rate=0.1,
    )

    assert steps == 3 * -(-len(digits.train_y) // 16)
    assert all(value is array for value, array in zip(model.values(), arrays, strict=True))
    assert accuracy(model, digits.test_x, digits.test_y) > 0.9
