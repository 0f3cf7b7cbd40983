"""Journal: rounds in order, once, for good."""

from __future__ import annotations

import errno
import json
import math
import shutil
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest

from flarebus.errors import DecodeError, UsageError
from flarebus.job.journal import CommittedRound, Journal, append_metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the journal is."""
    return tmp_path / "rounds.sqlite"


def test_what_is_committed_is_found_again(path: Path) -> None:
    """Rounds and the state of the job are there when the journal is opened again."""
    journal = Journal(path)
    assert (journal.last_round(), journal.rows(), journal.state()) == (None, [], ("unknown", None))
    journal.begin("job-1", "fedavg")
    journal.commit(0, "model-0.safetensors", {"accuracy": 0.5}, ["site-1", "site-2"], 1.5)
    journal.commit(1, "model-1.safetensors", {}, [], 2.5)
    journal.close()

    again = Journal(path)

    assert again.last_round() == 1
    assert again.rows() == [
        CommittedRound(0, "model-0.safetensors", {"accuracy": 0.5}, ["site-1", "site-2"], 1.5),
        CommittedRound(1, "model-1.safetensors", {}, [], 2.5),
    ]
    assert again.state() == ("running", None)
    again.end("failed", "1 usable result, 2 needed")
    assert again.state() == ("failed", "1 usable result, 2 needed")
    again.begin("job-1", "fedavg")
    assert again.state() == ("running", None)
    again.close()


def test_a_crash_loses_no_committed_round(path: Path, tmp_path: Path) -> None:
    """What a killed process leaves, database and log as they lie there, holds every round that was committed."""
    journal = Journal(path)
    journal.begin("job-1", "fedavg")
    for round in range(3):
        journal.commit(round, f"model-{round}", {}, ["a"], 0.0)
        left = tmp_path / f"left-{round}"
        left.mkdir()
        for file in (path, path.with_name(f"{path.name}-wal")):
            shutil.copy(file, left)
    journal.close()

    for round in range(3):
        again = Journal(tmp_path / f"left-{round}" / path.name)
        assert [row.model for row in again.rows()] == [f"model-{number}" for number in range(round + 1)]
        assert again.state() == ("running", None)
        again.commit(round + 1, "next", {}, [], 0.0)
        again.close()


@pytest.mark.parametrize(("done", "number"), [(0, 1), (2, 1), (2, 0), (2, 3), (0, -1)])
def test_rounds_commit_in_order_and_once(path: Path, done: int, number: int) -> None:
    """A gap, a repetition or a step back is refused, and nothing is written."""
    journal = Journal(path)
    for round in range(done):
        journal.commit(round, "m", {}, [], 0.0)

    with pytest.raises(UsageError, match=f"round {number} cannot"):
        journal.commit(number, "other", {}, [], 0.0)

    assert [row.model for row in journal.rows()] == ["m"] * done
    journal.close()


def test_one_of_many_threads_commits_a_round(path: Path) -> None:
    """When several threads commit the same round, one does and the others hear of it."""
    journal = Journal(path)
    refused = []
    start = threading.Barrier(8)

    def commit() -> None:
        start.wait()
        try:
            journal.commit(0, "m", {}, [], 0.0)
        except UsageError as error:
            refused.append(error)

    threads = [threading.Thread(target=commit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(refused) == 7
    assert journal.last_round() == 0
    journal.close()


def test_metrics_of_any_kind_do_not_stop_a_commit(path: Path) -> None:
    """NaN, numbers of NumPy and nested dicts are kept as what JSON can hold."""
    journal = Journal(path)

    journal.commit(0, "m", {"nan": math.nan, "np": np.float32(0.5), "deep": {"inf": [math.inf]}}, [], 0.0)

    assert journal.rows()[0].metrics == {"nan": None, "np": 0.5, "deep": {"inf": [None]}}
    journal.close()


def test_commits_are_durable_when_they_return(path: Path) -> None:
    """The database is in WAL mode with full synchronisation, so that a committed row survives a crash."""
    journal = Journal(path)

    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,)
    journal.close()


def test_a_file_that_is_no_journal_is_refused(path: Path) -> None:
    """A damaged or foreign file is an error that names it."""
    path.write_bytes(b"no database at all" * 100)

    with pytest.raises(DecodeError, match=r"rounds\.sqlite"):
        Journal(path)


def test_a_damaged_journal_is_found(path: Path) -> None:
    """Damage inside the database is an error that names the file, never a wrong answer without a word."""
    journal = Journal(path)
    for round in range(50):
        journal.commit(round, "m" * 200, {}, [], 0.0)
    journal.close()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)

    with pytest.raises(DecodeError, match=r"rounds\.sqlite"):
        Journal(path).rows()


def test_rows_that_are_no_json_are_found(path: Path) -> None:
    """A row whose text was changed is an error that names the file."""
    journal = Journal(path)
    journal.commit(0, "m", {}, [], 0.0)
    journal._db.execute("UPDATE rounds SET metrics='{'")

    with pytest.raises(DecodeError, match=r"rounds\.sqlite"):
        journal.rows()
    journal.close()


def test_a_journal_from_a_later_version_is_left_alone(path: Path) -> None:
    """A journal with a schema of another version is refused with both versions, not guessed at."""
    Journal(path).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 7")
    database.close()

    with pytest.raises(DecodeError, match="version 7"):
        Journal(path)


def test_no_room_or_no_folder_is_an_oserror(path: Path) -> None:
    """What the disk refuses is the operating system's error, with the file's name."""
    with pytest.raises(OSError, match=r"unable to open.*rounds\.sqlite"):
        Journal(path.parent / "nowhere" / "rounds.sqlite")
    journal = Journal(path)
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count = {pages}")

    journal.commit(0, "m", {}, [], 0.0)

    with pytest.raises(OSError, match="No space") as caught:
        journal.commit(1, "m" * 10_000, {}, [], 0.0)

    assert caught.value.errno == errno.ENOSPC
    assert journal.last_round() == 0
    journal.close()


def test_metrics_are_lines_of_json(tmp_path: Path) -> None:
    """Each record is one line of strict JSON; what JSON has no word for is null or text."""
    path = tmp_path / "metrics.jsonl"

    append_metrics(path, {"round": 0, "metrics": {"loss": math.nan, "text": "a\nb", "n": np.int64(3)}})
    append_metrics(path, {"round": 1, "metrics": {"loss": np.array(0.5), "many": np.zeros(2), 5: {1, 2} - {2}}})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert lines[0] == {"round": 0, "metrics": {"loss": None, "text": "a\nb", "n": 3}}
    assert lines[1]["metrics"]["loss"] == 0.5
    assert lines[1]["metrics"]["5"] == "{1}"
