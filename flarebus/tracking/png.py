"""Images as PNG files, with the standard library and NumPy: no tracker should need an image library for them."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np

__all__ = ["to_png"]

_COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}
"""Channels -> colour type: grey, grey with alpha, RGB, RGB with alpha."""
_MAX_PIXELS = 1 << 24


def to_png(image: Any, layout: str = "CHW") -> bytes:
    """Encode an image, or several beside each other.

    Args:
        image: an array; floats from 0 to 1, integers from 0 to 255.
        layout: the order of its axes: the letters H and W, and perhaps C and N, for the images of a batch.

    Raises:
        ValueError: it is no such array.
    """
    array = np.asarray(image)
    axes = layout.upper()
    if not {"H", "W"} <= set(axes) <= set("NHWC") or len(set(axes)) != len(axes) or array.ndim != len(axes):
        raise ValueError(f"an image of shape {array.shape} cannot have the layout {layout!r}")
    if not 0 < array.size <= _MAX_PIXELS:
        raise ValueError(f"an image of {array.size} values; there may be {_MAX_PIXELS}")
    for missing in set("NC") - set(axes):
        axes, array = axes + missing, array[..., None]
    array = array.transpose([axes.index(axis) for axis in "HNWC"])
    array = array.reshape(array.shape[0], -1, array.shape[3])
    if array.shape[2] not in _COLOURS:
        raise ValueError(f"an image of {array.shape[2]} channels; there may be 1 to 4")
    return _encoded(_bytes(array))


def _bytes(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if array.dtype.kind == "b":
        array = array.astype(np.float32)
    if array.dtype.kind == "f":
        array = np.nan_to_num(np.clip(array.astype(np.float32), 0, 1)) * 255
    elif array.dtype.kind not in "iu":
        raise ValueError(f"an image of {array.dtype}")
    found: np.ndarray[Any, Any] = np.clip(np.rint(array), 0, 255).astype(np.uint8)
    return found


def _encoded(array: np.ndarray[Any, Any]) -> bytes:
    height, width, channels = array.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOURS[channels], 0, 0, 0)
    # Each line begins with the number of its filter: 0, none.
    lines = np.zeros((height, 1 + width * channels), np.uint8)
    lines[:, 1:] = array.reshape(height, -1)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
