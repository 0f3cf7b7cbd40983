"""RecordWriter: each kind of metric record becomes the right call, whatever a site puts into it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from flarebus.metric import MAX_KEY
from flarebus.tracking.records import RecordWriter, numbers_in, size_of
from tests.tracking.fake_tracker import FakeTracker


def record(value: Any, kind: str = "SCALAR", key: str = "loss", **fields: Any) -> dict[str, Any]:
    basic = {"site": "a", "round": 1, "time": 5.5, "key": key, "value": value, "type": kind, "step": 3, "writer": None}
    return {**basic, **fields}


def calls(*records: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What a tracker is told, without the change of round."""
    tracker = FakeTracker({})
    RecordWriter().write(tracker, "a", records)
    for call in tracker.calls:
        if call[0] == "scalars":
            call[2][:] = [point for point in call[2] if point[0] != "round"]
    return tracker.calls


pytestmark = pytest.mark.usefixtures("made")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (record(0.5), [("loss", 0.5, 3, 1)]),
        (record(True), [("loss", 1.0, 3, 1)]),
        (record(7, "METRIC", round=None), [("loss", 7.0, 3, None)]),
        (record(np.array([2], np.int64)), [("loss", 2.0, 3, 1)]),
        (record(10**400), [("loss", math.inf, 3, 1)]),
        (record({"a": 1, "b": 2.5}, "SCALARS"), [("loss/a", 1.0, 3, 1), ("loss/b", 2.5, 3, 1)]),
        (record({"f1": 0.5, "note": "text"}, "METRICS"), [("f1", 0.5, 3, 1)]),
    ],
)
def test_numbers_become_points(given: dict[str, Any], expected: list[Any]) -> None:
    """A dict of scalars belongs into the chart of its name; one of metrics is a list of metrics."""
    assert calls(given) == [("scalars", "a", expected)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (record("words", "TEXT"), ("text", "a", "loss", "words", 3, "")),
        (record("words", "TEXT", extra={"path": "/x/../y/n.txt"}), ("text", "a", "loss", "words", 3, "x/y/n.txt")),
        (record({"a": 1}, "LOG_RECORD"), ("text", "a", "loss", "{'a': 1}", 3, "")),
        (record(np.zeros((3, 2, 2)), "IMAGE"), ("image", "a", "loss", b"\x89PNG", 3)),
        (record(np.zeros((2, 2)), "IMAGE", extra={"dataformats": "HW"}), ("image", "a", "loss", b"\x89PNG", 3)),
        (record(0.1, "PARAMETER", key="lr"), ("params", "a", {"lr": 0.1})),
        (record({"lr": 0.1, "layers": [1]}, "PARAMETERS"), ("params", "a", {"lr": 0.1, "layers": "[1]"})),
        (record("ada", "TAG", key="who"), ("tags", "a", {"who": "ada"})),
        (record({"who": "ada"}, "TAGS"), ("tags", "a", {"who": "ada"})),
    ],
)
def test_other_kinds_have_calls_of_their_own(given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    """Texts, images, parameters and tags are what they are."""
    assert calls(given) == [expected]


@pytest.mark.parametrize(
    "given",
    [
        record("text", "SCALAR"),
        record(np.zeros(3), "METRIC"),
        record("no dict", "SCALARS"),
        record({"a": "text"}, "METRICS"),
        record(b"model", "MODEL"),
        record(np.zeros((3, 2, 2)), "IMAGE", extra={"dataformats": "??"}),
        record("no image", "IMAGE"),
        record("no dict", "PARAMETERS"),
        record(3, "DROPPED"),
    ],
)
def test_what_cannot_be_shown_is_counted(given: dict[str, Any]) -> None:
    """It costs nothing but itself."""
    tracker = FakeTracker({})

    n_unfit = RecordWriter().write(tracker, "a", [given, record("good", "TEXT")])

    assert n_unfit == 1
    assert [call[0] for call in tracker.calls] == ["text"]


def test_without_a_step_records_are_counted() -> None:
    """The n-th record of a key is at step n, for each site and key by itself; given steps stay as they are."""
    tracker, writer = FakeTracker({}), RecordWriter()
    for site in ("a", "b"):
        writer.write(tracker, site, [record(0.5, step=None, round=None)] * 2)
    writer.write(tracker, "a", [record(0.5, step=None, round=None), record(0.5, step=50, round=None)])
    writer.write(tracker, "a", [record(0.5, step=None, round=None, key="other")])

    steps = [[point[2] for point in points] for _, points in tracker.of("scalars")]
    assert steps == [[0, 1], [0, 1], [2, 50], [0]]


def test_each_series_says_when_its_round_changes() -> None:
    """The step at which a round begins is in the series `round`."""
    tracker = FakeTracker({})
    records = [record(0.5, step=step, round=step // 2) for step in range(4)]

    RecordWriter().write(tracker, "a", records)

    (points,) = [points for _, points in tracker.of("scalars")]
    assert [point[:3] for point in points if point[0] == "round"] == [("round", 0.0, 0), ("round", 1.0, 2)]


def test_neighbouring_numbers_go_together_and_order_is_kept() -> None:
    """A tracker with a server needs one request for many numbers."""
    found = calls(record(1.0), record(2.0, step=4), record("t", "TEXT"), record(3.0, step=5))

    assert [call[0] for call in found] == ["scalars", "text", "scalars"]
    assert [point[1] for point in found[0][2]] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("round/loss", "round/loss"),
        ("../../etc/passwd", "_/_/etc/passwd"),
        ("/root", "root"),
        ("a\\b\nc\0d", "a_b_c_d"),
        ("/", "_"),
        ("x" * 300, "x" * MAX_KEY),
    ],
)
def test_names_lead_nowhere(name: str, expected: str) -> None:
    """A tracker may make files of names that somebody else has chosen."""
    assert list(numbers_in({name: 1})) == [(expected, 1.0)]


def test_none_is_a_number_that_is_missing() -> None:
    """Metrics of a round may be None; everything that is no number is left out."""
    found = dict(numbers_in({"none": None, "text": "a", "list": [1], "zero": np.float32(0)}))

    assert math.isnan(found.pop("none"))
    assert found == {"zero": 0.0}


def test_sizes_count_what_is_big() -> None:
    """Numbers are counted as records; texts, arrays and dicts by their bytes."""
    assert size_of([record(0.5)] * 10) == 0
    assert size_of([record("x" * 1000, "TEXT")]) == 1000
    assert size_of([record(np.zeros(1000), "IMAGE")]) == 8000
    assert size_of([record({"a": "x" * 1000})]) > 1000
    assert size_of([record(["x" * 500, "y" * 500], extra={"z": "x" * 1000})]) > 2000
