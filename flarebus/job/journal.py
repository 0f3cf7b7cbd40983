"""Journal: which rounds of a job are committed, and how it ended. One row per round, in SQLite.

A row is written only when its model is durable, and is itself durable when `commit` returns: whoever finds it after a
crash may rely on the file it names.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flarebus.errors import DecodeError, UsageError

__all__ = ["CommittedRound", "Journal", "append_metrics"]

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
        DecodeError: the file is no journal.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        with self._translated():
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)

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
        last = self.last_round()
        if number != (0 if last is None else last + 1):
            raise UsageError(f"round {number} cannot be committed after {'none' if last is None else last}")
        with self._translated():
            self._db.execute(
                "INSERT INTO rounds VALUES (?, ?, ?, ?, ?)",
                (number, model, json.dumps(dict(metrics)), json.dumps(list(accepted)), committed_at),
            )

    def last_round(self) -> int | None:
        """The last committed round, or None."""
        with self._translated():
            number = self._db.execute("SELECT max(number) FROM rounds").fetchone()[0]
        return None if number is None else int(number)

    def rows(self) -> list[CommittedRound]:
        """All committed rounds, in order."""
        with self._translated():
            found = self._db.execute("SELECT * FROM rounds ORDER BY number").fetchall()
        return [CommittedRound(row[0], row[1], json.loads(row[2]), json.loads(row[3]), row[4]) for row in found]

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
            raise OSError(None, str(error), str(self._path)) from error
        except sqlite3.DatabaseError as error:
            raise DecodeError(f"{self._path}: not a journal: {error}") from error


def append_metrics(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line of JSON; a reader sees all of it or nothing.

    Args:
        record: finite numbers, text, lists and dicts only.
    """
    line = json.dumps(record, allow_nan=False) + "\n"
    with open(path, "ab", buffering=0) as file:
        file.write(line.encode())
