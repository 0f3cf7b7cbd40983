"""Keras models as named parameters, and their files. Keras is imported for such a file, never by this module alone.

The parameters of a model are the name of each layer -> list of its arrays, as `layer.get_weights()` gives them and
`layer.set_weights()` takes them; a layer may be a whole model.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from flarebus.errors import ConfigError
from flarebus.job.file_names import KERAS_MODEL, KERAS_WEIGHTS
from flarebus.job.tensor_file import sync_folder

__all__ = ["export_keras", "is_keras_model", "layer_weights", "load_keras", "weights_in"]

log = logging.getLogger(__name__)

# Keras describes what it could not load at length.
_MAX_TOLD = 300


def is_keras_model(value: Any) -> bool:
    """Whether `value` is a Keras model."""
    # Any: an import on another thread may be half done; nobody has a model then.
    keras: Any = sys.modules.get("keras")
    return isinstance(value, getattr(keras, "Model", ()))


def layer_weights(model: Any) -> dict[str, list[NDArray[Any]]]:
    """Name of each layer -> copies of its arrays, in the order of the layers.

    Raises:
        ConfigError: the model has no weights yet, has some outside its layers, or has two layers of one name.
    """
    if not model.weights:
        raise ConfigError("model", model, "a model with weights; build it first, or begin it with keras.Input(shape)")
    in_layers = {id(weight) for layer in model.layers for weight in layer.weights}
    outside = [weight.path for weight in model.weights if id(weight) not in in_layers]
    names = [layer.name for layer in model.layers]
    twice = [name for name in names if names.count(name) > 1]
    if outside or twice:
        what = f"weights outside its layers: {outside[0]}" if outside else f"two layers of the name {twice[0]!r}"
        raise ConfigError("model", model, f'it has {what}; give {{"weights": model.get_weights()}} instead')
    return {layer.name: layer.get_weights() for layer in model.layers}


def load_keras(path: Path) -> Any:
    """Build the model in a `.keras` file. Nothing in it is run: layers that are code are refused.

    Raises:
        ConfigError: Keras is not installed, or the file cannot be read, is damaged or holds classes that Keras does not
            know.
    """
    keras = _keras(path)
    told = "is damaged, or more than layers of Keras are in it (then give the model, too)"
    return _read(path, told, lambda: keras.saving.load_model(path, compile=False, safe_mode=True))


def weights_in(path: Path, model: Any) -> dict[str, list[NDArray[Any]]]:
    """The parameters of `model` with the weights in a `.weights.h5` or `.keras` file; `model` stays as it is.

    The file may hold more than the model has, as for Keras' own `load_weights`.

    Raises:
        ConfigError: the file cannot be read or is damaged, or a weight of the model is missing there or has another
            shape.
    """
    layer_weights(model)
    with _borrowed(model):
        _read(path, "is damaged, or does not fit the model", lambda: model.load_weights(path))
        return layer_weights(model)


def export_keras(model: Any, params: Mapping[str, list[Any]], path: Path) -> None:
    """Write a model's parameters beside `path`, as `.weights.h5`, and with the model around them as `.keras`.

    Each file is whole or not there. A model that Keras cannot describe, such as one of a class without `get_config`,
    has no `.keras`, and a warning says so. `model` stays as it is.

    Args:
        model: what the parameters belong to.
        params: layer -> list of arrays, in the order of the model's layers.
        path: of the model in another format; its suffix is replaced.

    Raises:
        OSError: a file could not be written.
    """
    with _borrowed(model):
        # Not by name: Keras counts on in those that it gives.
        for layer, arrays in zip(model.layers, params.values(), strict=True):
            layer.set_weights(arrays)
        _write(path.with_suffix(KERAS_WEIGHTS), model.save_weights)
        try:
            _write(path.with_suffix(KERAS_MODEL), model.save)
        except OSError:
            raise
        except Exception as error:  # whatever the classes of the model raise when they are to describe themselves
            log.warning("no %s file: the model cannot be described: %s", KERAS_MODEL, _shortened(error))
    sync_folder(path.parent)


@contextmanager
def _borrowed(model: Any) -> Iterator[None]:
    """Give a model its weights back at the end: it may be somebody's."""
    before = model.get_weights()
    try:
        yield
    finally:
        model.set_weights(before)


def _write(path: Path, save: Callable[[Path], None]) -> None:
    temporary = path.with_name(f".tmp-{path.name}")  # Keras goes by the suffix
    try:
        save(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, told: str, read: Callable[[], Any]) -> Any:
    try:
        path.open("rb").close()  # Keras has no clear words for a file that is not there
    except OSError as error:
        raise ConfigError("initial_ckpt", str(path), f"cannot be read: {error.strerror}") from error
    try:
        return read()
    except Exception as error:  # damage shows as whatever the parser trips over
        raise ConfigError("initial_ckpt", str(path), f"{told}: {_shortened(error)}") from error


def _shortened(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MAX_TOLD else f"{text[:_MAX_TOLD]}..."


def _keras(path: Path) -> Any:
    try:
        import keras
    except ImportError as error:
        raise ConfigError("initial_ckpt", str(path), "needs TensorFlow: pip install 'flarebus[tensorflow]'") from error
    return keras
