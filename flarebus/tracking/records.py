"""From metric records, as they come from sites, to calls of a tracker.

Numbers become points. A record without a step is counted: the n-th one of its key is at step n. What a site says is
data of somebody else: names are made harmless before they can become names of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flarebus.metric import MAX_KEY, AnalyticsDataType
from flarebus.tracking.png import to_png
from flarebus.tracking.tracker import Plain, Point, Tracker

__all__ = ["RecordWriter", "numbers_in", "size_of"]

ROUND = "round"
"""The key that says which round a step belongs to, and the prefix of metrics that belong to a round as a whole."""
# Keys, over all sites, whose steps are counted.
_MAX_COUNTED = 100_000
_MAX_TEXT = 1000
_ONE_NUMBER = (AnalyticsDataType.SCALAR, AnalyticsDataType.METRIC)
_TEXTS = (AnalyticsDataType.TEXT, AnalyticsDataType.LOG_RECORD)
_ONE_PARAM = (AnalyticsDataType.PARAMETER, AnalyticsDataType.INIT_DATA)
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]|\.\.+")


class RecordWriter:
    """Writes records to trackers. One thread calls."""

    def __init__(self) -> None:
        self._next_step: dict[tuple[str, str], int] = {}
        self._rounds: dict[str, int | None] = {}

    def write(self, tracker: Tracker, site: str, records: Sequence[Mapping[str, Any]]) -> int:
        """Give the records of one site to `tracker`, the numbers of neighbouring ones together.

        Returns:
            How many could not be shown: something that is neither number nor text, image or parameter.

        Raises:
            Exception: whatever the tracker raised; the records after that are not written.
        """
        points: list[Point] = []
        n_unfit = 0
        for record in records:
            kind = record["type"]
            if kind in _ONE_NUMBER or kind in (AnalyticsDataType.SCALARS, AnalyticsDataType.METRICS):
                found = list(self._points(site, record))
                points += found
                n_unfit += not found
                continue
            if points:
                tracker.scalars(site, points)
                points = []
            n_unfit += not self._write_other(tracker, site, record, kind)
        if points:
            tracker.scalars(site, points)
        return n_unfit

    def _points(self, site: str, record: Mapping[str, Any]) -> Iterator[Point]:
        key, value, round = _safe(record["key"]), record["value"], record["round"]
        kind = record["type"]
        # A dict of metrics is a list of metrics; one of scalars belongs into the chart of its own name.
        values = {key: value} if kind in _ONE_NUMBER else value if isinstance(value, Mapping) else {}
        if kind == AnalyticsDataType.SCALARS:
            values = {f"{key}/{name}": each for name, each in values.items()}
        for name, number in numbers_in(values):
            step = self._step(site, name, record["step"])
            if round is not None and self._rounds.get(site) != round:
                self._rounds[site] = round
                yield Point(ROUND, float(round), step, round, record["time"])
            yield Point(name, number, step, round, record["time"])

    def _write_other(self, tracker: Tracker, site: str, record: Mapping[str, Any], kind: str) -> bool:
        key, value = _safe(record["key"]), record["value"]
        extra = record.get("extra") or {}
        if kind in _TEXTS:
            text = value if isinstance(value, str) else str(value)[:_MAX_TEXT]
            tracker.text(site, key, text, self._step(site, key, record["step"]), _path(extra.get("path")))
        elif kind == AnalyticsDataType.IMAGE:
            try:
                png = to_png(value, str(extra.get("dataformats", "CHW")))
            except (TypeError, ValueError):
                return False
            tracker.image(site, key, png, self._step(site, key, record["step"]))
        elif kind in _ONE_PARAM:
            tracker.params(site, _plain({key: value}))
        elif kind == AnalyticsDataType.PARAMETERS and isinstance(value, Mapping):
            tracker.params(site, _plain(value))
        elif kind == AnalyticsDataType.TAG:
            tracker.tags(site, _plain({key: value}))
        elif kind == AnalyticsDataType.TAGS and isinstance(value, Mapping):
            tracker.tags(site, _plain(value))
        else:
            return False
        return True

    def _step(self, site: str, key: str, step: int | None) -> int:
        if step is not None:
            return step
        counted = self._next_step.get((site, key), 0)
        if counted or len(self._next_step) < _MAX_COUNTED:
            self._next_step[site, key] = counted + 1
        return counted


def numbers_in(values: Mapping[Any, Any]) -> Iterator[tuple[str, float]]:
    """The numbers among metrics, by name; arrays of one number are numbers, None is NaN."""
    for name, value in values.items():
        if isinstance(value, np.ndarray | np.generic) and value.size == 1:
            value = value.item()
        if value is None:
            value = float("nan")
        if isinstance(value, bool | int | float):
            try:
                yield _safe(str(name)), float(value)
            except OverflowError:
                yield _safe(str(name)), float("inf") if value > 0 else float("-inf")


def size_of(records: Iterable[Mapping[str, Any]]) -> int:
    """About how many bytes the values of records take, beyond a number each."""
    return sum(
        _size(record["value"]) + (_size(record["extra"]) if "extra" in record else 0)
        for record in records
        if not isinstance(record["value"], float)
    )


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if isinstance(value, Mapping):
        return sum(len(str(key)) + 64 + _size(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return sum(64 + _size(each) for each in value)
    return 0


def _plain(values: Mapping[str, Any]) -> dict[str, Plain]:
    return {
        _safe(str(name)): value if isinstance(value, str | int | float | bool) else str(value)[:_MAX_TEXT]
        for name, value in values.items()
    }


def _safe(name: str) -> str:
    """A name that stays where it is put, should somebody make a file of it."""
    return _UNSAFE.sub("_", name).lstrip("/")[:MAX_KEY] or "_"


def _path(path: Any) -> str:
    """A relative path without `..`; "" if there is none."""
    if not isinstance(path, str):
        return ""
    parts = [_UNSAFE.sub("_", part) for part in path.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:MAX_KEY]
