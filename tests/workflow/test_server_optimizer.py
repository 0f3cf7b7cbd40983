"""ServerOptimizer: two steps of each formula worked out by hand, and what is stepped and what is not."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from flarebus.errors import ConfigError, JobFailed
from flarebus.workflow.server_optimizer import ServerOptimizer, check_optimizer_args

# server_optimizer, its parameters, (change, what is added to the model) for two rounds
BY_HAND: list[tuple[str, dict[str, Any], list[tuple[float, float]]]] = [
    # m: 2, then 0.9 * 2 + 1 = 2.8
    ("sgd", {"lr": 0.5, "momentum": 0.9}, [(2.0, 1.0), (1.0, 1.4)]),
    # v: 9 + 16 = 25, then 25 + 144 = 169; m is the change itself
    ("adagrad", {"lr": 1.0, "beta": 0.0, "tau": 3.0}, [(4.0, 4 / (5 + 3)), (12.0, 12 / (13 + 3))]),
    # m: 3.5, then 1.75 + 2.5 = 4.25; v: 0.5 + 24.5 = 25, then 12.5 + 12.5 = 25
    ("adam", {"lr": 2.0, "betas": [0.5, 0.5], "tau": 1.0}, [(7.0, 2 * 3.5 / 6), (5.0, 2 * 4.25 / 6)]),
    # m: 2, then 1 + 1 = 2; v: 1 + 0.5 * 16 = 9, for 16 is above v; then 9 - 0.5 * 4 = 7, for 4 is below it
    ("yogi", {"lr": 1.0, "betas": [0.5, 0.5], "tau": 1.0}, [(4.0, 2 / (3 + 1)), (2.0, 2 / (math.sqrt(7) + 1))]),
]
HALVES = {"lr": 0.5, "momentum": 0.0}


def stepped(optimizer: ServerOptimizer, model: dict[str, Any], mean: dict[str, Any]) -> dict[str, Any]:
    return optimizer.step(model, mean, {})


@pytest.mark.parametrize(("name", "args", "rounds"), BY_HAND, ids=[name for name, _, _ in BY_HAND])
@pytest.mark.parametrize("sign", [1, -1])
def test_two_steps_by_hand(name: str, args: dict[str, Any], rounds: list[tuple[float, float]], sign: int) -> None:
    """Each optimizer makes of two changes in turn what its formula says, upwards as downwards."""
    optimizer = ServerOptimizer(name, args)
    w = np.array([10.0])
    for change, step in rounds:
        new = stepped(optimizer, {"w": w}, {"w": w + sign * change})["w"]
        assert new - w == pytest.approx(sign * step, rel=1e-12)
        w = new


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_a_long_array_is_stepped_like_each_of_its_numbers(dtype: Any) -> None:
    """Blocks, shapes and memory layouts make no difference; the model keeps its dtype and is not written to."""
    random = np.random.default_rng(5)
    model = np.asfortranarray(random.normal(size=(300, 251))).astype(dtype)
    before, optimizer = model.copy(), ServerOptimizer("adam", {"lr": 0.5})
    m, v, w = 0.0, 1e-6, model.astype(np.float64)
    for _ in range(2):
        mean = (w + random.normal(size=w.shape)).astype(dtype)
        out = {"w": np.empty(w.shape, dtype)}
        found = optimizer.step({"w": w.astype(dtype)}, {"w": mean}, out)["w"]
        d = mean.astype(np.float64) - w
        m, v = 0.9 * m + 0.1 * d, 0.99 * v + 0.01 * d**2
        expected = w + 0.5 * m / (np.sqrt(v) + 1e-3)
        # The moments of a model that is no float64 are float32.
        eps = float(ml_dtypes.finfo(dtype).eps)
        np.testing.assert_allclose(found.astype(np.float64), expected, rtol=eps, atol=1e-6)
        assert found is out["w"]
        assert found.dtype == dtype
        w = found.astype(np.float64)
    assert model.tobytes() == before.tobytes()


def test_it_may_write_over_the_mean() -> None:
    """The arrays that the mean lies in may be those that the new model is wanted in."""
    pages = {"w": np.full(100_000, 3.0, np.float32)}
    found = ServerOptimizer("sgd", HALVES).step({"w": np.ones(100_000, np.float32)}, pages, pages)

    assert found["w"] is pages["w"]
    assert found["w"].min() == found["w"].max() == 2.0


def test_what_is_no_parameter_takes_the_mean() -> None:
    """Counters, numbers, text, and what batch normalisation counts are not for an optimizer."""
    model: dict[str, Any] = {
        "net": {"weight": np.zeros(2), "bn": {"running_var": np.zeros(2), "num_batches_tracked": np.array(0)}},
        "scale": 0.0,
        "phase": np.zeros(1, complex),
        "note": "text",
    }
    mean: dict[str, Any] = {
        "net": {"weight": np.full(2, 4.0), "bn": {"running_var": np.full(2, 4.0), "num_batches_tracked": np.array(4)}},
        "scale": 4.0,
        "phase": np.full(1, 4.0j),
        "note": "text",
    }
    found = stepped(ServerOptimizer("sgd", HALVES), model, mean)

    assert found["net"]["weight"].tolist() == [2.0, 2.0]
    assert found["net"]["bn"]["running_var"].tolist() == [4.0, 4.0]
    assert found["net"]["bn"]["num_batches_tracked"].item() == 4
    assert (found["scale"], found["phase"].tolist(), found["note"]) == (4.0, [4.0j], "text")
    chosen = stepped(ServerOptimizer("sgd", HALVES, "weight$"), model, mean)
    assert (chosen["net"]["weight"][0], chosen["net"]["bn"]["running_var"][0]) == (4.0, 2.0)
    assert stepped(ServerOptimizer("sgd", HALVES, None), model, mean)["net"]["bn"]["running_var"][0] == 2.0


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam", "yogi"])
def test_what_nobody_changed_stays(name: str) -> None:
    """Parameters that are excluded from the mean keep their value exactly, round after round."""
    optimizer, model = ServerOptimizer(name), {"w": np.array([0.1, -3.7], np.float32)}
    for _ in range(3):
        model_after = stepped(optimizer, model, {"w": model["w"].copy()})
        assert model_after["w"].tolist() == model["w"].tolist()


def test_the_first_model_of_all_is_the_mean() -> None:
    """Where there was no model yet there is nothing to step from."""
    assert stepped(ServerOptimizer("adam"), {}, {"w": np.ones(2)})["w"].tolist() == [1.0, 1.0]


def test_tensors_stay_tensors() -> None:
    """A server that keeps tensors gets tensors of the same dtype back."""
    model, mean = ({"w": torch.full((2,), value, dtype=torch.bfloat16)} for value in (1.0, 3.0))
    found = stepped(ServerOptimizer("sgd", HALVES), model, mean)["w"]

    assert (found.dtype, found.tolist()) == (torch.bfloat16, [2.0, 2.0])


def test_a_step_out_of_range_ends_the_job_with_the_name() -> None:
    """A model that runs away is not committed; the reason says which parameter and what may help."""
    model, mean = {"w": np.array([6e4], np.float16)}, {"w": np.array([6.5e4], np.float16)}

    with pytest.raises(JobFailed, match=r"'w' beyond the range of float16; a smaller lr"):
        stepped(ServerOptimizer("sgd", {"lr": 100.0}), model, mean)
    with pytest.raises(JobFailed, match="'w'"):
        stepped(ServerOptimizer("sgd"), {"w": np.array([-1.7e308])}, {"w": np.array([1.7e308])})


@pytest.mark.parametrize(
    ("name", "args", "parameter", "said"),
    [
        ("adamw", None, "server_optimizer", "did you mean 'adam'"),
        (None, None, "server_optimizer", "known: sgd, adagrad, adam, yogi"),
        ("adam", [0.1], "optimizer_args", "a dict"),
        ("adam", {"momentum": 0.9}, "optimizer_args['momentum']", "known: lr, betas, tau"),
        ("sgd", {"momentun": 0.9}, "optimizer_args['momentun']", "did you mean 'momentum'"),
        ("sgd", {"lr": 0}, "optimizer_args['lr']", "above 0"),
        ("sgd", {"lr": math.inf}, "optimizer_args['lr']", "finite"),
        ("sgd", {"momentum": 1.0}, "optimizer_args['momentum']", "below 1"),
        ("adam", {"betas": 0.9}, "optimizer_args['betas']", "two numbers"),
        ("adam", {"betas": [0.9]}, "optimizer_args['betas']", "two numbers"),
        ("adam", {"betas": [0.9, 1]}, "optimizer_args['betas']", "below 1"),
        ("yogi", {"tau": 0.0}, "optimizer_args['tau']", "above 0"),
        ("adagrad", {"beta": -0.1}, "optimizer_args['beta']", "from 0"),
    ],
)
def test_wrong_parameters_are_named(name: Any, args: Any, parameter: str, said: str) -> None:
    """An optimizer takes its own parameters and nothing else, within their bounds."""
    with pytest.raises(ConfigError) as caught:
        check_optimizer_args(name, args)

    assert caught.value.parameter == parameter
    assert said in str(caught.value)


def test_parameters_that_are_not_given_have_defaults() -> None:
    """What is kept of a recipe says all parameters, in words of JSON."""
    assert check_optimizer_args("adam", {"betas": (0.5, 0.75)}) == {"lr": 0.03, "betas": [0.5, 0.75], "tau": 0.001}
    with pytest.raises(ConfigError, match="average_vars"):
        ServerOptimizer("adam", None, "(")
