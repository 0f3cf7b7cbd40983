"""Params: nested parameters as flat names and back, and one array view of everything that holds numbers.

Not a codec: nothing is copied and nothing becomes bytes. A leaf is any value that is no dict, list or tuple; its name
is the keys and indexes on the way to it, joined with dots.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flarebus.errors import ConfigError
from flarebus.tf_values import is_tf_value, tf_array, tf_like

__all__ = ["as_array", "flatten", "is_flat", "is_number_dtype", "rebuild", "restore"]

# A model nested deeper than this is a mistake, and recursion has to end somewhere.
_MAX_DEPTH = 64
_CONTAINERS = (dict, list, tuple)


def is_flat(params: Mapping[Any, Any]) -> bool:
    """Whether every key is a string and no value a container, so that `params` are their own flat form."""
    return all(type(key) is str and not isinstance(value, _CONTAINERS) for key, value in params.items())


def flatten(params: Mapping[Any, Any]) -> dict[str, Any]:
    """Return dotted name -> leaf, in the order of `params`; leaves by reference.

    Raises:
        ConfigError: two leaves have the same name, or the nesting is too deep.
    """
    found: dict[str, Any] = {}
    for name, leaf in _walk("", params, 0):
        if name in found:
            raise ConfigError("params", name, "two values have this dotted name; rename one of them")
        found[name] = leaf
    return found


def _walk(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, _CONTAINERS):
        yield name, value
        return
    if depth >= _MAX_DEPTH:
        raise ConfigError("params", name, f"nested deeper than {_MAX_DEPTH} levels")
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _walk(f"{name}.{key}" if depth else str(key), item, depth + 1)


def rebuild(params: Mapping[Any, Any], leaves: Mapping[str, Any]) -> dict[Any, Any]:
    """Return `params` in fresh containers with every leaf that `leaves` names replaced."""
    return {key: _replaced(str(key), value, leaves) for key, value in params.items()}


def _replaced(name: str, value: Any, leaves: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(f"{name}.{key}", item, leaves) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_replaced(f"{name}.{index}", item, leaves) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return leaves.get(name, value)


def as_array(leaf: Any) -> NDArray[Any] | None:
    """Return an array on the memory of `leaf`, or None if it is neither array, NumPy scalar, dense tensor nor variable.

    A NumPy scalar becomes a 0-d array (a copy), a tensor on another device is copied to the CPU. Tensors of dtypes that
    NumPy lacks come as `ml_dtypes`. What comes from TensorFlow is read-only. No framework is ever imported here.
    """
    if isinstance(leaf, np.ndarray):
        return leaf
    if isinstance(leaf, np.generic):
        return np.asarray(leaf)
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(leaf, getattr(torch, "Tensor", ())):
        return _tensor_view(torch, leaf)
    return tf_array(leaf)


def _tensor_view(torch: Any, leaf: Any) -> NDArray[Any] | None:
    if leaf.layout is not torch.strided or leaf.is_quantized:
        return None
    tensor = leaf.detach().cpu().resolve_conj().resolve_neg()
    name = str(tensor.dtype).removeprefix("torch.")
    if name.startswith(("bfloat", "float8")):
        import ml_dtypes  # costs 20 ms that models without such dtypes need not pay

        carrier = torch.int16 if tensor.element_size() == 2 else torch.uint8
        raw: NDArray[Any] = tensor.view(carrier).numpy()
        dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return raw.view(dtype)
    plain: NDArray[Any] = tensor.numpy()
    return plain


def restore(array: NDArray[Any], leaf: Any) -> Any:
    """Return `array` as the kind of thing `leaf` is: array, NumPy scalar, or tensor on the same memory; for
    TensorFlow, a tensor or variable on memory of its own."""
    if isinstance(leaf, np.generic):
        return array[()]
    if isinstance(leaf, np.ndarray):
        return array
    if is_tf_value(leaf):
        return tf_like(array, leaf)
    torch = sys.modules["torch"]  # it is there: `leaf` is a tensor
    if not array.dtype.type.__module__.startswith("ml_dtypes"):
        return torch.from_numpy(array)
    carrier = np.int16 if array.dtype.itemsize == 2 else np.uint8
    return torch.from_numpy(array.view(carrier)).view(getattr(torch, array.dtype.name))


def is_number_dtype(dtype: np.dtype[Any]) -> bool:
    """Whether arrays of `dtype` can be averaged: integers, floats (also of `ml_dtypes`) and complex numbers."""
    if dtype.kind in "Vf" and dtype.type.__module__.startswith("ml_dtypes"):
        return "float" in dtype.name
    return dtype.kind in "iufc"
