"""The model a job starts with."""

from __future__ import annotations

import contextlib
import random
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from flarebus.errors import ConfigError
from flarebus.job.initial import NUMPY_KEY, load_initial, params_of
from flarebus.job.tensor_file import save_params

W = np.arange(6, dtype=np.float32).reshape(2, 3)


def listed(params: dict[str, Any]) -> dict[str, Any]:
    return {name: leaf.tolist() if isinstance(leaf, np.ndarray) else leaf for name, leaf in params.items()}


def test_one_array(tmp_path: Path) -> None:
    """A `.npy` file is a model with one array."""
    np.save(tmp_path / "m.npy", W)

    loaded = load_initial(tmp_path / "m.npy")

    assert listed(loaded) == {NUMPY_KEY: W.tolist()}
    assert loaded[NUMPY_KEY].dtype == np.float32


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_named_arrays(tmp_path: Path, save: Any) -> None:
    """An `.npz` file is a model with the names in it, in their order."""
    save(tmp_path / "m.npz", b=W, a=np.ones(2, np.int64))

    loaded = load_initial(tmp_path / "m.npz")

    assert listed(loaded) == {"b": W.tolist(), "a": [1, 1]}
    assert list(loaded) == ["b", "a"]


def test_safetensors(tmp_path: Path) -> None:
    """A `.safetensors` file is mapped, and may be written to without changing the file."""
    save_params({"w": W, "n": 3}, tmp_path / "m.safetensors")
    before = (tmp_path / "m.safetensors").read_bytes()

    loaded = load_initial(tmp_path / "m.safetensors")
    assert listed(loaded) == {"w": W.tolist(), "n": 3}
    loaded["w"][...] = 0

    assert (tmp_path / "m.safetensors").read_bytes() == before


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".PT"])
def test_state_dicts(tmp_path: Path, wrapper: str | None, suffix: str) -> None:
    """A state dict is found bare or under the names that people put it under; tensors become arrays."""
    torch = pytest.importorskip("torch")
    state = {"w": torch.from_numpy(W), "bf": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
    path = tmp_path / f"m{suffix}"
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, path)

    loaded = load_initial(path)

    assert loaded["w"].tolist() == W.tolist()
    assert loaded["bf"].dtype == ml_dtypes.bfloat16
    assert loaded["n"].shape == ()
    assert list(loaded) == ["w", "bf", "n"]


class Evil:
    """Runs when it is unpickled; if it does, the test sees it."""

    def __reduce__(self) -> Any:
        return (print, ("unpickled",))


def make_bad(folder: Path, case: str) -> tuple[Path, str]:
    """Write one bad file; return its path and what the error must say."""
    torch = pytest.importorskip("torch")
    path = folder / case.rpartition(" ")[2]
    if case.startswith("missing"):
        return path, "no such file|No such file"
    if case.startswith("folder"):
        path.mkdir()
        return path, "cannot be read|damaged"
    if case.startswith("objects"):
        np.save(path, np.array([Evil()])) if path.suffix == ".npy" else np.savez(path, a=np.array([Evil()]))
        return path, "pickled objects"
    if case.startswith("pickle"):
        torch.save({"w": Evil()}, path)
        return path, "more than weights"
    if case.startswith("list"):
        torch.save([1, 2], path)
        return path, "holds a list, not a state dict"
    if case.startswith("nothing"):
        torch.save({}, path) if path.suffix == ".pt" else np.savez(path)
        return path, "no parameters"
    path.write_bytes({"empty": b"", "junk": b"\x93NUMPY junk" * 20}[case.split()[0]])
    return path, r".npy, .npz, .pt" if path.suffix == ".bin" else "damaged|not a whole"


@pytest.mark.parametrize(
    "case",
    [
        *(f"missing m{suffix}" for suffix in (".npy", ".npz", ".pt", ".safetensors")),
        *(f"folder m{suffix}" for suffix in (".npy", ".npz", ".pt", ".safetensors")),
        *(f"empty m{suffix}" for suffix in (".npy", ".npz", ".pt", ".safetensors", ".bin")),
        *(f"junk m{suffix}" for suffix in (".npy", ".npz", ".pt", ".pth", ".safetensors", ".bin")),
        "objects m.npy",
        "objects m.npz",
        "pickle m.pt",
        "list m.pt",
        "nothing m.pt",
        "nothing m.npz",
    ],
)
def test_bad_files_are_errors_of_the_user(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not there, damaged, of another kind or full of pickles is named, with what would be right."""
    path, reason = make_bad(tmp_path, case)

    with pytest.raises(ConfigError, match=reason) as caught:
        load_initial(path)

    assert (caught.value.parameter, caught.value.value) == ("initial_ckpt", str(path))
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", [".npy", ".npz", "compressed.npz", ".pt", ".safetensors"])
def test_damage_anywhere_is_never_a_crash(tmp_path: Path, kind: str) -> None:
    """Flipped bits and cut ends give an error of the user's or a model, nothing else."""
    torch = pytest.importorskip("torch")
    path = tmp_path / f"m{kind}"
    if kind == ".npy":
        np.save(path, W)
    elif kind.endswith(".npz"):
        (np.savez_compressed if "compressed" in kind else np.savez)(path, a=W, b=np.ones(30))
    elif kind == ".pt":
        torch.save({"a": torch.from_numpy(W), "b": torch.ones(30)}, path)
    else:
        save_params({"a": W, "b": np.ones(30)}, path)
    content = path.read_bytes()
    rng = random.Random(kind)

    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        with contextlib.suppress(ConfigError):
            assert load_initial(path)


def test_an_array_larger_than_memory_is_damage(tmp_path: Path) -> None:
    """A header that speaks of more numbers than there are bytes is refused, not allocated."""
    np.save(tmp_path / "m.npy", W)
    content = (tmp_path / "m.npy").read_bytes().replace(b"(2, 3), }       ", b"(2, 3000000000)}")
    (tmp_path / "m.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr("a.npy", content)

    for name in ("m.npy", "m.npz"):
        with pytest.raises(ConfigError, match="damaged"):
            load_initial(tmp_path / name)


def test_modules() -> None:
    """A module is its state dict, on the module's own memory, buffers included."""
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1))

    params = params_of(module)

    assert list(params) == list(module.state_dict())
    assert all(isinstance(array, np.ndarray) for array in params.values())
    assert params["0.weight"].ctypes.data == module[0].weight.data_ptr()


@pytest.mark.parametrize(
    ("model", "params"),
    [
        ([1.0, 2.0, 3.0], {NUMPY_KEY: [1, 2, 3]}),
        ([[1, 2], [3, 4]], {NUMPY_KEY: [[1, 2], [3, 4]]}),
        ([np.ones(2), np.zeros(1)], {"0": [1, 1], "1": [0]}),
        (W, {NUMPY_KEY: W.tolist()}),
        ({"a": W, "n": 1.5, "s": "x"}, {"a": W.tolist(), "n": 1.5, "s": "x"}),
    ],
)
def test_arrays_and_numbers(model: Any, params: dict[str, Any]) -> None:
    """An array, a list of numbers or of arrays, and a dict have their names."""
    assert listed(params_of(model)) == params


def test_lists_of_numbers_are_float32_and_lists_of_tensors_are_arrays() -> None:
    """Numbers become float32; tensors keep their dtype and memory."""
    torch = pytest.importorskip("torch")
    tensor = torch.ones(1, dtype=torch.float64)

    assert params_of([1, 2])[NUMPY_KEY].dtype == np.float32
    assert params_of([tensor, W])["0"].ctypes.data == tensor.data_ptr()
    assert params_of(tensor)[NUMPY_KEY].dtype == np.float64
    assert params_of({"deep": {"w": tensor}})["deep"]["w"].tolist() == [1.0]


@pytest.mark.parametrize("model", ["model.pt", 3, [], [[1], [2, 3]], ["a"], object(), [None], None])
def test_what_is_no_model_is_an_error_of_the_user(model: Any) -> None:
    """Anything else is refused, with what would be right."""
    with pytest.raises(ConfigError) as caught:
        params_of(model)

    assert caught.value.parameter == "model"
