"""Handlers of NumPy arrays and scalars, for a closed table of dtypes.

An array is on the wire as dtype number, reference and shape; its bytes go out as they lie in memory. Arrays in Fortran
order, or with axes permuted in memory, travel as they are, with their strides; those with gaps are copied once.
Object arrays and structured arrays are refused. `ml_dtypes` is imported when one of its dtypes arrives, not before.
"""

from __future__ import annotations

import sys
from functools import cache, lru_cache
from math import prod
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

from flarebus.codec._decoder import Decoder
from flarebus.codec._encoder import Encoder, Region
from flarebus.codec._ids import NDARRAY, NDARRAY_VIEW, NUMPY_SCALAR
from flarebus.codec._registry import Malformed, Refused, Registry

__all__ = ["Array", "add_numpy", "array_node", "read_array", "view_node"]

Array = np.ndarray[Any, Any]

# Numbers of dtypes. Those that end up in a memoryview without further ado come first; never renumber.
_SIMPLE = ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_COMPLEX = ("c8", "c16")
_FIRST_SIMPLE, _FIRST_COMPLEX, _FIRST_ML, _FIRST_TIME = 1, 20, 64, 128
_CASTABLE = _FIRST_COMPLEX  # numbers below: the buffer protocol knows the format
_SWAPPED = 32  # added for byte orders other than little-endian
_ML_NAMES = (
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e4m3b11fnuz",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e8m0fnu",
    "float6_e2m3fn",
    "float6_e3m2fn",
    "float4_e2m1fn",
    "int4",
    "uint4",
    "int2",
    "uint2",
    "int1",
    "uint1",
    "complex32",
    "bcomplex32",
)
_UNITS = ("generic", "Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as")
_TEXT = 250  # 'S' and, one above, 'U'; big-endian 'U' another one above; with the item size above the lowest 8 bits
_MAX_TEXT = 1 << 16  # characters an item
_LARGEST_CODE_POINT = 0x10FFFF


def _numbered() -> dict[int, np.dtype[Any]]:
    table: dict[int, np.dtype[Any]] = {}
    for first, names in ((_FIRST_SIMPLE, _SIMPLE), (_FIRST_COMPLEX, _COMPLEX)):
        for number, name in enumerate(names, first):
            table[number] = np.dtype(f"<{name}")
            if table[number].itemsize > 1:
                table[number + _SWAPPED] = np.dtype(f">{name}")
    for kind, first in (("M", _FIRST_TIME), ("m", _FIRST_TIME + 32)):
        for number, unit in enumerate(_UNITS, first):
            suffix = "" if unit == "generic" else f"[{unit}]"
            table[number] = np.dtype(f"<{kind}8{suffix}")
            table[number + 16] = np.dtype(f">{kind}8{suffix}")
    return table


_BY_NUMBER = _numbered()
_BY_DTYPE = {dtype: number for number, dtype in _BY_NUMBER.items()}
# Types of C that are the same as another one: they compare equal but may hash apart.
_BY_DTYPE |= {np.dtype(char): _BY_DTYPE[np.dtype(np.dtype(char).str)] for char in "bBhHiIlLqQ"}
_SCALARS = tuple(
    {np.dtype(name).type for name in _SIMPLE + _COMPLEX}
    | {np.dtype(char).type for char in "bBhHiIlLqQ"}
    | {np.datetime64, np.timedelta64, np.str_, np.bytes_}
)


def add_numpy(registry: Registry) -> None:
    """Register arrays (also mapped ones, which come back as plain arrays) and scalars."""
    scalars = _SCALARS + tuple(f"ml_dtypes:{name}" for name in _ML_NAMES)
    registry.add_handlers(NDARRAY, (np.ndarray, np.memmap), array_node, read_array)
    registry.add_handlers(NDARRAY_VIEW, (), None, read_array)
    registry.add_handlers(NUMPY_SCALAR, scalars, _encode_scalar, _decode_scalar)


@cache
def _ml_dtypes() -> dict[int, np.dtype[Any]]:
    import ml_dtypes

    found = ((number, getattr(ml_dtypes, name, None)) for number, name in enumerate(_ML_NAMES, _FIRST_ML))
    return {number: np.dtype(kind) for number, kind in found if kind is not None}


@lru_cache(maxsize=256)
def _number_of(dtype: np.dtype[Any]) -> int:
    """Return the number of a dtype that is not in the table of common ones."""
    if dtype.char == "S" or dtype.char == "U":
        number = _TEXT + (dtype.char == "U") + (dtype.char == "U" and not _is_little(dtype))
        length = dtype.itemsize // (4 if dtype.char == "U" else 1)
        if length <= _MAX_TEXT:
            return number + (length << 8)
    if "ml_dtypes" in sys.modules:
        for number, known in _ml_dtypes().items():
            if known == dtype:
                return number
    raise Refused(f"an array of dtype {dtype}", _hint(dtype))


def _is_little(dtype: np.dtype[Any]) -> bool:
    return dtype.byteorder == "<" or (dtype.byteorder == "=" and sys.byteorder == "little")


def _hint(dtype: np.dtype[Any]) -> str:
    if dtype.hasobject:
        return "objects do not travel; make it numeric, or send value.tolist()"
    if dtype.names is not None:
        return "send its fields as a dict of arrays"
    if dtype.char in "gG":
        return "its size differs between machines; convert it to float64 or complex128"
    return "convert it to a numeric dtype"


def _dtype_of(number: Any) -> np.dtype[Any]:
    """Return the dtype of a number from the wire."""
    if type(number) is not int:
        raise Malformed("a dtype that is no number")
    if number in _BY_NUMBER:
        return _BY_NUMBER[number]
    if _FIRST_ML <= number < _FIRST_ML + len(_ML_NAMES) and number in _ml_dtypes():
        return _ml_dtypes()[number]
    length, kind = number >> 8, (number & 255) - _TEXT
    if not 0 <= kind <= 2 or not 0 <= length <= _MAX_TEXT:
        raise Malformed(f"unknown dtype number {number}")
    return np.dtype(f"{('S', '<U', '>U')[kind]}{length}")


# -- out ----------------------------------------------------------------------------------------------------------


def array_node(value: Array, sink: Encoder, depth: int = 0) -> list[Any]:
    """Return the node of an array: ``[NDARRAY, dtype, reference, *shape]`` or its form with strides."""
    dtype = value.dtype
    number = _BY_DTYPE.get(dtype)
    if number is None:
        number = _number_of(dtype)
    n_bytes = value.nbytes
    if not n_bytes:
        return [NDARRAY, number, None, *value.shape]
    if sink.regions is not None or not value.flags.c_contiguous:
        return _strided_node(value, number, sink)
    view = value.data.cast("B") if number < _CASTABLE else _flat_bytes(value)
    return [NDARRAY, number, sink.place(view, n_bytes), *value.shape]


def _flat_bytes(value: Array) -> memoryview:
    """Return the bytes of a C-contiguous array, not copied, whatever its dtype."""
    return value.reshape(-1).view(np.uint8).data


def view_node(
    dtype: np.dtype[Any], reference: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> list[Any]:
    """Return the node of an array with strides, `offset` bytes into what `reference` names."""
    number = _BY_DTYPE.get(dtype)
    if number is None:
        number = _number_of(dtype)
    return [NDARRAY_VIEW, number, reference, offset, len(shape), *shape, *strides]


def _strided_node(value: Array, number: int, sink: Encoder) -> list[Any]:
    low, high = byte_bounds(value)
    shape = value.shape
    # NumPy leaves any number as the stride of an axis of length one.
    strides = tuple(value.itemsize if dim == 1 else stride for dim, stride in zip(shape, value.strides, strict=True))
    region = sink.region_of(low, high - low)
    if region is not None and min(strides, default=0) >= 0 and value.nbytes <= region.end - region.start:
        reference = sink.place_region(region, lambda: _span(region, value).data)
        return view_node(value.dtype, reference, low - region.start, shape, strides)
    if value.flags.c_contiguous:
        return [NDARRAY, number, sink.place(_flat_bytes(value), value.nbytes), *shape]
    if (axes := _dense_axes(value)) is not None:
        reference = sink.place(_flat_bytes(value.transpose(axes)), value.nbytes)
        return view_node(value.dtype, reference, 0, shape, strides)
    key = (low, high - low, value.nbytes, number, shape, strides)
    reference = sink.place_copy(key, value, lambda: _flat_bytes(np.ascontiguousarray(value)))
    return [NDARRAY, number, reference, *shape]


def _dense_axes(value: Array) -> list[int] | None:
    """Return the order of axes in which the array is C-contiguous, or None: gaps, overlaps, negative strides."""
    axes = sorted(range(value.ndim), key=lambda axis: (value.strides[axis], value.shape[axis]), reverse=True)
    return axes if value.transpose(axes).flags.c_contiguous else None


class _Span:
    """Memory by its address, for NumPy to read; keeps the array alive that it belongs to."""

    def __init__(self, start: int, n_bytes: int, owner: Array) -> None:
        self.owner = owner
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (n_bytes,), "data": (start, True)}


def _span(region: Region, member: Array) -> Array:
    """Return the bytes of a region, (n_bytes,) uint8, not copied: overlapping arrays lie in one allocation."""
    return np.asarray(_Span(region.start, region.end - region.start, member))


def _encode_scalar(value: np.generic, sink: Encoder, depth: int) -> list[Any]:
    if isinstance(value, np.str_):  # as text: NumPy's fixed width would lose NULs at the end
        return [NUMPY_SCALAR, _TEXT + 1, sink.plain(str(value), depth + 1)]
    if isinstance(value, np.bytes_):
        return [NUMPY_SCALAR, _TEXT, sink.plain(bytes(value), depth + 1)]
    dtype = np.dtype(value.dtype)
    number = _BY_DTYPE.get(dtype)
    return [NUMPY_SCALAR, _number_of(dtype) if number is None else number, value.tobytes()]


# -- in -----------------------------------------------------------------------------------------------------------


def read_array(node: list[Any], source: Decoder, depth: int = 0) -> Array:
    """Return the array of a node: writable and aligned, on the buffer itself where that allows it."""
    form, number, reference = node[0], node[1], node[2]
    dtype = _BY_NUMBER.get(number)
    if dtype is None:
        dtype = _dtype_of(number)
    strides, offset = None, 0
    if form == NDARRAY:
        shape = node[3:]
    elif form == NDARRAY_VIEW:
        shape, strides, offset = _read_view(node)
    else:
        raise Malformed("no array where one belongs")
    for dim in shape:
        if type(dim) is not int or dim < 0:
            raise Malformed("a shape that is not of whole numbers from 0")
    n_bytes = prod(shape) * dtype.itemsize
    if reference is None:
        if n_bytes or strides:
            raise Malformed("an array without its bytes")
        return np.ndarray(shape, dtype, bytearray(16))  # an empty one would not be aligned
    if not n_bytes:
        raise Malformed("bytes for an array that has none")
    if strides is None:
        found = source.array(reference, shape, dtype, n_bytes)
    else:
        found = source.array_view(reference, shape, dtype, n_bytes, offset, strides)
    if dtype.kind in "bU":
        _check_content(found, reference, offset, source)
    return found


def _read_view(node: list[Any]) -> tuple[list[int], list[int], int]:
    """Return shape, strides and offset of the form with strides; the shape is checked by the caller."""
    offset, n_dims = node[3:5]
    shape, strides = node[5 : 5 + n_dims], node[5 + n_dims :]
    if len(shape) != len(strides):
        raise Malformed("as many strides as dimensions are needed")
    for number in (offset, *strides):
        if type(number) is not int or number < 0:
            raise Malformed("an offset or a stride that is no whole number from 0")
    return shape, strides, offset


def _check_content(found: Array, reference: int, offset: int, source: Decoder) -> None:
    """Refuse bytes that no bool and no string can have: NumPy's own code relies on their absence."""
    if not source.may_scan(reference, offset, found.nbytes):
        return
    if found.dtype.kind == "b":
        if found.view(np.uint8).max() > 1:
            raise Malformed("a bool that is neither 0 nor 1")
        return
    order = found.dtype.byteorder
    codes = np.ascontiguousarray(found).reshape(-1).view(np.dtype(np.uint32).newbyteorder(order))
    if codes.max() > _LARGEST_CODE_POINT:
        raise Malformed("a character beyond Unicode")


def _decode_scalar(node: list[Any], source: Decoder, depth: int) -> Any:
    _, number, data = node
    if number == _TEXT or number == _TEXT + 1:
        text = source.value(data, depth + 1)
        if type(text) is not (bytes if number == _TEXT else str):
            raise Malformed("something else where text belongs")
        return np.bytes_(text) if number == _TEXT else np.str_(text)
    dtype = _dtype_of(number)
    if type(data) is not bytes or len(data) != dtype.itemsize or not data:
        raise Malformed("a scalar with too few or too many bytes")
    if dtype.kind == "b" and data > b"\x01":
        raise Malformed("a bool that is neither 0 nor 1")
    return np.frombuffer(data, dtype)[0]
