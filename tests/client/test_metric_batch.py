"""metric_batch: rows as bytes and back, and bytes that nobody honest has made."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flarebus.client import metric_batch
from flarebus.client.metric_batch import (
    MAX_BATCH_BYTES,
    MAX_BATCH_RECORDS,
    MAX_TEXT,
    Row,
    decode_batch,
    encode_batch,
    is_light,
    pack_value,
)
from flarebus.codec import MAX_BODY
from flarebus.errors import DecodeError, EncodeError
from flarebus.metric import AnalyticsDataType

GOOD: list[Any] = [1.5, "site-1", 3, "loss", 0.5, "SCALAR", 7, "mlflow", None]


def row(**changes: Any) -> Row:
    names = ("time", "site", "round", "key", "value", "type", "step", "writer", "extra")
    return tuple(changes.get(name, value) for name, value in zip(names, GOOD, strict=True))  # type: ignore[return-value]


def decoded(*rows: Any, dropped: Any = None) -> list[dict[str, Any]]:
    return decode_batch({"records": encode_batch(rows), "dropped": dropped or {}})[0]


def test_rows_come_back_as_records_in_order() -> None:
    """Every field has its name, and the enumeration of types is its word."""
    found = decoded(row(), row(round=None, value="x", type=AnalyticsDataType.TEXT, step=None, writer=None))

    assert found == [
        {
            "site": "site-1",
            "round": 3,
            "time": 1.5,
            "key": "loss",
            "value": 0.5,
            "type": "SCALAR",
            "step": 7,
            "writer": "mlflow",
        },
        {
            "site": "site-1",
            "round": None,
            "time": 1.5,
            "key": "loss",
            "value": "x",
            "type": "TEXT",
            "step": None,
            "writer": None,
        },
    ]
    assert type(found[1]["type"]) is str


@given(
    st.one_of(st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(), st.text(max_size=9), st.binary())
)
def test_light_values_and_packed_ones_come_back_the_same(value: Any) -> None:
    """Whatever is light travels as it is; what is not is packed."""
    (found,) = decoded(row(value=value if is_light(value) else pack_value(value)))

    assert type(found["value"]) is type(value)
    assert repr(found["value"]) == repr(value)


def test_packed_values_are_copies() -> None:
    """An array may be written to as soon as it is packed; what comes out is writable too."""
    array = np.arange(10_000, dtype=np.int32)
    packed = pack_value({"many": array, "few": [1, "x"]})
    array[:] = -1
    (found,) = decoded(row(value=packed, extra=pack_value({"why": "because"})))

    assert found["value"]["many"].tolist() == list(range(10_000))
    assert found["value"]["few"] == [1, "x"]
    assert found["value"]["many"].flags.writeable
    assert found["extra"] == {"why": "because"}


def test_texts_are_light_when_they_are_short_and_plain() -> None:
    """Longer ones are counted in bytes; half a surrogate pair is no text that can travel."""
    assert is_light("x" * MAX_TEXT)
    assert not is_light("x" * (MAX_TEXT + 1))
    assert not is_light("\ud800")
    with pytest.raises(EncodeError):
        pack_value("\ud800")


def test_a_full_batch_fits() -> None:
    """As many rows as a batch may have, each as big as a row without packed values may be on average."""
    assert len(encode_batch([row(key="k" * 250, value="v" * 700)] * MAX_BATCH_RECORDS)) < MAX_BATCH_BYTES
    assert len(decoded(*[row()] * MAX_BATCH_RECORDS)) == MAX_BATCH_RECORDS


# --- hostile


@pytest.mark.parametrize(
    "fields",
    [
        None,
        [],
        b"",
        {},
        {"records": b"\x90"},
        {"records": b"\x90", "dropped": {}, "more": 1},
        {"records": "", "dropped": {}},
        {"records": [], "dropped": {}},
        {"records": b"\x90", "dropped": 3},
        {"records": b"\x90", "dropped": {"a": -1}},
        {"records": b"\x90", "dropped": {"a": 1.0}},
        {"records": b"\x90", "dropped": {"a": True}},
        {"records": b"\x90", "dropped": {"": 1}},
        {"records": b"\x90", "dropped": {3: 1}},
        {"records": b"\x90", "dropped": {"a" * 256: 1}},
    ],
    ids=repr,
)
def test_fields_of_another_form_are_refused(fields: Any) -> None:
    """The fields are a dict of bytes and of counts, and nothing else."""
    with pytest.raises(DecodeError, match="metric records"):
        decode_batch(fields)


@pytest.mark.parametrize(
    "changes",
    [
        {"time": 1},
        {"time": float("nan")},
        {"time": -1.0},
        {"time": 1e12},
        {"site": ""},
        {"site": None},
        {"site": b"site-1"},
        {"site": "s" * 256},
        {"round": "1"},
        {"round": True},
        {"key": ""},
        {"key": "k" * 251},
        {"key": 3},
        {"value": []},
        {"value": [[]]},
        {"value": b""},
        {"value": b"\x90"},
        {"value": b"\x91\x01"},
        {"value": b"\x92\xc4\x00\x01"},
        {"value": pack_value(3) + b"x"},
        {"type": "NO_SUCH"},
        {"type": 3},
        {"step": 0.5},
        {"step": True},
        {"writer": 3},
        {"writer": ""},
        {"extra": "x"},
        {"extra": pack_value(3)},
    ],
    ids=repr,
)
def test_a_row_of_another_form_spoils_its_batch(changes: dict[str, Any]) -> None:
    """One wrong field, and nothing of the batch counts."""
    with pytest.raises(DecodeError):
        decoded(row(), row(**changes))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x00",
        b"\x80",
        b"\x91\x80",
        b"\x91",
        b"\x90\x90",
        b"\x91\x93\x01\x02\x03",
        b"\xdd\xff\xff\xff\xff",
        b"\xdd\x00\x00\x10\x00" * 100,
        b"\x91\xd6\xff\x00\x00\x00\x00",
        b"\x91\xc7\x00\x05",
        b"\x91\xc6\xff\xff\xff\xff",
        b"\x91" * 5000,
        msgpack.packb([GOOD] * (MAX_BATCH_RECORDS + 1)),
        msgpack.packb([[[]] * 9]),
        msgpack.packb([[{}] * 9]),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_bytes_that_are_no_rows_are_refused(data: bytes) -> None:
    """Cut, nested, too many, maps, timestamps, extension types, lengths that are not there: all one error."""
    with pytest.raises(DecodeError, match="metric records"):
        decode_batch({"records": data, "dropped": {}})


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_harmless(data: bytes) -> None:
    """Nothing but records or a `DecodeError` comes out."""
    try:
        found, _ = decode_batch({"records": data, "dropped": {}})
    except DecodeError:
        return
    assert all(type(each) is dict for each in found)


def test_too_many_bytes_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is looked at first."""
    monkeypatch.setattr(metric_batch, "MAX_BATCH_BYTES", 10)
    with pytest.raises(DecodeError, match="more than 10"):
        decoded(row())


def test_many_small_objects_are_refused_before_they_take_memory() -> None:
    """Bytes that would become a hundred times as much memory are refused on the way, whatever hides them."""
    empty_lists = b"\xdc\x0f\xff" + b"\x90" * 4095
    many = b"\xdc\x0f\xff" + empty_lists * 4095
    body = msgpack.packb([[1, *[[1]] * 500], 0, b""])
    packed = msgpack.packb([body])
    bodies = encode_batch([row(value=packed)] * MAX_BATCH_RECORDS)
    assert len(many) < MAX_BATCH_BYTES
    assert len(body) * MAX_BATCH_RECORDS > 2 * MAX_BODY
    for data in (many, bodies):
        tracemalloc.start()
        with pytest.raises(DecodeError):
            decode_batch({"records": data, "dropped": {}})
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

        assert peak < 200_000_000
