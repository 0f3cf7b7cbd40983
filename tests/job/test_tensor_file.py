"""Tensor files: what is written is read back, by us and by others, and damage is found."""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import resource
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flarebus.codec import encode
from flarebus.errors import DecodeError, EncodeError
from flarebus.job import tensor_file
from flarebus.job.tensor_file import Layout, MappedFile, load_params, save_params

PLAIN = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"]
ODD = ["c8", "c16", ">f4", ">i8", ">c8", "g", "M8[s]", "m8[ms]", "U5", "S3"]
SHORT = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
ODD_SHORT = [ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz, ml_dtypes.int4]


def sample(dtype: Any, shape: tuple[int, ...] = (3, 5)) -> np.ndarray:
    return np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)


def same(left: Any, right: Any) -> bool:
    """Equal to the bit, types and dtypes included."""
    if isinstance(left, np.ndarray | np.generic):
        return (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and (left == right or left != left)


@pytest.mark.parametrize("dtype", PLAIN + SHORT + ODD + ODD_SHORT)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 2), (7,)])
def test_every_dtype_comes_back(tmp_path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    """Arrays of every dtype and shape are read back to the bit, aligned and writable, and the file stays as it is."""
    params = {"byte": sample("u1", (3,)), "w": sample(dtype, shape)}
    path = tmp_path / "m.safetensors"

    save_params(params, path)
    before = path.read_bytes()
    loaded = load_params(path)

    assert same(params, loaded)
    assert all(array.flags.aligned and array.flags.writeable for array in loaded.values())
    for array in loaded.values():
        array[...] = array
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", PLAIN)
def test_the_safetensors_library_reads_them(tmp_path: Path, dtype: str) -> None:
    """Files are plain safetensors: the library that everybody has reads the same arrays from them."""
    params = {"layer.weight": sample(dtype), "layer.bias": sample("f4", (5,)), "odd": sample("u1", (3,))}
    path = tmp_path / "m.safetensors"

    save_params(params, path)

    assert same(params, {name: safetensors.numpy.load_file(path)[name] for name in params})


def test_the_library_reads_nested_models_and_short_floats(tmp_path: Path) -> None:
    """Other readers see nested arrays under dotted names, and bfloat16 and float8 as what they are."""
    torch = pytest.importorskip("torch")
    import safetensors.torch

    path = tmp_path / "m.safetensors"
    save_params({"a": {"b": sample(ml_dtypes.bfloat16)}, "f": sample(ml_dtypes.float8_e5m2, (2,)), "n": 3}, path)

    loaded = safetensors.torch.load_file(path)

    assert loaded["a.b"].dtype == torch.bfloat16
    assert loaded["a.b"].float().tolist() == sample("f4").tolist()
    assert loaded["f"].dtype == torch.float8_e5m2
    assert sorted(loaded) == ["a.b", "f"]


@pytest.mark.parametrize("dtype", PLAIN)
def test_what_the_library_wrote_is_read(tmp_path: Path, dtype: str) -> None:
    """A file from anybody is a flat dict of its arrays, aligned whatever the file looks like."""
    params = {"a": sample(dtype), "b": sample("u1", (3,)), "c": sample("f8", (2,))}
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file(params, path, metadata={"who": "else"})

    loaded = load_params(path)

    assert same(params, {name: loaded[name] for name in params})
    assert all(array.flags.aligned for array in loaded.values())


def test_misaligned_data_is_copied_to_good_places(tmp_path: Path) -> None:
    """A foreign file whose data begins at an odd address is read all the same, into aligned arrays."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header = header.ljust(len(header) + 1 - len(header) % 2)  # eight and an odd number
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + np.array([1, 2], np.float32).tobytes())

    loaded = load_params(path)

    assert loaded["w"].tolist() == [1, 2]
    assert loaded["w"].flags.aligned


def test_structure_and_what_is_no_array_come_back(tmp_path: Path) -> None:
    """Nested dicts, lists, tuples, numbers, text, None and odd keys come back as they were, and in their order."""
    params = {
        "z": {"w": sample("f4"), 5: [1, 2.5, (None, sample("c8"))], "empty": {}, "none": []},
        "text": "é" * 3000,
        "bytes": b"\x00\xff" * 700,
        "number": 2**80,
        "nan": float("nan"),
        "flag": True,
        "complex": 1 - 2j,
    }
    path = tmp_path / "m.safetensors"

    save_params(params, path)

    assert same(params, load_params(path))


def test_numpy_scalars_and_tensors_come_back_as_arrays(tmp_path: Path) -> None:
    """Scalars of NumPy and tensors are numbers in a shape: they are read as arrays of their dtype."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "m.safetensors"

    save_params({"s": np.float32(2), "t": torch.ones(2, 3, dtype=torch.bfloat16)}, path)
    loaded = load_params(path)

    assert (loaded["s"].shape, loaded["s"].dtype) == ((), np.float32)
    assert (loaded["t"].shape, loaded["t"].dtype) == ((2, 3), ml_dtypes.bfloat16)


def test_data_is_aligned_in_the_file(tmp_path: Path) -> None:
    """Data begins on a cache line and every array on a multiple of its item size, so that pages can be computed on."""
    dtypes = ["u1", "f8", "f2", "c16", "f4", "?"]
    params = {f"{number}": sample(dtype, (2 * number + 1,)) for number, dtype in enumerate(dtypes)}
    path = tmp_path / "m.safetensors"
    save_params(params, path)

    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    fields = json.loads(content[8 : 8 + length])

    assert (8 + length) % 64 == 0
    sizes = {"F64": 8, "F16": 2, "F32": 4}
    tensors = [entry for name, entry in fields.items() if name != "__metadata__"]
    assert all(entry["data_offsets"][0] % sizes.get(entry["dtype"], 1) == 0 for entry in tensors)


def test_the_name_of_the_metadata_is_taken(tmp_path: Path) -> None:
    """A parameter cannot have the one name that the file format keeps for itself."""
    with pytest.raises(EncodeError, match="__metadata__"):
        save_params({"__metadata__": sample("f4")}, tmp_path / "m.safetensors")


@pytest.mark.parametrize("leaf", [np.array([object()]), {1, 2} - {1}, object()])
def test_what_cannot_be_saved_is_refused_by_name(tmp_path: Path, leaf: Any) -> None:
    """Objects are refused with the place they stand at, and no file is left."""
    if isinstance(leaf, set):
        leaf = [lambda: 0]
    with pytest.raises(EncodeError, match="bad"):
        save_params({"w": sample("f4"), "deep": {"bad": leaf}}, tmp_path / "m.safetensors")

    assert list(tmp_path.iterdir()) == []


def test_long_text_and_bytes_are_data(tmp_path: Path) -> None:
    """Models that are one long string of bytes, as of other libraries, are saved like arrays."""
    params = {"booster": b"\x00\xff" * 3_000_000, "text": "é" * 2_000_000, "w": sample("f4")}
    path = tmp_path / "m.safetensors"

    save_params(params, path)

    assert same(params, load_params(path))
    assert len(safetensors.numpy.load_file(path)) == 3


def test_too_many_lone_values_are_refused(tmp_path: Path) -> None:
    """More lone values than may travel are refused when they are saved, not found out when they are loaded."""
    with pytest.raises(EncodeError, match="more than fits"):
        save_params({"w": [float(number) for number in range(150_000)]}, tmp_path / "m.safetensors")


def test_a_full_disk_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room is an `OSError` before a single page is touched; what was there stays, and nothing is left over."""
    path = tmp_path / "m.safetensors"
    save_params({"w": sample("f4")}, path)
    before = path.read_bytes()

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        save_params({"w": sample("f8", (1000,))}, path)
    with pytest.raises(OSError, match="No space"):
        MappedFile(tmp_path / "model-1.safetensors", Layout({"w": sample("f4")}))

    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.safetensors"]


def test_every_truncation_is_found(tmp_path: Path) -> None:
    """A file cut off at any byte is refused with its name, and never read as a model."""
    whole = tmp_path / "whole.safetensors"
    save_params({"w": sample("f4"), "n": 1.0, "c": sample("c8", (2,))}, whole)
    content = whole.read_bytes()
    path = tmp_path / "cut.safetensors"

    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DecodeError, match=r"cut\.safetensors"):
            load_params(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever bytes of the header change, the file is read or refused; nothing else happens."""
    path = tmp_path / "m.safetensors"
    save_params({"w": sample("f4"), "l": [sample("c8", (2,)), 1.0], "g": sample("g", (1,))}, path)
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)

    with contextlib.suppress(DecodeError):
        load_params(path)


def hostile(fields: Any, data: bytes = bytes(64)) -> bytes:
    header = (fields if isinstance(fields, str) else json.dumps(fields)).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


def with_odd(dtype: Any, shape: list[Any], end: int) -> dict[str, Any]:
    metadata = {"flarebus.numpy_dtypes": json.dumps({"w": dtype})}
    return {"__metadata__": metadata, "w": {"dtype": "U8", "shape": shape, "data_offsets": [0, end]}}


def with_structure(text: str) -> dict[str, Any]:
    return {"__metadata__": {"flarebus.structure": text}, **entry()}


HOSTILE = {
    "empty": b"",
    "header longer than the file": (2**62).to_bytes(8, "little") + b"{}",
    "no json": hostile("{"),
    "a list": hostile([1]),
    "a number": hostile("1"),
    "deep nesting": hostile("[" * 100_000),
    "entry is a list": hostile({"w": [1]}),
    "entry is empty": hostile({"w": {}}),
    "unknown dtype": hostile(entry(dtype="X9")),
    "dtype is a list": hostile(entry(dtype=[])),
    "negative shape": hostile(entry(shape=[-2])),
    "huge shape": hostile(entry(shape=[2**62, 2**62])),
    "fractional shape": hostile(entry(shape=[2.0])),
    "flag as a shape": hostile(entry(shape=[True, 2])),
    "too many dimensions": hostile(entry(shape=[1] * 100 + [2])),
    "one offset": hostile(entry(data_offsets=[0])),
    "offsets beyond the file": hostile(entry(data_offsets=[60, 68])),
    "offsets in reverse": hostile(entry(data_offsets=[8, 0])),
    "size and shape disagree": hostile(entry(shape=[3])),
    "metadata is a list": hostile({"__metadata__": [], **entry()}),
    "metadata is a number": hostile({"__metadata__": {"flarebus.numpy_dtypes": 5}, **entry()}),
    "structure is no base64": hostile(with_structure("?")),
    "structure is no value": hostile(with_structure(base64.b64encode(b"\xc1").decode())),
    "structure is no dict": hostile(with_structure(base64.b64encode(encode([1]).body).decode())),
    "structure without the arrays": hostile(with_structure(base64.b64encode(encode({"x": 1}).body).decode())),
    "object dtype": hostile(with_odd("O", [8], 8)),
    "dtype without size": hostile(with_odd("V0", [8], 8)),
    "dtype that is none": hostile(with_odd("nonsense", [8], 8)),
    "dtype of another size": hostile(with_odd("<c8", [3, 5], 15)),
    "dtype without an axis": hostile(with_odd("<c8", [], 1)),
    "dtype from a list": hostile(with_odd([["a", "f4"]], [4], 4)),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, case: str) -> None:
    """Files that lie about themselves are refused with their name, whatever the lie."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(HOSTILE[case])

    with pytest.raises(DecodeError, match=r"m\.safetensors"):
        load_params(path)


def test_a_missing_file_is_an_oserror(tmp_path: Path) -> None:
    """A file that is not there is the operating system's error, with the name in it."""
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        load_params(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("held", [False, True])
def test_a_file_holds_what_its_arrays_hold_once_it_is_synchronised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    """Round after round, whether the arrays are pages of the file or memory that is written to it, bit by bit."""
    monkeypatch.setattr(tensor_file, "HELD_BYTES", 10_000 if held else 0)
    written = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: written(handle, bytes(data[:1000]), at))
    params = {"w": np.zeros(1000, np.float32), "b": np.zeros(7)}
    file = MappedFile(tmp_path / "m.safetensors", Layout(params))
    for value in (1.0, 2.0):
        for array in file.arrays.values():
            array[...] = value
        file.sync()
        loaded = load_params(tmp_path / "m.safetensors")
        assert {name: set(array.tolist()) for name, array in loaded.items()} == {"w": {value}, "b": {value}}
    file.close()


def test_small_models_cost_no_page_faults(tmp_path: Path) -> None:
    """Writing a small model again does not touch pages that the kernel has protected while it wrote them out."""
    params = {"w": np.zeros(250_000, np.float32)}
    file = MappedFile(tmp_path / "m.safetensors", Layout(params))
    file.arrays["w"][...] = 1
    file.sync()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        file.arrays["w"][...] = 2
        file.sync()

    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 250
    file.close()


def test_pages_of_a_file_are_not_memory_of_ours(tmp_path: Path) -> None:
    """Filling a mapped file and reading one back leaves the process's own memory as it was."""
    size = 32 * 1024 * 1024
    params = {"w": np.zeros(size // 4, np.float32)}  # of pages that were never touched
    path = tmp_path / "m.safetensors"
    before = anonymous_bytes()

    layout = Layout(params)
    file = MappedFile(path, layout)
    layout.fill(file.arrays, {"w": np.broadcast_to(np.float32(1), params["w"].shape)})
    file.sync()
    file.close()
    loaded = load_params(path)

    assert loaded["w"].sum(dtype=np.float64) == size // 4
    assert anonymous_bytes() - before < size // 4


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024
