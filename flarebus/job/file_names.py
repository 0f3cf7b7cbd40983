"""The names of model files: the suffixes there are, and what is left of a name without one."""

from __future__ import annotations

from pathlib import Path

from flarebus.job.kinds import FrameworkType

__all__ = ["CKPT_SUFFIXES", "KERAS_MODEL", "KERAS_SUFFIXES", "KERAS_WEIGHTS", "saved_suffixes", "stem_of", "suffix_of"]

KERAS_WEIGHTS, KERAS_MODEL = ".weights.h5", ".keras"
KERAS_SUFFIXES = (KERAS_WEIGHTS, KERAS_MODEL)
CKPT_SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".safetensors", *KERAS_SUFFIXES)
"""What a checkpoint to start from may end in."""

_SAVED = {FrameworkType.PYTORCH: (".pt",), FrameworkType.TENSORFLOW: KERAS_SUFFIXES}


def saved_suffixes(framework: FrameworkType) -> tuple[str, ...]:
    """What the files end in that a job of `framework` leaves of each model."""
    return (".safetensors", *_SAVED.get(framework, ()))


def suffix_of(path: Path) -> str:
    """The suffix of a model file, in lower case; `.weights.h5` is one."""
    return KERAS_WEIGHTS if path.name.lower().endswith(KERAS_WEIGHTS) else path.suffix.lower()


def stem_of(path: Path) -> str:
    """The name of a model file without its suffix."""
    return path.name[: len(path.name) - len(suffix_of(path))]
