"""Tensor files: models as safetensors, written in place and read by mapping.

The safetensors library writes a file in one go from memory; here a file is laid out once and then mapped, so that a new
model is computed straight into its pages, round after round. The format is so small that this is the whole of it:

    8 bytes little-endian n | n bytes of JSON: {name: {dtype, shape, data_offsets}, "__metadata__": {...}} | data

What it has no word for (nested dicts, numbers, text, complex or big-endian arrays) is kept in its metadata, so that any
`FLModel.params` comes back as it was; other readers see the arrays, under dotted names.
"""

from __future__ import annotations

import base64
import json
import math
import mmap
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from flarebus.codec import decode, encode
from flarebus.errors import DecodeError, FlarebusError
from flarebus.wire import MAX_BODY_BYTES
from flarebus.workflow.params import as_array, flatten, is_flat, rebuild

__all__ = ["Layout", "MappedFile", "load_params", "save_params"]

_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_BY_WORD = {word: name for name, word in _DTYPES.items()}
# Data begins on a cache line, and every tensor on a multiple of its item size because larger items come first.
ALIGNMENT = 64
MAX_HEADER_BYTES = 100_000_000
_STRUCTURE = "flarebus.structure"
_NUMPY_DTYPES = "flarebus.numpy_dtypes"


@dataclass(frozen=True)
class _Tensor:
    word: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


class Layout:
    """Where each array of a model lies in its file.

    Args:
        params: the model; only shapes, dtypes and values that are no arrays are read.
    """

    def __init__(self, params: Mapping[Any, Any]) -> None:
        arrays = {name: array for name, leaf in flatten(params).items() if (array := as_array(leaf)) is not None}
        self.tensors: dict[str, _Tensor] = {}
        odd = {}
        end = 0
        for name, array in sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize):
            word = _word(array.dtype)
            if word is None:
                # As bytes for others; its real dtype is noted for us.
                odd[name] = array.dtype.str
            begin, end = end, end + array.nbytes
            shape = array.shape if word else (*array.shape, array.dtype.itemsize)
            self.tensors[name] = _Tensor(word or "U8", array.dtype, shape, begin, end)
        self.header = self._header(params, arrays, odd)
        self.nbytes = len(self.header) + end

    def _header(self, params: Mapping[Any, Any], arrays: Mapping[str, Any], odd: Mapping[str, str]) -> bytes:
        metadata = {"format": "pt"}
        if odd:
            metadata[_NUMPY_DTYPES] = json.dumps(odd)
        if not is_flat(params) or len(arrays) < len(params):
            skeleton = encode(rebuild(params, dict.fromkeys(arrays)), externalise_from=MAX_BODY_BYTES).body
            metadata[_STRUCTURE] = base64.b64encode(skeleton).decode()
        fields: dict[str, Any] = {"__metadata__": metadata}
        for name, tensor in self.tensors.items():
            fields[name] = {
                "dtype": tensor.word,
                "shape": list(tensor.shape),
                "data_offsets": [tensor.begin, tensor.end],
            }
        text = json.dumps(fields, separators=(",", ":")).encode()
        padded = text.ljust(-(-(len(text) + 8) // ALIGNMENT) * ALIGNMENT - 8)
        return len(padded).to_bytes(8, "little") + padded

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.header == other.header

    def __hash__(self) -> int:
        return hash(self.header)


class MappedFile:
    """A tensor file whose arrays are its pages: what is written to them is written to the file.

    Args:
        path: made, or laid out anew if it is there.
        layout: of the model.

    Raises:
        OSError: the disk is full; said now, because later it could only be said by killing the process.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _reserve(handle, layout.nbytes)
            os.pwrite(handle, layout.header, 0)
            self._map = mmap.mmap(handle, layout.nbytes)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        self.arrays: dict[str, NDArray[Any]] = {}
        for name, tensor in layout.tensors.items():
            self.arrays[name] = _view(self._map, len(layout.header) + tensor.begin, tensor)

    def sync(self) -> None:
        """Return when what was written is durable."""
        # Not mmap.flush: that keeps all other threads of Python waiting for the disk.
        os.fdatasync(self._handle) if hasattr(os, "fdatasync") else os.fsync(self._handle)

    def rename(self, path: Path) -> None:
        """Give the file another name, replacing what has it; arrays stay valid."""
        os.replace(self.path, path)
        self.path = path

    def close(self) -> None:
        """Let go; pages stay mapped for as long as somebody holds an array."""
        self.arrays = {}
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def save_params(params: Mapping[Any, Any], path: Path) -> None:
    """Write a model to `path`, whole or not at all; durable when this returns.

    Raises:
        OSError: it could not be written; what was there before still is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        file = MappedFile(temporary, Layout(params))
        try:
            fill(file.arrays, params)
            file.sync()
            file.rename(path)
        finally:
            file.close()
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def fill(arrays: Mapping[str, NDArray[Any]], params: Mapping[Any, Any]) -> None:
    """Copy the arrays of a model to their places."""
    for name, leaf in flatten(params).items():
        array = as_array(leaf)
        if array is not None and array is not arrays[name]:
            np.copyto(arrays[name], array)


def load_params(path: Path) -> dict[Any, Any]:
    """Map a tensor file. Arrays are copy-on-write: the file never changes, and untouched pages are not our memory.

    Raises:
        DecodeError: it is no tensor file, or does not hold what its header says.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        tensors, metadata, start = _read_header(path, file, size)
        pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    arrays: dict[Any, Any] = {name: _view(pages, start + tensor.begin, tensor) for name, tensor in tensors.items()}
    structure = metadata.get(_STRUCTURE)
    if structure is None:
        return arrays
    try:
        return rebuild(decode(base64.b64decode(structure, validate=True), ()), arrays)
    except (FlarebusError, ValueError, AttributeError) as error:
        raise DecodeError(f"{path}: its structure cannot be read: {error}") from error


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, _Tensor], dict[str, str], int]:
    try:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError("it is shorter than its header says")
        fields = json.loads(file.read(length))
        metadata = fields.pop("__metadata__", {})
        odd = json.loads(metadata.get(_NUMPY_DTYPES, "{}"))
        start = 8 + length
        tensors = {name: _tensor(name, entry, odd.get(name), size - start) for name, entry in fields.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DecodeError(f"{path}: not a whole safetensors file: {error}") from error
    return tensors, metadata, start


def _tensor(name: str, entry: Any, odd: str | None, available: int) -> _Tensor:
    word, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if word not in _BY_WORD:
        raise ValueError(f"{name!r} has the unknown dtype {word!r}")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or not begin <= end <= available:
        raise ValueError(f"{name!r} lies outside the file")
    dtype = _numpy_dtype(_BY_WORD[word]) if odd is None else np.dtype(odd)
    if dtype.hasobject:
        raise ValueError(f"{name!r} has a dtype that is no numbers")
    if math.prod(shape) * (1 if odd is not None else dtype.itemsize) != end - begin:
        raise ValueError(f"{name!r} has another size than its shape says")
    return _Tensor(word, dtype, shape, begin, end)


def _view(pages: mmap.mmap, offset: int, tensor: _Tensor) -> NDArray[Any]:
    """The array at `offset` of a mapping; dtypes that the format lacks have an axis of bytes too many there."""
    shape = tensor.shape if _word(tensor.dtype) else tensor.shape[:-1]
    count = (tensor.end - tensor.begin) // tensor.dtype.itemsize
    return np.frombuffer(pages, tensor.dtype, count, offset).reshape(shape)


def _word(dtype: np.dtype[Any]) -> str | None:
    return _DTYPES.get(dtype.name) if dtype.isnative else None


def _numpy_dtype(name: str) -> np.dtype[Any]:
    if name.startswith(("bfloat", "float8")):
        import ml_dtypes  # costs 20 ms that models without such dtypes need not pay

        name = getattr(ml_dtypes, name)
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype


def _reserve(handle: int, nbytes: int) -> None:
    os.ftruncate(handle, nbytes)
    if sys.platform == "linux":
        os.posix_fallocate(handle, 0, nbytes)


def sync_folder(folder: Path) -> None:
    """Make names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
