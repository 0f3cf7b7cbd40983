"""The parameters of a job, as a tracker shows them: what the recipe was given, by name, as plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from flarebus.job.class_ref import ClassRef
from flarebus.job.definition import JobDefinition
from flarebus.job.secrets import hide_arguments, hide_secrets
from flarebus.tracking.tracker import Plain

__all__ = ["params_of_job"]

_OF_SITES = ("framework", "params_transfer_type", "server_expected_format", "launch_external_process", "attach")
_MAX_TEXT = 250


def params_of_job(job: JobDefinition) -> dict[str, Plain]:
    """What describes `job`; values that are not set are left out, and secrets among arguments are hidden."""
    config = job.site_defaults
    found: dict[str, Any] = {
        "job": job.name,
        "workflow": job.workflow,
        **job.workflow_settings,
        "train_script": Path(config.train_script).name,
        "train_args": hide_arguments(config.train_args),
        **{name: getattr(config, name) for name in _OF_SITES},
        "model": _described(job.model),
        "initial_ckpt": None if job.initial_ckpt is None else job.initial_ckpt.name,
    }
    return {name: _plain(value) for name, value in found.items() if value is not None and value != ""}


def _described(model: Any) -> Any:
    if model is None or isinstance(model, ClassRef):
        return model
    return type(model).__name__


def _plain(value: Any) -> Plain:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, ClassRef):
        value = value.class_path
    elif isinstance(value, Mapping | list | tuple):
        value = json.dumps(value, default=str)
    elif not isinstance(value, str):
        value = type(value).__name__  # an object of the user's, such as an aggregator
    return hide_secrets(value)[:_MAX_TEXT]
