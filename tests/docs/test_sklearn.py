"""docs/sklearn.md: excerpts stand in the example, and recipes are accepted. The whole script runs in a system test."""

from __future__ import annotations

from pathlib import Path

import pytest

from flarebus.recipe import sklearn
from tests.docs.pages import ROOT, blocks, is_excerpt

PYTHON = blocks("sklearn.md", "python")


def test_what_a_script_does_stands_in_the_example() -> None:
    """The calls of a linear script are those of the example, which is run."""
    excerpts = [block for block in PYTHON if "make_model" in block]

    assert len(excerpts) == 2
    assert all(is_excerpt(block, ROOT / "examples" / "sklearn_linear" / "client.py") for block in excerpts)


def test_recipes_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each recipe can be made as it is written."""
    (tmp_path / "client.py").touch()
    monkeypatch.chdir(tmp_path)
    made = []
    for block in PYTHON:
        if block.startswith("recipe = "):
            names = {name: getattr(sklearn, name) for name in sklearn.__all__}
            exec(block, names)
            made.append(type(names["recipe"]).__name__)

    assert made == ["SklearnFedAvgRecipe", "KMeansFedAvgRecipe", "SVMFedAvgRecipe"]
