"""Arrays and tensors, models and differences."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flarebus.client.convert import difference, plain_scalar, private_copy, to_arrays, to_tensors
from flarebus.errors import ClientApiError

DTYPES = ["bool", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16"]
SPECIAL = ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"]


@given(hnp.arrays(st.sampled_from(DTYPES).map(np.dtype), hnp.array_shapes(min_dims=0, min_side=0, max_side=4)))
def test_arrays_round_trip_through_tensors_without_a_copy(array: np.ndarray) -> None:
    """Shape, dtype, bits and memory of an array survive."""
    tensor = to_tensors(array)
    back = to_arrays(tensor)

    assert isinstance(tensor, torch.Tensor)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()
    assert array.size == 0 or np.shares_memory(back, array)


@pytest.mark.parametrize("name", SPECIAL)
def test_dtypes_that_numpy_lacks_round_trip(name: str) -> None:
    """bfloat16 and float8 keep their bits and their names in both directions."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3).astype(getattr(ml_dtypes, name))
    tensor = to_tensors({"w": array})["w"]
    back = to_arrays({"w": tensor})["w"]

    assert tensor.dtype is getattr(torch, name)
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "array",
    [np.arange(4.0)[::-1], np.arange(4, dtype=">f4"), np.frombuffer(b"\0" * 8, np.float32), np.zeros((2, 3)).T],
    ids=["negative stride", "big-endian", "read-only", "transposed"],
)
def test_arrays_that_pytorch_cannot_address_are_copied(array: np.ndarray) -> None:
    """Values are right whatever the layout, and a script may write to what it gets."""
    tensor = to_tensors(array)
    assert np.array_equal(tensor.numpy(), array)

    before = array.copy()
    tensor += 1
    assert array.flags.f_contiguous or np.array_equal(array, before)


@pytest.mark.parametrize("value", [None, "x", 3, 0.5, True, np.float32(1), np.array(["a"]), np.array([None])])
def test_other_values_pass_as_they_are(value: Any) -> None:
    """What is neither a numeric array nor a tensor is not touched."""
    params = {"k": value, "nested": {"list": [value]}}

    assert to_tensors(params) is params
    assert to_arrays(params) is params


def test_nested_values_are_converted_where_they_are() -> None:
    """Dicts, lists and tuples are followed; keys and order stay; the given containers are not changed."""
    params = {"a": [np.ones(2), "x"], 3: {"b": (np.zeros(1), None)}}
    tensors = to_tensors(params)
    back = to_arrays(tensors)

    assert list(tensors) == ["a", 3]
    assert isinstance(tensors["a"][0], torch.Tensor)
    assert isinstance(tensors[3]["b"][0], torch.Tensor)
    assert isinstance(params["a"][0], np.ndarray)
    assert isinstance(back[3]["b"], tuple)


def test_module_state_becomes_arrays_of_its_memory() -> None:
    """Parameters are detached and not copied; tied ones become one array."""
    layer = torch.nn.Linear(3, 3)
    state = {"a": layer.weight, "b": layer.weight, "c": layer.state_dict()["weight"], "bias": layer.bias}
    arrays = to_arrays(state)

    assert arrays["a"] is arrays["b"] is arrays["c"]
    with torch.no_grad():
        layer.bias.fill_(7)
    assert arrays["bias"].tolist() == [7, 7, 7]


def test_conjugate_and_strided_tensors_are_right() -> None:
    """Lazy conjugation is resolved and strides are kept."""
    tensor = torch.tensor([1 + 2j]).conj()

    assert to_arrays(tensor).tolist() == [1 - 2j]
    assert to_arrays(torch.arange(6).reshape(2, 3).T).tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "meta"),
    ],
)
def test_tensors_without_an_array_are_named(tensor: torch.Tensor, kind: str) -> None:
    """The error says which parameter and why."""
    with pytest.raises(ClientApiError, match=rf"params\['w'\].*{kind}"):
        to_arrays({"w": tensor}, ("params",))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(np.float32(0.5), 0.5), (np.array([2]), 2), (torch.tensor(True), True), ("x", "x"), (None, None)],
)
def test_plain_scalar(value: Any, expected: Any) -> None:
    """One element becomes a Python number, anything else stays."""
    assert plain_scalar(value) == expected
    assert type(plain_scalar(value)) is type(expected)


def test_plain_scalar_leaves_many_values() -> None:
    """An array of several values is not a scalar."""
    array = np.ones(2)

    assert plain_scalar(array) is array


@given(
    hnp.arrays(st.sampled_from(["i4", "i8", "f2", "f4", "f8"]).map(np.dtype), (3,), elements=st.integers(-99, 99)),
    st.booleans(),
    st.booleans(),
)
def test_difference_is_sent_minus_received(base: np.ndarray, sent_tensor: bool, base_tensor: bool) -> None:
    """In the dtype it has, for arrays and tensors in any pairing; what was sent stays as it was."""
    sent = base + np.array(3, base.dtype)
    value = torch.from_numpy(sent) if sent_tensor else sent
    kept = private_copy(torch.from_numpy(base) if base_tensor else base)
    result = to_arrays(difference({"w": value}, {"w": kept})["w"])

    assert result.dtype == base.dtype
    assert result.tolist() == [3, 3, 3]
    assert sent.tolist() == (base + np.array(3, base.dtype)).tolist()


def test_difference_uses_the_memory_of_the_copy() -> None:
    """No third model is held."""
    base = {"a": np.ones(4, np.float32), "b": torch.ones(4)}
    result = difference({"a": np.full(4, 3, np.float32), "b": torch.full((4,), 3.0)}, base)

    assert result["a"] is base["a"]
    assert result["b"].data_ptr() == base["b"].data_ptr()


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("tensors", [False, True])
def test_difference_of_dtypes_that_numpy_lacks(name: str, tensors: bool) -> None:
    """bfloat16 and float8 are subtracted in their own dtype."""
    base: Any = np.full(3, 1, np.float32).astype(getattr(ml_dtypes, name))
    sent: Any = np.full(3, 3, np.float32).astype(getattr(ml_dtypes, name))
    if tensors:
        base, sent = to_tensors(base), to_tensors(sent)
    result = to_arrays(difference({"w": sent}, {"w": base})["w"])

    assert result.dtype.name == name
    assert result.astype(np.float32).tolist() == [2, 2, 2]


def test_difference_of_trained_parameters() -> None:
    """Parameters that require a gradient are read, not followed."""
    result = difference({"w": torch.nn.Parameter(torch.ones(2))}, {"w": torch.zeros(2)})

    assert result["w"].tolist() == [1, 1]
    assert not result["w"].requires_grad


def test_difference_follows_structure_and_leaves_the_rest() -> None:
    """Lists and dicts are followed, numbers subtracted; text, None and flags are those that were sent."""
    sent = {"l": [np.array([2.0])], "d": {"n": 5}, "s": "new", "none": None, "flag": True, "m": np.array([True, False])}
    base = {"l": [np.array([0.5])], "d": {"n": 3}, "s": "old", "none": None, "flag": False, "m": np.array([True, True])}
    result = difference(sent, base)

    assert result["l"][0].tolist() == [1.5]
    assert result["d"] == {"n": 2}
    assert (result["s"], result["none"], result["flag"]) == ("new", None, True)
    assert result["m"].tolist() == [False, True]


@pytest.mark.parametrize(
    ("sent", "base", "message"),
    [
        ({"a": np.ones(1)}, {"a": np.ones(1), "b": np.ones(1)}, "received but not sent: 'b'"),
        ({"a": np.ones(1), "c": 1}, {"a": np.ones(1)}, "sent but not received: 'c'"),
        ({"a": np.ones(2)}, {"a": np.ones(3)}, r"params\['a'\]: shape \(2,\), but \(3,\)"),
        ({"a": [1]}, {"a": [1, 2]}, r"params\['a'\]: 1 entries"),
        ({"a": "x"}, {"a": np.ones(1)}, r"params\['a'\]: str, but ndarray"),
        ({"a": np.array([1], "u1")}, {"a": np.array([2], "u1")}, "uint8 cannot hold"),
        ({"d": {"x": 1}}, {"d": {"y": 1}}, r"params\['d'\]"),
    ],
)
def test_difference_refuses_what_does_not_fit(sent: Any, base: Any, message: str) -> None:
    """Nothing is dropped silently: the key and the reason are named, and the copy is whole."""
    kept = private_copy(base)

    with pytest.raises(ClientApiError, match=message):
        difference(sent, kept)
    assert repr(kept) == repr(base)


def test_private_copy_shares_nothing() -> None:
    """Training in place does not change the copy."""
    params = {"a": np.zeros(2), "b": [torch.zeros(2)], "c": "x"}
    copied = private_copy(params)
    params["a"] += 1
    params["b"][0] += 1

    assert copied["a"].tolist() == [0, 0]
    assert copied["b"][0].tolist() == [0, 0]
    assert copied["c"] == "x"


def test_tensorflow_values_become_arrays(tf: Any) -> None:
    """Tensors and variables, also those of Keras, wherever they are; what is no tensor stays."""
    import keras

    variable = tf.Variable([1.0, 2.0])
    params = {
        "layer": [tf.ones([2, 2]), variable],
        "k": keras.Variable([3, 4]),
        "b": tf.zeros([1], tf.bfloat16),
        1: "x",
    }
    arrays = to_arrays(params)
    variable.assign([5.0, 5.0])

    assert [each.tolist() for each in arrays["layer"]] == [[[1, 1], [1, 1]], [1, 2]]
    assert arrays["k"].tolist() == [3, 4]
    assert arrays["b"].dtype == ml_dtypes.bfloat16
    assert arrays[1] == "x"


@pytest.mark.parametrize("kind", ["sparse", "ragged", "string"])
def test_tensorflow_values_without_an_array_are_named(tf: Any, kind: str) -> None:
    """The error says which parameter and what it is."""
    made = {"sparse": tf.sparse.eye(2), "ragged": tf.ragged.constant([[1], []]), "string": tf.constant(["a"])}
    with pytest.raises(ClientApiError, match=rf"params\['w'\].*{type(made[kind]).__name__} of .*dense"):
        to_arrays({"w": made[kind]}, ("params",))


def test_plain_scalars_of_tensorflow(tf: Any) -> None:
    """Metrics are often tensors of one number."""
    found = [plain_scalar(each) for each in (tf.constant(0.5), tf.Variable([2]), tf.constant(True))]

    assert found == [0.5, 2, True]
    assert [type(each) for each in found] == [float, int, bool]
    several = tf.ones([2])
    assert plain_scalar(several) is several


def test_difference_of_tensorflow_values(tf: Any) -> None:
    """What a script trained minus what it received, whichever of the two are tensors."""
    base = private_copy({"a": [tf.ones([2])], "b": np.ones(2, np.float32), "n": 1})
    found = difference({"a": [tf.fill([2], 3.0)], "b": tf.Variable([4.0, 5.0]), "n": 3}, base)

    assert found["a"][0].tolist() == [2, 2]
    assert found["b"].tolist() == [3, 4]
    assert found["n"] == 2
