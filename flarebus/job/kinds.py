"""The closed sets of words a job is described with: frameworks, exchange formats, kinds of update.

Standard library only: training scripts and workers import them.
"""

from __future__ import annotations

from enum import Enum

__all__ = ["DataKind", "ExchangeFormat", "FrameworkType", "TransferType"]


class FrameworkType(str, Enum):
    """What the training script is written with; decides which model files the server writes."""

    NUMPY = "numpy"
    PYTORCH = "pytorch"
    TENSORFLOW = "tensorflow"
    RAW = "raw"


class ExchangeFormat(str, Enum):
    """What parameters are: for a script, and while they are between a site and the server."""

    NUMPY = "numpy"
    PYTORCH = "pytorch"
    RAW = "raw"
    KERAS_LAYER_WEIGHTS = "keras_layer_weights"
    """Name of a layer -> list of its arrays."""


class TransferType(str, Enum):
    """Whether a site answers with its whole model or with the difference to the one it received."""

    FULL = "FULL"
    DIFF = "DIFF"


class DataKind(str, Enum):
    """What an aggregator is given: models, or differences between models."""

    WEIGHTS = "WEIGHTS"
    WEIGHT_DIFF = "WEIGHT_DIFF"
