"""Shelf: what a site keeps is found again by its next life, whole, however the one before ended."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from flarebus.job.kinds import FrameworkType
from flarebus.job.tensor_file import HELD_BYTES
from flarebus.site import shelf as module
from flarebus.site.shelf import Shelf

SIZES = [8, HELD_BYTES // 4 + 1]


def opened(folder: Path) -> Shelf:
    return Shelf(folder, "best", FrameworkType.NUMPY)


def keep(shelf: Shelf, value: float, round: int, size: int = 8) -> None:
    """Keep a model of this value, made on the shelf's own pages."""
    pages = shelf.pages({"w": np.zeros(size, np.float32)})
    pages["w"][:] = value
    shelf.keep(pages, round)


def found(folder: Path) -> tuple[int | None, float | None]:
    """What a new life finds: the round, and the value of the model's weights."""
    shelf = opened(folder)
    values = set(shelf.params.get("w", np.empty(0)).tolist())
    assert len(values) <= 1
    return shelf.round, values.pop() if values else None


def test_nothing_is_found_where_nothing_was_kept(tmp_path: Path) -> None:
    """No round, no models."""
    assert found(tmp_path) == (None, None)
    assert opened(tmp_path).best_params == {}


@pytest.mark.parametrize("size", SIZES, ids=["held in memory", "pages of a file"])
def test_a_model_is_found_as_soon_as_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Also if the life that kept it was over before the disk had it."""
    shelf = opened(tmp_path)
    keep(shelf, 1.0, 1, size)
    shelf._finish()
    monkeypatch.setattr(Shelf, "_make_durable", lambda *_: None)
    keep(shelf, 2.0, 2, size)

    assert found(tmp_path) == (2, 2.0)


def test_after_a_restart_of_the_machine_only_what_is_durable_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model before is found, and whole; also where nobody knows when the machine started."""
    shelf = opened(tmp_path)
    keep(shelf, 1.0, 1)
    shelf._finish()
    monkeypatch.setattr(Shelf, "_make_durable", lambda *_: None)
    keep(shelf, 2.0, 2)

    for boot in ("another", ""):
        monkeypatch.setattr(module, "_boot_id", lambda boot=boot: boot)
        assert found(tmp_path) == (1, 1.0)


@pytest.mark.parametrize("note", ["", "{", "[]", "{}", '{"file": 1, "round": 1}', '{"file": "../x", "round": 1}'])
def test_a_damaged_note_is_none(tmp_path: Path, note: str) -> None:
    """Nothing is found, and nothing is raised."""
    keep(shelf := opened(tmp_path), 1.0, 1)
    shelf._finish()
    for name in ("kept.json", "kept_now.json"):
        (tmp_path / "models" / name).write_text(note)

    assert found(tmp_path) == (None, None)


def test_a_note_whose_model_is_damaged_is_none(tmp_path: Path) -> None:
    """A file that is cut short is no model."""
    keep(shelf := opened(tmp_path), 1.0, 1)
    shelf._finish()
    name = json.loads((tmp_path / "models/kept.json").read_text())["file"]
    (tmp_path / "models" / name).write_bytes(b"short")

    assert found(tmp_path) == (None, None)


def test_the_end_leaves_two_plain_files(tmp_path: Path) -> None:
    """Last and best model, and nothing of lives that were cut short."""
    before = opened(tmp_path)
    keep(before, 1.0, 1)
    before.keep_best(before.params)
    keep(before, 2.0, 2)
    before._finish()
    shelf = opened(tmp_path)
    assert shelf.best_params["w"].tolist() == [1.0] * 8
    keep(shelf, 3.0, 3)
    shelf.close()

    folder = tmp_path / "models"
    assert sorted(path.name for path in folder.iterdir()) == ["FL_global_model.safetensors", "best.safetensors"]
    assert load_file(folder / "FL_global_model.safetensors")["w"].tolist() == [3.0] * 8
    assert load_file(folder / "best.safetensors")["w"].tolist() == [1.0] * 8
