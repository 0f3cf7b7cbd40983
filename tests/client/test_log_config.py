"""What `log_config` may be, and what a line looks like."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from flarebus.client.log_config import Layout, LogConfig, escape
from flarebus.errors import ConfigError

WHEN = time.mktime((2031, 2, 3, 4, 5, 6, 0, 0, -1)) + 0.25


@pytest.mark.parametrize(
    ("value", "layout", "level"),
    [
        (None, Layout.CONCISE, logging.INFO),
        ("concise", Layout.CONCISE, logging.INFO),
        ("full", Layout.FULL, logging.INFO),
        ("verbose", Layout.VERBOSE, logging.DEBUG),
        ("msg_only", Layout.MSG_ONLY, logging.INFO),
        ("DEBUG", Layout.CONCISE, logging.DEBUG),
        ("error", Layout.CONCISE, logging.ERROR),
    ],
)
def test_modes_and_levels(value: str | None, layout: Layout, level: int) -> None:
    """A mode sets the layout, a level the least level, nothing means concise."""
    config = LogConfig.parse(value)

    assert (config.layout, config.level, config.tables) == (layout, level, None)


def test_json_file(tmp_path: Path) -> None:
    """A file for dictConfig is taken, and does not silence the loggers that exist unless it says so."""
    path = tmp_path / "log.json"
    path.write_text(json.dumps({"version": 1, "root": {"level": "DEBUG"}}))
    config = LogConfig.parse(path)

    assert config.tables == {"version": 1, "root": {"level": "DEBUG"}, "disable_existing_loggers": False}


@pytest.mark.parametrize("text", ["not json", "[]", "{}", '{"version": 2}', "\x80"])
def test_wrong_file_is_refused(tmp_path: Path, text: str) -> None:
    """A file that is no configuration is an error that names the parameter and the file."""
    path = tmp_path / "log.json"
    path.write_text(text, encoding="latin-1")

    with pytest.raises(ConfigError, match=r"log_config=.*log\.json"):
        LogConfig.parse(str(path))


@pytest.mark.parametrize("value", ["loud", "/no/such/file.json", 3, ""])
def test_other_values_are_refused(value: Any) -> None:
    """The error says what is allowed."""
    with pytest.raises(ConfigError, match=r"concise|mode"):
        LogConfig.parse(value)


@pytest.mark.parametrize(
    ("mode", "line"),
    [
        ("concise", "04:05:06 INFO    hello"),
        ("full", "2031-02-03 04:05:06.250 INFO    net hello"),
        ("verbose", "2031-02-03 04:05:06.250 INFO    net main client.py:3 hello"),
        ("msg_only", "hello"),
    ],
)
def test_layouts(mode: str, line: str) -> None:
    """Each mode has its columns."""
    assert LogConfig.parse(mode).line(WHEN, "INFO", "net", "main client.py:3", "hello") == line


def test_escape() -> None:
    """Nothing that moves a cursor, ends a line or turns text round gets through; other text does."""
    assert escape("a\tb ü €") == "a\tb ü €"
    assert escape("\x1b[31m\n\r\x00\x7f\x85\u2028\u202e") == r"\x1b[31m\n\r\x00\x7f\x85\u2028\u202e"
