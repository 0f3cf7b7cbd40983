"""The log records of a trainer: laid out here as the site's `log_config` says, written to standard error with a mark,
and put into the site's log by the client job, which has the file (see `flarebus.client.log_config`).

A configuration of handlers applies in the trainer too, but only one process may rotate a file: here rotating handlers
become plain ones that append. A script that has set its logging up before keeps what it has.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from flarebus.client.log_config import MARK, LogConfig
from flarebus.errors import ConfigError

__all__ = ["configure_logging"]

log = logging.getLogger(__name__)

_FILE_HANDLER = "logging.FileHandler"
_ROTATING = frozenset({"logging.handlers.RotatingFileHandler", "logging.handlers.TimedRotatingFileHandler"})
_OF_ROTATION = frozenset({"maxBytes", "backupCount", "when", "interval", "utc", "atTime"})


def configure_logging(log_config: str | None) -> None:
    """Set the logging of this process up as that of the site. What is wrong with it is logged as a warning.

    Args:
        log_config: as for `LogConfig.parse`.
    """
    problem = ""
    try:
        config = LogConfig.parse(log_config)
    except ConfigError as error:
        config, problem = LogConfig(), str(error)
    root = logging.getLogger()
    if config.tables is not None:
        root.setLevel(config.level)
        problem = _apply(config.tables)
        if problem:
            config, problem = LogConfig(), f"log_config={config.source!r}: {problem}"
    if not root.handlers:
        if config.tables is None:
            root.setLevel(config.level)
        root.addHandler(_MarkedHandler(config))
    if problem:
        log.warning("%s; this process logs as by default", problem)


def _apply(tables: Mapping[str, Any]) -> str:
    """Hand a configuration to `dictConfig`; what is wrong with it, or ""."""
    import logging.config  # with a server for configurations and more: not for those who have no such file

    handlers = tables.get("handlers")
    if isinstance(handlers, dict):
        tables = {**tables, "handlers": {name: _without_rotation(handler) for name, handler in handlers.items()}}
    try:
        logging.config.dictConfig(dict(tables))
    except (ValueError, TypeError, AttributeError, ImportError, OSError) as error:
        return f"{error}: {error.__cause__}" if error.__cause__ is not None else str(error)
    return ""


def _without_rotation(handler: Any) -> Any:
    """The handler for a process that shares the file with another one."""
    if not isinstance(handler, dict):
        return handler  # dictConfig says what is wrong with it
    made_by = handler.get("()", handler.get("class"))
    if made_by in _ROTATING:
        kept = {name: value for name, value in handler.items() if name not in _OF_ROTATION | {"()"}}
        return {**kept, "class": _FILE_HANDLER, "mode": "a"}
    return {**handler, "mode": "a"} if made_by == _FILE_HANDLER else handler


class _MarkedHandler(logging.Handler):
    def __init__(self, config: LogConfig) -> None:
        super().__init__(config.level)
        self._config = config

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # In one piece: other processes of the trainer write to the same pipe.
            sys.stderr.write("".join(f"{MARK}{line}\n" for line in self._config.record(record)))
            sys.stderr.flush()
        except Exception:  # what every handler does with a message that does not fit its arguments
            self.handleError(record)
