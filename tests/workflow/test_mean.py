"""WeightedMean: exactness, refusals, kinds of values, metrics."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flarebus.errors import ConfigError, QuorumNotReached, UpdateRefused
from flarebus.model import FLModel, ParamsType
from flarebus.workflow.mean import WeightedMean

Params = dict[str, Any]


def mean_of(like: Params, updates: Iterable[tuple[Params, float]], kind: str = "FULL", **options: Any) -> Params:
    mean = WeightedMean(like, **options)
    for params, weight in updates:
        mean.add(FLModel(kind, params), weight)
    return mean.apply_to(like)


def exact_mean(columns: list[NDArray[Any]], weights: list[float]) -> list[Fraction]:
    total = sum(map(Fraction, weights))
    return [
        sum((Fraction(weight) * Fraction(value) for weight, value in zip(weights, row, strict=True)), Fraction(0))
        / total
        for row in zip(*(column.tolist() for column in columns), strict=True)
    ]


def ulps_off(result: NDArray[Any], exact: list[Fraction]) -> float:
    """The largest distance between `result` and `exact`, in units in the last place of the result."""
    worst = 0.0
    for value, wanted in zip(result, exact, strict=True):
        with np.errstate(over="ignore"):  # at the end of the range
            spacing = float(np.spacing(np.abs(value)))
        ulp = Fraction(
            spacing if math.isfinite(spacing) else float(np.spacing(np.nextafter(value, value.dtype.type(0))))
        )
        worst = max(worst, float(abs(Fraction(float(value)) - wanted) / ulp))
    return worst


def test_mean_of_1000_float32_clients_is_exact() -> None:
    """The mean of a thousand clients with random weights is the exact sum to one unit in the last place."""
    rng = np.random.default_rng(7)
    columns = [rng.standard_normal(37).astype(np.float32) for _ in range(1000)]
    weights = [float(weight) for weight in rng.random(1000) * 1000]

    result = mean_of(
        {"w": columns[0] * 0}, [({"w": column.copy()}, w) for column, w in zip(columns, weights, strict=True)]
    )

    total = math.fsum(weights)
    for index, value in enumerate(result["w"]):
        wanted = math.fsum(w * float(column[index]) for column, w in zip(columns, weights, strict=True)) / total
        assert abs(float(value) - wanted) <= np.spacing(np.float32(abs(wanted)))


@pytest.mark.parametrize("clients", [1, 2, 3, 60])
def test_float64_is_exact_where_values_cancel(clients: int) -> None:
    """Float64 models are exact to one unit in the last place, although the values cancel to a billionth."""
    rng = np.random.default_rng(clients)
    columns = [rng.standard_normal(40) for _ in range(clients)]
    weights = [float(weight) for weight in rng.random(clients) + 0.01]
    if clients > 1:
        rest = exact_mean(columns[:-1], weights[:-1])
        factor = float(sum(map(Fraction, weights[:-1])) / Fraction(weights[-1]))
        columns[-1] = np.array([-float(value) * factor * (1 + 1e-9) for value in rest])

    result = mean_of(
        {"w": columns[0] * 0}, [({"w": column.copy()}, w) for column, w in zip(columns, weights, strict=True)]
    )

    assert ulps_off(result["w"], exact_mean(columns, weights)) <= 1


@given(data=st.data(), dtype=st.sampled_from([np.float32, np.float64]), clients=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_any_finite_values_and_weights(data: st.DataObject, dtype: type, clients: int) -> None:
    """No mixture of large and small values or weights overflows, and the error stays within the promise."""
    width = np.dtype(dtype).itemsize * 8
    numbers = st.floats(-1e3, 1e3, width=width) | st.sampled_from([float(np.finfo(dtype).max), 1.0, 0.0])
    weights = data.draw(st.lists(st.floats(1e-3, 1e3), min_size=clients, max_size=clients))
    columns = [np.abs(np.array(data.draw(st.lists(numbers, min_size=3, max_size=3)), dtype)) for _ in range(clients)]
    columns = [np.where(column < 1e-30, 0, column).astype(dtype) for column in columns]

    result = mean_of({"w": columns[0] * 0}, [({"w": c.copy()}, w) for c, w in zip(columns, weights, strict=True)])

    assert ulps_off(result["w"], exact_mean(columns, weights)) <= 1


def test_largest_float64_values_do_not_overflow() -> None:
    """Values at the end of the range average to values in range, also when a weight outgrows all before it."""
    top = np.finfo(np.float64).max
    updates = [({"w": np.array([top, -top])}, weight) for weight in (1e-20, 1.0, 1e3, 1e25, 3.0)]

    result = mean_of({"w": np.zeros(2)}, updates)

    np.testing.assert_array_equal(result["w"], [top, -top])


def test_a_quotient_that_rounds_beyond_the_range_is_brought_back() -> None:
    """The sum over the total of the weights may round up beyond the largest value though the mean does not."""
    top = np.finfo(np.float64).max
    updates = [({"w": np.array([top, -top, 1.0])}, weight) for weight in (1.0, 24.0, 999.1396513113401)]

    result = mean_of({"w": np.zeros(3)}, updates)

    np.testing.assert_array_equal(result["w"], [top, -top, 1.0])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("clients", [2, 7, 20])
def test_short_floats(dtype: type, clients: int) -> None:
    """Sixteen- and eight-bit floats come out as the nearest value of their dtype, in that dtype."""
    rng = np.random.default_rng(3)
    columns = [(rng.random(21) + 0.5).astype(dtype) for _ in range(clients)]
    weights = [float(weight) for weight in rng.integers(1, 9, clients)]

    result = mean_of({"w": columns[0]}, [({"w": c.copy()}, w) for c, w in zip(columns, weights, strict=True)])

    wide = np.average([c.astype(np.float64) for c in columns], axis=0, weights=weights)
    assert result["w"].dtype == dtype
    step = float(ml_dtypes.finfo(dtype).eps)  # of values from 1 to 2; half of it is the error of the rounding
    np.testing.assert_allclose(result["w"].astype(np.float64), wide, rtol=step)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("clients", [1, 2, 3, 5, 9])
def test_integers_are_rounded_to_nearest(dtype: type, clients: int) -> None:
    """Integer arrays keep their dtype and are rounded to the nearest, over their whole range."""
    limits = np.iinfo(dtype)
    rng = np.random.default_rng(clients)
    columns = [
        np.append(rng.integers(limits.min, limits.max, 6, dtype, True), np.array([limits.max, limits.min], dtype))
        for _ in range(clients)
    ]
    weights = [float(weight) for weight in rng.integers(1, 9, clients)]

    result = mean_of({"w": columns[0]}, [({"w": c.copy()}, w) for c, w in zip(columns, weights, strict=True)])

    assert result["w"].dtype == dtype
    exact = exact_mean(columns, weights)
    assert all(
        abs(Fraction(int(value)) - wanted) <= Fraction(1, 2) for value, wanted in zip(result["w"], exact, strict=True)
    )


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("clients", [2, 4])
def test_halves_go_to_the_even_integer(dtype: type, clients: int) -> None:
    """A mean half-way between two integers becomes the even one, as everywhere in NumPy."""
    updates = [({"w": np.array([2, 3, -3, 7], dtype) + number % 2}, 3.0) for number in range(clients)]

    result = mean_of({"w": np.zeros(4, dtype)}, updates)

    assert result["w"].tolist() == [2, 4, -2, 8]


@pytest.mark.parametrize(
    "dtype", [np.complex64, np.complex128, np.longdouble, ">f4", ">f8", ">c8", ">i8", ">i4", ">f2"]
)
@pytest.mark.parametrize("clients", [1, 2, 3, 5])
def test_uncommon_dtypes(dtype: Any, clients: int) -> None:
    """Complex numbers, long doubles and foreign byte orders are averaged like all others."""
    rng = np.random.default_rng(5)
    columns = [(rng.integers(-99, 99, (3, 4)) * 16).astype(dtype) for _ in range(clients)]
    if np.dtype(dtype).kind == "c":
        columns = [(column * (1 + 2j)).astype(dtype) for column in columns]
    weights = [2.0 ** -(index % 2) for index in range(clients)]

    result = mean_of({"w": columns[0]}, [({"w": c.copy()}, w) for c, w in zip(columns, weights, strict=True)])

    wide = np.complex128 if np.dtype(dtype).kind == "c" else np.float64
    wanted = np.average([c.astype(wide) for c in columns], axis=0, weights=weights)
    assert result["w"].dtype == np.dtype(dtype)
    step = 1.0 if np.dtype(dtype).kind == "i" else 0.0
    np.testing.assert_allclose(result["w"].astype(wide), wanted, rtol=1e-3 if dtype == ">f2" else 1e-7, atol=step)


def test_long_double_keeps_its_digits() -> None:
    """Long doubles are averaged with all the digits they have."""
    step = np.finfo(np.longdouble).eps
    updates = [({"w": np.array([1 + number * step], np.longdouble)}, 1.0) for number in (1, 2, 6)]

    result = mean_of({"w": np.zeros(1, np.longdouble)}, updates)

    assert result["w"][0] == 1 + 3 * step


def test_python_numbers_are_averaged_as_numbers() -> None:
    """Lone numbers are averaged exactly; whole ones become floats; complex ones stay complex."""
    like = {"f": 0.5, "i": 3, "c": 1j, "deep": {"list": [1.0, {"x": 2}]}}
    updates = [
        ({"f": 0.1, "i": 1, "c": 1 + 1j, "deep": {"list": [3, {"x": 1}]}}, 1),
        ({"f": 0.1, "i": 2, "c": 3, "deep": {"list": [np.float64(4.0), {"x": np.int32(6)}]}}, 1.0),
        ({"f": 0.1, "i": 2.5, "c": 2 - 1j, "deep": {"list": [5.0, {"x": 2}]}}, 2),
    ]

    result = mean_of(like, updates)

    assert result == {"f": 0.1, "i": 2.0, "c": 2 - 0.25j, "deep": {"list": [4.25, {"x": 2.75}]}}
    assert type(result["i"]) is float


def test_numpy_scalars_and_0d_arrays_stand_for_each_other() -> None:
    """A NumPy scalar where the model has a 0-d array, or the reverse, is welcome: NumPy itself mixes them."""
    like = {"s": np.float32(1), "z": np.zeros((), np.int64)}

    result = mean_of(like, [({"s": np.array(2, np.float32), "z": np.int64(4)}, 1.0)])

    assert result["s"] == 2
    assert isinstance(result["s"], np.float32)
    assert isinstance(result["z"], np.ndarray)
    assert result["z"] == 4


def test_what_is_no_number_keeps_the_value_of_the_model() -> None:
    """Strings, None, flags, bytes and masks stay the model's, whatever the sites send of the same type."""
    like = {"s": "a", "n": None, "b": True, "y": b"1", "m": np.array([True, False]), "w": np.ones(2)}
    sent = {"s": "b", "n": None, "b": False, "y": b"2", "m": np.array([False, False]), "w": np.zeros(2)}

    result = mean_of(like, [(sent, 1.0)])

    assert {name: result[name] for name in "snby"} == {name: like[name] for name in "snby"}
    assert result["m"].tolist() == [True, False]
    assert result["w"].tolist() == [0, 0]


def test_nested_models_keep_their_structure() -> None:
    """Dicts, lists and tuples come back as they were, with new leaves, and the model given is not changed."""
    like = {"a": {"w": np.zeros(2, np.float32)}, "l": [np.zeros(1), (np.zeros(3),)], "e": {}, 5: np.zeros(1)}
    sent = {"a": {"w": np.ones(2, np.float32)}, "l": [np.ones(1), (np.ones(3),)], "e": {}, 5: np.ones(1)}

    result = mean_of(like, [(sent, 2.0)])

    assert list(result) == ["a", "l", "e", 5]
    assert result["a"]["w"].tolist() == [1, 1]
    assert isinstance(result["l"][1], tuple)
    assert result["l"][1][0].tolist() == [1, 1, 1]
    assert like["a"]["w"].tolist() == [0, 0]


def test_tensors_come_back_as_tensors() -> None:
    """Torch tensors of every common dtype are averaged through their memory and come back as tensors."""
    torch = pytest.importorskip("torch")
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.complex64]
    like = {str(dtype): torch.zeros(2, 3, dtype=dtype) for dtype in dtypes}
    updates = [({name: tensor + number for name, tensor in like.items()}, 1.0) for number in (1, 2, 3, 4, 9)]

    result = mean_of(like, updates)

    for dtype in dtypes:
        assert result[str(dtype)].dtype == dtype
        assert result[str(dtype)].shape == (2, 3)
        assert result[str(dtype)].real.float().unique().tolist() == [
            pytest.approx(3.8 if dtype.is_floating_point or dtype.is_complex else 4, rel=1e-2)
        ]


def test_arrays_answer_for_tensors() -> None:
    """A site may send arrays where the model has tensors of the same dtype and shape."""
    torch = pytest.importorskip("torch")

    result = mean_of({"w": torch.zeros(2)}, [({"w": np.ones(2, np.float32)}, 1.0)])

    assert result["w"].tolist() == [1, 1]
    assert isinstance(result["w"], torch.Tensor)


def test_differences_are_added_to_the_model() -> None:
    """DIFF results are averaged and added to the model, rounded once."""
    like = {
        "f": np.array([1.0, 2.0], np.float32),
        "d": np.array([1e16]),
        "i": np.array([10, 20]),
        "h": np.array([1.0], np.float16),
        "n": 5.0,
    }
    one, three = dict(like), dict(like)
    one |= {"f": np.array([0.5, 1], np.float32), "d": np.array([1.0]), "i": np.array([1, -5]), "n": 1.0}
    three |= {"f": np.array([1.5, 2], np.float32), "d": np.array([3.0]), "i": np.array([3, -7]), "n": 2.0}
    updates = [(one, 1.0), (three, 3.0)]

    result = mean_of(like, updates, "DIFF")

    assert result["f"].tolist() == [2.25, 3.75]
    assert result["d"].tolist() == [1e16 + 2]  # 1e16 + 2.5, rounded once
    assert result["i"].tolist() == [12, 14]
    assert result["h"].tolist() == [2]
    assert result["n"] == 6.75


@pytest.mark.parametrize(
    ("base", "diff"),
    [
        (np.array([6e4], np.float16), np.array([6e4], np.float16)),
        (np.array([3e38], np.float32), np.array([3e38], np.float32)),
        (np.array([1.7e308]), np.array([1e308])),
        (np.array([100], np.int8), np.array([100], np.int8)),
        (np.array([2**63 - 2]), np.array([2**62])),
        (np.array([3e38], ml_dtypes.bfloat16), np.array([3e38], ml_dtypes.bfloat16)),
        (1.7e308, 1e308),
    ],
)
def test_a_difference_that_leaves_the_range_is_refused(base: Any, diff: Any) -> None:
    """A sum beyond the range of the dtype is an error with the key in it, not Inf in the next model."""
    with pytest.raises(UpdateRefused, match="beyond the range") as caught:
        mean_of({"w": base}, [({"w": diff}, 1.0)], "DIFF")

    assert caught.value.key == "w"


def test_full_and_diff_never_mix() -> None:
    """The first result that counts decides between FULL and DIFF, and the other kind is refused."""
    mean = WeightedMean({"w": np.zeros(1)})
    mean.add(FLModel("DIFF", {"w": np.ones(1)}), 0.0)
    mean.add(FLModel("FULL", {"w": np.ones(1)}), 1.0)

    with pytest.raises(UpdateRefused, match="DIFF in a round of FULL results"):
        mean.add(FLModel("DIFF", {"w": np.ones(1)}), 1.0, "site-2")

    assert mean.kind is ParamsType.FULL
    assert mean.apply_to({"w": np.zeros(1)})["w"].tolist() == [1]


REFUSED = {
    "missing key": ({"w": np.ones(2, np.float32)}, "n", "missing key 'n'"),
    "extra key": ({"w": np.ones(2, np.float32), "n": 1.0, "x": 1}, "x", "key 'x' not in the model"),
    "wrong shape": ({"w": np.ones((2, 1), np.float32), "n": 1.0}, "w", r"shape \(2, 1\), the model has \(2,\)"),
    "shape that broadcasts": ({"w": np.ones(1, np.float32), "n": 1.0}, "w", r"shape \(1,\)"),
    "wider dtype": ({"w": np.ones(2), "n": 1.0}, "w", "dtype float64, the model has float32"),
    "integer dtype": ({"w": np.ones(2, np.int32), "n": 1.0}, "w", "dtype int32"),
    "NaN": ({"w": np.array([1, np.nan], np.float32), "n": 1.0}, "w", "NaN or Inf"),
    "Inf": ({"w": np.array([-np.inf, 1], np.float32), "n": 1.0}, "w", "NaN or Inf"),
    "number for array": ({"w": 1.0, "n": 1.0}, "w", "float where the model has an array"),
    "list for array": ({"w": [1.0, 2.0], "n": 1.0}, "w", "list where the model has an array"),
    "array for number": ({"w": np.ones(2, np.float32), "n": np.ones(1)}, "n", "ndarray where the model has a number"),
    "flag for number": ({"w": np.ones(2, np.float32), "n": True}, "n", "bool where the model has a number"),
    "NaN number": ({"w": np.ones(2, np.float32), "n": math.nan}, "n", "NaN or Inf"),
    "endless number": ({"w": np.ones(2, np.float32), "n": 10**400}, "n", "beyond the range"),
    "complex number": ({"w": np.ones(2, np.float32), "n": 1j}, "n", "complex where the model has a number"),
    "no dict": ([1], "", "params are list, not a dict"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_refused_update_leaves_no_trace(case: str, before: int) -> None:
    """A bad update is refused with site, key and reason, and the mean is that of the others to the last bit."""
    params, key, reason = REFUSED[case]
    like = {"w": np.zeros(2, np.float32), "n": 0.0}
    others = [({"w": np.array([number, 0.1], np.float32), "n": number}, 1.5) for number in range(before + 1)]
    mean = WeightedMean(like)
    for good, weight in others[:before]:
        mean.add(FLModel(params={**good, "w": good["w"].copy()}), weight)
    bad = FLModel(params={}, metrics={"accuracy": 0.0})
    bad.params = params

    with pytest.raises(UpdateRefused, match=reason) as caught:
        mean.add(bad, 2.0, "site-7")

    assert (caught.value.key, caught.value.site) == (key, "site-7")
    assert (mean.n_results, mean.sites, mean.metrics) == (before, [""] * before, {})
    last, weight = others[before]
    mean.add(FLModel(params={**last, "w": last["w"].copy()}), weight)
    result, wanted = mean.apply_to(like), mean_of(like, others)
    assert result["w"].tobytes() == wanted["w"].tobytes()
    assert result["n"] == wanted["n"]


@pytest.mark.parametrize(
    "dtype",
    [
        np.float16,
        np.float32,
        np.float64,
        np.complex64,
        ml_dtypes.bfloat16,
        ">f4",
        np.longdouble,
        ml_dtypes.float8_e4m3fn,
    ],
)
@pytest.mark.parametrize("size", [3, 200_001])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_found_in_every_float_dtype(dtype: Any, size: int, value: float) -> None:
    """One element that is not finite, at the very end, is enough, and the error names its array."""
    array = np.ones(size, dtype)
    array[-1] = value

    with pytest.raises(UpdateRefused, match="NaN or Inf") as caught:
        mean_of({"a": np.ones(2, dtype), "w": array}, [({"a": np.ones(2, dtype), "w": array}, 1.0)])

    assert caught.value.key == "w"


@pytest.mark.parametrize("weight", [-1, -1e-300, math.nan, math.inf, 1e308, 1e-300, 10**400, "3", None, True, 1j])
def test_silly_weights_are_refused(weight: Any) -> None:
    """Negative, endless, absurd or non-numeric weights are refused, with the site and what is allowed."""
    mean = WeightedMean({"w": np.zeros(1)})

    with pytest.raises(UpdateRefused, match=r"site-1: weight .* must be"):
        mean.add(FLModel(params={"w": np.ones(1)}), weight, "site-1")

    assert mean.n_results == 0


def test_weight_zero_is_accepted_and_does_not_count() -> None:
    """An update of weight 0 is checked and counted as a result, and changes nothing."""
    mean = WeightedMean({"w": np.zeros(1)})
    mean.add(FLModel(params={"w": np.array([5.0])}, metrics={"loss": 9.0, "only": 1.0}), 0, "site-1")
    mean.add(FLModel(params={"w": np.array([1.0])}, metrics={"loss": 1.0}), np.int64(3), "site-2")

    with pytest.raises(UpdateRefused):
        mean.add(FLModel(params={"w": np.array([math.nan])}), 0)

    assert mean.apply_to({"w": np.zeros(1)})["w"].tolist() == [1]
    assert (mean.n_results, mean.total_weight, mean.sites) == (2, 3.0, ["site-1", "site-2"])
    assert mean.metrics == {"loss": 1.0}


@pytest.mark.parametrize("add", [None, "metrics", "weight 0"])
def test_a_round_without_contribution_is_an_error(add: str | None) -> None:
    """When nothing was contributed there is no new model, and nothing is written."""
    mean = WeightedMean({"w": np.zeros(1)})
    if add == "metrics":
        mean.add(FLModel(metrics={"accuracy": 0.5}), 1.0, "site-1")
    elif add:
        mean.add(FLModel(params={"w": np.ones(1)}), 0.0, "site-1")
    out = np.full(1, 7.0)

    with pytest.raises(QuorumNotReached):
        mean.apply_to({"w": np.zeros(1)}, {"w": out})

    assert out.tolist() == [7]


def test_metrics_alone_are_accepted_for_the_metrics() -> None:
    """A result with metrics and no parameters counts for the metrics and not for the model."""
    mean = WeightedMean({"w": np.zeros(1)})
    mean.add(FLModel(metrics={"accuracy": 1.0}), 3.0)
    mean.add(FLModel(params={"w": np.ones(1)}, metrics={"accuracy": 0.0, "loss": np.float32(2)}), 1.0)

    assert mean.metrics == {"accuracy": 0.75, "loss": 2.0}
    assert (mean.n_results, mean.total_weight) == (2, 1.0)
    with pytest.raises(UpdateRefused, match="neither parameters nor metrics"):
        mean.add(FLModel(), 1.0)


def test_odd_metrics_are_left_out_with_one_warning_each(caplog: pytest.LogCaptureFixture) -> None:
    """Values that are no finite numbers are left out, and the log says so once for each name."""
    mean = WeightedMean({"w": np.zeros(1)})
    odd = {
        "text": "x",
        "nan": math.nan,
        "big": 10**400,
        "flag": True,
        "many": np.zeros(3),
        "nested": {},
        "ok": np.array(1.0),
    }
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            mean.add(FLModel(metrics=odd), 1.0)

    assert mean.metrics == {"ok": 1.0}
    assert sorted(record.getMessage().split("'")[1] for record in caplog.records) == sorted(odd.keys() - {"ok"})


@pytest.mark.parametrize("metrics", [{str(number): 1 for number in range(1001)}, {1: 2.0}, {"x" * 200: 1.0}, {"": 1.0}])
def test_silly_metrics_are_refused(metrics: dict[Any, Any]) -> None:
    """Too many metrics, or names that are none, are refused before anything counts."""
    mean = WeightedMean({"w": np.zeros(1)})

    with pytest.raises(UpdateRefused, match="metric"):
        mean.add(FLModel(params={"w": np.ones(1)}, metrics=metrics), 1.0)

    assert mean.kind is None


def test_excluded_keys_keep_the_value_of_the_model() -> None:
    """Keys in which the pattern is found are not wanted, not looked at when sent, and keep the model's value."""
    like = {"body.w": np.zeros(2), "head.w": np.full(2, 3.0), "head.n": 1.0}
    mean = WeightedMean(like, exclude=r"head\.|bn")
    mean.add(FLModel(params={"body.w": np.ones(2)}), 1.0)
    mean.add(FLModel(params={"body.w": np.ones(2), "head.w": "anything", "bn.new": math.nan}), 1.0)
    with pytest.raises(UpdateRefused, match="other"):
        mean.add(FLModel(params={"body.w": np.ones(2), "other": 1}), 1.0)
    out = {"body.w": np.empty(2), "head.w": np.empty(2)}

    result = mean.apply_to(like, out)

    assert {name: np.array(value).tolist() for name, value in result.items()} == {
        "body.w": [1, 1],
        "head.w": [3, 3],
        "head.n": 1,
    }
    assert result["head.w"] is out["head.w"]


def test_a_pattern_that_is_none_is_an_error_of_the_user() -> None:
    """A broken pattern is refused at once, with the name that the user knows."""
    with pytest.raises(ConfigError, match="exclude_vars"):
        WeightedMean({}, exclude="(")


def test_partial_updates_are_averaged_key_by_key() -> None:
    """Where updates may lack keys, each key is averaged over those that sent it, and one that nobody sent stays."""
    like = {"a": np.zeros(1), "b": np.zeros(1), "c": np.full(1, 9.0), "n": 0.0, "m": 5.0}
    updates = [
        ({"a": np.array([1.0]), "n": 1.0}, 1.0),
        ({"a": np.array([4.0]), "b": np.array([8.0])}, 2.0),
        ({"b": np.array([2.0]), "n": 4.0}, 1.0),
    ]

    result = mean_of(like, updates, partial=True)

    assert {name: np.array(value).tolist() for name, value in result.items()} == {
        "a": [3],
        "b": [6],
        "c": [9],
        "n": 2.5,
        "m": 5.0,
    }


def test_without_a_model_the_first_update_is_the_template() -> None:
    """A round without a model takes its shape from the first FULL update; a difference has nothing to be added to."""
    mean = WeightedMean(None, exclude="skip")
    with pytest.raises(UpdateRefused, match="no model yet"):
        mean.add(FLModel("DIFF", {"w": np.ones(2)}), 1.0)
    with pytest.raises(UpdateRefused, match="NaN"):
        mean.add(FLModel(params={"other": np.array([np.nan])}), 1.0)
    mean.add(FLModel(params={"w": np.ones(2), "skip": 4.0, "s": "x"}), 1.0)
    with pytest.raises(UpdateRefused, match="missing"):
        mean.add(FLModel(params={"s": "y"}), 1.0)
    mean.add(FLModel(params={"w": np.zeros(2), "s": "y"}), 1.0)

    result = mean.apply_to(None)

    assert result["w"].tolist() == [0.5, 0.5]
    assert (result["skip"], result["s"]) == (4.0, "x")


def test_results_go_to_the_arrays_given() -> None:
    """With `out`, results are written where the caller wants them, and it must fit."""
    like = {"big": np.zeros(300_000, np.float32), "small": np.zeros((2, 2), np.float32)}
    mean = WeightedMean(like)
    mean.add(FLModel(params={name: value + 1 for name, value in like.items()}), 1.0)
    out = {name: np.empty_like(value) for name, value in like.items()}

    result = mean.apply_to(like, out)

    assert result["big"] is out["big"]
    assert result["small"] is out["small"]
    assert all(value.min() == value.max() == 1 for value in out.values())
    with pytest.raises(ConfigError, match="contiguous array of float32"):
        mean.apply_to(like, {"big": np.zeros(3)})
    with pytest.raises(ConfigError, match="not the one"):
        mean.apply_to({"big": like["big"]})
    assert mean.apply_to(like)["small"].tolist() == [[1, 1], [1, 1]]


def test_empty_arrays_are_no_problem() -> None:
    """Arrays without elements go through a round like any other, with any number of clients."""
    like = {"none": np.zeros((0, 3), np.float32), "w": np.zeros(1, np.float32)}

    result = mean_of(like, [({name: value + 1 for name, value in like.items()}, 1.0) for _ in range(4)])

    assert result["none"].shape == (0, 3)
    assert result["w"].tolist() == [1]
