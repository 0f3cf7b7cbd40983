"""ClientConfig: what a trainer in a process of its own is told, as a file that only its user can read.

{
  "SITE_NAME": "site-1",
  "JOB_ID": "...",
  "TASK_EXCHANGE": {
    "exchange_format": "numpy",
    "pipe_channel_name": "task",
    "pipe": {"CLASS_NAME": "cell", "ARG": {...}},
    ...
  },
  "METRICS_EXCHANGE": {"pipe_channel_name": "metric", "pipe": {...}},
  "auth_token": "...",
  "connection": {...}
}

Every key may be missing; `flarebus.job.client_keys` says what it means then. A key that is not known is an error.
"""

from __future__ import annotations

import copy
import json
import os
import stat
from collections.abc import Mapping
from typing import Any

from flarebus.errors import ConfigError
from flarebus.job.checks import nearest
from flarebus.job.client_keys import METRIC_KEYS, PIPE_KEYS, TASK_KEYS, TOP_KEYS, ConfigKey, Key, check_section
from flarebus.job.kinds import ExchangeFormat, TransferType

__all__ = ["ClientConfig", "ConfigKey", "ExchangeFormat", "TransferType", "from_file", "write_config_to_file"]

# A page of text; whatever is longer is something else.
_MAX_BYTES = 2**20
_SECTIONS: dict[str, dict[str, Key]] = {ConfigKey.TASK_EXCHANGE: TASK_KEYS, ConfigKey.METRICS_EXCHANGE: METRIC_KEYS}


class ClientConfig:
    """A trainer's configuration, checked. It does not change.

    Args:
        config: keys as in the file; copied. None is an empty one: everything has its default.

    Raises:
        ConfigError: a key is unknown (names the nearest known one), or a value is wrong.
    """

    __slots__ = ("_config",)

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self._config = check_section("config", {} if config is None else dict(config), TOP_KEYS)

    def get_config(self) -> dict[str, Any]:
        """All of it, secrets included; a copy."""
        return copy.deepcopy(self._config)

    def public(self) -> dict[str, Any]:
        """What a script may see and print: no token, no connection, and of each pipe only its class; a copy."""
        shown = _without_secrets(self._config, TOP_KEYS)
        for name in _SECTIONS:
            if ConfigKey.PIPE in shown.get(name, {}):
                shown[name] = {**shown[name], ConfigKey.PIPE: _without_secrets(shown[name][ConfigKey.PIPE], PIPE_KEYS)}
        return copy.deepcopy(shown)

    def get_site_name(self) -> str | None:
        """The site that the trainer works for."""
        return self._top(ConfigKey.SITE_NAME)

    def get_job_id(self) -> str | None:
        """The job."""
        return self._top(ConfigKey.JOB_ID)

    def get_auth_token(self) -> str | None:
        """What the trainer shows to be let in. Secret."""
        return self._top(ConfigKey.AUTH_TOKEN)

    def get_connection(self) -> dict[str, Any] | None:
        """The keys of the encrypted connection; a copy. Secret. None: no encryption, on one machine only."""
        return copy.deepcopy(self._config.get(ConfigKey.CONNECTION))

    def get_log_config(self) -> str | None:
        """Layout, level or file of the logs, as the environment was given it."""
        return self._top(ConfigKey.LOG_CONFIG)

    def get_train_with_eval(self) -> bool:
        """Whether the train task evaluates the received model as well."""
        return bool(self._task(ConfigKey.TRAIN_WITH_EVAL))

    def get_exchange_format(self) -> ExchangeFormat:
        """What the script works with."""
        return ExchangeFormat(self._task(ConfigKey.EXCHANGE_FORMAT))

    def get_server_expected_format(self) -> ExchangeFormat:
        """What the server wants to get."""
        return ExchangeFormat(self._task(ConfigKey.SERVER_EXPECTED_FORMAT))

    def get_transfer_type(self) -> TransferType:
        """Whether answers are whole models or differences."""
        return TransferType(self._task(ConfigKey.TRANSFER_TYPE))

    def get_train_task(self) -> str:
        """Name of the task to train."""
        return str(self._task(ConfigKey.TRAIN_TASK_NAME))

    def get_eval_task(self) -> str:
        """Name of the task to evaluate."""
        return str(self._task(ConfigKey.EVAL_TASK_NAME))

    def get_submit_model_task(self) -> str:
        """Name of the task to submit the site's own model."""
        return str(self._task(ConfigKey.SUBMIT_MODEL_TASK_NAME))

    def get_memory_gc_rounds(self) -> int:
        """After how many rounds memory is cleaned up; 0 for never."""
        return int(self._task(ConfigKey.MEMORY_GC_ROUNDS))

    def get_cuda_empty_cache(self) -> bool:
        """Whether that gives cached GPU memory back, too."""
        return bool(self._task(ConfigKey.CUDA_EMPTY_CACHE))

    def get_heartbeat_timeout(self) -> float:
        """Seconds of silence after which the peer is held to be gone; of the metrics section if tasks say nothing."""
        name = ConfigKey.HEARTBEAT_TIMEOUT
        for section in _SECTIONS:
            if name in self._config.get(section, {}):
                break
        return float(self._get(section, name))

    def get_heartbeat_interval(self) -> float:
        """Seconds between two signs of life."""
        return float(self._task(ConfigKey.HEARTBEAT_INTERVAL))

    def get_submit_result_timeout(self) -> float:
        """Seconds to wait for the client job's word that it has read a result."""
        return float(self._task(ConfigKey.SUBMIT_RESULT_TIMEOUT))

    def get_max_resends(self) -> int | None:
        """How often a result is sent again at most; None for no limit."""
        found: int | None = self._task(ConfigKey.MAX_RESENDS)
        return found

    def get_download_complete_timeout(self) -> float:
        """Seconds that the trainer stays after the word came, for the server to pull what the result holds."""
        return float(self._task(ConfigKey.DOWNLOAD_COMPLETE_TIMEOUT))

    def get_launch_once(self) -> bool:
        """Whether one process does the whole job; False: one task each."""
        return bool(self._task(ConfigKey.LAUNCH_ONCE))

    def get_pipe_channel_name(self, section: str) -> str:
        """Name of the channel.

        Args:
            section: `ConfigKey.TASK_EXCHANGE` or `ConfigKey.METRICS_EXCHANGE`; for all methods about pipes.

        Raises:
            ConfigError: it is neither; for all methods about pipes.
        """
        return str(self._get(section, ConfigKey.PIPE_CHANNEL_NAME))

    def get_pipe_class(self, section: str) -> str:
        """Name or dotted class path of the pipe.

        Raises:
            ConfigError: the section has no pipe.
        """
        return str(self._pipe(section)[ConfigKey.CLASS_NAME])

    def get_pipe_args(self, section: str) -> dict[str, Any]:
        """Arguments of the pipe, without the mode; a copy. May hold secrets.

        Raises:
            ConfigError: the section has no pipe.
        """
        found: dict[str, Any] = copy.deepcopy(self._pipe(section)[ConfigKey.ARG])
        return found

    def to_json(self, config_file: str | os.PathLike[str]) -> None:
        """Write all of it to a file that only its owner can read, in place of one that is there, whole or not at all.

        Raises:
            ConfigError: it cannot be written.
        """
        _write(json.dumps(self._config, indent=2, allow_nan=False) + "\n", os.fspath(config_file))

    def _top(self, name: str) -> str | None:
        return self._config.get(name) or None

    def _task(self, name: str) -> Any:
        return self._get(ConfigKey.TASK_EXCHANGE, name)

    def _get(self, section: str, name: str) -> Any:
        if section not in _SECTIONS:
            raise ConfigError("section", section, nearest(_SECTIONS, section))
        default = _SECTIONS[section][name].default
        value = self._config.get(section, {}).get(name, default)
        return default if value == "" else value

    def _pipe(self, section: str) -> dict[str, Any]:
        found: dict[str, Any] | None = self._get(section, ConfigKey.PIPE)
        if found is None:
            raise ConfigError(section, ConfigKey.PIPE, "there is no pipe in this section")
        return found


def from_file(config_file: str | os.PathLike[str]) -> ClientConfig:
    """Read a configuration.

    Raises:
        ConfigError: there is none, somebody else may read or write it, it is no whole JSON object, or its content is
            wrong. Nothing secret is in the message.
    """
    path = os.fspath(config_file)
    try:
        found = json.loads(_read(path))
    except UnicodeDecodeError:
        raise ConfigError("config_file", path, "not JSON: no UTF-8") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("config_file", path, f"not JSON, or not all of it: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError("config_file", path, f"a JSON object, not {type(found).__name__}")
    try:
        return ClientConfig(found)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.parameter}", error.value, error.allowed) from None


def write_config_to_file(config_data: Mapping[str, Any], config_file: str | os.PathLike[str]) -> None:
    """Write top-level keys into a configuration; those of a file that is there already stay.

    As `ClientConfig.to_json`, which replaces the file.

    Raises:
        ConfigError: a key or value is wrong, or the file that is there cannot be read, or not be written.
    """
    old = from_file(config_file).get_config() if os.path.lexists(config_file) else {}
    ClientConfig({**old, **config_data}).to_json(config_file)


def _without_secrets(values: Mapping[str, Any], table: Mapping[str, Key]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not table[name].secret}


def _read(path: str) -> str:
    try:
        # Not blocking: what waits behind the name may be a FIFO.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            # Asked of the open file: behind the name there may be another one by now.
            _check_private(path, os.fstat(file))
            with open(file, "rb", closefd=False) as opened:
                return opened.read(_MAX_BYTES).decode("utf-8")
        finally:
            os.close(file)
    except OSError as error:
        raise ConfigError("config_file", path, f"cannot be read: {error.strerror}") from None


def _check_private(path: str, about: os.stat_result) -> None:
    if not stat.S_ISREG(about.st_mode):
        raise ConfigError("config_file", path, "is no file")
    if about.st_uid != os.geteuid():
        allowed = f"belongs to user {about.st_uid}, not to you, and it holds a secret: chown it, then chmod 600"
        raise ConfigError("config_file", path, allowed)
    if about.st_mode & 0o077:
        allowed = f"others can read or write it (mode {about.st_mode & 0o777:03o}), and it holds a secret: chmod 600"
        raise ConfigError("config_file", path, allowed)
    if about.st_size > _MAX_BYTES:
        raise ConfigError("config_file", path, f"is too long: at most {_MAX_BYTES} bytes")


def _write(text: str, path: str) -> None:
    # Beside the target: a rename works only within one file system.
    fresh = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.urandom(8).hex()}")
    try:
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(file, "w", encoding="utf-8") as opened:
                os.fchmod(file, 0o600)  # whatever the umask makes of it
                opened.write(text)
            os.replace(fresh, path)
        except BaseException:
            os.unlink(fresh)
            raise
    except OSError as error:
        raise ConfigError("config_file", path, f"cannot be written: {error.strerror}") from None
