"""Tensor files: models as safetensors, written in place and read by mapping.

The safetensors library writes a file in one go from memory; here a file is laid out once and then mapped, so that a new
model is computed straight into its pages, round after round. The format is so small that this is the whole of it:

    8 bytes little-endian n | n bytes of JSON: {name: {dtype, shape, data_offsets}, "__metadata__": {...}} | data

What it has no word for (nested dicts, numbers, text, complex or big-endian arrays) is kept in its metadata, so that any
`FLModel.params` comes back as it was; other readers see the arrays, under dotted names, and long texts as bytes.
"""

from __future__ import annotations

import base64
import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from flarebus.codec import decode, encode
from flarebus.errors import DecodeError, EncodeError, FlarebusError
from flarebus.workflow.params import as_array, flatten, is_flat, rebuild

__all__ = ["Layout", "MappedFile", "load_params", "save_params", "sync_folder"]

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
# C64 is young: we read it, and write complex numbers in a way that older readers know.
_BY_WORD = {word: name for name, word in _DTYPES.items()} | {"C64": "complex64"}
# Data begins on a cache line, and every tensor on a multiple of its item size because larger items come first.
ALIGNMENT = 64
MAX_HEADER_BYTES = 100_000_000
# Up to here a model is held in memory beside its file: three files of this size do not matter to a server.
HELD_BYTES = 4 * 1024 * 1024
_MAX_DIMENSIONS = 64  # of NumPy
# Text and bytes from here on are data, not header.
_LONG_BYTES = 4096
_BLOB = "flarebus.blob."
_ZEROS = bytes(1 << 20)
_METADATA = "__metadata__"
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

    Raises:
        EncodeError: a value cannot be saved; says which.
    """

    def __init__(self, params: Mapping[Any, Any]) -> None:
        arrays = {name: array for name, leaf in flatten(params).items() if (array := as_array(leaf)) is not None}
        structure, self._blobs = _structure(params, arrays)
        arrays |= self._blobs
        if _METADATA in arrays:
            raise EncodeError(f"params[{_METADATA!r}]", "a name that the file format keeps for itself", "rename it")
        tensors: dict[str, _Tensor] = {}
        odd = {}
        end = 0
        for name, array in sorted(arrays.items(), key=lambda item: -item[1].dtype.alignment):
            if array.dtype.hasobject:
                raise EncodeError(f"params[{name!r}]", "an array of Python objects", "save plain numbers")
            word = _word(array.dtype)
            if word is None:
                # As bytes for others; its real dtype is noted for us.
                odd[name] = array.dtype.name if _is_ml(array.dtype) else array.dtype.str
            begin, end = end, end + array.nbytes
            shape = array.shape if word else (*array.shape, array.dtype.itemsize)
            tensors[name] = _Tensor(word or "U8", array.dtype, shape, begin, end)
        self.tensors = {name: tensors[name] for name in arrays}  # a reader finds them in the order of the model
        self.header = self._header(structure, odd)
        self.nbytes = len(self.header) + end

    def fill(self, arrays: Mapping[str, NDArray[Any]], params: Mapping[Any, Any]) -> None:
        """Copy the model that this layout was made for to its places in a file of an equal layout."""
        for name, leaf in (flatten(params) | self._blobs).items():
            array = as_array(leaf)
            if array is not None and array is not arrays[name]:
                np.copyto(arrays[name], array)

    def _header(self, structure: str | None, odd: Mapping[str, str]) -> bytes:
        metadata = {"format": "pt"}
        if odd:
            metadata[_NUMPY_DTYPES] = json.dumps(odd)
        if structure is not None:
            metadata[_STRUCTURE] = structure
        fields: dict[str, Any] = {_METADATA: metadata}
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
    """A tensor file whose arrays are its pages: what is written to them is in the file after `sync`.

    The arrays of a small file are memory of their own, which `sync` writes in one go: pages of a file are protected
    when they are written out, and the next write to each costs a fault, which is more than to copy it.

    Args:
        path: made; must not be there.
        layout: of the model.

    Raises:
        OSError: the disk is full; said now, because later only a signal could say it. No file is left.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _reserve(handle, layout.nbytes)
            os.pwrite(handle, layout.header, 0)
            self._is_held = layout.nbytes <= HELD_BYTES
            self._map = mmap.mmap(-1 if self._is_held else handle, layout.nbytes)
        except BaseException as error:
            os.close(handle)
            path.unlink()
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(path)  # calls on a handle do not know it
            raise
        self._handle = handle
        self.arrays: dict[str, NDArray[Any]] = {}
        for name, tensor in layout.tensors.items():
            self.arrays[name] = _view(self._map, len(layout.header) + tensor.begin, tensor)

    def sync(self) -> None:
        """Return when the file holds durably what the arrays hold.

        Raises:
            OSError: the disk is full, or fails.
        """
        self.write()
        # Not mmap.flush: that keeps all other threads of Python waiting for the disk.
        os.fdatasync(self._handle) if hasattr(os, "fdatasync") else os.fsync(self._handle)

    def write(self) -> None:
        """Return when whoever reads the file finds what the arrays hold, as long as the machine runs.

        Raises:
            OSError: the disk is full, or fails.
        """
        if not self._is_held:
            return
        left = memoryview(self._map)[len(self.layout.header) :]
        while left:
            left = left[os.pwrite(self._handle, left, self.layout.nbytes - left.nbytes) :]

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
        EncodeError: a value cannot be saved; says which.
        OSError: it could not be written; what was there before still is.
    """
    layout = Layout(params)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        file = MappedFile(temporary, layout)
        try:
            layout.fill(file.arrays, params)
            file.sync()
            file.rename(path)
        finally:
            file.close()
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


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
    arrays: dict[Any, Any] = {}
    for name, tensor in tensors.items():
        view = _view(pages, start + tensor.begin, tensor)
        arrays[name] = view if view.flags.aligned else view.copy()  # other writers need not align
    structure = metadata.get(_STRUCTURE)
    if structure is None:
        return arrays
    try:
        return _restructured(structure, arrays)
    except (FlarebusError, ValueError, AttributeError, TypeError) as error:
        raise DecodeError(f"{path}: its structure cannot be read: {error}") from error


def _structure(
    params: Mapping[Any, Any], arrays: Mapping[str, NDArray[Any]]
) -> tuple[str | None, dict[str, NDArray[Any]]]:
    """Return all of a model that is no array, as text, and the long parts of it as arrays of bytes."""
    if is_flat(params) and len(arrays) == len(params):
        return None, {}
    body, buffers = encode(rebuild(params, dict.fromkeys(arrays)), externalise_from=_LONG_BYTES)
    blobs = {f"{_BLOB}{index}": np.frombuffer(buffer, np.uint8) for index, buffer in enumerate(buffers)}
    if blobs.keys() & arrays.keys():
        raise EncodeError("params", f"a name that begins with {_BLOB}", "rename it")
    return base64.b64encode(body).decode(), blobs


def _restructured(structure: str, arrays: dict[Any, Any]) -> dict[Any, Any]:
    blobs = [arrays.pop(f"{_BLOB}{index}") for index in range(sum(name.startswith(_BLOB) for name in arrays))]
    params = rebuild(decode(base64.b64decode(structure, validate=True), blobs), arrays)
    missing = arrays.keys() - flatten(params).keys()
    if missing:
        raise ValueError(f"it has no place for {min(missing)!r}")
    return params


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, _Tensor], dict[str, str], int]:
    try:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError("it is shorter than its header says")
        fields = json.loads(file.read(length))
        metadata = fields.pop(_METADATA, {})
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
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{name!r} has more than {_MAX_DIMENSIONS} dimensions")
    dtype = _numpy_dtype(_BY_WORD[word]) if odd is None else _numpy_dtype(odd)
    if odd is not None and (dtype.hasobject or not dtype.itemsize or shape[-1:] != (dtype.itemsize,)):
        raise ValueError(f"{name!r} is said to be {odd}, which it cannot be")
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


def _is_ml(dtype: np.dtype[Any]) -> bool:
    return dtype.type.__module__.startswith("ml_dtypes")


def _numpy_dtype(name: str) -> np.dtype[Any]:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes  # costs 20 ms that models without such dtypes need not pay

        found = vars(ml_dtypes).get(name)
        if not (isinstance(found, type) and issubclass(found, np.generic)):
            raise
        return np.dtype(found)


def _reserve(handle: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, nbytes)
        return
    for begin in range(0, nbytes, len(_ZEROS)):
        os.pwrite(handle, _ZEROS[: nbytes - begin], begin)


def sync_folder(folder: Path) -> None:
    """Make names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
