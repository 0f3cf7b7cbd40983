"""Runs: the same bits on every path, and no byte written that is somebody else's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from flarebus.errors import UpdateRefused
from flarebus.model import FLModel
from flarebus.workflow.mean import WeightedMean

DTYPES = [
    np.float32,
    np.float64,
    np.float16,
    ml_dtypes.bfloat16,
    np.int32,
    np.int64,
    np.uint8,
    np.complex64,
    np.complex128,
]
# Beyond one block of every kind, with a rest that no lane can take.
SIZE = 2 * 131_072 + 7


def arrays_of(dtype: Any, clients: int, size: int = SIZE) -> list[NDArray[Any]]:
    rng = np.random.default_rng(1)
    if np.dtype(dtype).kind in "iu":
        return [rng.integers(0, 100, size).astype(dtype) for _ in range(clients)]
    return [rng.standard_normal(size).astype(dtype) for _ in range(clients)]


def mean_of(arrays: list[NDArray[Any]], threads: int = 1, kind: str = "FULL") -> NDArray[Any]:
    like = {"w": np.zeros_like(arrays[0])}
    mean = WeightedMean(like, threads=threads)
    for number, array in enumerate(arrays):
        mean.add(FLModel(kind, {"w": array}), 1.0 + number / 7)
    result: NDArray[Any] = mean.apply_to(like)["w"]
    return result


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def misaligned(array: NDArray[Any]) -> NDArray[Any]:
    memory = np.empty(array.nbytes + 1, np.uint8)
    memory[1:] = np.frombuffer(array.tobytes(), np.uint8)
    return memory[1:].view(array.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clients", [1, 2, 3, 9])
@pytest.mark.parametrize("kind", ["FULL", "DIFF"])
def test_every_path_gives_the_same_bits(dtype: Any, clients: int, kind: str) -> None:
    """Sums in the updates' own memory, in memory apart, from odd addresses and by several threads agree to the bit."""
    arrays = arrays_of(dtype, clients)

    in_place = mean_of([array.copy() for array in arrays], kind=kind).tobytes()

    assert mean_of([read_only(array) for array in arrays], kind=kind).tobytes() == in_place
    assert mean_of([misaligned(array) for array in arrays], kind=kind).tobytes() == in_place
    assert mean_of([array.copy() for array in arrays], threads=3, kind=kind).tobytes() == in_place


@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_arrays_give_the_bits_of_single_ones(dtype: Any) -> None:
    """Many small arrays that are added as one run have the same mean as one big array with the same numbers."""
    arrays = arrays_of(dtype, 5)
    bounds = [0, 1, 2, 1000, 40_000, 40_001, 41_000, 70_000, 71_000]
    whole = mean_of([array[: bounds[-1]].copy() for array in arrays])

    like = {str(begin): np.zeros(end - begin, dtype) for begin, end in pairwise(bounds)}
    mean = WeightedMean(like)
    for number, array in enumerate(arrays):
        parts = {str(begin): array[begin:end] for begin, end in pairwise(bounds)}
        mean.add(FLModel(params=parts), 1.0 + number / 7)

    assert np.concatenate(list(mean.apply_to(like).values())).tobytes() == whole.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_two_updates_are_all_the_memory(dtype: Any) -> None:
    """The sum lives in the memory of the first updates, and updates after them are only read."""
    arrays = [array.copy() for array in arrays_of(dtype, 4)]
    later = [array.copy() for array in arrays[2:]]
    mean = WeightedMean({"w": np.zeros_like(arrays[0])})
    for array in arrays:
        mean.add(FLModel(params={"w": array}), 1.0)

    (run,) = mean._runs.runs
    assert all(np.shares_memory(lane, array) for lane, array in zip(run.sums.lanes, arrays, strict=False))
    assert all(np.array_equal(array, copy) for array, copy in zip(arrays[2:], later, strict=True))


def test_tied_weights_are_not_written_over() -> None:
    """Two names for one memory keep their own sums."""
    like = {"a": np.zeros(SIZE, np.float32), "b": np.zeros(SIZE, np.float32)}
    mean = WeightedMean(like)
    for number in range(4):
        tied = np.full(SIZE, number, np.float32)
        mean.add(FLModel(params={"a": tied, "b": tied}), 1.0)

    result = mean.apply_to(like)

    assert all(value.min() == value.max() == 1.5 for value in result.values())


def test_one_array_handed_in_again_is_not_written_over() -> None:
    """A site that sends the same memory twice, or the model itself, spoils neither the sum nor the model."""
    base = np.full(SIZE, 2.0, np.float32)
    same = np.full(SIZE, 5.0, np.float32)
    mean = WeightedMean({"w": base})
    for array in (same, base, same, same[:]):
        mean.add(FLModel(params={"w": array}), 1.0)

    result = mean.apply_to({"w": base})

    assert result["w"].min() == result["w"].max() == 4.25
    assert base.min() == base.max() == 2
    assert same.min() == same.max() == 5


def test_a_site_that_sends_the_model_itself_does_not_change_it() -> None:
    """A result that is the very memory of the model is averaged and not written over."""
    base = np.full(SIZE, 2.0, np.float32)
    mean = WeightedMean({"w": base})
    for array in (base, base + 1, base + 2, base + 3):
        mean.add(FLModel(params={"w": array}), 1.0)

    result = mean.apply_to({"w": base})

    assert result["w"].min() == result["w"].max() == 3.5
    assert base.min() == base.max() == 2


def test_the_first_bad_array_is_named() -> None:
    """When several arrays are bad the error names the first, whatever thread found it."""
    like = {name: np.zeros(SIZE, np.float32) for name in "abcdef"}
    bad = {name: np.full(SIZE, np.nan if name > "b" else 0, np.float32) for name in like}

    with pytest.raises(UpdateRefused) as caught:
        WeightedMean(like, threads=3).add(FLModel(params=bad), 1.0)

    assert caught.value.key == "c"


def test_arrays_in_any_layout() -> None:
    """Transposed, strided and Fortran-ordered arrays are added by value, not by address."""
    wanted = np.arange(300_000, dtype=np.float32).reshape(300, 1000)
    layouts = [np.asfortranarray(wanted), np.repeat(wanted, 2, axis=1)[:, ::2], wanted.T.copy().T, wanted.copy()]

    result = mean_of(layouts)

    np.testing.assert_array_equal(result, wanted)


def test_no_room_for_the_sum_leaves_the_mean_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """When memory runs out while a sum is made, the update is not counted and the mean is still good."""
    like = {"a": np.zeros(SIZE, np.float32)}
    mean = WeightedMean(like)
    for number in (1, 3):
        mean.add(FLModel(params={"a": read_only(np.full(SIZE, number, np.float32))}), 1.0)
    (run,) = mean._runs.runs
    with monkeypatch.context() as patch:

        def fail(in_place: bool) -> None:
            raise MemoryError

        patch.setattr(run.sums, "make_lanes", fail)
        with pytest.raises(MemoryError):
            mean.add(FLModel(params={"a": np.full(SIZE, 8, np.float32)}), 1.0)

    assert mean.n_results == 2
    assert mean.apply_to(like)["a"].max() == 2
