"""The kinds of value that a training script may log while it runs. The values themselves travel elsewhere."""

from __future__ import annotations

from enum import Enum

__all__ = ["MAX_KEY", "AnalyticsDataType"]

# Characters of the name of one metric: what the trackers that it may end up in agree on.
MAX_KEY = 250


class AnalyticsDataType(str, Enum):
    """What one logged value is, so that a tracker knows where to put it.

    The plural kinds carry a dict of name -> value; `TAG`, `TAGS` and `INIT_DATA` describe the run, not a step of it.
    """

    SCALAR = "SCALAR"
    SCALARS = "SCALARS"
    IMAGE = "IMAGE"
    TEXT = "TEXT"
    LOG_RECORD = "LOG_RECORD"
    PARAMETER = "PARAMETER"
    PARAMETERS = "PARAMETERS"
    METRIC = "METRIC"
    METRICS = "METRICS"
    MODEL = "MODEL"
    TAG = "TAG"
    TAGS = "TAGS"
    INIT_DATA = "INIT_DATA"
