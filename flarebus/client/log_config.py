"""How a site's log looks and how much is in it: what `log_config` may be, and the layout of one line.

A log is written by the site. A trainer, a process of its own, lays its log records out itself and writes them to
standard error with a mark, so that the site knows them from printed lines. Where lines go is not known here.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import traceback
from dataclasses import dataclass
from enum import Enum
from typing import Any

from flarebus.errors import ConfigError

__all__ = ["MARK", "Layout", "LogConfig", "continued", "escape", "without_mark"]

# Control codes, line separators and the marks that reorder text: a log line says what was written, on one line.
_UNSAFE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# In front of each line of a log record that a trainer writes: a control character that a terminal does not show.
MARK = "\x1e"
_CONTINUED = "  | "
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class Layout(str, Enum):
    """What stands in a line of a site's log.

    CONCISE: time, level, message. FULL: date, time, level, logger, message. VERBOSE: the same with thread, file and
    line, from level DEBUG on. MSG_ONLY: the message.
    """

    CONCISE = "concise"
    FULL = "full"
    VERBOSE = "verbose"
    MSG_ONLY = "msg_only"


def escape(text: str) -> str:
    """Write control characters, line ends included, as ``\\x1b`` and the like; tabs stay."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def without_mark(line: str) -> str:
    """A line of a trainer as a person reads it."""
    return line.removeprefix(MARK)


def continued(text: str) -> list[str]:
    """Lay out what belongs to the line before it, such as a traceback."""
    return [_CONTINUED + escape(line) for line in text.splitlines()]


@dataclass(frozen=True, slots=True)
class LogConfig:
    """A checked `log_config`.

    Args:
        layout: of printed lines, and of log records unless `tables` has handlers for them.
        level: the least level that is logged, as a number of `logging`.
        tables: a configuration for `logging.config.dictConfig`, or None.
        source: the file that `tables` came from.
        text: what it was made from, for whoever has to make the same in another process; None for the default.
    """

    layout: Layout = Layout.CONCISE
    level: int = logging.INFO
    tables: dict[str, Any] | None = None
    source: str = ""
    text: str | None = None

    @classmethod
    def parse(cls, value: str | os.PathLike[str] | None) -> LogConfig:
        """Understand a `log_config`.

        Args:
            value: ``concise``, ``full``, ``verbose`` or ``msg_only``; a level name; the path of a JSON file for
                `logging.config.dictConfig`; None for ``concise``.

        Raises:
            ConfigError: it is none of these, or the file is not such a configuration.
        """
        if value is None:
            return cls()
        if not isinstance(value, str | os.PathLike):
            raise ConfigError("log_config", value, "a mode, a level name or the path of a JSON file")
        text = os.fspath(value)
        if text in {layout.value for layout in Layout}:
            layout = Layout(text)
            return cls(layout, logging.DEBUG if layout is Layout.VERBOSE else logging.INFO, text=text)
        if text.upper() in _LEVELS:
            return cls(level=int(getattr(logging, text.upper())), text=text)
        if not os.path.isfile(text):
            modes = ", ".join(layout.value for layout in Layout)
            raise ConfigError("log_config", text, f"one of {modes}; a level ({', '.join(_LEVELS)}); or a JSON file")
        return cls(Layout.MSG_ONLY, logging.INFO, _read_tables(text), text, os.path.abspath(text))

    def line(self, when: float, level: str, logger: str, where: str, message: str) -> str:
        """Lay out one line.

        Args:
            when: seconds since the epoch.
            level: the word in the level column.
            logger: whose message it is.
            where: thread, file and line.
            message: without control characters.

        Returns:
            The line, without its end.
        """
        if self.layout is Layout.MSG_ONLY:
            return message
        moment = time.localtime(when)
        if self.layout is Layout.CONCISE:
            return f"{moment[3]:02}:{moment[4]:02}:{moment[5]:02} {level:<7} {message}"
        stamp = f"{time.strftime('%Y-%m-%d %H:%M:%S', moment)}.{int(when % 1 * 1000):03}"
        if self.layout is Layout.FULL:
            return f"{stamp} {level:<7} {logger} {message}"
        return f"{stamp} {level:<7} {logger} {where} {message}"

    def record(self, record: logging.LogRecord) -> list[str]:
        """Lay out a log record: its line, then its traceback and stack if it has them."""
        where = f"{escape(record.threadName or '')} {escape(record.filename)}:{record.lineno}"
        message = escape(record.getMessage())
        lines = [self.line(record.created, escape(record.levelname), escape(record.name), where, message)]
        if record.exc_info and record.exc_info[0] is not None:
            lines += continued("".join(traceback.format_exception(*record.exc_info)))
        if record.stack_info:
            lines += continued(record.stack_info)
        return lines


def _read_tables(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            tables = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError("log_config", path, f"a JSON file; this one cannot be read: {error}") from error
    if not isinstance(tables, dict) or tables.get("version") != 1:
        raise ConfigError("log_config", path, 'a configuration of logging.config.dictConfig, with "version": 1')
    # By default a configuration silences every logger that exists already.
    return {"disable_existing_loggers": False, **tables}
