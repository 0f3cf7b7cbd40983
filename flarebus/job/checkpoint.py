"""CheckpointStore: the models of a job on disk. Each round is saved, and the best one, without ever copying a model.

Three files take turns: one holds the committed model, one the best so far, and the third is free for the next round,
which is computed into its pages. Committing and choosing the best only move names. Until the job ends the names that
people know are links; then they are the files themselves.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from flarebus.errors import ConfigError
from flarebus.job.tensor_file import Layout, MappedFile, sync_folder
from flarebus.workflow.params import as_array, flatten, restore

__all__ = ["BEST_NAME", "GLOBAL_NAME", "CheckpointStore", "export_pt"]

GLOBAL_NAME = "FL_global_model.safetensors"
BEST_NAME = "best_FL_global_model.safetensors"


class CheckpointStore:
    """The model files of one job.

    Args:
        folder: made if it is not there.
        best_name: file name of the best model.
    """

    def __init__(self, folder: Path, best_name: str = BEST_NAME) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._best_name = best_name
        self._files: list[MappedFile] = []
        self._made = 0
        self._next: MappedFile | None = None
        self._current: MappedFile | None = None
        self._before: MappedFile | None = None
        self._best: MappedFile | None = None
        # What the names lead to: what a crash leaves has to be whole.
        self._named: set[MappedFile | None] = set()
        self._has_new_names = False
        self._written: set[MappedFile] = set()
        """Files that may hold what is not durable."""

    def next_arrays(self, params: Mapping[Any, Any]) -> dict[str, NDArray[Any]]:
        """Dotted name -> writable array on the pages of the free file, of the shapes and dtypes of `params`.

        Raises:
            OSError: the disk is full; no committed model is harmed.
        """
        self._next = None
        # From round to round the model is what the file before holds: no need to look at it again.
        known = self._current is not None and _is_in(self._current, params)
        self._next = self._free_file(self._current.layout if self._current and known else Layout(params))
        return self._next.arrays

    def finish(self, params: Mapping[Any, Any]) -> Path:
        """What was written becomes the current model: `params`, whose arrays are those of `next_arrays` or are copied
        there. Durable after `sync`."""
        file, self._next = self._next, None
        if file is None or not _is_in(file, params):
            layout = Layout(params)
            if file is None or file.layout != layout:
                file = self._free_file(layout)
            layout.fill(file.arrays, params)
        self._before, self._current = self._current, file
        return file.path

    def write(self) -> None:
        """Return when the current model is in its file for other processes: it outlives this one, not the machine."""
        if self._current is not None:
            self._current.write()

    def take_back(self) -> None:
        """What `finish` made the current model is not to be it: the one before is again."""
        self._current = self._before

    def keep_best(self, params: Mapping[Any, Any]) -> None:
        """The current model, `params`, is the best so far. Only a model that is in no file yet is written."""
        if self._current is None:
            self.save_best(params)
        else:
            self._best = self._current

    def save_best(self, params: Mapping[str, Any]) -> None:
        """`params`, wherever they come from, are the best model so far."""
        layout = Layout(params)
        file = self._free_file(layout)
        layout.fill(file.arrays, params)
        self._best = file

    @property
    def current_path(self) -> Path | None:
        """The file of the current model, if there is one."""
        return None if self._current is None else self._current.path

    @property
    def best_path(self) -> Path | None:
        """The file of the best model, if there is one."""
        return None if self._best is None else self._best.path

    def sync(self) -> None:
        """Return when current and best model are durable, and their names lead to them."""
        self._sync_files()
        for file, name in ((self._current, GLOBAL_NAME), (self._best, self._best_name)):
            if file is not None:
                self._link(file.path.name, name)
        # The journal knows files by their own names: only new ones have to last. Links are for people.
        if self._has_new_names:
            sync_folder(self._folder)
            self._has_new_names = False
        self._named = {self._current, self._best}

    def close(self) -> None:
        """Leave the models under their own names, as plain files, and nothing else.

        Raises:
            OSError: a model that was never synchronised could not be written.
        """
        self._sync_files()
        for file, name in ((self._best, self._best_name), (self._current, GLOBAL_NAME)):
            target = self._folder / name
            if file is None:
                if target.is_symlink():  # to a model that was taken back
                    target.unlink()
            elif file is self._best and file is self._current and name == GLOBAL_NAME:
                temporary = self._folder / f".{name}.link"
                temporary.unlink(missing_ok=True)
                os.link(file.path, temporary)
                os.replace(temporary, target)
                temporary.unlink(missing_ok=True)  # replacing a file with itself does nothing
            else:
                file.rename(target)
        kept = {GLOBAL_NAME, self._best_name}
        for file in self._files:
            file.close()
            if file.path.name not in kept:
                file.path.unlink(missing_ok=True)
        self._files.clear()
        self._written.clear()
        self._named.clear()
        self._next = self._current = self._before = self._best = None
        sync_folder(self._folder)

    def _sync_files(self) -> None:
        for file in (self._current, self._best):
            if file is not None and file in self._written:
                file.sync()
                self._written.discard(file)

    def _free_file(self, layout: Layout) -> MappedFile:
        for file in self._files:
            if file not in (self._current, self._best, self._next) and file not in self._named:
                if file.layout == layout:
                    self._written.add(file)
                    return file
                self._files.remove(file)
                self._written.discard(file)
                file.close()
                file.path.unlink()
                break
        file = MappedFile(self._fresh_path(), layout)
        self._files.append(file)
        self._written.add(file)
        self._has_new_names = True
        return file

    def _fresh_path(self) -> Path:
        """A name that no file has: one from an earlier life may be the last good model."""
        while True:
            self._made += 1
            path = self._folder / f"model-{self._made}.safetensors"
            if not path.exists():
                return path

    def _link(self, target: str, name: str) -> None:
        link = self._folder / name
        if link.is_symlink() and os.readlink(link) == target:
            return
        temporary = self._folder / f".{name}.link"
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        temporary.symlink_to(target)
        os.replace(temporary, link)


def _is_in(file: MappedFile, params: Mapping[Any, Any]) -> bool:
    """Whether a flat model is nothing but the arrays of `file`."""
    arrays = file.arrays
    return params.keys() == arrays.keys() and all(params[name] is array for name, array in arrays.items())


def export_pt(params: Mapping[Any, Any], path: Path) -> None:
    """Write a model as a PyTorch state dict (`torch.load(path, weights_only=True)` reads it), whole or not at all.

    Arrays become tensors; nested names are joined with dots; other values stay what they are.

    Raises:
        ConfigError: an array has a dtype that PyTorch lacks.
        OSError: it could not be written.
    """
    import torch

    state = {name: _tensor(torch, name, leaf) for name, leaf in flatten(params).items()}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _tensor(torch: Any, name: str, leaf: Any) -> Any:
    array = as_array(leaf)
    if array is None:
        return leaf
    dtype = getattr(torch, array.dtype.name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(
            f"params[{name!r}]", array.dtype.name, "PyTorch has no such dtype; it cannot be in a .pt file"
        )
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # PyTorch wants memory that it may write; copy-on-write pages are that.
    return restore(array if array.flags.writeable else array.copy(), torch.empty(0, dtype=dtype))
