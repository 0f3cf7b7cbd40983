"""For all tests: runs without a folder of their own go to one of the session, and Hypothesis watches no clock."""

from __future__ import annotations

import os

import hypothesis
import pytest

# Time per example says nothing on a machine that is shared; the time limit of the whole test still holds.
hypothesis.settings.register_profile("flarebus", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "flarebus"))


@pytest.fixture(autouse=True, scope="session")
def _own_simulation_root(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the user's cache folder out of the tests, also in the processes they start."""
    os.environ["FLAREBUS_SIMULATION_ROOT"] = str(tmp_path_factory.mktemp("runs"))
