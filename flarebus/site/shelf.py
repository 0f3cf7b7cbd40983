"""Shelf: the models that one site keeps, on its own disk, and of which round the last one is.

A model is durable before the note that names it, and the note takes the place of the one before in one step: whoever
reads it after a crash finds a whole model. The disk gets its time while the next round goes on; until then a second
note names the model for a process that is started again, which finds in memory what was written there.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flarebus.errors import DecodeError
from flarebus.job.checkpoint import CheckpointStore, export_pt
from flarebus.job.kinds import FrameworkType
from flarebus.job.tensor_file import load_params, sync_folder

__all__ = ["Shelf"]

_NOTE = "kept.json"
_NOTE_NOW = "kept_now.json"
# Another one each time the machine starts; only Linux has it, and elsewhere the durable note has to do.
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Shelf:
    """The models of one site. One thread calls it.

    Args:
        folder: of the site.
        best_stem: name of the best model's file, without suffix.
        framework: its own files are left beside, if it is PyTorch.

    Raises:
        OSError: the folder cannot be written; so do all methods.
    """

    def __init__(self, folder: Path, best_stem: str, framework: FrameworkType) -> None:
        self._folder = folder / "models"
        self._framework = framework
        self._store = CheckpointStore(self._folder, f"{best_stem}.safetensors")
        self._boot = _boot_id()
        self._round, self._params = self._found()
        self._best = self._found_best(best_stem)
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="flarebus keep")
        self._syncing: Future[None] | None = None

    @property
    def round(self) -> int | None:
        """The round that begins with the model kept last, or None."""
        return self._round

    @property
    def params(self) -> dict[str, Any]:
        """The model kept last; empty when none was."""
        return self._params

    @property
    def best_params(self) -> dict[str, Any]:
        """The best model; empty when none was kept."""
        return self._best

    def pages(self, params: dict[str, Any]) -> dict[str, Any]:
        """Writable arrays like those in `params`, on the pages of a file that holds no kept model."""
        self._finish()
        return self._store.next_arrays(params)

    def keep(self, params: dict[str, Any], round: int) -> None:
        """`params` are the last model, with which `round` begins; durable soon, and before anything else is kept."""
        self._finish()
        path = self._store.finish(params)
        self._params, self._round = params, round
        if self._boot:
            self._store.write()
            self._write(_NOTE_NOW, {"file": path.name, "round": round, "boot": self._boot})
        self._syncing = self._syncer.submit(self._make_durable, path, round)

    def keep_best(self, params: dict[str, Any]) -> None:
        """`params` are the best model; durable soon."""
        self._finish()
        if params is self._params:
            self._store.keep_best(params)
        else:
            self._store.save_best(params)
        self._best = params
        self._syncing = self._syncer.submit(self._store.sync)

    def close(self) -> None:
        """Leave plain files behind."""
        self._params, self._best = {}, {}
        with ExitStack() as steps:
            steps.callback(self._store.close)
            steps.callback(self._syncer.shutdown)
            self._finish()
        for name in (_NOTE, _NOTE_NOW):
            self._folder.joinpath(name).unlink(missing_ok=True)
        for file in self._folder.glob("model-*.safetensors"):  # of lives that were cut short
            file.unlink()
        if self._framework is FrameworkType.PYTORCH:
            for file in sorted(self._folder.glob("*.safetensors")):
                export_pt(load_params(file), file.with_suffix(".pt"))

    def _finish(self) -> None:
        syncing, self._syncing = self._syncing, None
        if syncing is not None:
            syncing.result()

    def _make_durable(self, path: Path, round: int) -> None:
        self._store.sync()
        self._write(_NOTE, {"file": path.name, "round": round}, durable=True)

    def _write(self, name: str, note: dict[str, Any], durable: bool = False) -> None:
        """Put a note into the place of the one before, in one step."""
        temporary = self._folder / f".{name}"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(note, file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, self._folder / name)
        if durable:
            sync_folder(self._folder)

    def _found_best(self, stem: str) -> dict[str, Any]:
        try:
            found = load_params(self._folder / f"{stem}.safetensors")
        except (OSError, DecodeError):
            return {}
        self._store.save_best(found)  # in a file of this life: names that lead to others go with its end
        return found

    def _found(self) -> tuple[int | None, dict[str, Any]]:
        """What an earlier life of this site has left."""
        for name in (_NOTE_NOW, _NOTE):
            try:
                note = json.loads(self._folder.joinpath(name).read_text(encoding="utf-8"))
                file, number = note["file"], note["round"]
                if type(file) is not str or type(number) is not int or "/" in file:
                    raise TypeError("a note that names no model")
                if note.get("boot", self._boot) == self._boot:
                    return number, load_params(self._folder / file)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, DecodeError):
                # Nothing else depends on it: others have the model, or the round before is done again.
                continue
        return None, {}


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""
