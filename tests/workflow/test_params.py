"""Params: names of nested leaves, and what counts as an array."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from flarebus.errors import ConfigError
from flarebus.model import FLModel
from flarebus.workflow.mean import WeightedMean
from flarebus.workflow.params import as_array, flatten, is_flat, is_number_dtype, rebuild, restore


def test_names_are_the_way_to_the_leaf() -> None:
    """A leaf's name is its keys and indexes joined with dots, in the order of the params."""
    params = {"a": {"b": 1, 2: [3, (4,)]}, "c": None, "empty": {}}

    assert flatten(params) == {"a.b": 1, "a.2.0": 3, "a.2.1.0": 4, "c": None}


def test_rebuild_replaces_leaves_in_fresh_containers() -> None:
    """Named leaves are replaced, all others stay, and the original containers are not touched."""
    params = {"a": {"b": 1, 2: [3, (4,)]}, "c": None, "empty": {}}

    new = rebuild(params, {"a.b": 10, "a.2.1.0": 40})

    assert new == {"a": {"b": 10, 2: [3, (40,)]}, "c": None, "empty": {}}
    assert params["a"] == {"b": 1, 2: [3, (4,)]}
    assert new["empty"] is not params["empty"]


@pytest.mark.parametrize("params", [{"a.b": 1, "a": {"b": 2}}, {1: 1, "1": 2}])
def test_one_name_for_two_values_is_an_error(params: dict[object, object]) -> None:
    """Params in which two leaves would have one name are refused with that name."""
    with pytest.raises(ConfigError, match="two values"):
        flatten(params)


def test_endless_nesting_is_an_error() -> None:
    """A model nested without end is refused and does not end in a recursion error."""
    params: dict[str, object] = {}
    params["self"] = params

    with pytest.raises(ConfigError, match="nested deeper"):
        flatten(params)


def test_flat_means_no_containers_and_string_keys() -> None:
    """Only params with string keys and plain leaves are their own flat form."""
    assert is_flat({"a": 1, "b": None})
    assert not any(map(is_flat, ({"a": []}, {"a": {}}, {"a": ()}, {1: 1})))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "bool", "complex64"])
def test_tensors_share_their_memory(name: str) -> None:
    """A tensor becomes an array on its own memory and an array a tensor on its own, whatever the dtype."""
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(2, 3).to(getattr(torch, name))

    array = as_array(tensor)

    assert array is not None
    assert (array.shape, array.dtype.name) == ((2, 3), name)
    assert array.ctypes.data == tensor.data_ptr()
    back = restore(array, tensor)
    assert (back.dtype, back.data_ptr()) == (tensor.dtype, tensor.data_ptr())


def test_tensors_that_are_no_plain_memory() -> None:
    """Parameters, views and conjugates have an array; sparse tensors have none."""
    torch = pytest.importorskip("torch")

    assert as_array(torch.nn.Parameter(torch.ones(2))).tolist() == [1, 1]  # type: ignore[union-attr]
    assert as_array(torch.arange(6).reshape(2, 3).T).tolist() == [[0, 3], [1, 4], [2, 5]]  # type: ignore[union-attr]
    assert as_array(torch.tensor([1j]).conj()).tolist() == [-1j]  # type: ignore[union-attr]
    assert as_array(torch.ones(2, 2).to_sparse()) is None
    assert as_array([1.0]) is None


def test_which_dtypes_can_be_averaged() -> None:
    """Integers, floats and complex numbers of every width can be averaged; flags, strings and dates cannot."""
    assert all(is_number_dtype(np.dtype(t)) for t in ("u1", "i8", "f2", "f4", ">f8", "c8", ml_dtypes.bfloat16))
    assert all(is_number_dtype(np.dtype(t)) for t in (ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn))
    assert not any(is_number_dtype(np.dtype(t)) for t in ("?", "O", "U3", "S3", "M8[s]", "V4", ml_dtypes.int4))


def test_values_of_tensorflow(tf: Any) -> None:
    """A tensor or variable has an array that nobody can write to, and an array becomes one of them again."""
    import keras

    for leaf in (tf.constant([1.0, 2.0]), tf.Variable([1, 2], trainable=False), keras.Variable([1.0, 2.0])):
        array = as_array(leaf)

        assert array is not None
        assert array.tolist() == [1, 2]
        assert not array.flags.writeable
        back = restore(array + 1, leaf)
        assert (type(back), back.dtype) == (type(leaf), leaf.dtype)
        assert back.numpy().tolist() == [2, 3]
        assert getattr(back, "trainable", None) == getattr(leaf, "trainable", None)
    for leaf in (tf.constant(["a"]), tf.sparse.eye(2), tf.ragged.constant([[1], []])):
        assert as_array(leaf) is None


def test_tensors_of_tensorflow_can_be_averaged(tf: Any) -> None:
    """The mean of tensors and variables is of their kind, and what was averaged is as it was."""
    updates = [{"t": tf.fill([40_000], float(n)), "v": tf.Variable([float(n)])} for n in range(4)]
    mean = WeightedMean(like=updates[0])
    for update in updates:
        mean.add(FLModel(params=update), 1.0)
    found = mean.apply_to(updates[0])

    assert type(found["t"]) is type(updates[0]["t"])
    assert set(found["t"].numpy().tolist()) == {1.5}
    assert found["v"].numpy().tolist() == [1.5]
    assert [set(each["t"].numpy().tolist()) for each in updates] == [{n} for n in range(4)]
