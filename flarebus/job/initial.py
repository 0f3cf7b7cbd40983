"""The model a job starts with: from a checkpoint file, or from what a recipe was given.

Files are data: nothing that is pickled in one is ever run.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flarebus.errors import ConfigError, DecodeError
from flarebus.job.file_names import CKPT_SUFFIXES, KERAS_MODEL, KERAS_WEIGHTS, suffix_of
from flarebus.job.keras_models import is_keras_model, layer_weights, load_keras
from flarebus.job.tensor_file import load_params, save_params
from flarebus.workflow.params import as_array, flatten, rebuild

__all__ = ["NUMPY_KEY", "load_initial", "map_initial", "params_of"]

NUMPY_KEY = "numpy_key"
"""The name of a model that is a single array."""

# How people wrap a state dict when they save it.
_WRAPPERS = ("model", "state_dict", "model_state_dict")


def load_initial(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: `.npy` (one array, under `NUMPY_KEY`), `.npz`, `.pt`/`.pth` (a state dict, or a dict that holds one as
            `model` or `state_dict`; weights only), `.safetensors`, or `.keras` (name of a layer -> list of arrays).

    Returns:
        name -> array, the caller's own; those of a safetensors file are mapped copy-on-write.

    Raises:
        ConfigError: the file is not there, is damaged, or holds something else; names parameter and path.
    """
    readers: dict[str, Callable[[Path], dict[str, Any]]] = {
        ".npy": _translated(_npy),
        ".npz": _translated(_npz),
        ".pt": _pt,
        ".pth": _pt,
        ".safetensors": load_params,
        KERAS_MODEL: lambda path: layer_weights(load_keras(path)),
        KERAS_WEIGHTS: _weights_alone,
    }
    reader = readers.get(suffix_of(path))
    if reader is None:
        raise ConfigError("initial_ckpt", str(path), f"the path of a file ending in {', '.join(CKPT_SUFFIXES)}")
    try:
        params = reader(path)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError("initial_ckpt", str(path), f"cannot be read: {error.strerror or error}") from error
    except DecodeError as error:
        raise ConfigError("initial_ckpt", str(path), str(error).removeprefix(f"{path}: ")) from error
    if not params:
        raise ConfigError("initial_ckpt", str(path), "holds no parameters")
    return params


def map_initial(path: Path, folder: Path, parameter: str) -> dict[str, Any]:
    """Load a checkpoint so that its arrays lie on the pages of a file, and not in memory.

    Args:
        folder: where a file may be made for that; it is gone when this returns, its pages are not.
        parameter: what errors call the checkpoint.

    Raises:
        ConfigError: see `load_initial`.
        EncodeError: it holds something that cannot be kept in a file.
        OSError: the disk is full.
    """
    try:
        params = load_initial(path)
    except ConfigError as error:
        raise ConfigError(parameter, error.value, error.allowed) from error
    if suffix_of(path) == ".safetensors":
        return params
    with TemporaryDirectory(prefix=".checkpoint-", dir=folder) as place:
        copy = Path(place) / "model.safetensors"
        save_params(params, copy)
        return load_params(copy)


def _npy(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {NUMPY_KEY: np.lib.format.read_array(file, allow_pickle=False)}


def _npz(path: Path) -> dict[str, Any]:
    found = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                found[name.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
    return found


def _translated(read: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    def reader(path: Path) -> dict[str, Any]:
        try:
            return read(path)
        except OSError:
            raise
        except Exception as error:  # damage shows as whatever the parser trips over
            if "allow_pickle" in str(error):
                wrong = "holds pickled objects, which may be programs; save plain arrays"
            else:
                wrong = "is damaged, or not what its name says"
            raise ConfigError("initial_ckpt", str(path), wrong) from error

    return reader


def _pt(path: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise ConfigError("initial_ckpt", str(path), "needs PyTorch: pip install 'flarebus[torch]'") from error
    if not path.exists():
        raise ConfigError("initial_ckpt", str(path), "there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever is wrong with it, PyTorch has an exception of its own for that
        told = "holds more than weights, or is damaged; save the state dict with torch.save(model.state_dict(), path)"
        raise ConfigError("initial_ckpt", str(path), told) from error
    for name in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping):
        raise ConfigError("initial_ckpt", str(path), f"holds a {type(content).__name__}, not a state dict")
    return _arrays_of(content)


def _weights_alone(path: Path) -> dict[str, Any]:
    told = "holds weights without their model; give the Keras model that they belong to, or a .keras file"
    raise ConfigError("initial_ckpt", str(path), told)


def params_of(model: Any) -> dict[str, Any]:
    """Named arrays of what a recipe takes as a model.

    Args:
        model: a `torch.nn.Module`; a `keras.Model` (name of a layer -> list of its arrays); a dict of arrays, tensors,
            numbers and the like (kept as it is, tensors as arrays); one array, or a list of numbers, nested or not
            (float32, under `NUMPY_KEY`); a list of arrays (under "0", "1", ...).

    Returns:
        name -> array or other value; arrays share memory with `model` where that is possible.

    Raises:
        ConfigError: it is none of these.
    """
    if is_keras_model(model):  # first: where Keras runs on PyTorch, it is a module as well
        return dict(layer_weights(model))
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        return _arrays_of(model.state_dict())
    if isinstance(model, Mapping):
        return _arrays_of(model)
    array = as_array(model)
    if array is not None:
        return {NUMPY_KEY: array}
    if isinstance(model, (list, tuple)) and model:
        arrays = [array for array in map(as_array, model) if array is not None]
        if len(arrays) == len(model) and not all(isinstance(item, np.generic) for item in model):
            return {str(index): array for index, array in enumerate(arrays)}
        try:
            return {NUMPY_KEY: _numbers(model)}
        except (ValueError, TypeError) as error:
            raise ConfigError("model", model, "a list must hold arrays, or numbers in a regular shape") from error
    raise ConfigError(
        "model", model, "a torch.nn.Module, a keras.Model, a dict or list of arrays, or a description of a class"
    )


def _numbers(model: Any) -> NDArray[Any]:
    found = np.array(model)
    if found.dtype.kind not in "biuf":  # NumPy would make a number of None and of "3"
        raise TypeError
    return found.astype(np.float32)


def _arrays_of(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The same names, with tensors as arrays on their memory, at any depth."""
    arrays = {name: array for name, leaf in flatten(state).items() if (array := as_array(leaf)) is not None}
    return rebuild(state, arrays)
