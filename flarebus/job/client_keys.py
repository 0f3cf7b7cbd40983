"""The keys of a trainer's configuration: what each is called, what it means when it is missing, what it may be.

One table for everybody: for the file that a trainer reads, for what a recipe may change with `add_client_config`, and
for the settings of a session. Values are kept as JSON has them. Standard library only: training scripts import this.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from flarebus.errors import ConfigError
from flarebus.job.checks import check_flag, check_int, check_mapping, check_number, check_text, nearest
from flarebus.job.kinds import ExchangeFormat, TransferType

__all__ = [
    "METRIC_KEYS",
    "PIPE_KEYS",
    "TASK_KEYS",
    "TOP_KEYS",
    "ConfigKey",
    "Key",
    "check_beats",
    "check_overrides",
    "check_pipe",
    "check_section",
    "overrides_in_file",
]

_log = logging.getLogger("flarebus.client")


class ConfigKey:
    """Names of the keys in the file."""

    ARG = "ARG"
    AUTH_TOKEN = "auth_token"
    CLASS_NAME = "CLASS_NAME"
    CONNECTION = "connection"
    CUDA_EMPTY_CACHE = "cuda_empty_cache"
    DOWNLOAD_COMPLETE_TIMEOUT = "download_complete_timeout"
    EVAL_TASK_NAME = "eval_task_name"
    EXCHANGE_FORMAT = "exchange_format"
    HEARTBEAT_INTERVAL = "heartbeat_interval"
    HEARTBEAT_TIMEOUT = "HEARTBEAT_TIMEOUT"
    JOB_ID = "JOB_ID"
    LAUNCH_ONCE = "launch_once"
    LOG_CONFIG = "log_config"
    MAX_RESENDS = "max_resends"
    MEMORY_GC_ROUNDS = "memory_gc_rounds"
    METRICS_EXCHANGE = "METRICS_EXCHANGE"
    PIPE = "pipe"
    PIPE_CHANNEL_NAME = "pipe_channel_name"
    SERVER_EXPECTED_FORMAT = "server_expected_format"
    SITE_NAME = "SITE_NAME"
    SUBMIT_MODEL_TASK_NAME = "submit_model_task_name"
    SUBMIT_RESULT_TIMEOUT = "submit_result_timeout"
    TASK_EXCHANGE = "TASK_EXCHANGE"
    TASK_NAME = "TASK_NAME"
    """Of messages between client job and trainer; no key of the file."""
    TRAIN_TASK_NAME = "train_task_name"
    TRAIN_WITH_EVAL = "train_with_eval"
    TRANSFER_TYPE = "transfer_type"


# A value is whatever JSON has; the check of its key narrows it.
Check = Callable[[str, object], Any]


@dataclass(frozen=True, slots=True)
class Key:
    """One key.

    Args:
        name: in the file.
        default: what a missing key means, and an empty string where the default is none.
        check: takes the place and the value, returns it as it is kept, or raises `ConfigError`.
        override: its name for `add_client_config`; "" if a job cannot change it there.
        secret: whether no script, log or error may show it.
    """

    name: str
    default: Any
    check: Check
    override: str = ""
    secret: bool = False


def _word(kind: type[Enum]) -> Check:
    words = ", ".join(str(each.value) for each in kind)

    def check(parameter: str, value: object) -> Any:
        try:
            return value if value == "" else kind(value).value
        except ValueError:
            raise ConfigError(parameter, value, f"one of {words}") from None

    return check


def _seconds(parameter: str, value: object) -> float:
    return check_number(parameter, value, above=0.0)


def _seconds_or_none(parameter: str, value: object) -> float | None:
    return None if value is None else _seconds(parameter, value)


def _count(parameter: str, value: object) -> int:
    return check_int(parameter, value, 0)


def _resends(parameter: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(parameter, value, "a whole number, or None for no limit")
    if value < 0:
        _log.warning("%s=%d: counts as 0, nothing is sent again", parameter, value)
    return max(0, value)


def _text_or_none(parameter: str, value: object) -> str | None:
    return None if value is None else check_text(parameter, value)


class _Hidden:
    """Stands in an error for a value that may be secret."""

    def __init__(self, value: object) -> None:
        self._kind = type(value).__name__

    def __repr__(self) -> str:
        return f"<{self._kind}>"


def _json_object(parameter: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(parameter, _Hidden(value), "an object")
    try:
        # As it comes back from a file: tuples are lists, keys are strings.
        loaded: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(parameter, _Hidden(value), f"not JSON: {error}") from None
    return loaded


def _object_or_none(parameter: str, value: object) -> dict[str, Any] | None:
    return None if value is None else _json_object(parameter, value)


def _secret_or_none(parameter: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ConfigError(parameter, _Hidden(value), "a string, or null")
    return value


def check_pipe(parameter: str, value: object) -> dict[str, Any]:
    """A pipe by its class: ``{"CLASS_NAME": ..., "ARG": {...}}``; the name of an installed one will do, too."""
    if isinstance(value, str):
        value = {ConfigKey.CLASS_NAME: value}
    elif not isinstance(value, dict):
        raise ConfigError(parameter, value, 'the name of a pipe, or {"CLASS_NAME": ..., "ARG": {...}}')
    return {ConfigKey.ARG: {}} | check_section(parameter, value, PIPE_KEYS, (ConfigKey.CLASS_NAME,))


def _class_name(parameter: str, value: object) -> str:
    if not isinstance(value, str) or not all(part.isidentifier() for part in value.replace(":", ".").split(".")):
        raise ConfigError(parameter, value, 'the name of a pipe such as "cell" or "file", or "package.module.Class"')
    return value


def _table(*keys: Key) -> dict[str, Key]:
    return {key.name: key for key in keys}


PIPE_KEYS = _table(
    Key(ConfigKey.CLASS_NAME, None, _class_name),
    Key(ConfigKey.ARG, {}, _json_object, secret=True),
)
_HEARTBEAT_TIMEOUT = Key(ConfigKey.HEARTBEAT_TIMEOUT, 60.0, _seconds, "heartbeat_timeout")
_PIPE = Key(ConfigKey.PIPE, None, check_pipe, "pipe")

TASK_KEYS = _table(
    Key(ConfigKey.TRAIN_WITH_EVAL, False, check_flag, "train_with_eval"),
    Key(ConfigKey.EXCHANGE_FORMAT, ExchangeFormat.NUMPY.value, _word(ExchangeFormat), "exchange_format"),
    Key(ConfigKey.SERVER_EXPECTED_FORMAT, ExchangeFormat.NUMPY.value, _word(ExchangeFormat)),
    Key(ConfigKey.TRANSFER_TYPE, TransferType.FULL.value, _word(TransferType)),
    Key(ConfigKey.TRAIN_TASK_NAME, "train", check_text, "train_task_name"),
    Key(ConfigKey.EVAL_TASK_NAME, "validate", check_text, "eval_task_name"),
    Key(ConfigKey.SUBMIT_MODEL_TASK_NAME, "submit_model", check_text, "submit_model_task_name"),
    Key(ConfigKey.PIPE_CHANNEL_NAME, "task", check_text),
    _PIPE,
    _HEARTBEAT_TIMEOUT,
    Key(ConfigKey.HEARTBEAT_INTERVAL, 5.0, _seconds, "heartbeat_interval"),
    Key(ConfigKey.MEMORY_GC_ROUNDS, 0, _count, "memory_gc_rounds"),
    Key(ConfigKey.CUDA_EMPTY_CACHE, False, check_flag, "cuda_empty_cache"),
    # How long a trainer waits for the word that its result was read; one chunk of it is no more than a second's work.
    Key(ConfigKey.SUBMIT_RESULT_TIMEOUT, 300.0, _seconds, "submit_result_timeout"),
    Key(ConfigKey.MAX_RESENDS, 3, _resends, "max_resends"),
    # How long it stays for the server to pull its result: half an hour is enough for 100 GB over a bad line.
    Key(ConfigKey.DOWNLOAD_COMPLETE_TIMEOUT, 1800.0, _seconds, "download_complete_timeout"),
    Key(ConfigKey.LAUNCH_ONCE, False, check_flag),
)
METRIC_KEYS = _table(Key(ConfigKey.PIPE_CHANNEL_NAME, "metric", check_text), _PIPE, _HEARTBEAT_TIMEOUT)


def _task_section(parameter: str, value: object) -> dict[str, Any]:
    section = check_section(parameter, value, TASK_KEYS)
    check_beats(
        f"{parameter}[{ConfigKey.HEARTBEAT_INTERVAL!r}]",
        section.get(ConfigKey.HEARTBEAT_INTERVAL),
        section.get(ConfigKey.HEARTBEAT_TIMEOUT),
    )
    return section


def _metric_section(parameter: str, value: object) -> dict[str, Any]:
    return check_section(parameter, value, METRIC_KEYS)


TOP_KEYS = _table(
    Key(ConfigKey.SITE_NAME, None, _text_or_none),
    Key(ConfigKey.JOB_ID, None, _text_or_none),
    Key(ConfigKey.TASK_EXCHANGE, {}, _task_section),
    Key(ConfigKey.METRICS_EXCHANGE, {}, _metric_section),
    Key(ConfigKey.LOG_CONFIG, None, _text_or_none),
    Key(ConfigKey.AUTH_TOKEN, None, _secret_or_none, secret=True),
    Key(ConfigKey.CONNECTION, None, _object_or_none, secret=True),
)


def check_section(
    parameter: str, value: object, table: Mapping[str, Key], required: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A dict of known keys, each value checked; a copy.

    Raises:
        ConfigError: a key is unknown (names the nearest known one), a required one is missing, or a value is wrong.
    """
    data = check_mapping(parameter, value)
    for key in data:
        if key not in table:
            raise ConfigError(parameter, key, f"unknown key; {nearest(table, key)}")
    for key in required:
        if key not in data:
            raise ConfigError(parameter, sorted(data), f"the key {key!r} is missing")
    return {name: table[name].check(f"{parameter}[{name!r}]", each) for name, each in data.items()}


def check_beats(parameter: str, interval: float | None, timeout: float | None) -> None:
    """See that a peer gives signs of life more often than their absence is noticed; None is the default."""
    timeout = _HEARTBEAT_TIMEOUT.default if timeout is None else timeout
    interval = TASK_KEYS[ConfigKey.HEARTBEAT_INTERVAL].default if interval is None else interval
    if interval >= timeout:
        raise ConfigError(parameter, interval, f"less than the heartbeat timeout, {timeout:g} s")


# Of the client job alone; not in the file.
_LAUNCH_TIMEOUT = Key("launch_timeout", 300.0, _seconds_or_none, "launch_timeout")
_OVERRIDES = {key.override: key for key in (*TASK_KEYS.values(), _LAUNCH_TIMEOUT) if key.override}
_ALIASES = {
    "HEARTBEAT_TIMEOUT": "heartbeat_timeout",
    "external_pre_init_timeout": "launch_timeout",
    "client_memory_gc_rounds": "memory_gc_rounds",
}
# What a recipe has a parameter of its own for, because it has to fit the rest of the job.
_ELSEWHERE = {
    ConfigKey.SERVER_EXPECTED_FORMAT: "server_expected_format",
    ConfigKey.TRANSFER_TYPE: "params_transfer_type",
    ConfigKey.LAUNCH_ONCE: "launch_once",
}


def check_overrides(parameter: str, value: Mapping[Any, Any]) -> dict[str, Any]:
    """What a job changes in its trainers' configuration, under canonical names; a copy.

    Raises:
        ConfigError: a key is unknown, is there under two names, or belongs elsewhere; or a value is wrong.
    """
    found: dict[str, Any] = {}
    for key, each in value.items():
        name = _ALIASES.get(key, key)
        place = f"{parameter}[{key!r}]"
        if name in _ELSEWHERE:
            raise ConfigError(place, each, f"is a parameter of the recipe: {_ELSEWHERE[name]}")
        if name not in _OVERRIDES:
            hint = nearest([*_OVERRIDES, *_ALIASES], key)
            raise ConfigError(place, each, f"unknown key; {hint}")
        if name in found:
            raise ConfigError(place, each, f"is another name of {name}; give one of them")
        if each == "":
            raise ConfigError(place, each, "a value; leave it out for the default")
        found[name] = _OVERRIDES[name].check(place, each)
    return found


def overrides_in_file(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What `check_overrides` returned, as part of the file's section for tasks; without the pipe."""
    return {
        key.name: overrides[key.override]
        for key in TASK_KEYS.values()
        if key.override in overrides and key.name != ConfigKey.PIPE
    }
