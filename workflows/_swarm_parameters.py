"""What the parameters of `SwarmClientController` may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flarebus.errors import ConfigError

__all__ = ["check_swarm_parameters"]

_MAY_BE_NONE = ("learn_task_timeout", "request_to_submit_result_max_wait", "wait_time_after_min_resps_received")
# What these ids name in NVFlare is here the one way in which models are kept and travel.
_FIXED_IDS = {"persistor_id": "persistor", "shareable_generator_id": "shareable_generator"}


def check_swarm_parameters(given: Mapping[str, Any]) -> None:
    """See that the parameters of `SwarmClientController` can be.

    Raises:
        ConfigError: one cannot; names it.
    """
    for name, fixed in _FIXED_IDS.items():
        if given[name] != fixed:
            raise ConfigError(name, given[name], f'"{fixed}": there is one way to keep models and to send them')
    for name in ("task_name_prefix", "learn_task_name"):
        if not isinstance(given[name], str) or not given[name]:
            raise ConfigError(name, given[name], "the name of a task")
    for name in ("min_responses_required", "memory_gc_rounds"):
        if type(given[name]) is not int or given[name] < 0:
            raise ConfigError(name, given[name], "a whole number from 0")
    if type(given["max_concurrent_submissions"]) is not int or given["max_concurrent_submissions"] < 1:
        raise ConfigError("max_concurrent_submissions", given["max_concurrent_submissions"], "a whole number from 1")
    for name, value in given.items():
        is_time = name.endswith(("_timeout", "_interval", "_wait")) or name.startswith("wait_time")
        if not is_time or (value is None and name in _MAY_BE_NONE):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ConfigError(name, value, "seconds from 0")
