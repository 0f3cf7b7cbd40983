"""Handlers of TensorFlow tensors and variables. TensorFlow is imported when one arrives, never by this module alone.

A dense tensor travels as an array on its own memory and comes back as a copy, on the CPU if there is no other device. A
variable travels with whether it is trainable; names, constraints and strategies do not travel. A sparse tensor is its
indices, values and shape, a ragged one its flat values and row splits. Tensors of strings are refused, as are those of
a graph, which have no values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flarebus.codec._decoder import Decoder
from flarebus.codec._encoder import Encoder
from flarebus.codec._ids import KERAS_VARIABLE, TF_RAGGED, TF_SPARSE, TF_TENSOR, TF_VARIABLE
from flarebus.codec._numpy import Array, array_node, read_array
from flarebus.codec._registry import Malformed, Refused, Registry
from flarebus.tf_values import tf_array

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["add_tensorflow"]

_OPS = "tensorflow.python"


def add_tensorflow(registry: Registry) -> None:
    """Register tensors and variables, by name."""
    # Keras has moved its class from one module to the other.
    keras_names = ("keras.src.backend:Variable", "keras.src.backend.tensorflow.core:Variable")
    ragged, sparse = f"{_OPS}.ops.ragged.ragged_tensor:RaggedTensor", f"{_OPS}.framework.sparse_tensor:SparseTensor"
    registry.add_handlers(TF_TENSOR, (f"{_OPS}.framework.ops:EagerTensor",), _encode_tensor, _decode_tensor)
    registry.add_handlers(
        TF_VARIABLE, (f"{_OPS}.ops.resource_variable_ops:ResourceVariable",), _encode_variable, _decode_variable
    )
    registry.add_handlers(TF_RAGGED, (ragged,), _encode_ragged, _decode_ragged)
    registry.add_handlers(TF_SPARSE, (sparse,), _encode_sparse, _decode_sparse)
    registry.add_handlers(KERAS_VARIABLE, keras_names, _encode_keras_variable, _decode_keras_variable)


# -- out ----------------------------------------------------------------------------------------------------------


def _encode_tensor(value: tf.Tensor, sink: Encoder, depth: int) -> list[Any]:
    return [TF_TENSOR, *_dense_node(value, sink)]


def _encode_variable(value: tf.Variable, sink: Encoder, depth: int) -> list[Any]:
    return [TF_VARIABLE, bool(value.trainable), *_dense_node(value, sink)]


def _encode_keras_variable(value: Any, sink: Encoder, depth: int) -> list[Any]:
    return [KERAS_VARIABLE, bool(value.trainable), *_dense_node(value, sink)]


def _dense_node(value: Any, sink: Encoder) -> list[Any]:
    array = tf_array(value)
    if array is None:
        raise Refused(f"a tensor of {value.dtype}", "send value.numpy().tolist(), or make it a tensor of numbers")
    return array_node(array, sink)


def _encode_ragged(value: tf.RaggedTensor, sink: Encoder, depth: int) -> list[Any]:
    return _parts(TF_RAGGED, [value.flat_values, *value.nested_row_splits], sink, depth)


def _encode_sparse(value: tf.SparseTensor, sink: Encoder, depth: int) -> list[Any]:
    return _parts(TF_SPARSE, [value.indices, value.values, value.dense_shape], sink, depth)


def _parts(type_id: int, tensors: list[Any], sink: Encoder, depth: int) -> list[Any]:
    sink.charge(len(tensors), depth)
    return [type_id, *(_dense_node(tensor, sink) for tensor in tensors)]


# -- in -----------------------------------------------------------------------------------------------------------


def _decode_tensor(node: list[Any], source: Decoder, depth: int) -> tf.Tensor:
    return _tensorflow().constant(_numbers(node[1:], source))


def _decode_variable(node: list[Any], source: Decoder, depth: int) -> tf.Variable:
    return _tensorflow().Variable(_numbers(node[2:], source), trainable=_flag(node[1]))


def _decode_keras_variable(node: list[Any], source: Decoder, depth: int) -> Any:
    _tensorflow()  # Keras without its backend would fail in words of its own
    import keras

    array = _numbers(node[2:], source)
    return keras.Variable(array, trainable=_flag(node[1]), dtype=array.dtype.name)


def _decode_ragged(node: list[Any], source: Decoder, depth: int) -> tf.RaggedTensor:
    tf = _tensorflow()
    values, *splits = [_numbers(part, source) for part in node[1:]]
    if not splits or any(each.dtype.name not in ("int32", "int64") for each in splits):
        raise Malformed("a ragged tensor without row splits that are whole numbers")
    try:
        return tf.RaggedTensor.from_nested_row_splits(tf.constant(values), splits, validate=True)
    except (ValueError, tf.errors.InvalidArgumentError) as error:
        raise Malformed("a ragged tensor whose row splits do not fit its values") from error


def _decode_sparse(node: list[Any], source: Decoder, depth: int) -> tf.SparseTensor:
    tf = _tensorflow()
    indices, values, shape = [_numbers(part, source) for part in node[1:]]
    # What is made of it later, such as a dense tensor, relies on this.
    if indices.dtype.name != "int64" or shape.dtype.name != "int64" or indices.shape != (*values.shape, *shape.shape):
        raise Malformed("a sparse tensor whose parts do not fit each other")
    if values.ndim != 1 or shape.ndim != 1 or (shape < 0).any() or ((indices < 0) | (indices >= shape)).any():
        raise Malformed("a sparse tensor with values outside its shape")
    return tf.SparseTensor(indices, values, shape)


def _numbers(node: Any, source: Decoder) -> Array:
    if type(node) is not list:
        raise Malformed("no array where one belongs")
    array = read_array(node, source)
    if array.dtype.kind not in "biufcV" or not array.dtype.isnative:
        raise Malformed(f"a TensorFlow tensor of dtype {array.dtype}")
    return array


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise Malformed("a variable without its flag")
    return value


def _tensorflow() -> Any:
    try:
        import tensorflow
    except ImportError as error:
        raise Malformed(
            "a TensorFlow tensor came, and TensorFlow is not here: pip install 'flarebus[tensorflow]'"
        ) from error
    return tensorflow
