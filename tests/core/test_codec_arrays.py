"""Arrays travel on their own memory: what is copied, what is shared, and what stays alive."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from flarebus.codec import decode, encode

Array = np.ndarray[Any, Any]


def arrived(value: Any, **options: Any) -> Any:
    body, buffers = encode(value, **options)
    return decode(body, [bytearray(buffer) for buffer in buffers])


def address(buffer: Any) -> int:
    return int(np.frombuffer(buffer, np.uint8).__array_interface__["data"][0])


@pytest.mark.parametrize(
    "array",
    [
        np.arange(600.0),
        np.arange(600.0).reshape(20, 30).T,
        np.asfortranarray(np.arange(600.0).reshape(20, 30)),
        np.arange(600.0).reshape(4, 5, 30).transpose(1, 2, 0),
        np.arange(600, dtype=">i8"),
        np.arange(600).astype("M8[s]"),
        np.arange(600, dtype=np.complex64),
        np.array(["ab"] * 600),
    ],
    ids=["c", "transposed", "fortran", "permuted", "big-endian", "dates", "complex", "text"],
)
def test_a_dense_array_is_not_copied(array: Array) -> None:
    """An array without gaps goes out on its own memory and comes in on the buffer, in the same order of axes."""
    body, buffers = encode({"w": array})
    memory = bytearray(buffers[0])
    found = decode(body, [memory])["w"]

    assert (buffers[0].format, buffers[0].ndim, buffers[0].nbytes) == ("B", 1, array.nbytes)
    assert address(buffers[0]) == array.__array_interface__["data"][0]
    assert np.shares_memory(found, np.frombuffer(memory, np.uint8))
    assert found.strides == array.strides
    assert np.array_equal(found, array)


def test_an_array_with_gaps_is_copied_once() -> None:
    """A slice with steps travels without what lies between, and the same slice again costs nothing."""
    whole = np.arange(2000.0)
    body, buffers = encode([whole[::2], whole[::2]])
    first, second = decode(body, [bytearray(buffer) for buffer in buffers])

    assert [buffer.nbytes for buffer in buffers] == [8000]
    assert np.array_equal(first, whole[::2])
    assert np.shares_memory(first, second)
    assert np.array_equal(arrived(whole[::-1]), whole[::-1])


def test_small_arrays_stay_in_the_body() -> None:
    """Arrays of a few bytes need no buffer; beyond the room for them, they get one."""
    value = [np.full(20, i, np.float32) for i in range(2000)]
    body, buffers = encode(value)

    assert 0 < len(buffers) < 1000
    assert len(body) < 256 << 10
    assert all(np.array_equal(a, b) for a, b in zip(decode(body, [bytes(b) for b in buffers]), value, strict=True))
    assert encode(value[0]).buffers == []
    assert len(encode(value[0], externalise_from=1).buffers) == 1


def test_small_arrays_lie_aligned_in_one_copy() -> None:
    """Arrays in the body share one allocation, whatever odd size the one before has."""
    found = decode(*encode([np.ones(3, np.uint8), np.ones(3), np.ones(7, np.uint8), np.ones(3, np.complex128)]))

    assert len({id(one.base) for one in found}) == 1


def test_a_writable_aligned_buffer_is_used_as_it_is() -> None:
    """What is written to the array is written to the buffer it came in."""
    body, buffers = encode(np.zeros(1000))
    memory = bytearray(buffers[0])

    decode(body, [memory])[:] = 1
    assert memory == np.ones(1000).tobytes()


@pytest.mark.parametrize("case", ["read-only", "misaligned", "copy"])
def test_other_buffers_are_copied_once_and_left_alone(case: str) -> None:
    """A read-only or misaligned buffer is copied, once for all arrays on it; `copy` copies always."""
    array = np.arange(1000.0)
    body, buffers = encode([array, array, array.view(np.int64)])
    room = bytearray(8008)
    memory = memoryview(room)[1:8001] if case == "misaligned" else memoryview(room)[:8000]
    memory[:] = buffers[0]
    before = bytes(room)

    found = decode(body, [memory.toreadonly() if case == "read-only" else memory], copy=case == "copy")
    found[0][:] = 7
    assert bytes(room) == before
    assert found[1].sum() == 7000
    assert found[2].view(np.float64).sum() == 7000
    assert all(one.flags.aligned and one.flags.writeable for one in found)


def test_one_buffer_for_two_alignments() -> None:
    """Arrays of bytes and of floats on one misaligned buffer still share memory, and are aligned."""
    array = np.arange(1000.0)
    body, buffers = encode([array.view(np.uint8), array])
    room = bytearray(8001)
    room[1:] = buffers[0]

    as_bytes, as_floats = decode(body, [memoryview(room)[1:]])
    as_bytes[:] = 0
    assert as_floats.flags.aligned
    assert not as_floats.any()


def test_an_array_keeps_its_memory_alive() -> None:
    """Buffers keep the array alive they lie on, and arrays the buffer they came on."""
    array = np.arange(1000.0)
    gone = weakref.ref(array)
    body, buffers = encode([array])
    del array
    gc.collect()
    assert gone() is not None

    memory = np.array(buffers[0])
    gone_too = weakref.ref(memory)
    found = decode(body, [memory.data])
    del memory, buffers
    gc.collect()
    assert gone() is None
    assert gone_too() is not None
    assert found[0][999] == 999


@pytest.mark.parametrize("n_items", [12, 3000], ids=["in the body", "beside it"])
def test_shared_memory_stays_shared(n_items: int) -> None:
    """Arrays that overlap in any way overlap alike when they arrive, and their bytes travel once."""
    whole = np.arange(n_items, dtype=np.float64)
    value = {
        "same": whole,
        "again": whole[:],
        "head": whole[: n_items // 2],
        "tail": whole[4:],
        "steps": whole[::2],
        "square": whole.reshape(-1, 3),
        "turned": whole.reshape(-1, 3).T,
        "bits": whole.view(np.uint64),
        "apart": whole.copy(),
    }
    body, buffers = encode(value)
    found = decode(body, [bytes(buffer) for buffer in buffers])

    assert sum(buffer.nbytes for buffer in buffers) == (2 * whole.nbytes if buffers else 0)
    assert all(np.array_equal(found[key], value[key]) for key in value)
    found["same"][:] = -1
    found["bits"][-1] = 0
    assert [float(found[key].max()) for key in ("again", "head", "steps", "square", "turned")] == [0, -1, -1, 0, 0]
    assert found["tail"].max() == 0
    assert np.array_equal(found["apart"], whole)


def test_views_that_cannot_share_come_back_right() -> None:
    """Reversed and repeated views beside what they view come back with their values, on memory of their own."""
    whole = np.arange(300.0)
    value = [whole, whole[::-1], np.broadcast_to(whole[5:8], (200, 3)), whole[10:20]]

    assert all(np.array_equal(a, b) for a, b in zip(arrived(value), value, strict=True))


def test_an_axis_of_length_one_may_have_any_stride() -> None:
    """The stride of an axis that is never stepped along means nothing and stops nothing."""
    array = np.arange(2000.0).reshape(50, 1, 40).T[:, ::-1]

    assert array.strides[1] < 0
    assert np.array_equal(arrived(array), array)


def test_neighbours_do_not_drag_each_other_along() -> None:
    """Columns of a large matrix share no items: they travel alone, without the matrix around them."""
    matrix = np.arange(100_000.0).reshape(1000, 100)
    body, buffers = encode([matrix[:, 3], matrix[:, 5], matrix[10], matrix[11]])
    found = decode(body, [bytearray(buffer) for buffer in buffers])

    assert [buffer.nbytes for buffer in buffers] == [8000, 8000, 800, 800]
    assert np.array_equal(found[1], matrix[:, 5])


def test_copies_are_not_taken_for_each_other() -> None:
    """Copies of arrays with gaps never stand in for one another, though they reuse addresses."""
    whole = np.arange(400, dtype=np.float32)
    value: list[Array] = [whole[start : start + 40 : 2] for start in range(0, 360, 4)]
    value += [one.astype(np.complex128)[::-1] for one in value]

    assert all(np.array_equal(a, b) for a, b in zip(arrived(value), value, strict=True))


def test_a_mapped_array_travels_as_an_array(tmp_path: Any) -> None:
    """An array in a mapped file, read-only too, goes out without being read into memory first."""
    path = tmp_path / "w"
    np.arange(5000.0).tofile(path)
    mapped = np.memmap(path, np.float64, "r")
    body, buffers = encode({"w": mapped, "again": mapped[:]})
    found = decode(body, buffers)

    assert len(buffers) == 2 - 1
    assert type(found["w"]) is np.ndarray
    assert np.array_equal(found["w"], np.arange(5000.0))
    assert found["w"].flags.writeable
