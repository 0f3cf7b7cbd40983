"""Everything that travels comes back exactly: drawn by Hypothesis from all that the codec knows."""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from enum import Enum, Flag, IntEnum
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flarebus.codec import decode, encode, register_dataclass, register_enum
from flarebus.model import FLModel, ParamsType

exactly = settings(deadline=None, max_examples=100)


class Colour(Enum):
    RED = "red"
    BLUE = ("blue", 3)


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Right(Flag):
    READ = 1
    WRITE = 2


@dataclass(frozen=True, slots=True)
class Point:
    x: float
    name: str
    more: Any = None


register_enum(Colour, 1001)
register_enum(Level, 1002)
register_enum(Right, 1003)
register_dataclass(Point, 1004)


def round_trip(value: Any, **options: Any) -> Any:
    body, buffers = encode(value, **options)
    return decode(body, [bytearray(buffer) for buffer in buffers])


def shown(value: Any) -> str:
    """A hashable value in words that do not depend on the order of sets."""
    if isinstance(value, frozenset):
        return f"frozenset({sorted(map(shown, value))})"
    return f"({', '.join(map(shown, value))})" if type(value) is tuple else f"{type(value)}{value!r}"


def same(left: Any, right: Any) -> bool:
    """Equal in type, value, order, sign of zero and bits, down to the last item."""
    if type(left) is not type(right):
        return False
    match left:
        case float():
            return struct.pack("<d", left) == struct.pack("<d", right)
        case complex():
            return same(left.real, right.real) and same(left.imag, right.imag)
        case dict():
            return same(list(left.items()), list(right.items()))
        case list() | tuple():
            return len(left) == len(right) and all(map(same, left, right))
        case set() | frozenset():
            return sorted(map(shown, left)) == sorted(map(shown, right))
        case datetime() | time():
            return left.isoformat() == right.isoformat() and (left.tzname(), left.fold) == (right.tzname(), right.fold)
        case np.generic() | np.ndarray():
            return (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())
        case FLModel():
            return all(same(getattr(left, name), getattr(right, name)) for name in FLModel.__slots__)
        case Point():
            return same([left.x, left.name, left.more], [right.x, right.name, right.more])
        case _:
            return bool(left == right)


zones = st.none() | st.just(UTC) | st.builds(timezone, st.timedeltas(timedelta(hours=-23), timedelta(hours=23)))
named_zones = zones | st.builds(timezone, st.just(timedelta(hours=1)), st.just("CET"))
numbers = st.booleans() | st.integers() | st.integers(-(2**200), 2**200) | st.floats() | st.complex_numbers()
texts = st.text(max_size=40) | st.binary(max_size=40)
moments = (
    st.datetimes(timezones=named_zones)
    | st.dates()
    | st.times(timezones=named_zones)
    | st.timedeltas()
    | st.builds(datetime, st.just(2024), st.just(10), st.just(27), st.just(2), fold=st.just(1))
)
members = st.sampled_from([*Colour, *Level, Right.READ, Right.READ | Right.WRITE, Right(0), *ParamsType])
plain_keys = st.none() | numbers | texts | moments | members
keys = st.recursive(plain_keys, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=4)
dtypes = (
    hnp.boolean_dtypes()
    | hnp.integer_dtypes(endianness="?")
    | hnp.unsigned_integer_dtypes(endianness="?")
    | hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64))
    | hnp.complex_number_dtypes(endianness="?", sizes=(64, 128))
    | hnp.datetime64_dtypes(endianness="?")
    | hnp.timedelta64_dtypes(endianness="?")
    | hnp.byte_string_dtypes(max_len=5)
    | hnp.unicode_string_dtypes(endianness="?", max_len=5)
)
little = dtypes.filter(lambda dtype: dtype.isnative)
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)
arrays = hnp.arrays(dtypes, shapes)
scalars = hnp.arrays(little, ()).map(lambda array: array[()])


@st.composite
def laid_out(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Draw an array as programs leave them: transposed, sliced, backwards, repeated, read-only."""
    array: np.ndarray[Any, Any] = draw(arrays)
    match draw(st.integers(0, 6)):
        case 1:
            array = np.asfortranarray(array)
        case 2:
            array = array.T
        case 3 if array.ndim:
            array = array[::2]
        case 4 if array.ndim:
            array = np.flip(array, draw(st.integers(0, array.ndim - 1)))
        case 5:
            array = np.broadcast_to(array, (2, *array.shape))
        case 6:
            array.setflags(write=False)
    return array


leaves = (
    st.none()
    | numbers
    | texts
    | moments
    | members
    | scalars
    | laid_out()
    | st.builds(bytearray, texts.map(repr).map(str.encode))
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.sets(keys, max_size=5)
        | st.frozensets(keys, max_size=5)
        | st.dictionaries(keys, inner, max_size=5)
        | st.dictionaries(keys, inner, max_size=5).map(OrderedDict)
        | st.builds(Point, st.floats(), st.text(max_size=5), inner)
        | st.builds(
            FLModel,
            params=st.none() | st.dictionaries(keys, inner, max_size=4),
            optimizer_params=st.none() | st.dictionaries(keys, inner, max_size=2),
            metrics=st.none() | st.dictionaries(st.text(max_size=5), st.floats(), max_size=2),
            current_round=st.none() | st.integers(0, 2**70),
            meta=st.dictionaries(st.text(max_size=5), inner, max_size=2),
        )
    ),
    max_leaves=12,
)


@given(values)
@exactly
def test_any_value_comes_back_exactly(value: Any) -> None:
    """Whatever may travel comes back with the same types, order and bits."""
    assert same(round_trip(value), value)


@given(values, st.integers(1, 64))
@exactly
def test_the_threshold_changes_nothing_but_the_place(value: Any, externalise_from: int) -> None:
    """A value comes back the same, whether its strings and arrays travel in the body or beside it."""
    assert same(round_trip(value, externalise_from=externalise_from), value)


@given(values)
@exactly
def test_encoding_is_repeatable_and_leaves_the_value_alone(value: Any) -> None:
    """Encoding the same value twice gives the same bytes."""
    first, second = encode(value), encode(value)

    assert first.body == second.body
    assert [bytes(buffer) for buffer in first.buffers] == [bytes(buffer) for buffer in second.buffers]


@given(laid_out(), st.booleans(), st.booleans(), st.booleans())
@exactly
def test_arrays_come_back_writable_and_aligned(
    array: np.ndarray[Any, Any], is_read_only: bool, is_shifted: bool, copy: bool
) -> None:
    """Whatever memory the buffers lie in, arrays may be written to and need no unaligned access."""
    body, buffers = encode([array, array], externalise_from=1)
    memory = []
    for buffer in buffers:
        room = bytearray(buffer.nbytes + 1)
        view = memoryview(room)[1:] if is_shifted else memoryview(room)[:-1]
        view[:] = buffer
        memory.append(view.toreadonly() if is_read_only else view)

    for found in decode(body, memory, copy=copy):
        assert same(found, np.array(array, order="K"))
        assert found.flags.writeable
        assert found.flags.aligned


ML_DTYPES = [name for name, kind in vars(ml_dtypes).items() if isinstance(kind, type) and issubclass(kind, np.generic)]


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_ml_dtype_travels(name: str) -> None:
    """bfloat16, float8 and the other small dtypes of ml_dtypes travel as arrays of any layout and as scalars."""
    kind = getattr(ml_dtypes, name)
    array = np.array([[1, 0, 1], [0, 0, 1]]).astype(kind)
    for value in (array, array.T, array[:, ::2], array[:0], np.array(1).astype(kind)[()], np.zeros((), kind)):
        for threshold in (1, 1024):
            assert same(round_trip(value, externalise_from=threshold), value)


def test_the_awkward_numbers_keep_their_bits() -> None:
    """Not-a-number with a payload, negative zero, infinities and the ends of 64 bits survive."""
    payload = struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_DEAD_BEEF))[0]
    value = [payload, -0.0, math.inf, -math.inf, 2**63 - 1, -(2**63), 2**64 - 1, 2**64, -(2**63) - 1, 10**400]

    assert same(round_trip(value), value)


def test_one_and_true_stay_apart() -> None:
    """A bool never becomes an integer, nor the other way, as key or as item."""
    value = [{1: "a"}, {True: "a"}, {1.0: "a"}, [0, False, 0.0], (1, True)]

    assert same(round_trip(value), value)


@pytest.mark.parametrize("n_items", [0, 1, 510, 511, 512, 513, 1022, 1023, 5000, 30_000])
def test_long_containers_travel(n_items: int) -> None:
    """Containers of any length within a body come back, beyond the length of one list on the wire too."""
    items = list(range(n_items))
    value = [
        items,
        tuple(items),
        set(items),
        {str(item): item for item in items},
        {(item,): None for item in items[:5000]},
    ]

    assert same(round_trip(value), value)


def test_long_strings_leave_the_body() -> None:
    """Long bytes and strings are buffers, each object once, and short ones are not."""
    text, data = "ä" * 5000, b"x" * 5000
    body, buffers = encode({"a": text, "b": [data, data, bytearray(data)], text: 1, "short": "y" * 1000})

    assert [len(buffer) for buffer in buffers] == [10_000, 5000, 5000]
    assert len(body) < 1200
    assert same(decode(body, buffers), {"a": text, "b": [data, data, bytearray(data)], text: 1, "short": "y" * 1000})


def test_a_depth_of_eighty_is_enough() -> None:
    """Values nest deeply, both ways, whatever they are made of; a record counts as two levels."""
    value: Any = 1
    for level in range(80):
        value = ([value], (value,), {"k": value}, Point(1.0, "", value), {(level,): value})[level % 5]

    assert same(round_trip([value]), [value])


def test_models_keep_each_field() -> None:
    """A model comes back with its rounds, metrics and type of parameters."""
    model = FLModel("DIFF", {"w": np.ones(3)}, {"lr": 0.1}, {"loss": 1.5}, 2, 3, 2**64, {"n": 1})
    found = round_trip({"model": model})["model"]

    assert found.params_type is ParamsType.DIFF
    assert same(found, model)
    assert same(round_trip(FLModel()), FLModel())


def test_dates_of_every_kind() -> None:
    """Dates, times and spans come back with their zone."""
    value = [date.min, date.max, datetime.max, time.max, timedelta.min, datetime.now(UTC), time(1, tzinfo=UTC)]

    assert same(round_trip(value), value)
