"""TensorFlow tensors and variables travel with dtype and kind; a machine without TensorFlow says so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from flarebus.codec import decode, encode
from flarebus.codec._encoder import encode_with
from flarebus.codec._ids import TF_RAGGED, TF_SPARSE, TF_TENSOR, TF_VARIABLE
from flarebus.codec._numpy import add_numpy, array_node
from flarebus.codec._plain import add_plain
from flarebus.codec._registry import Registry
from flarebus.errors import DecodeError, EncodeError

DTYPES = [
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
    *("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4"),
]


def round_trip(value: Any, **options: Any) -> Any:
    body, buffers = encode(value, **options)
    return decode(body, [bytearray(buffer) for buffer in buffers])


def numbers(dtype: str, *shape: int) -> np.ndarray[Any, Any]:
    """Zeros and ones by turns."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return (np.arange(np.prod(shape)) % 2).reshape(shape).astype(kind)


@pytest.mark.parametrize("threshold", [1, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dense_dtype_travels(tf: Any, dtype: str, threshold: int) -> None:
    """Every dtype of numbers comes back bit for bit, in every shape."""
    value = [tf.constant(numbers(dtype, *shape)) for shape in ((), (3,), (0, 2), (4, 6), (30, 40))]
    found = round_trip(value, externalise_from=threshold)

    for one, other in zip(found, value, strict=True):
        assert type(one) is type(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.numpy().tobytes() == other.numpy().tobytes()


def test_variables_stay_variables(tf: Any) -> None:
    """Variables of TensorFlow and of Keras come back as such, trainable or not, with their dtype, free to change."""
    import keras

    value = {
        "plain": tf.Variable([1.0, 2.0]),
        "frozen": tf.Variable([1, 2], trainable=False),
        "keras": keras.Variable(np.ones(3), dtype="bfloat16"),
        "state": keras.Variable(np.arange(3), trainable=False, dtype="int64"),
    }
    found = round_trip(value)

    assert [type(each) for each in found.values()] == [type(each) for each in value.values()]
    assert [each.trainable for each in found.values()] == [True, False, True, False]
    assert [each.numpy().tolist() for each in found.values()] == [[1, 2], [1, 2], [1, 1, 1], [0, 1, 2]]
    assert [keras.backend.standardize_dtype(each.dtype) for each in found.values()] == [
        *("float32", "int32", "bfloat16", "int64"),
    ]
    found["plain"].assign_add([1.0, 1.0])
    assert value["plain"].numpy().tolist() == [1, 2]


def test_what_was_sent_does_not_change_with_the_variable(tf: Any) -> None:
    """Nothing is copied on the way out, and training on does not reach into what is on its way."""
    variable = tf.Variable(tf.ones([1000]))
    address = variable.read_value().__array__().ctypes.data
    body, buffers = encode([variable, variable])
    assert len(buffers) == 1
    assert np.frombuffer(buffers[0], np.uint8).ctypes.data == address

    variable.assign_add(tf.ones([1000]))
    variable[:5].assign(tf.zeros([5]))
    tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=[9], updates=tf.constant([7.0]))

    assert variable.numpy()[[0, 6, 9]].tolist() == [0, 2, 7]
    for found in decode(body, buffers):
        assert found.numpy().tolist() == [1] * 1000


def test_what_came_does_not_change_with_the_memory_it_came_in(tf: Any) -> None:
    """A tensor never changes, so it lies on no buffer that somebody may use again."""
    body, buffers = encode(tf.ones([1000]))
    memory = bytearray(buffers[0])
    found = decode(body, [memory])
    memory[:] = bytes(len(memory))

    assert found.numpy().tolist() == [1] * 1000


def test_ragged_and_sparse_tensors_travel(tf: Any) -> None:
    """Those that are not dense come back as what they are."""
    value = {
        "ragged": tf.ragged.constant([[[1.0, 2.0], []], [[3.0]], []]),
        "rows": tf.RaggedTensor.from_row_splits(tf.ones([3, 2]), tf.constant([0, 1, 3], tf.int32)),
        "sparse": tf.sparse.from_dense([[0, 5], [0, 0], [7, 0]]),
        "empty": tf.sparse.from_dense(tf.zeros([2, 2])),
    }
    found = round_trip(value)

    assert [type(each) for each in found.values()] == [type(each) for each in value.values()]
    assert [each.dtype for each in found.values()] == [each.dtype for each in value.values()]
    assert found["ragged"].to_list() == value["ragged"].to_list()
    assert found["rows"].row_splits.dtype == tf.int32
    assert found["rows"].to_list() == value["rows"].to_list()
    assert tf.sparse.to_dense(found["sparse"]).numpy().tolist() == [[0, 5], [0, 0], [7, 0]]
    assert found["empty"].shape == (2, 2)


REFUSED: list[tuple[Callable[[Any, Any], Any], str, str]] = [
    (lambda tf, keras: tf.constant(["a"]), "string", "tolist"),
    (lambda tf, keras: tf.Variable(["a"]), "string", "tolist"),
    (lambda tf, keras: tf.ragged.constant([["a"]]), "string", "tolist"),
    (lambda tf, keras: tf.bitcast(tf.constant([1], tf.int8), tf.qint8), "qint8", "tensor of numbers"),
    (lambda tf, keras: tf.IndexedSlices(tf.ones([1]), tf.constant([0])), "IndexedSlices", ""),
    (lambda tf, keras: keras.Sequential([keras.layers.Dense(1)]), "Sequential", "get_weights()"),
    (lambda tf, keras: keras.Input((2,)), "KerasTensor", ""),
    (lambda tf, keras: tf.float32, "DType", ""),
]


@pytest.mark.parametrize(("make", "found", "hint"), REFUSED, ids=range(8))
def test_refuses_what_is_no_tensor_of_numbers(tf: Any, make: Callable[[Any, Any], Any], found: str, hint: str) -> None:
    """Strings, quantised and symbolic tensors and whole models are refused with their place and what to do."""
    import keras

    value = make(tf, keras)

    with pytest.raises(EncodeError, match=r"value\['w'\]") as caught:
        encode({"w": value})

    assert found in caught.value.found
    assert hint in str(caught.value)


def test_tensors_of_a_graph_are_refused(tf: Any) -> None:
    """Inside a function that TensorFlow compiles there are no values to send."""

    @tf.function
    def step(x: Any) -> Any:
        with pytest.raises(EncodeError, match="SymbolicTensor"):
            encode([x])
        return x

    step(tf.ones([1]))


def crafted(type_id: int, *parts: Any) -> bytes:
    """The body of one node; arrays among its parts are what an honest sender makes of them."""
    registry = Registry()
    add_plain(registry)
    add_numpy(registry)

    def node(value: Any, sink: Any, depth: int) -> Any:
        return [type_id, *(array_node(each, sink) if isinstance(each, np.ndarray) else each for each in parts)]

    registry.add_handlers(type_id, (object,), node, lambda node, source, depth: None)
    return encode_with(registry, object(), 1 << 20).body


ONE, INDEX = np.ones(1, np.float32), np.zeros((1, 1), np.int64)
HOSTILE: list[tuple[int, list[Any], str]] = [
    (TF_TENSOR, [], "not readable"),
    (TF_TENSOR, [30, "x", None], "no number"),
    (TF_TENSOR, array_node(np.zeros(0, "S3"), None), "dtype"),  # type: ignore[arg-type]
    (TF_TENSOR, array_node(np.zeros(0, ">f4"), None), "dtype"),  # type: ignore[arg-type]
    (TF_VARIABLE, [1, *array_node(np.zeros(0), None)], "without its flag"),  # type: ignore[arg-type]
    (TF_RAGGED, [], "not readable"),
    (TF_RAGGED, [ONE], "without row splits"),
    (TF_RAGGED, [ONE, ONE], "without row splits"),
    (TF_RAGGED, [ONE, np.array([0, 9])], "do not fit"),
    (TF_RAGGED, [ONE, np.array([0, 2, 1])], "do not fit"),
    (TF_RAGGED, [ONE, np.array([], np.int64)], "do not fit"),
    (TF_RAGGED, [ONE, np.array([[0, 1]])], "do not fit"),
    (TF_RAGGED, [ONE, "x"], "no array"),
    (TF_SPARSE, [INDEX, ONE], "not readable"),
    (TF_SPARSE, [INDEX + 1, ONE, np.array([1])], "outside its shape"),
    (TF_SPARSE, [INDEX - 1, ONE, np.array([1])], "outside its shape"),
    (TF_SPARSE, [INDEX, ONE, np.array([-1])], "outside its shape"),
    (TF_SPARSE, [INDEX, ONE, np.array([1, 1])], "do not fit"),
    (TF_SPARSE, [INDEX, np.ones(2), np.array([1])], "do not fit"),
    (TF_SPARSE, [INDEX.astype(np.int32), ONE, np.array([1])], "do not fit"),
]


@pytest.mark.parametrize(("type_id", "parts", "told"), HOSTILE, ids=range(len(HOSTILE)))
def test_what_no_honest_sender_makes_is_refused(tf: Any, type_id: int, parts: list[Any], told: str) -> None:
    """Parts that do not fit each other never become a tensor."""
    with pytest.raises(DecodeError, match=told):
        decode(crafted(type_id, *parts), [])


@pytest.mark.parametrize("kind", ["tensor", "variable", "sparse", "ragged", "keras"])
def test_without_tensorflow_the_error_names_the_extra(tf: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where TensorFlow is not installed, only what needs it fails, and says what to install."""
    import keras

    value = {
        "tensor": tf.ones([2]),
        "variable": tf.Variable([1.0]),
        "sparse": tf.sparse.eye(2),
        "ragged": tf.ragged.constant([[1], []]),
        "keras": keras.Variable([1.0]),
    }[kind]
    body, buffers = encode({"w": value})
    monkeypatch.setitem(sys.modules, "tensorflow", None)

    with pytest.raises(DecodeError, match=r"value\['w'\].*pip install 'flarebus\[tensorflow\]'"):
        decode(body, buffers)
    assert decode(*encode([1.0])) == [1.0]


def test_the_codec_alone_does_not_import_tensorflow() -> None:
    """Nor does a value that has nothing to do with it."""
    code = (
        "import sys, numpy\nfrom flarebus.codec import decode, encode\n"
        "decode(*encode({'w': numpy.ones(3000)}))\n"
        "assert not {'tensorflow', 'keras'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
