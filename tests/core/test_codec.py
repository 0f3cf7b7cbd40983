"""What the codec refuses and how it says so, registration, and what it imports."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import msgpack
import numpy as np
import pytest

from flarebus import codec
from flarebus.codec import MAX_BODY, MAX_DEPTH, Decomposer, Sink, Source, decode, encode
from flarebus.errors import ConfigError, DecodeError, EncodeError
from flarebus.model import FLModel


class Unknown:
    pass


class Colour(IntEnum):
    RED = 1


@dataclass
class Record:
    x: int


Pair = namedtuple("Pair", "a b")


class Text(str):
    __slots__ = ()


class Number(int):
    __slots__ = ()


class Rows(list[int]):
    pass


STRUCTURED = np.zeros(2, [("a", "f4"), ("b", "i4")])


@pytest.mark.parametrize(
    ("value", "found", "hint"),
    [
        (Unknown(), "test_codec.Unknown", "flarebus.codec.register"),
        (object(), "object", "register"),
        (len, "builtin_function_or_method", "code"),
        (lambda: 0, "function", "code"),
        (Unknown, "type", "classes do not travel"),
        (sys, "module", "modules do not travel"),
        (Colour.RED, "Colour", "register_enum"),
        (Record(1), "Record", "register_dataclass"),
        (Pair(1, 2), "Pair", "tuple(value)"),
        (Text("a"), "Text", "str(value)"),
        (Number(1), "Number", "int(value)"),
        (Rows([1]), "Rows", "list(value)"),
        (defaultdict(int), "collections.defaultdict", "dict(value)"),
        (Counter("a"), "collections.Counter", "dict(value)"),
        (Path("/"), "PosixPath", "str(value)"),
        (iter([1]), "list_iterator", "list(value)"),
        (memoryview(b""), "memoryview", "bytes(value)"),
        (Decimal(1), "decimal.Decimal", "register"),
        (datetime.now(ZoneInfo("UTC")), "ZoneInfo", "astimezone"),
        (np.array([object()]), "dtype object", "objects do not travel"),
        (STRUCTURED, "dtype [('a', '<f4'), ('b', '<i4')]", "dict of arrays"),
        (STRUCTURED[0], "numpy.void", "numeric"),
        (np.zeros(1, "g"), "dtype float128", "float64"),
        (np.longdouble(1), "numpy.longdouble", "numeric"),
        (np.zeros(1, "M8[25s]"), "dtype datetime64[25s]", "numeric"),
        (np.zeros(1, "S70000"), "dtype |S70000", "numeric"),
        (np.ma.masked_array([1.0], [True]), "numpy.ma.MaskedArray", "numpy.asarray"),
        ("\ud800", "lone surrogate", "bytes"),
        (SimpleNamespace(state_dict=dict), "SimpleNamespace", "state_dict()"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isascii() else type(value).__name__,
)
def test_refuses_what_is_not_registered(value: Any, found: str, hint: str) -> None:
    """Anything unregistered is refused with its place, its type and what to do."""
    with pytest.raises(EncodeError) as caught:
        encode({"params": {"layer": [0, 1, (value,)]}})

    assert caught.value.path == "value['params']['layer'][2][0]"
    assert found in caught.value.found
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (Unknown(), "value"),
        ({1: {None: {b"k": Unknown()}}}, "value[1][None][b'k']"),
        ({(1, 2): Unknown()}, "value[<tuple key>]"),
        ({"a": {"\ud800": 1}}, "value['a']['\\ud800']"),
        (FLModel(params={"w": [Unknown()]}), "value.params['w'][0]"),
        (FLModel(meta={"m": Unknown()}), "value.meta['m']"),
        ({"k" * 100: Unknown()}, "value['" + "k" * 56 + "...]"),
        ([0] * 2000 + [Unknown()], "value[2000]"),
    ],
    ids=range(8),
)
def test_names_the_place_of_a_refused_value(value: Any, path: str) -> None:
    """The error's path leads to the refused value, through any container."""
    with pytest.raises(EncodeError) as caught:
        encode(value)

    assert caught.value.path == path


def test_refuses_a_model_with_a_field_of_another_type() -> None:
    """A field of a model set to something else after its construction is refused by name."""
    model = FLModel()
    model.metrics = [1.0]  # type: ignore[assignment]

    with pytest.raises(EncodeError, match=r"value\.metrics: an object of type list"):
        encode(model)


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: {"k": v}, lambda v: (v,), OrderedDict], ids=range(4))
def test_refuses_what_contains_itself(wrap: Callable[[Any], Any]) -> None:
    """A container that holds itself is refused as too deep, not walked for ever."""
    value: Any = []
    value.append(wrap({"v": value}))

    with pytest.raises(EncodeError, match="contains itself"):
        encode(value)


def test_refuses_one_level_too_many() -> None:
    """The documented depth travels; one level more is refused."""
    value: Any = 0
    for _ in range(MAX_DEPTH + 1):
        value = [value]

    assert decode(*encode(value)) == value
    with pytest.raises(EncodeError, match="deeper than 100 levels"):
        encode([value])


@pytest.mark.parametrize(
    "value",
    [
        [0.5] * 200_000,
        ["a" * 1000] * 1100,
        [0] * (2 * MAX_BODY),
        [[i] for i in range(40_000)],
        [2**70 + i for i in range(40_000)],
        {str(i): np.zeros(300, np.uint8) for i in range(40_000)},
        1 << (9 * MAX_BODY),
    ],
    ids=["floats", "strings", "count", "containers", "big integers", "arrays", "one integer"],
)
def test_refuses_what_exceeds_a_body(value: Any) -> None:
    """Whatever does not fit into a body is refused with what to do."""
    with pytest.raises(EncodeError, match="send many numbers as one array"):
        encode(value)


def test_refuses_lists_that_multiply() -> None:
    """Lists that hold one list many times over are refused before they are written out."""
    value: list[Any] = []
    for _ in range(50):
        value = [value] * 10

    with pytest.raises(EncodeError, match="more than fits"):
        encode(value)


def test_refuses_a_threshold_of_nothing() -> None:
    """The threshold is a number of bytes from 1."""
    with pytest.raises(ConfigError, match="externalise_from=0"):
        encode(1, externalise_from=0)


# -- registration -------------------------------------------------------------------------------------------------


class Matrix:
    def __init__(self, rows: int, data: bytes) -> None:
        self.rows = rows
        self.data = data


class MatrixDecomposer(Decomposer):
    type_id = 1101
    types = (Matrix,)

    def decompose(self, value: Matrix, sink: Sink) -> Any:
        if value.rows < 0:
            raise ValueError("rows below 0")
        return {"rows": value.rows, "data": sink.add(value.data)}

    def recompose(self, plain: Any, source: Source) -> Matrix:
        view = source.get(plain["data"])
        view[:1] = b"!"  # writable, whatever came
        return Matrix(plain["rows"], bytes(view))


codec.register(MatrixDecomposer())


def test_a_registered_type_travels() -> None:
    """A decomposer's type travels inside any value, with bytes of its own beside the body."""
    body, buffers = encode([Matrix(2, b"abc"), Matrix(3, b"def")])
    first, second = decode(body, [bytes(buffer) for buffer in buffers])

    assert [bytes(buffer) for buffer in buffers] == [b"abc", b"def"]
    assert (type(first), first.rows, first.data) == (Matrix, 2, b"!bc")
    assert (second.rows, second.data) == (3, b"!ef")


def test_says_which_decomposer_failed_and_where() -> None:
    """An exception in a decomposer becomes an error with the path, in both directions."""
    with pytest.raises(
        EncodeError, match=r"value\['m'\]: MatrixDecomposer\.decompose failed: ValueError: rows below 0"
    ):
        encode({"m": Matrix(-1, b"x")})

    body, _ = encode({"m": Matrix(1, b"x")})
    with pytest.raises(DecodeError, match=r"value: 0 buffers came"):
        decode(body, ())


class Box:
    def __init__(self, inner: Any) -> None:
        self.inner = inner


class BoxDecomposer(Decomposer):
    type_id = 1103
    types = (Box,)

    def decompose(self, value: Box, sink: Sink) -> Any:
        return value.inner() if callable(value.inner) else value.inner

    def recompose(self, plain: Any, source: Source) -> Box:
        return Box(plain)


codec.register(BoxDecomposer())


def test_boxes_in_boxes_are_as_deep_as_lists_in_lists() -> None:
    """A registered type counts as a level, out and in."""
    value = Box(0)
    for _ in range(MAX_DEPTH + 1):
        value = Box(value)

    with pytest.raises(EncodeError, match="deeper than 100 levels"):
        encode(value)
    body, _ = encode(value.inner)
    inner, tag = body[1:-3], body[1:5]
    with pytest.raises(DecodeError, match="deeper than 100 levels"):
        decode(body[:1] + tag + inner + body[-3:], ())


def test_temporary_arrays_of_a_decomposer_are_not_taken_for_each_other() -> None:
    """Small arrays made while encoding never stand in for one another, though they would reuse addresses."""
    made: list[Callable[[int], np.ndarray[Any, Any]]] = [
        lambda i: np.full(20, i),
        lambda i: np.full(400, i),
        lambda i: np.full(40, i)[::2],
        lambda i: np.full(4000, i)[::2],
    ]
    for make in made:
        body, buffers = encode([Box(lambda i=i, make=make: make(i)) for i in range(50)])
        assert [int(box.inner.mean()) for box in decode(body, buffers)] == list(range(50))


def test_temporary_arrays_that_overlap_are_read_where_they_are() -> None:
    """Overlapping arrays made while encoding travel with their own bytes, though they are made more than once."""

    def make(i: int) -> list[np.ndarray[Any, Any]]:
        whole = np.full(5000 + i, i)
        return [whole, whole[10:]]

    body, buffers = encode([Box(lambda i=i: make(i)) for i in range(20)])
    for i, box in enumerate(decode(body, buffers)):
        assert [(len(one), one.min(), one.max()) for one in box.inner] == [(5000 + i, i, i), (4990 + i, i, i)]


class LazyDecomposer(Decomposer):
    type_id = 1102
    types = ("fractions:Fraction", "nowhere.to.be.found:Thing")

    def decompose(self, value: Any, sink: Sink) -> Any:
        return value.as_integer_ratio()

    def recompose(self, plain: Any, source: Source) -> Any:
        from fractions import Fraction

        return Fraction(*plain)


codec.register(LazyDecomposer())


def test_a_type_registered_by_name_travels() -> None:
    """A class named by module and name is found once that module is loaded."""
    from fractions import Fraction

    assert decode(*encode({"q": Fraction(2, 3)})) == {"q": Fraction(2, 3)}


def test_a_name_alone_proves_nothing() -> None:
    """A class that only claims the name of a registered one is refused."""
    impostor = type("Thing", (), {"__module__": "nowhere.to.be.found"})

    with pytest.raises(EncodeError, match=r"nowhere\.to\.be\.found\.Thing"):
        encode(impostor())


def made(type_id: Any, types: Any) -> Decomposer:
    found = MatrixDecomposer()
    found.type_id = type_id
    found.types = types
    return found


@pytest.mark.parametrize(
    ("decomposer", "message"),
    [
        (MatrixDecomposer, "decomposer="),
        (made(1101, (Unknown,)), "type_id=1101: this id is registered already"),
        (made(1199, (Matrix,)), "this type is registered already"),
        (made(1199, (dict,)), "this type is registered already"),
        (made(1199, (int,)), "this type is registered already"),
        (made(1199, (np.ndarray,)), "this type is registered already"),
        (made(1199, ("torch:Tensor",)), "this type is registered already"),
        (made(1199, ("datetime:datetime",)), "this type is registered already"),
        (made(1199, ("no name",)), "package.module:Class"),
        (made(1199, ()), "types=()"),
        (made(1199, [Unknown]), "a tuple of classes"),
        (made(1199, (3,)), "classes or"),
        (made(99, (Unknown,)), "type_id=99"),
        (made(True, (Unknown,)), "type_id=True"),
        (made(40_000, (Unknown,)), "type_id=40000"),
        (made("1199", (Unknown,)), "type_id='1199'"),
    ],
    ids=range(16),
)
def test_refuses_a_wrong_registration(decomposer: Any, message: str) -> None:
    """A taken id or type, or anything that is no decomposer, is refused and changes nothing."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        codec.register(decomposer)

    with pytest.raises(EncodeError):
        encode(Unknown())


@dataclass
class Hidden:
    x: int
    y: int = field(init=False, default=0)


def test_refuses_classes_that_are_no_records() -> None:
    """Only enums and dataclasses that their fields alone can build again are registered as such."""
    with pytest.raises(ConfigError, match="init=False"):
        codec.register_dataclass(Hidden, 1190)
    with pytest.raises(ConfigError, match="a dataclass"):
        codec.register_dataclass(Unknown, 1190)
    with pytest.raises(ConfigError, match="a subclass of enum"):
        codec.register_enum(Unknown, 1190)  # type: ignore[arg-type]


class Late(Enum):
    A = 1


@dataclass
class Checked:
    n: int
    unit: str = "s"

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ValueError(self.n)


def test_records_check_what_comes_in() -> None:
    """A member that does not exist, a field too many and a value the class refuses are malformed."""
    codec.register_enum(Late, 1110)
    codec.register_dataclass(Checked, 1111)
    good = Checked(1)

    body, _ = encode([Late.A, good])
    assert decode(body, ()) == [Late.A, good]
    good.n = -1
    incomplete = msgpack.packb([[1111, [2, "n", 1]], 0, b""])
    for broken in (incomplete, encode(good).body, body.replace(b"\xa1A", b"\xa1B"), body.replace(b"\xa1n", b"\xa1m")):
        with pytest.raises(DecodeError):
            decode(broken, ())


def test_any_thread_may_encode_and_decode() -> None:
    """Many threads share the codec, also when a type is met for the first time."""
    values = [{"k": [i, Matrix(i, b"a" * 2000)], "w": np.full(1000, i)} for i in range(200)]

    def go(value: Any) -> tuple[int, int, float]:
        body, buffers = encode(value)
        found = decode(body, buffers)
        return found["k"][0], found["k"][1].rows, float(found["w"].mean())

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(go, values)) == [(i, i, float(i)) for i in range(200)]


# -- imports ------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import numpy as np
from flarebus.codec import decode, encode
from flarebus.model import FLModel
value = {"a": [1, 2.5, "x", b"y" * 5000, None, {3}], "m": FLModel(params={"w": np.ones(2000), "s": np.float32(1)})}
found = decode(*encode(value))
assert found["m"].params["w"].sum() == 2000
try:
    encode(object())
except TypeError:
    pass
print(sorted({"torch", "ml_dtypes", "rich", "click", "safetensors"} & sys.modules.keys()))
"""


def test_plain_values_and_arrays_import_nothing_more() -> None:
    """Neither torch nor ml_dtypes is imported before one of their values shows up."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)

    assert (done.stdout.strip(), done.stderr) == ("[]", "")


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # as if it were not installed
from flarebus.codec import decode
from flarebus.errors import DecodeError
try:
    decode(bytes.fromhex(sys.argv[1]), [bytes.fromhex(argument) for argument in sys.argv[2:]])
except DecodeError as error:
    print(error)
"""


def test_says_what_to_install_when_torch_is_missing() -> None:
    """A tensor that arrives where torch is not installed gives an error that says what to install."""
    import torch

    body, buffers = encode({"w": torch.ones(2)})
    arguments = [body.hex(), *(bytes(buffer).hex() for buffer in buffers)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, check=False
    )

    assert "value['w']" in done.stdout
    assert "pip install 'flarebus[torch]'" in done.stdout
