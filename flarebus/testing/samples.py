"""Samples: bytes that a pipe carries while it is checked. Both processes of a check can make the same ones."""

from __future__ import annotations

import numpy as np

__all__ = ["sample"]


def sample(nbytes: int, seed: int = 0) -> bytearray:
    """So many bytes without a pattern, the same for the same seed."""
    return bytearray(np.random.default_rng(seed).bytes(nbytes))
