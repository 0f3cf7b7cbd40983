"""Journal: which rounds of a job are committed, and how it ended. One row per round, in SQLite.

A row is written only when its model is durable, and is itself durable when `commit` returns: whoever finds it after a
crash may rely on the file it names.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flarebus.errors import DecodeError, UsageError

__all__ = ["CommittedRound", "Journal", "append_lines", "append_metrics", "json_text"]

_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS job (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, state TEXT NOT NULL, reason TEXT
);
CREATE TABLE IF NOT EXISTS rounds (
    number INTEGER PRIMARY KEY, model TEXT NOT NULL, metrics TEXT NOT NULL, accepted TEXT NOT NULL,
    committed_at REAL NOT NULL
);
"""


@dataclass(frozen=True, slots=True)
class CommittedRound:
    """One row.

    Args:
        number: of the round, from 0.
        model: name of the model's file.
        metrics: of the model that entered the round.
        accepted: sites whose results are in the model.
        committed_at: seconds since the epoch, by the server's clock.
    """

    number: int
    model: str
    metrics: dict[str, Any]
    accepted: list[str]
    committed_at: float


class Journal:
    """The journal of one job. Any thread may call.

    Args:
        path: of the database; made if it is not there.

    Raises:
        DecodeError: the file is no journal, or one of another version.
        OSError: it cannot be opened or written; so do all methods.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        with self._translated():
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            try:
                self._set_up()
            except BaseException:
                self._db.close()
                raise

    def _set_up(self) -> None:
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, _VERSION):
            raise DecodeError(f"{self._path}: a journal of version {found}; this flarebus reads version {_VERSION}")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(f"{_SCHEMA} PRAGMA user_version={_VERSION};")

    def begin(self, job_id: str, name: str) -> None:
        """The job runs, for the first time or again."""
        with self._translated():
            self._db.execute(
                "INSERT INTO job VALUES (?, ?, 'running', NULL)"
                " ON CONFLICT (id) DO UPDATE SET state='running', reason=NULL",
                (job_id, name),
            )

    def end(self, state: str, reason: str | None) -> None:
        """The job has ended."""
        with self._translated():
            self._db.execute("UPDATE job SET state=?, reason=?", (state, reason))

    def state(self) -> tuple[str, str | None]:
        """State and reason as they were noted last."""
        with self._translated():
            row = self._db.execute("SELECT state, reason FROM job").fetchone()
        return ("unknown", None) if row is None else (row[0], row[1])

    def commit(
        self, number: int, model: str, metrics: Mapping[str, Any], accepted: Sequence[str], committed_at: float
    ) -> None:
        """Note a round whose model is durable.

        Raises:
            UsageError: it is not the round after the last one.
        """
        row = (number, model, json_text(metrics), json_text(list(accepted)), committed_at)
        with self._translated():
            last = self._last_round()
            if number != (0 if last is None else last + 1):
                raise UsageError(f"round {number} cannot be committed after {'none' if last is None else last}")
            self._db.execute("INSERT INTO rounds VALUES (?, ?, ?, ?, ?)", row)

    def last_round(self) -> int | None:
        """The last committed round, or None."""
        with self._translated():
            return self._last_round()

    def _last_round(self) -> int | None:
        number = self._db.execute("SELECT max(number) FROM rounds").fetchone()[0]
        return None if number is None else int(number)

    def rows(self) -> list[CommittedRound]:
        """All committed rounds, in order."""
        with self._translated():
            found = self._db.execute("SELECT * FROM rounds ORDER BY number").fetchall()
        try:
            return [CommittedRound(row[0], row[1], json.loads(row[2]), json.loads(row[3]), row[4]) for row in found]
        except ValueError as error:
            raise DecodeError(f"{self._path}: a row holds no JSON: {error}") from error

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except sqlite3.OperationalError as error:
            number = errno.ENOSPC if error.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO
            raise OSError(number, f"{os.strerror(number)} ({error})", str(self._path)) from error
        except sqlite3.DatabaseError as error:
            raise DecodeError(f"{self._path}: not a journal: {error}") from error


def append_metrics(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line of JSON; a reader sees all of it or nothing.

    Args:
        record: anything: NaN and infinities become null, arrays with one number that number, all else that JSON has no
            word for its text.

    Raises:
        OSError: the disk is full; the file is as it was.
    """
    append_lines(path, [json_text(record)])


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Add lines to a file; a reader sees all of them or none.

    Raises:
        OSError: the disk is full; the file is as it was.
    """
    data = memoryview("".join(f"{line}\n" for line in lines).encode())
    with open(path, "ab", buffering=0) as file:
        begin = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(begin)  # half a line would spoil the file for whoever reads it
            raise


def json_text(value: Any) -> str:
    """Anything as JSON: NaN and infinities become null, arrays with one number that number, the rest its text."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    """The same as JSON can hold it: what a site sends as metrics must never end a job."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if getattr(value, "size", 0) == 1 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
