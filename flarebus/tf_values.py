"""What TensorFlow holds, as arrays, and back. TensorFlow is never imported here: whoever has such a value has it, too.

Keras variables belong to it as long as they live in TensorFlow, Keras' usual backend.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["is_tf_value", "tf_array", "tf_like"]


def is_tf_value(value: Any) -> bool:
    """Whether `value` is a tensor, dense or not, or a variable."""
    tf: Any = sys.modules.get("tensorflow")
    if tf is None:
        return False
    kinds = ("Tensor", "Variable", "RaggedTensor", "SparseTensor", "IndexedSlices")
    return any(_is(value, tf, kind) for kind in kinds) or _is_keras_variable(value, tf)


def tf_array(value: Any) -> NDArray[Any] | None:
    """Return a read-only array on the memory of a dense tensor or variable of numbers; None for everything else.

    Tensors never change, and a variable that is assigned to gets memory of its own, so the array is what `value` is
    now, for ever. One on another device is copied from there. dtypes that NumPy lacks come as `ml_dtypes`.
    """
    tf: Any = sys.modules.get("tensorflow")
    if tf is None:
        return None
    if _is_keras_variable(value, tf):
        value = value.value
    if _is(value, tf, "Variable"):
        value = value.read_value()
    # Symbolic tensors, those of a graph, have no `numpy`.
    if not _is(value, tf, "Tensor") or not hasattr(value, "numpy"):
        return None
    dtype = value.dtype
    if not (dtype.is_floating or dtype.is_integer or dtype.is_complex or dtype.is_bool):  # strings, quantised ones
        return None
    array = np.asarray(value.__array__())
    array.flags.writeable = False
    return array


def tf_like(array: NDArray[Any], leaf: Any) -> Any:
    """Return a copy of `array` as the kind of thing that `leaf` is: a tensor, a variable or a Keras variable."""
    tf: Any = sys.modules["tensorflow"]  # it is there: `leaf` belongs to it
    if _is_keras_variable(leaf, tf):
        return type(leaf)(array, trainable=leaf.trainable, dtype=leaf.dtype)
    if isinstance(leaf, tf.Variable):
        return tf.Variable(array, trainable=leaf.trainable)
    return tf.constant(array)


def _is_keras_variable(value: Any, tf: Any) -> bool:
    return _is(value, sys.modules.get("keras"), "Variable") and _is(value.value, tf, "Variable")


def _is(value: Any, module: Any, kind: str) -> bool:
    # An import on another thread may be half done; nobody holds a value of it then.
    return isinstance(value, getattr(module, kind, ()))
