"""Giving memory back that a script no longer uses. Done when a job asks for it; it costs tens of milliseconds."""

from __future__ import annotations

import gc
import sys

__all__ = ["release_memory"]


def release_memory(cuda: bool = False) -> None:
    """Collect unreachable objects and return free heap pages to the system.

    Args:
        cuda: empty PyTorch's CUDA cache as well, if the process uses PyTorch and a GPU.
    """
    gc.collect()
    _trim_heap()
    torch = sys.modules.get("torch")
    if cuda and torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _trim_heap() -> None:
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
