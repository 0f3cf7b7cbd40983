"""site_metrics: batches from sites become records, and records lines of JSON, whatever is in them."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flarebus.client.metric_batch import Row, encode_batch, pack_value
from flarebus.errors import DecodeError
from flarebus.server import site_metrics
from flarebus.server.site_metrics import DROPPED, NOT_SENT, NOT_WRITTEN, MetricFile, read_batch


def row(site: str = "a", value: Any = 0.5) -> Row:
    return (1.5, site, 2, "loss", value, "SCALAR", 7, "mlflow", None)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def runs(source: str, site: str) -> bool:
    return source == "host" and site in ("a", "b")


# --- batches


def test_a_batch_becomes_records() -> None:
    """Each row is a record with all its fields by name."""
    (found,) = read_batch("host", {"records": encode_batch([row()]), "dropped": {}}, runs)

    assert found == {
        "site": "a",
        "round": 2,
        "time": 1.5,
        "key": "loss",
        "value": 0.5,
        "type": "SCALAR",
        "step": 7,
        "writer": "mlflow",
    }


def test_what_a_site_dropped_is_a_record_and_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """The number of lost records stands where the values of the others stand, under a type of its own."""
    found = read_batch("host", {"records": encode_batch([row()]), "dropped": {"b": 3, "a": 4}}, runs)

    assert [(each["site"], each["key"], each["value"], each["type"]) for each in found[1:]] == [
        ("b", NOT_SENT, 3, DROPPED),
        ("a", NOT_SENT, 4, DROPPED),
    ]
    assert "b dropped 3 metric records" in caplog.text


@pytest.mark.parametrize("source", ["host", "another"])
def test_nobody_speaks_for_sites_of_others(source: str) -> None:
    """A batch with one record, or one loss, of a site that its sender does not run is refused as a whole."""
    for fields in (
        {"records": encode_batch([row(), row("a" if source == "another" else "c")]), "dropped": {}},
        {"records": encode_batch([]), "dropped": {"a" if source == "another" else "c": 1}},
    ):
        with pytest.raises(DecodeError, match=f"which {source} does not run"):
            read_batch(source, fields, runs)


# --- lines

BIG = np.zeros((3, 32, 32), np.uint8)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, 0.5),
        (True, True),
        ("text\n", "text\n"),
        (None, None),
        (math.nan, None),
        (-math.inf, None),
        (1 << 80, 1 << 80),
        ({"a": math.inf, "b": 1}, {"a": None, "b": 1}),
        ({3: (1, {2})}, {"3": [1, [2]]}),
        (np.float32(0.5), 0.5),
        (np.array([[4]]), 4),
        (np.array([1.0, math.nan]), [1.0, None]),
        (BIG, {"dtype": "uint8", "shape": [3, 32, 32]}),
        ([BIG], [{"dtype": "uint8", "shape": [3, 32, 32]}]),
        (b"12345", {"bytes": 5}),
        (1 + 2j, "(1+2j)"),
    ],
    ids=repr,
)
def test_what_json_has_no_word_for(tmp_path: Path, value: Any, expected: Any) -> None:
    """Every value that can travel gets a line, and its neighbours keep theirs."""
    file = MetricFile(tmp_path / "m.jsonl")
    file.write([{"value": 1}, {"value": value, "key": "x"}, {"value": 2}])

    assert lines(tmp_path / "m.jsonl") == [{"value": 1}, {"value": expected, "key": "x"}, {"value": 2}]


def test_every_value_of_the_codec_gets_a_line(tmp_path: Path) -> None:
    """What comes out of a batch can be written, packed values and extra fields included."""
    rows = [
        (1.0, "a", None, "image", pack_value(BIG), "IMAGE", None, None, pack_value({"dataformats": "CHW"})),
        (1.0, "a", None, "many", pack_value({"x": np.float16(2)}), "METRICS", None, None, None),
    ]
    file = MetricFile(tmp_path / "m.jsonl")
    file.write(read_batch("host", {"records": encode_batch(rows), "dropped": {}}, runs))

    found = lines(tmp_path / "m.jsonl")
    assert found[0]["value"] == {"dtype": "uint8", "shape": [3, 32, 32]}
    assert found[0]["extra"] == {"dataformats": "CHW"}
    assert found[1]["value"] == {"x": 2.0}


def test_a_full_disk_costs_records_and_they_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is raised and the log says it once; when there is room again, the file says how many are missing."""
    file = MetricFile(tmp_path / "m.jsonl")
    file.write([{"value": 1}])
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(site_metrics, "append_lines", full)
        file.write([{"value": 2}, {"value": 3}])
        file.write([{"value": 4}])
    assert caplog.text.count("No space left") == 1
    file.write([{"value": 5}])
    file.write([{"value": 6}])

    found = lines(tmp_path / "m.jsonl")
    assert [(each.get("key"), each["value"]) for each in found] == [
        (None, 1),
        (NOT_WRITTEN, 3),
        (None, 5),
        (None, 6),
    ]
