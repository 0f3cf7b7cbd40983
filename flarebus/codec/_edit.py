"""Changing an encoded FLModel around its parameters, which are neither decoded nor moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from flarebus.codec._decoder import Decoder, read_body
from flarebus.codec._encoder import Encoder, path_of
from flarebus.codec._ids import DICT, FLMODEL, FOLDED, MAX_BODY
from flarebus.codec._registry import Malformed, Refused, Registry
from flarebus.errors import DecodeError, EncodeError
from flarebus.message import Buffer
from flarebus.model import FLModel

__all__ = ["edit_model_with", "has_params"]

# The list of an FLModel: its id, the type of its params, params, params of the optimizer, and what is around them.
_PARAMS = 2
_FIRST = 4
_AROUND = ("metrics", "meta", "start_round", "current_round", "total_rounds")


class _Elsewhere(Exception):
    """A value does not stand in the tree itself."""


class _TreeDecoder(Decoder):
    """Decodes what stands in the tree. Bytes outside it, also those of small arrays in the body, may be shared with
    parameters: they can neither be read here nor be taken out of the body.
    """

    __slots__ = ("met",)

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry, [], b"", copy=False)
        self.met = False

    def _elsewhere(self) -> NoReturn:
        self.met = True  # a decomposer may translate the exception
        raise _Elsewhere

    def _view(self, reference: Any) -> memoryview:
        self._elsewhere()

    def array(self, reference: int, shape: Sequence[int], dtype: np.dtype[Any], n_bytes: int) -> np.ndarray[Any, Any]:
        self._elsewhere()

    def array_view(
        self,
        reference: Any,
        shape: Sequence[int],
        dtype: np.dtype[Any],
        n_bytes: int,
        offset: int,
        strides: Sequence[int],
    ) -> np.ndarray[Any, Any]:
        self._elsewhere()


def edit_model_with(
    registry: Registry, body: Buffer, edit: Callable[[FLModel], FLModel], beside: Mapping[str, Any]
) -> bytes | None:
    """Edit with the types of `registry`; see `flarebus.codec.edit_model`."""
    decoder = _TreeDecoder(registry)
    try:
        root, n_buffers, arena = _read_model(body)
        values = (decoder.value(node, 1) for node in root[_FIRST:])
        model = FLModel(**dict(zip(_AROUND, values, strict=True)))
    except Exception as error:  # whatever a hostile body makes of msgpack, NumPy or a decomposer
        if decoder.met:
            return None
        said = str(error) if isinstance(error, Malformed) else f"not readable ({type(error).__name__})"
        raise DecodeError(f"{path_of(decoder.trail)}: {said}") from error
    edited = edit(model)
    # Checked once more: its fields are open to anybody.
    edited = FLModel(**{name: getattr(edited, name) for name in _AROUND})
    return _packed(registry, root, n_buffers, arena, edited, beside)


def _joined(encoder: Encoder, params: Any, beside: Mapping[str, Any]) -> list[Any]:
    """An encoded dict with more in it; what it has of these names goes."""
    node = [DICT] if params is None else params
    if type(node) is list and node[:1] == [FOLDED]:
        node = [each for part in node[1:] for each in part]
    if type(node) is not list or node[:1] != [DICT]:
        raise Refused("parameters that are no dict", "nothing goes beside them")
    pairs = zip(node[1::2], node[2::2], strict=True)
    kept = [each for key, value in pairs if type(key) is not str or key not in beside for each in (key, value)]
    more: list[Any] = encoder.plain(dict(beside), 1)
    return encoder.fold([DICT, *kept, *more[1:]])


def has_params(body: Buffer) -> bool:
    """Whether an encoded `FLModel` has parameters; they are not looked at.

    Raises:
        DecodeError: the body is not that of an FLModel.
    """
    try:
        root, _, _ = _read_model(body)
    except Exception as error:  # whatever a hostile body makes of msgpack
        said = str(error) if isinstance(error, Malformed) else f"not readable ({type(error).__name__})"
        raise DecodeError(said) from error
    return root[_PARAMS] is not None


def _read_model(body: Buffer) -> tuple[list[Any], int, bytes]:
    root, n_buffers, arena = read_body(bytes(body))
    if type(root) is not list or len(root) != _FIRST + len(_AROUND) or root[0] != FLMODEL:
        raise Malformed("no FLModel")
    return root, n_buffers, arena


def _packed(
    registry: Registry, root: list[Any], n_buffers: int, arena: bytes, edited: FLModel, beside: Mapping[str, Any]
) -> bytes:
    # Nothing may become a buffer: those that there are have their numbers.
    encoder = Encoder(registry, MAX_BODY)
    encoder.inline_below = MAX_BODY
    encoder.arena += arena
    try:
        for at, name in enumerate(_AROUND, _FIRST):
            try:
                root[at] = encoder.plain(getattr(edited, name), 1)
            except Exception:
                encoder.trail.append(f".{name}")
                raise
        if beside:
            root[_PARAMS] = _joined(encoder, root[_PARAMS], beside)
        if encoder.buffers:
            raise Refused("more than fits beside the parameters", "metrics and meta are for small things")
        return encoder.pack(root, n_buffers)
    except Refused as error:
        raise EncodeError(path_of(encoder.trail), error.found, error.hint) from error.__cause__
    except MemoryError:
        raise
    except Exception as error:  # such as a string that is no Unicode text
        raise EncodeError(path_of(encoder.trail), f"{type(error).__name__}: {error}") from error
