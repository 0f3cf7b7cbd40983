"""PNG files: an image library reads back what was encoded."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from flarebus.tracking.png import to_png


def pixels(png: bytes) -> np.ndarray[Any, Any]:
    """What Pillow reads."""
    image = pytest.importorskip("PIL.Image")
    return np.asarray(image.open(io.BytesIO(png)))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_number_of_channels_comes_back(channels: int) -> None:
    """Grey or colour, with or without alpha: each pixel is the same, rows and columns are where they were."""
    image = np.arange(channels * 5 * 7, dtype=np.uint8).reshape(channels, 5, 7)

    found = pixels(to_png(image))

    assert np.array_equal(found.reshape(5, 7, channels), image.transpose(1, 2, 0))


@pytest.mark.parametrize("layout", ["HWC", "CWH", "HW", "NCHW", "NHW"])
def test_axes_may_come_in_any_order(layout: str) -> None:
    """Letters say which axis is which; images of a batch stand beside each other."""
    sizes = {"N": 2, "C": 3, "H": 4, "W": 5}
    image = np.random.default_rng(0).integers(0, 256, [sizes[axis] for axis in layout]).astype(np.uint8)

    found = pixels(to_png(image, layout))

    whole = image if "N" in layout else image[None]
    axes = layout if "N" in layout else f"N{layout}"
    first = whole.transpose([axes.index(axis) for axis in "NHWC" if axis in axes])[0]
    assert found.shape[:2] == (4, 10 if "N" in layout else 5)
    assert np.array_equal(found[:, :5], first)


def test_floats_go_from_0_to_1() -> None:
    """What is beyond is cut off, and what is no number is black."""
    found = pixels(to_png(np.array([[0.0, 0.5, 1.0, 2.0, -1.0, np.nan, np.inf]]), "HW"))

    assert found.tolist() == [[0, 128, 255, 255, 0, 0, 255]]


@pytest.mark.parametrize(
    ("image", "layout"),
    [
        (np.zeros((5, 4, 4)), "CHW"),
        (np.zeros((4, 4)), "CHW"),
        (np.zeros((4, 4)), "HH"),
        (np.zeros((4, 4)), "HX"),
        (np.zeros((3, 0, 4)), "CHW"),
        (np.broadcast_to(np.uint8(0), (1 << 13, 1 << 13)), "HW"),
        (np.array([["a"]]), "HW"),
        ("text", "HW"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, layout: str) -> None:
    """Shapes and sizes that a site may send by mistake or on purpose."""
    with pytest.raises(ValueError, match="an image of"):
        to_png(image, layout)
