"""Bodies made to harm are refused, in bounded time and memory, with the place and nothing of the content."""

from __future__ import annotations

import random
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flarebus.codec import _ids, decode, encode
from flarebus.codec._ids import MAX_BODY
from flarebus.errors import DecodeError
from flarebus.model import FLModel

MAX_GROWTH = 8 << 20
F4, BOOL, TEXT = 11, 1, 251 + (3 << 8)  # numbers of the dtypes float32, bool and U3


def packed(root: Any, n_buffers: int = 0, arena: bytes = b"") -> bytes:
    return bytes(msgpack.packb([root, n_buffers, arena]))


def nested(levels: int, core: Any = 1) -> Any:
    for _ in range(levels):
        core = [_ids.LIST, core]
    return core


def array(*shape: Any, number: Any = F4, reference: Any = 0) -> list[Any]:
    return [_ids.NDARRAY, number, reference, *shape]


def view(shape: Sequence[Any], strides: Sequence[Any], offset: Any = 0, reference: Any = 0) -> list[Any]:
    return [_ids.NDARRAY_VIEW, F4, reference, offset, len(shape), *shape, *strides]


def colliding(n_keys: int) -> list[list[Any]]:
    """Integers of one hash, in wire form."""
    prime = 2**61 - 1
    return [[_ids.BIG_INT, (prime * (2**64 + i)).to_bytes(24, "little")] for i in range(n_keys)]


def long(node: list[Any]) -> list[Any]:
    return [_ids.FOLDED, *(node[at : at + 500] for at in range(0, len(node), 500))]


DATA = bytes(64)
HEAD = b"\x93"  # a list of three: root, number of buffers, bytes
RAW: dict[str, bytes] = {
    "nothing": b"",
    "no list": b"\xc0",
    "another list": msgpack.packb([1, 0]),
    "no count": msgpack.packb([1, None, b""]),
    "no bytes": msgpack.packb([1, 0, ""]),
    "a count of true": msgpack.packb([1, False, b""]),
    "trailing bytes": packed(1) + b"\x00",
    "truncated": packed([_ids.LIST, "abc", 1.5])[:-4],
    "reserved byte": b"\xc1",
    "too large": packed(bytes(MAX_BODY)),
    "invalid utf-8": HEAD + b"\xa2\xff\xfe" + b"\x00\xc4\x00",
    "deep": b"\x91" * 1_000_000,
    "deep in bounds": b"\x91" * 1000 + b"\x01",
    "deep with huge lengths": b"\xdd\x00\x0f\xff\xff" * 200_000,
    "deep with allowed lengths": b"\xdc\x02\x00" * 340_000,
    "list of 4 billion": b"\xdd\xff\xff\xff\xff",
    "list of a million": b"\xdd\x00\x10\x00\x00" + b"\x01" * 900_000,
    "map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "string of 4 billion": b"\xdb\xff\xff\xff\xff",
    "bytes of 4 billion": b"\xc6\xff\xff\xff\xff",
    "extension of 4 billion": b"\xc9\xff\xff\xff\xff\x05",
    "many empty lists": HEAD + b"\xdc\x02\x00" + (b"\xdc\x02\x00" + b"\x90" * 512) * 512 + b"\x00\xc4\x00",
    "many empty maps": HEAD + b"\xdc\x02\x00" + (b"\xdc\x02\x00" + b"\x80" * 512) * 512 + b"\x00\xc4\x00",
    "empty map": HEAD + b"\x80" + b"\x00\xc4\x00",
    "map": HEAD + b"\x81\xa1k\x01" + b"\x00\xc4\x00",
    "map with one key twice": HEAD + b"\x82\xa1k\x01\xa1k\x02" + b"\x00\xc4\x00",
    "extension": HEAD + b"\xc7\x00\x05" + b"\x00\xc4\x00",
    "extension of one byte": HEAD + b"\xd4\x05\x00" + b"\x00\xc4\x00",
    "timestamp": HEAD + b"\xd6\xff\x00\x00\x00\x00" + b"\x00\xc4\x00",
    "timestamp far away": HEAD + b"\xc7\x0c\xff" + b"\xff" * 12 + b"\x00\xc4\x00",
}
PLAIN: dict[str, Any] = {
    "unknown id": [31_337, 1],
    "negative id": [-1, 1],
    "id true": [True, 1],
    "id 1.0": [1.0, 1],
    "id by name": ["builtins.list", 1],
    "no id": [],
    "id of 64 bits": [2**64 - 1],
    "depth": nested(102),
    "part that is no list": [_ids.FOLDED, 1],
    "no parts": [_ids.FOLDED],
    "parts of parts": [_ids.FOLDED, [_ids.FOLDED, [_ids.LIST, 1]]],
    "deep parts": [_ids.FOLDED, [_ids.FOLDED]],
    "key without item": [_ids.DICT, "k"],
    "key twice": [_ids.DICT, "k", 1, "k", 2],
    "key equal to another": [_ids.DICT, 1, 1, True, 2],
    "tuple key twice": [_ids.DICT, [_ids.TUPLE, 1], 1, [_ids.TUPLE, 1], 2],
    "list as key": [_ids.DICT, [_ids.LIST], 1],
    "item twice": [_ids.SET, 1, 1],
    "list as item of a set": [_ids.SET, [_ids.LIST]],
    "colliding keys": long([_ids.DICT, *(part for key in colliding(5000) for part in (key, None))]),
    "colliding items": long([_ids.SET, *colliding(5000)]),
    "colliding tuples": long([_ids.SET, *([_ids.TUPLE, key] for key in colliding(3000))]),
    "big integer of no bytes": [_ids.BIG_INT, "1"],
    "big integer of two": [_ids.BIG_INT, b"1", b"1"],
    "complex of text": [_ids.COMPLEX, "1", 2.0],
    "complex of one": [_ids.COMPLEX, 1.0],
    "pickled datetime": [_ids.DATETIME, datetime(2020, 1, 1).__reduce__()[1][0], *[0] * 7],
    "month 13": [_ids.DATETIME, 2020, 13, 1, 0, 0, 0, 0, 0],
    "year of 64 bits": [_ids.DATETIME, 2**63, 1, 1, 0, 0, 0, 0, 0],
    "zone of ten days": [_ids.DATETIME, 2020, 1, 1, 0, 0, 0, 0, 0, 10**12, None],
    "zone by name only": [_ids.DATETIME, 2020, 1, 1, 0, 0, 0, 0, 0, "UTC"],
    "short date": [_ids.DATE, 2020],
    "pickled date": [_ids.DATE, b"\x07\xe4\x01\x01"],
    "hour 25": [_ids.TIME, 25, 0, 0, 0, 0],
    "span of ages": [_ids.TIMEDELTA, 2**62, 0, 0],
    "scalar too short": [_ids.NUMPY_SCALAR, F4, b"123"],
    "scalar of text": [_ids.NUMPY_SCALAR, F4, "1234"],
    "scalar bool of 2": [_ids.NUMPY_SCALAR, BOOL, b"\x02"],
    "scalar of no dtype": [_ids.NUMPY_SCALAR, 9999, b""],
    "numpy text of bytes": [_ids.NUMPY_SCALAR, 251, b"a"],
    "params type": [_ids.PARAMS_TYPE, "NONE"],
    "params type of the class": [_ids.PARAMS_TYPE, "__class__"],
    "params type by number": [_ids.PARAMS_TYPE, 0],
    "short model": [_ids.FLMODEL, "FULL", None],
    "model with a list of params": [_ids.FLMODEL, None, [_ids.LIST], None, None, None, 0, None, None],
    "model of round -1": [_ids.FLMODEL, None, None, None, None, None, -1, None, None],
    "model of another type": [_ids.FLMODEL, "HALF", [_ids.DICT], None, None, None, 0, None, None],
    "array in no buffer": array(0, reference=0),
    "array without bytes": array(4, reference=None),
    "array of one without bytes": array(1, reference=None),
    "array in the body, beyond it": array(4, reference=-1),
    "view without bytes": view([4], [4], reference=None),
    "bytes in no buffer": [_ids.BYTES, 0, 0],
    "string in no buffer": [_ids.STR, -1, 0],
    "bytearray in no buffer": [_ids.BYTEARRAY, 0, 0],
    "tensor of nothing": [_ids.TENSOR, 0],
    "empty array of too many": array(0, 2**63, reference=None),
    "empty array of 65 dimensions": array(*[0] * 65, reference=None),
    "empty array of minus one": array(0, -1, reference=None),
    "text array of gigabytes": array(0, number=251 + (2**30 << 8), reference=None),
}
WITH_BUFFER: dict[str, Any] = {
    "unused buffer": 1,
    "wrong shape": array(17),
    "too small a shape": array(15),
    "negative dimension": array(-16),
    "two negative dimensions": array(-4, -4),
    "minus one and another": array(-1, -16),
    "minus one to be inferred": array(-1),
    "shape that overflows to fit": array(2**62, 2**2, 2**2),
    "dimension of 2 to the 63": array(2**63),
    "dimension of 2 to the 64": array(2**64 - 1, 16),
    "dimension of a float": array(16.0),
    "dimension of text": array("16"),
    "dimension of a bool": array(16, True),
    "dimension of a list": array([_ids.LIST]),
    "no items but bytes": array(0),
    "65 dimensions": array(16, *[1] * 64),
    "dtype of objects": array(8, number="O"),
    "dtype by name": array(16, number="<f4"),
    "dtype unknown": array(16, number=240),
    "dtype negative": array(16, number=-11),
    "dtype of a list": array(16, number=[1]),
    "ml dtype unknown": array(64, number=127),
    "text too long": array(1, number=250 + (2**40 << 8)),
    "reference out of range": array(16, reference=1),
    "reference far out of range": array(16, reference=2**63),
    "reference of a bool": array(16, reference=False),
    "reference of a float": array(16, reference=0.0),
    "reference of text": array(16, reference="0"),
    "negative reference": array(16, reference=-17),
    "very negative reference": array(16, reference=-(2**63)),
    "view beyond the end": view([16], [4], offset=4),
    "view far beyond": view([2], [2**62]),
    "view that overflows": view([2**32, 2**32], [2**31, 2**31]),
    "view before the start": view([4], [4], offset=-4),
    "view backwards": view([4], [-4], offset=60),
    "view larger than its memory": view([2**40], [0]),
    "view with a float stride": view([4], [4.0]),
    "view with too few strides": [_ids.NDARRAY_VIEW, F4, 0, 0, 2, 4, 4, 4],
    "view of minus one dimensions": [_ids.NDARRAY_VIEW, F4, 0, 0, -1, 4, 4],
    "view of a billion dimensions": [_ids.NDARRAY_VIEW, F4, 0, 0, 10**9, 4, 4],
    "view of nothing": view([0], [4]),
    "short view": [_ids.NDARRAY_VIEW, F4, 0],
    "bytes too short": [_ids.BYTES, 0, 65],
    "bytes of a bool": [_ids.BYTES, False, 64],
    "bytes too long": [_ids.BYTES, 0, 63],
    "one buffer for two bytearrays": [_ids.LIST, [_ids.BYTEARRAY, 0, 64], [_ids.BYTEARRAY, 0, 64]],
    "tensor of no flags": [_ids.TENSOR, "0", *array(16)],
    "tensor of negative flags": [_ids.TENSOR, -1, *array(16)],
    "tensor of unknown dtype": [_ids.TENSOR, 99 << 2, *array(16)],
    "tensor of dtype of another size": [_ids.TENSOR, 1 << 2, *array(16)],
    "tensor of integers with gradient": [_ids.TENSOR, 1, *array(16, number=4)],
    "tensor of text": [_ids.TENSOR, 0, *array(16, number=251 + (1 << 8))],
    "tensor of a list": [_ids.TENSOR, 0, _ids.LIST, 0, 0],
    "tensor of a tensor": [_ids.TENSOR, 0, _ids.TENSOR, 0, *array(16)],
}


def refused(body: bytes, buffers: Sequence[bytes | bytearray] = ()) -> str:
    """Return the message of the refusal, which must come without much memory."""
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError) as caught:
            decode(body, buffers)
        assert tracemalloc.get_traced_memory()[1] < MAX_GROWTH
    finally:
        tracemalloc.stop()
    return str(caught.value)


@pytest.mark.parametrize("name", RAW)
def test_refuses_bytes_that_are_no_body(name: str) -> None:
    """Broken, oversized or foreign msgpack is refused, and the error says that the body is at fault."""
    assert refused(RAW[name]).startswith("value: ")


@pytest.mark.parametrize("name", PLAIN)
def test_refuses_a_body_that_means_nothing(name: str) -> None:
    """Well-formed msgpack that stands for no value is refused, at any depth, with the path to it."""
    assert refused(packed(PLAIN[name])).startswith("value")
    assert "['here'][0]" in refused(packed([_ids.DICT, "here", [_ids.LIST, PLAIN[name]]]))


@pytest.mark.parametrize("name", WITH_BUFFER)
def test_refuses_arrays_that_do_not_fit_their_bytes(name: str) -> None:
    """Shapes, dtypes, strides and references are checked against the bytes that came."""
    refused(packed(WITH_BUFFER[name], 1), [bytearray(DATA)])


def test_refuses_views_that_leave_their_memory() -> None:
    """The last byte of a view is computed in integers of any size, before NumPy sees its strides."""
    for node in (view([16], [4], offset=4), view([2], [2**62]), view([3, 3], [2**63, 2**63]), view([2], [61])):
        assert "leaves the 64 bytes" in refused(packed(node, 1), [bytearray(DATA)])


def test_refuses_another_number_of_buffers() -> None:
    """The body says how many buffers belong to it; more or fewer are refused."""
    body, buffers = encode([np.ones(500), np.ones(500)])

    assert "1 buffers came" in refused(body, [bytes(buffers[0])])
    assert "3 buffers came" in refused(body, [bytes(buffer) for buffer in (*buffers, buffers[0])])


def test_refuses_buffers_in_another_order_or_cut_short() -> None:
    """Each buffer must have the bytes that its array has."""
    body, buffers = encode([np.ones(500), np.ones(600)])
    first, second = map(bytes, buffers)

    assert "on the 4800 bytes of buffer 0" in refused(body, [second, first])
    assert "value[1]" in refused(body, [first, second[:-1]])


def test_refuses_content_that_no_such_array_has() -> None:
    """Bytes that are no bool or no character never become an array of them."""
    assert "bool" in refused(packed(array(64, number=BOOL), 1), [bytearray(b"\x01" * 63 + b"\x02")])
    assert "character" in refused(packed(array(1, number=TEXT), 1), [bytearray(b"\xff" * 12)])
    assert "UnicodeDecodeError" in refused(packed([_ids.STR, 0, 2], 1), [b"\xff\xff"])


def test_reads_each_byte_a_bounded_number_of_times() -> None:
    """Thousands of arrays or strings named on one large buffer cost neither memory nor time."""
    n_bytes = 1 << 20
    views = [[_ids.NDARRAY_VIEW, BOOL, 0, at, 1, n_bytes - 500, 1] for at in range(400)]
    assert "too many arrays" in refused(packed([_ids.LIST, *views], 1), [bytearray(n_bytes)])

    body = packed([_ids.LIST, *[[_ids.BYTES, 0, n_bytes]] * 400, 1, []], 1)
    refused(body, [bytearray(n_bytes)])


def test_says_nothing_of_the_content() -> None:
    """What a refusal says may be logged: it holds the place and no value."""
    secret = "hunter2"
    for root in ([_ids.COMPLEX, secret, secret], [_ids.PARAMS_TYPE, secret], [secret], [_ids.DATE, secret], secret):
        message = refused(packed([_ids.DICT, "k", root], 1 if root == secret else 0))
        assert secret not in message


def test_long_keys_are_cut_and_control_codes_escaped() -> None:
    """A key in the path cannot fill or forge a log."""
    message = refused(packed([_ids.DICT, "\x1b[31m\n" + "k" * 10_000, [31_337]]))

    assert len(message) < 200
    assert message.isprintable()


def valid_bodies() -> list[tuple[bytes, list[bytes]]]:
    tied = np.arange(400, dtype=np.float32)
    weight = torch.nn.Parameter(torch.ones(40, 10))
    values: list[Any] = [
        {
            "a": [1, 2.5, None, True, "text", b"bytes", 2**70],
            "b": ({1, 2}, frozenset({(3,)}), 1j),
            5: datetime(2020, 1, 1),
        },
        FLModel("DIFF", {"w": tied, "v": tied[3:], "s": tied[::2], "b": np.ones(3)}, metrics={"m": np.float16(1)}),
        {"t": weight, "u": weight.t(), "h": torch.ones(3, dtype=torch.bfloat16), "bool": np.ones(600, bool)},
        ["x" * 2000, b"y" * 2000, bytearray(2000), np.array(["ab", "c"]), np.zeros((0, 3)), [None] * 600],
    ]
    encoded = [encode(value) for value in values]
    return [(body, [bytes(buffer) for buffer in buffers]) for body, buffers in encoded]


def mutated(body: bytes, choose: random.Random) -> bytes:
    changed = bytearray(body)
    for _ in range(choose.randint(1, 4)):
        at = choose.randrange(len(changed))
        match choose.randrange(5):
            case 0:
                changed[at] = choose.randrange(256)
            case 1:
                changed[at] ^= 1 << choose.randrange(8)
            case 2:
                del changed[at : at + choose.randint(1, 4)]
            case 3:
                changed[at:at] = choose.randbytes(choose.randint(1, 4))
            case _:
                changed[at] = choose.choice(
                    (0x90, 0x91, 0xC0, 0xC4, 0xCF, 0xD3, 0xDC, 0xDD, 0xFF, 0x00, 0x1E, 0x1F, 0x28)
                )
        if not changed:
            return b""
    return bytes(changed)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_bodies_give_a_value_or_a_refusal(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is changed in a valid body, decoding ends with a value or a DecodeError, and little memory."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # its own hundred megabytes do not count
    choose = random.Random(seed)
    body, buffers = valid_bodies()[seed]
    n_refused = 0
    tracemalloc.start()
    try:
        for _ in range(1500):
            try:
                decode(mutated(body, choose), buffers)
            except DecodeError:
                n_refused += 1
        assert tracemalloc.get_traced_memory()[1] < MAX_GROWTH
    finally:
        tracemalloc.stop()
    assert n_refused > 300


trees = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=9),
    lambda inner: st.builds(lambda tag, items: [tag, *items], st.integers(0, 41), st.lists(inner, max_size=8)),
    max_leaves=15,
)


@given(trees, st.lists(st.binary(max_size=20), max_size=2), st.binary(max_size=20))
@settings(deadline=None, max_examples=200)
def test_any_tree_gives_a_value_or_a_refusal(root: Any, buffers: list[bytes], arena: bytes) -> None:
    """No combination of type ids and items ends in anything but a value or a DecodeError."""
    try:
        decode(packed(root, len(buffers), arena), buffers)
    except DecodeError:
        return


@pytest.mark.parametrize("cut", [lambda body: body[:-1], lambda body: body + b"\xc0", lambda body: b""], ids=range(3))
def test_accepts_any_bytes_like_body(cut: Callable[[bytes], bytes]) -> None:
    """A body may come as any bytes-like object; each truncation of it is refused."""
    body, _ = encode({"a": 1})

    assert decode(bytearray(body), ()) == decode(memoryview(body), ()) == {"a": 1}
    refused(cut(body))
