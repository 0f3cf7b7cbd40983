"""What sites log, at the server: batches become records, records become lines of JSON.

One line for each record: ``site``, ``round``, ``time``, ``key``, ``value``, ``type``, ``step``, ``writer`` and, where a
script gave more, ``extra``. What JSON has no word for is written like this:

    NaN and infinities            null, as in ``metrics.jsonl``
    an array of one number        that number
    an array of up to 1000        lists
    a bigger one, an image        ``{"dtype": "uint8", "shape": [3, 32, 32]}``: pixels are for listeners, not for lines
    bytes                         ``{"bytes": 1234}``
    anything else                 its text

Lost records stand among the others with type ``DROPPED`` and their number as the value; the key says where they were
lost.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flarebus.client.metric_batch import decode_batch
from flarebus.errors import DecodeError
from flarebus.job.journal import append_lines

__all__ = ["DROPPED", "NOT_SENT", "NOT_WRITTEN", "MetricFile", "read_batch"]

log = logging.getLogger(__name__)

DROPPED = "DROPPED"
NOT_SENT = "records dropped at the site"
NOT_WRITTEN = "records not written at the server"
_MAX_LISTED = 1000
_MAX_SHOWN = 1000


def read_batch(source: str, fields: Any, runs: Callable[[str, str], bool]) -> list[dict[str, Any]]:
    """The records in a message; among them one for each site that had to drop some.

    Args:
        source: who sent it.
        runs: whether `source` may speak for a site.

    Raises:
        DecodeError: it is no batch, or it has records of a site that its sender does not run. Nothing of it counts.
    """
    records, dropped = decode_batch(fields)
    for site in {record["site"] for record in records} | dropped.keys():
        if not runs(source, site):
            raise DecodeError(f"metric records of {site:.80}, which {source} does not run")
    for site, count in dropped.items():
        log.warning("%s dropped %d metric records: it logs faster, or more, than can be sent", site, count)
        records.append(_loss(site, NOT_SENT, count))
    return records


class MetricFile:
    """A file of records that a full disk keeps from growing, but not the job from going on. One thread calls.

    Args:
        path: of the file; made with the first record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._n_unwritten = 0

    def write(self, records: list[dict[str, Any]]) -> None:
        """Add a line for each record, all or none; what was not written is counted by a line of its own later."""
        lines = [_line(record) for record in records]
        if self._n_unwritten:
            lines.insert(0, _line(_loss(None, NOT_WRITTEN, self._n_unwritten)))
        try:
            append_lines(self._path, lines)
        except OSError as error:
            if not self._n_unwritten:
                log.warning("metric records are not written: %s", error)
            self._n_unwritten += len(records)
        else:
            if self._n_unwritten:
                log.warning("%d metric records were not written", self._n_unwritten)
            self._n_unwritten = 0


def _loss(site: str | None, where: str, count: int) -> dict[str, Any]:
    return {
        "site": site,
        "round": None,
        "time": time.time(),
        "key": where,
        "value": count,
        "type": DROPPED,
        "step": None,
        "writer": None,
    }


_encode = json.JSONEncoder(allow_nan=False).encode


def _line(record: dict[str, Any]) -> str:
    try:
        return _encode(record)
    except (TypeError, ValueError):  # few are like that, so the others need not be looked through
        return _encode(_plain(record))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain_array(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes | bytearray):
        return {"bytes": len(value)}
    return value if isinstance(value, bool | int | float | str | type(None)) else str(value)[:_MAX_SHOWN]


def _plain_array(array: np.ndarray[Any, Any]) -> Any:
    if array.size == 1:
        return _plain(array.item())
    if array.size > _MAX_LISTED:
        return {"dtype": array.dtype.name, "shape": list(array.shape)}
    return _plain(array.tolist())
