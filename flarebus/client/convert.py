"""Between what a script works with and what the server expects: arrays and tensors, whole models and differences.

Values are looked for in dicts, lists and tuples, however deep; whatever is neither an array nor a tensor passes as it
is, and a container in which nothing changes is returned itself. PyTorch is imported only to make tensors for a script
that wants them, ml_dtypes only for the dtypes that NumPy lacks (bfloat16, float8). Tensors are PyTorch's and,
on the way to arrays, TensorFlow's, variables among them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from flarebus.errors import ClientApiError
from flarebus.tf_values import is_tf_value, tf_array

__all__ = ["difference", "plain_scalar", "private_copy", "to_arrays", "to_tensors"]

# dtypes with the same bits in PyTorch and ml_dtypes and no common exchange: passed on as integers of their size.
_BITS = {
    "bfloat16": "int16",
    "float8_e4m3fn": "uint8",
    "float8_e4m3fnuz": "uint8",
    "float8_e5m2": "uint8",
    "float8_e5m2fnuz": "uint8",
    "float8_e8m0fnu": "uint8",
}

_Path = tuple[Any, ...]
# The values are a user's, of any type: Any is what the functions below are about.
_Leaf = Callable[[Any, _Path], Any]


def to_tensors(value: Any, path: _Path = ()) -> Any:
    """Replace every NumPy array in `value` by a CPU tensor of its shape and dtype.

    Memory is shared with the arrays wherever PyTorch can address it: native byte order, positive strides, writable.
    Arrays of dtypes that PyTorch does not have (text, objects, dates) stay arrays.

    Raises:
        ClientApiError: PyTorch is not installed.
    """
    torch = _import_torch()

    def leaf(item: Any, _: _Path) -> Any:
        return _tensor(item, torch) if isinstance(item, np.ndarray) else item

    return _walk(value, leaf, path)


def to_arrays(value: Any, path: _Path = ()) -> Any:
    """Replace every dense tensor in `value` by an array of its shape and dtype.

    A tensor on the CPU is not copied: the array is its memory. Tensors of PyTorch that are the same memory in the same
    form (tied weights) become one array object. Arrays of what comes from TensorFlow are read-only.

    Raises:
        ClientApiError: a tensor has no dense array (sparse, ragged, quantised, on the meta device, of strings); names
            its path.
    """
    torch = sys.modules.get("torch")
    if torch is None and "tensorflow" not in sys.modules:  # nobody can hold a tensor
        return value
    seen: dict[tuple[Any, ...], np.ndarray[Any, Any]] = {}

    def leaf(item: Any, at: _Path) -> Any:
        if torch is not None and isinstance(item, torch.Tensor):
            return _array(item, torch, at, seen)
        return _tf_array(item, at) if is_tf_value(item) else item

    return _walk(value, leaf, path)


def plain_scalar(value: Any) -> Any:
    """Return the Python number in a NumPy scalar or in an array or tensor of one element; anything else as it is."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.size == 1):
        return value.item()
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    array = tf_array(value)
    return value if array is None or array.size != 1 else array.item()


def private_copy(value: Any) -> Any:
    """Copy every array and tensor in `value`; the copies share no memory with anything. Those of what comes from
    TensorFlow are arrays."""
    torch = sys.modules.get("torch")

    def leaf(item: Any, _: _Path) -> Any:
        if isinstance(item, np.ndarray):
            return np.array(item, order="K", subok=False)
        if torch is not None and isinstance(item, torch.Tensor):
            return item.detach().clone()
        array = tf_array(item)
        return item if array is None else array.copy()

    return _walk(value, leaf, ())


def difference(sent: dict[Any, Any], base: dict[Any, Any]) -> dict[Any, Any]:
    """Subtract `base` from `sent`, entry by entry, in the dtype they have.

    Args:
        sent: the trained parameters: arrays, tensors on any device, numbers, lists and dicts of them. Only read. For
            tensors and variables of TensorFlow the differences are arrays.
        base: what was received, from `private_copy`. *Used up*: where shape and dtype agree the difference is written
            into its memory, so that no third model is held.

    Returns:
        A new dict with the keys of `sent`. Text, booleans and None are those of `sent`; a boolean array says what
        changed.

    Raises:
        ClientApiError: keys or shapes differ, or an unsigned entry got smaller; names them. `base` is still whole.
    """
    sent = _walk(sent, lambda item, _: item if (array := tf_array(item)) is None else array, ())
    _check_alike(sent, base, ("params",))
    return {key: _minus(new, base[key]) for key, new in sent.items()}


def _walk(value: Any, leaf: _Leaf, path: _Path) -> Any:
    if isinstance(value, dict):
        items = {key: _walk(item, leaf, (*path, key)) for key, item in value.items()}
        return items if any(items[key] is not item for key, item in value.items()) else value
    if type(value) in (list, tuple):
        parts = [_walk(item, leaf, (*path, index)) for index, item in enumerate(value)]
        return type(value)(parts) if any(a is not b for a, b in zip(parts, value, strict=True)) else value
    return leaf(value, path)


def _shown(path: _Path) -> str:
    return str(path[0]) + "".join(f"[{key!r}]" for key in path[1:]) if path else "value"


def _import_torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise ClientApiError(
            "this site's exchange format is 'pytorch', but PyTorch cannot be imported here "
            f"({error}); install it, for instance with: pip install 'flarebus[torch]'"
        ) from error
    return torch


def _tensor(array: np.ndarray[Any, Any], torch: ModuleType) -> Any:
    name = array.dtype.name
    if name in _BITS:
        dtype = getattr(torch, name, None)
        return array if dtype is None else _tensor(array.view(_BITS[name]), torch).view(dtype)
    if array.dtype.kind not in "biufc":
        return array
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable:  # PyTorch would let the script write to it all the same
        array = array.copy()
    try:
        return torch.from_numpy(array)
    except ValueError:  # strides that are negative or no multiple of the item
        return torch.from_numpy(array.copy(order="C"))
    except TypeError:  # a dtype that PyTorch does not have, such as longdouble
        return array


def _array(tensor: Any, torch: ModuleType, path: _Path, seen: dict[tuple[Any, ...], np.ndarray[Any, Any]]) -> Any:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else "quantised" if tensor.is_quantized else str(tensor.layout)
        raise ClientApiError(f"{_shown(path)}: a tensor that is {kind} cannot be sent as an array; make it dense first")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
    if tensor.numel() and key in seen:
        return seen[key]
    name = str(tensor.dtype).removeprefix("torch.")
    if name in _BITS:
        import ml_dtypes

        array = tensor.view(getattr(torch, _BITS[name])).numpy().view(getattr(ml_dtypes, name))
    else:
        array = tensor.numpy()
    seen[key] = array
    return array


def _tf_array(value: Any, path: _Path) -> np.ndarray[Any, Any]:
    array = tf_array(value)
    if array is None:
        kind = f"{type(value).__name__} of {value.dtype!r}"
        raise ClientApiError(
            f"{_shown(path)}: a {kind} cannot be sent as an array; make it dense, and of numbers, first"
        )
    return array


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | complex | np.number) and not isinstance(value, bool)


def _is_numeric(value: Any) -> bool:
    """Whether an array or a tensor holds numbers or booleans."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufc" or value.dtype.type.__module__.startswith("ml_dtypes")
    return _is_tensor(value)


def _check_alike(new: Any, old: Any, path: _Path) -> None:
    if isinstance(new, dict) and isinstance(old, dict):
        missing = [repr(key) for key in old if key not in new]
        extra = [repr(key) for key in new if key not in old]
        if missing or extra:
            raise ClientApiError(_keys_differ(path, missing, extra))
        for key, item in new.items():
            _check_alike(item, old[key], (*path, key))
    elif isinstance(new, list | tuple) and isinstance(old, list | tuple):
        if len(new) != len(old):
            raise ClientApiError(f"{_shown(path)}: {len(new)} entries, {len(old)} received; no difference can be sent")
        for index, (item, before) in enumerate(zip(new, old, strict=True)):
            _check_alike(item, before, (*path, index))
    elif _is_numeric(new) and _is_numeric(old):
        _check_arrays(new, old, path)
    elif (_is_numeric(new) or _is_number(new)) != (_is_numeric(old) or _is_number(old)):
        raise ClientApiError(
            f"{_shown(path)}: {type(new).__name__}, but {type(old).__name__} was received; no difference can be sent"
        )


def _keys_differ(path: _Path, missing: list[str], extra: list[str]) -> str:
    def some(keys: list[str]) -> str:
        return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")

    told = []
    if missing:
        told.append(f"received but not sent: {some(missing)}")
    if extra:
        told.append(f"sent but not received: {some(extra)}")
    return (
        f"{_shown(path)}: transfer type DIFF needs the keys that were received ({'; '.join(told)}); "
        "send all of them, or send a difference of your own as params_type=DIFF"
    )


def _check_arrays(new: Any, old: Any, path: _Path) -> None:
    if tuple(new.shape) != tuple(old.shape):
        raise ClientApiError(f"{_shown(path)}: shape {tuple(new.shape)}, but {tuple(old.shape)} was received")
    unsigned = str(new.dtype).removeprefix("torch.").startswith("uint")
    if unsigned and bool((to_arrays(new) < to_arrays(old)).any()):
        raise ClientApiError(f"{_shown(path)}: {new.dtype} cannot hold a negative difference; use transfer type FULL")


def _minus(new: Any, old: Any) -> Any:
    if isinstance(new, dict):
        return {key: _minus(item, old[key]) for key, item in new.items()}
    if isinstance(new, list | tuple):
        return [_minus(item, before) for item, before in zip(new, old, strict=True)]
    if _is_tensor(new) and _is_tensor(old):
        return _minus_tensor(new.detach().to(old.device), old)
    if _is_numeric(new) and _is_numeric(old):
        return _minus_array(to_arrays(new), to_arrays(old))
    if (_is_number(new) or _is_numeric(new)) and (_is_number(old) or _is_numeric(old)):
        return to_arrays(new) - to_arrays(old)
    return new


def _minus_array(new: np.ndarray[Any, Any], old: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if new.dtype.kind == "b" and old.dtype.kind == "b":
        np.logical_xor(new, old, out=old)
        return old
    if new.dtype == old.dtype:
        np.subtract(new, old, out=old)
        return old
    return np.asarray(np.subtract(new, old))


def _minus_tensor(new: Any, old: Any) -> Any:
    torch = sys.modules["torch"]
    if new.dtype is not old.dtype:
        return torch.sub(new, old)
    if new.dtype is torch.bool:
        return torch.logical_xor(new, old, out=old)
    if str(new.dtype).startswith("torch.float8"):  # PyTorch stores float8 but does not compute in it
        return old.copy_(new.float() - old.float())
    return torch.sub(new, old, out=old)
