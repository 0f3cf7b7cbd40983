"""For all tests: runs without a folder of their own go to one of the session, and Hypothesis watches no clock."""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Time per example says nothing on a machine that is shared; the time limit of the whole test still holds.
hypothesis.settings.register_profile("flarebus", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "flarebus"))


@pytest.fixture(autouse=True, scope="session")
def _own_simulation_root(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the user's cache folder out of the tests, also in the processes they start."""
    os.environ["FLAREBUS_SIMULATION_ROOT"] = str(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def tf() -> Any:
    """TensorFlow, which takes seconds to import: only where a test asks for it, and without its greetings."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow
    from absl import logging as absl_logging

    # It keeps the stream of this very test, and closes it when somebody configures logging.
    absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__
    return tensorflow


@pytest.fixture
def checked_out_workflows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workflows that pyproject.toml names are found by name, here and in processes started from here.

    What was installed last may be older than the checkout.
    """
    with open(Path(__file__).parents[1] / "pyproject.toml", "rb") as file:
        entries = tomllib.load(file)["project"]["entry-points"]["flarebus.workflows"]
    folder = tmp_path / "checkout" / "checkout-0.dist-info"
    folder.mkdir(parents=True)
    folder.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: checkout\nVersion: 0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
    folder.joinpath("entry_points.txt").write_text(f"[flarebus.workflows]\n{lines}")
    monkeypatch.setattr(sys, "path", [str(folder.parent), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(folder.parent), prepend=os.pathsep)
