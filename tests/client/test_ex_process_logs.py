"""What a trainer logs, and that it is in the site's log as if the script ran there. The trainers are real processes."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flarebus.client.log_config import MARK, LogConfig
from flarebus.site.import_path import import_path
from flarebus.site.output import SiteLogs

BEGIN = """
import logging, sys
from flarebus.client.ex_process.logs import configure_logging
configure_logging({config!r})
"""


def run(folder: Path, config: str | None, code: str, before: str = "") -> tuple[list[str], list[str]]:
    """Run a script with its logging configured; the lines of its standard output and of its standard error."""
    ended = subprocess.run(
        [sys.executable, "-c", before + BEGIN.format(config=config) + code],
        cwd=folder,
        env={**os.environ, **import_path(os.environ)},
        capture_output=True,
        text=True,
        check=True,
    )
    return ended.stdout.split("\n")[:-1], ended.stderr.split("\n")[:-1]  # not at marks


def site_log(folder: Path, config: str | None, code: str) -> list[str]:
    """Run a script likewise; what is in the log of its site then, first what came from its standard output."""
    out, err = run(folder, config, code)
    with_logs = SiteLogs(LogConfig.parse(config), now=lambda: 0.0)
    with_logs.add("site-1", folder / "log.txt")
    for stream, lines in (("stdout", out), ("stderr", err)):
        for line in lines:
            with_logs.line("site-1", stream, line)
    with_logs.close()
    return (folder / "log.txt").read_text().splitlines()


def tables(folder: Path, **changes: Any) -> str:
    """A file for dictConfig with one handler that writes to a file."""
    handler = {"class": "logging.FileHandler", "filename": str(folder / "own.txt"), "formatter": "f", **changes}
    config = {
        "version": 1,
        "formatters": {"f": {"format": "%(levelname)s: %(message)s"}},
        "handlers": {"h": handler},
        "root": {"level": "DEBUG", "handlers": ["h"]},
    }
    path = folder / "log.json"
    path.write_text(json.dumps(config))
    return str(path)


def test_records_and_printed_lines_are_in_the_log_once(tmp_path: Path) -> None:
    """A record has its own level and the layout of the site; printed lines are INFO, standard error is STDERR."""
    code = "print('hello'); logging.getLogger('net').warning('loss %.1f', 0.5); sys.stderr.write('raw\\n')"
    lines = site_log(tmp_path, "full", code)

    assert [line[24:] for line in lines] == ["INFO    print hello", "WARNING net loss 0.5", "STDERR  print raw"]
    assert not lines[1].startswith("1970")


def test_a_traceback_stays_with_its_record(tmp_path: Path) -> None:
    """It is indented below, and every character that could do harm is written out."""
    code = (
        "try: raise ValueError('bad\\x1b')\nexcept ValueError: logging.exception('failed\\nhere', stack_info=True)\n"
        f"print({MARK!r} + '\\x1b[31mnot so')"
    )
    lines = site_log(tmp_path, "msg_only", code)

    assert lines[:2] == [r"\x1b[31mnot so", r"failed\nhere"]
    assert all(line.startswith("  | ") for line in lines[2:])
    assert r"  | ValueError: bad\x1b" in lines
    assert any("Stack (most recent call last)" in line for line in lines)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, ["INFO    two", "ERROR   three"]),
        ("error", ["ERROR   three"]),
        ("debug", ["DEBUG   one", "INFO    two", "ERROR   three", "DEBUG   four"]),
    ],
)
def test_the_level_is_that_of_the_site(tmp_path: Path, config: str | None, expected: list[str]) -> None:
    """Also for a logger that wants more, as in the client job; `basicConfig` of the script changes nothing."""
    code = (
        "logging.basicConfig(level='CRITICAL')\nlogging.debug('one'); logging.info('two'); logging.error('three')\n"
        "own = logging.getLogger('own'); own.setLevel('DEBUG'); own.debug('four')"
    )
    lines = site_log(tmp_path, config, code)

    assert [re.sub(r"^[\d:]+ ", "", line) for line in lines] == expected


def test_a_message_that_does_not_fit_is_no_end(tmp_path: Path) -> None:
    """It is reported as by every handler."""
    _, err = run(tmp_path, None, "logging.info('%d', 'x'); logging.info('on')")

    assert "--- Logging error ---" in err
    assert err[-1].endswith("INFO    on")


@pytest.mark.parametrize(
    "changes",
    [
        {"class": "logging.handlers.RotatingFileHandler", "maxBytes": 50, "backupCount": 3, "mode": "w"},
        {"class": "logging.handlers.TimedRotatingFileHandler", "when": "S", "interval": 1, "utc": True, "atTime": None},
        {"()": "logging.handlers.RotatingFileHandler", "class": "ignored", "maxBytes": 50, "delay": True},
        {"mode": "w"},
    ],
)
def test_a_file_that_two_processes_write_is_only_appended_to(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Handlers that rotate or truncate become plain ones; other options stay."""
    (tmp_path / "own.txt").write_text("of the site\n")
    out, err = run(tmp_path, tables(tmp_path, **changes), "for n in range(20): logging.debug('record %d', n)")

    assert (tmp_path / "own.txt").read_text().splitlines() == [
        "of the site",
        *(f"DEBUG: record {n}" for n in range(20)),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.json", "own.txt"]
    assert (out, err) == ([], [])


def test_a_file_without_handlers_for_all_leaves_the_records_to_the_site(tmp_path: Path) -> None:
    """Then they come as they do without such a file, in its layout."""
    path = tmp_path / "log.json"
    path.write_text(json.dumps({"version": 1, "root": {"level": "ERROR"}}))
    lines = site_log(tmp_path, str(path), "logging.info('one'); logging.error('two')")

    assert lines == ["two"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "a JSON file"),
        ("no json", "cannot be read"),
        (
            json.dumps({"version": 1, "handlers": {"h": {"class": "no.such.Handler"}}}),
            "Unable to configure handler 'h'",
        ),
        (json.dumps({"version": 1, "handlers": {"h": 3}}), "Unable to configure handler 'h'"),
        (json.dumps({"version": 1, "handlers": 3}), "log.json"),
    ],
)
def test_a_wrong_configuration_only_warns(tmp_path: Path, text: str | None, words: str) -> None:
    """The script runs, and logs as by default."""
    path = tmp_path / "log.json"
    if text is not None:
        path.write_text(text)
    _, err = run(tmp_path, str(path), "logging.info('on')")

    assert [line.startswith(MARK) for line in err] == [True, True]
    assert " WARNING " in err[0]
    assert words in err[0]
    assert err[1].endswith("INFO    on")


def test_a_script_that_has_set_up_its_logging_keeps_it(tmp_path: Path) -> None:
    """What it has configured before is not added to."""
    before = "import logging; logging.basicConfig(format='own %(message)s', level='DEBUG')\n"
    _, err = run(tmp_path, "error", "logging.debug('one')", before)

    assert err == ["own one"]


def test_a_line_of_a_process_is_shown_on_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For debugging, as what a script prints in this process."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    with SiteLogs(LogConfig.parse("msg_only"), console=True) as logs:
        logs.add("site-1", tmp_path / "log.txt")
        logs.line("site-1", "stdout", "hello")
        logs.line("site-1", "stderr", f"{MARK}record")

    assert capsys.readouterr().err == "hello\nrecord\n"
    assert root.handlers == handlers
