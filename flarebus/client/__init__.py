"""The Client API: what a training script imports.

    import flarebus.client as flare

Nothing heavy is imported here: NumPy comes with the first model, PyTorch only for scripts that get tensors.
"""

from __future__ import annotations

from flarebus.client.api import (
    APIContext,
    clear,
    get_config,
    get_job_id,
    get_site_name,
    get_task_name,
    init,
    is_evaluate,
    is_running,
    is_submit_model,
    is_train,
    log,
    receive,
    send,
    shutdown,
    system_info,
)
from flarebus.client.decorators import evaluate, train
from flarebus.metric import AnalyticsDataType
from flarebus.model import FLModel, ParamsType

__all__ = [
    "APIContext",
    "AnalyticsDataType",
    "FLModel",
    "ParamsType",
    "clear",
    "evaluate",
    "get_config",
    "get_job_id",
    "get_site_name",
    "get_task_name",
    "init",
    "is_evaluate",
    "is_running",
    "is_submit_model",
    "is_train",
    "log",
    "receive",
    "send",
    "shutdown",
    "system_info",
    "train",
]
