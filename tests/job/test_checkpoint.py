"""CheckpointStore: models in turn, the best one, and what a crash leaves."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flarebus.errors import ConfigError
from flarebus.job.checkpoint import BEST_NAME, GLOBAL_NAME, CheckpointStore, export_pt
from flarebus.job.tensor_file import load_params


def model(value: float, size: int = 1000) -> dict[str, Any]:
    return {"w": np.full(size, value, np.float32), "b": np.full(3, float(value))}


def save(store: CheckpointStore, value: float) -> Path:
    """One round as a workflow does it: compute into the pages, finish, make durable."""
    arrays = store.next_arrays(model(0))
    for array in arrays.values():
        array[...] = value
    path = store.finish(arrays)
    store.sync()
    return path


def value_of(path: Path) -> float:
    loaded = load_params(path)
    values = {float(value) for array in loaded.values() for value in array}
    assert len(values) == 1
    return values.pop()


class StoreMachine(RuleBasedStateMachine):
    """A store used as an archive uses it, whatever happens in a round; names are followed after every step.

    `now` is what the store was told, `named` what was last made durable: that must be whole at any time, for at any
    time the process may be killed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = CheckpointStore(self.folder)
        self.now: dict[str, float | None] = {GLOBAL_NAME: None, BEST_NAME: None}
        self.before: float | None = None
        self.named = dict(self.now)
        self.pages: dict[str, Any] | None = None
        self.value = 0.0
        self.changed = self.finished = False

    @precondition(lambda self: not self.changed)
    @rule(size=st.sampled_from([3, 50]))
    def next_arrays(self, size: int) -> None:
        self.pages = self.store.next_arrays(model(0, size))
        for array in self.pages.values():
            array[...] = math.nan

    @precondition(lambda self: not self.changed)
    @rule(size=st.sampled_from([3, 50]))
    def disk_full(self, size: int) -> None:
        """Only a file that is not there yet can fail; the pages given out before are void either way."""
        self.pages = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "posix_fallocate", no_room, raising=False)
            with contextlib.suppress(OSError):
                self.store.next_arrays(model(0, size))

    @precondition(lambda self: not self.finished)
    @rule()
    def keep_best(self) -> None:
        current = self.now[GLOBAL_NAME]
        if current is None:  # the model that the job came with
            self.value = current = self.value + 1
        self.store.keep_best(model(current))
        self.now[BEST_NAME] = current
        self.changed = True

    @precondition(lambda self: not self.finished)
    @rule(size=st.sampled_from([3, 50]), elsewhere=st.booleans())
    def finish(self, size: int, elsewhere: bool) -> None:
        self.value += 1
        params = model(self.value, size)
        if self.pages is not None and not elsewhere:
            for array in self.pages.values():
                array[...] = self.value
            params = self.pages
        self.store.finish(params)
        self.before, self.now[GLOBAL_NAME] = self.now[GLOBAL_NAME], self.value
        self.pages, self.changed, self.finished = None, True, True

    @precondition(lambda self: self.finished)
    @rule()
    def take_back(self) -> None:
        self.store.take_back()
        self.now[GLOBAL_NAME] = self.before
        self.finished = False

    @rule()
    def sync(self) -> None:
        self.store.sync()
        self.named = dict(self.now)
        self.changed = self.finished = False

    @invariant()
    def names_lead_to_whole_models(self) -> None:
        for name, value in self.named.items():
            assert (self.folder / name).exists() == (value is not None)
            if value is not None:
                assert value_of(self.folder / name) == value
        assert len(list(self.folder.glob("model-*"))) <= 4

    def teardown(self) -> None:
        self.store.close()
        left = {path.name: value_of(path) for path in self.folder.iterdir()}
        assert left == {name: value for name, value in self.now.items() if value is not None}
        assert not any(path.is_symlink() for path in self.folder.iterdir())
        shutil.rmtree(self.folder)


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestStoreMachine = StoreMachine.TestCase


def no_room(*_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_two_files_take_turns(tmp_path: Path) -> None:
    """Without a best model two files are enough; the name people know leads to the last one, and each is whole."""
    store = CheckpointStore(tmp_path)

    paths = [save(store, round) for round in range(5)]

    assert len(set(paths)) == 2
    assert all(left != right for left, right in pairwise(paths))
    assert value_of(tmp_path / GLOBAL_NAME) == 4
    assert value_of(paths[-2]) == 3


def test_pages_are_used_again(tmp_path: Path) -> None:
    """The third round computes into the very pages of the first: no new file, no fresh memory."""
    store = CheckpointStore(tmp_path)
    first = store.next_arrays(model(0))
    store.finish(first)
    save(store, 1)

    assert all(array is first[name] for name, array in store.next_arrays(model(0)).items())


def test_the_committed_model_is_never_written(tmp_path: Path) -> None:
    """While the next model is written, and when it is given up, the committed one is as it was."""
    store = CheckpointStore(tmp_path)
    save(store, 1)
    path = save(store, 2)
    before = path.read_bytes()

    for array in store.next_arrays(model(0)).values():
        array[...] = np.nan

    assert path.read_bytes() == before
    for array in store.next_arrays(model(0, size=50)).values():
        array[...] = np.nan
    assert path.read_bytes() == before
    assert value_of(tmp_path / GLOBAL_NAME) == 2


def test_the_best_model_stays_while_others_come(tmp_path: Path) -> None:
    """The best model outlives any number of rounds, and at most three files exist at a time."""
    store = CheckpointStore(tmp_path)
    for round, is_best in enumerate([True, False, True, True, False, False]):
        if is_best:
            store.keep_best(model(round - 1))
        save(store, round)
        assert len(list(tmp_path.glob("model-*"))) <= 3

    assert value_of(tmp_path / BEST_NAME) == 2
    assert value_of(tmp_path / GLOBAL_NAME) == 5


def test_the_initial_model_can_be_the_best(tmp_path: Path) -> None:
    """The model that a job came with is in no file yet; when it is the best it gets one."""
    store = CheckpointStore(tmp_path)
    store.next_arrays(model(0))
    store.keep_best(model(7))
    save(store, 1)
    save(store, 2)

    assert value_of(tmp_path / BEST_NAME) == 7
    assert value_of(tmp_path / GLOBAL_NAME) == 2


def test_choosing_the_best_before_finishing_keeps_the_written_pages(tmp_path: Path) -> None:
    """Choosing the committed model as the best after the next one was computed spoils neither."""
    store = CheckpointStore(tmp_path)
    for round in range(6):
        arrays = store.next_arrays(model(0))
        for array in arrays.values():
            array[...] = round
        store.keep_best(model(round - 1))
        store.finish(arrays)
        store.sync()

        assert value_of(tmp_path / GLOBAL_NAME) == round
        assert value_of(tmp_path / BEST_NAME) == round - 1


def test_arrays_from_elsewhere_are_copied(tmp_path: Path) -> None:
    """A model whose arrays are not the pages, of any structure, is saved as well."""
    store = CheckpointStore(tmp_path)
    store.next_arrays(model(0))
    odd = {"w": np.arange(5.0), "deep": {"n": 3, "l": [np.ones(2, np.complex64)]}}

    path = store.finish(odd)
    store.sync()

    loaded = load_params(path)
    assert loaded["w"].tolist() == [0, 1, 2, 3, 4]
    assert loaded["deep"]["n"] == 3
    assert loaded["deep"]["l"][0].tolist() == [1, 1]


def test_numbers_may_change_from_round_to_round(tmp_path: Path) -> None:
    """Lone numbers of a model live in the header of its file, and every round has its own."""
    store = CheckpointStore(tmp_path)
    paths = []
    for round in range(4):
        params = {"w": np.zeros(3), "n": 10.0**round}
        arrays = store.next_arrays({"w": np.zeros(3), "n": 0.0})
        arrays["w"][...] = round
        paths.append(store.finish({**params, **arrays}))
        store.sync()
        loaded = load_params(tmp_path / GLOBAL_NAME)
        assert (loaded["n"], loaded["w"].tolist()) == (10.0**round, [round] * 3)

    assert load_params(paths[-2])["n"] == 100.0


@pytest.mark.parametrize("best_at", [None, 0, 2])
def test_at_the_end_there_are_plain_files_and_nothing_else(tmp_path: Path, best_at: int | None) -> None:
    """When the job has ended its models are plain files under their own names, readable by everybody."""
    store = CheckpointStore(tmp_path)
    for round in range(3):
        save(store, round)
        if round == best_at:
            store.keep_best(model(round))
    store.next_arrays(model(0))["w"][...] = np.nan

    store.close()

    wanted = {GLOBAL_NAME: 2} | ({} if best_at is None else {BEST_NAME: best_at})
    assert {path.name for path in tmp_path.iterdir()} == set(wanted)
    for name, value in wanted.items():
        assert not (tmp_path / name).is_symlink()
        assert set(safetensors.numpy.load_file(tmp_path / name)["b"]) == {value}
    store.close()


def test_a_job_without_a_round_leaves_nothing(tmp_path: Path) -> None:
    """A store that was never finished closes without a model and without a file."""
    store = CheckpointStore(tmp_path / "models")
    store.next_arrays(model(0))

    store.close()

    assert list((tmp_path / "models").iterdir()) == []


def test_files_that_are_there_are_never_overwritten(tmp_path: Path) -> None:
    """A second store in a folder, such as after a crash, leaves the files of the first alone."""
    left = save(CheckpointStore(tmp_path), 5)

    save(CheckpointStore(tmp_path), 1)

    assert value_of(left) == 5


def test_a_full_disk_harms_no_committed_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for the next model there is an `OSError`; the committed model and the best one are intact."""
    store = CheckpointStore(tmp_path)
    store.keep_best(model(0))
    path = save(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_room, raising=False)
        with pytest.raises(OSError, match="No space"):
            store.next_arrays(model(0))

    assert value_of(path) == value_of(tmp_path / GLOBAL_NAME) == 1
    assert len(list(tmp_path.glob("model-*"))) == 2
    assert save(store, 2) != path
    store.close()
    assert value_of(tmp_path / BEST_NAME) == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_really_full_disk(tmp_path: Path) -> None:
    """On a file system that is full the process lives, and hears of it as an `OSError`."""
    folder = tmp_path / "small"
    folder.mkdir()
    code = (
        "import sys, numpy as np\nfrom pathlib import Path\nfrom flarebus.job.checkpoint import CheckpointStore\n"
        "store = CheckpointStore(Path(sys.argv[1]) / 'models')\nlike = {'w': np.zeros(1_500_000, np.float32)}\n"
        "store.finish(store.next_arrays(like)); store.sync()\n"
        "try:\n    store.next_arrays(like)\nexcept OSError as error:\n    print('errno', error.errno)\n"
    )
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs unshare")
    script = f'mount -t tmpfs -o size=8m none "{folder}" || exit 77; "$0" -c "$1" "{folder}"'
    found = subprocess.run(
        [unshare, "-m", "sh", "-c", script, sys.executable, code], capture_output=True, text=True, check=False
    )
    if found.returncode == 77 or "unshare failed" in found.stderr:
        pytest.skip("may not mount")

    assert (found.stdout, found.returncode) == (f"errno {errno.ENOSPC}\n", 0), found.stderr


def test_killed_at_any_moment_the_committed_model_is_whole(tmp_path: Path) -> None:
    """A process killed while it writes leaves the link on a whole model, never on the one it was writing."""
    code = (
        "import sys, numpy as np\nfrom pathlib import Path\nfrom flarebus.job.checkpoint import CheckpointStore\n"
        "store = CheckpointStore(Path(sys.argv[1]))\nlike = {'w': np.zeros(200_000, np.float32)}\n"
        "for number in range(100_000):\n"
        "    arrays = store.next_arrays(like)\n    arrays['w'][:100_000] = number\n"
        "    print(number, flush=True)\n    arrays['w'][100_000:] = number\n"
        "    store.finish(arrays)\n    store.sync()\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    with writer:
        while int(writer.stdout.readline()) < 5:
            pass
        writer.send_signal(signal.SIGKILL)

    assert value_of(tmp_path / GLOBAL_NAME) >= 4


def test_a_name_leads_to_a_model_only_when_it_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are on the disk before any name leads to them, and the names are before `sync` returns."""
    store = CheckpointStore(tmp_path)
    store.finish(store.next_arrays(model(0)))
    done: list[str] = []
    for name in ("fsync", "fdatasync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (done.append(name), real(*args)))

    store.sync()

    assert done == ["fdatasync" if hasattr(os, "fdatasync") else "fsync", "replace", "fsync"]


def test_folder_is_private(tmp_path: Path) -> None:
    """Models are their owner's: nobody else may list the folder or read the files."""
    store = CheckpointStore(tmp_path / "models")
    path = save(store, 1)

    assert (tmp_path / "models").stat().st_mode & 0o077 == 0
    assert path.stat().st_mode & 0o077 == 0


def test_export_for_pytorch(tmp_path: Path) -> None:
    """A model becomes a state dict that PyTorch loads with weights only, every dtype it has as what it is."""
    torch = pytest.importorskip("torch")
    store = CheckpointStore(tmp_path)
    params = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "bf": np.ones(2, ml_dtypes.bfloat16),
        "f8": np.ones(2, ml_dtypes.float8_e4m3fn),
        "big": np.array([1.5, 2.5], ">f4"),
        "n": np.array(3),
        "flag": np.array([True]),
        "step": 4,
    }
    path = store.finish(params)
    store.sync()

    export_pt(load_params(path), tmp_path / "m.pt")

    loaded = torch.load(tmp_path / "m.pt", weights_only=True)
    assert list(loaded) == list(params)
    assert loaded["w"].tolist() == params["w"].tolist()
    assert (loaded["bf"].dtype, loaded["f8"].dtype) == (torch.bfloat16, torch.float8_e4m3fn)
    assert loaded["big"].tolist() == [1.5, 2.5]
    assert (loaded["n"].item(), loaded["step"]) == (3, 4)
    assert [entry.name for entry in tmp_path.glob(".*")] == []


def test_export_of_what_pytorch_lacks_names_it(tmp_path: Path) -> None:
    """An array of a dtype that PyTorch does not have is an error with its name, and no file is left."""
    pytest.importorskip("torch")
    with pytest.raises(ConfigError, match="wide"):
        export_pt({"wide": np.zeros(2, np.longdouble)}, tmp_path / "m.pt")

    assert list(tmp_path.iterdir()) == []
