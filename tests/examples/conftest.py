"""One fresh environment for all tests of distributions that plug something in: making it takes a while."""

from __future__ import annotations

import pytest

from tests.examples.fresh import ROOT, FreshEnvironment


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> FreshEnvironment:
    """An environment with flarebus, and the examples that are distributions, beside each other."""
    environment = FreshEnvironment(tmp_path_factory.mktemp("fresh"))
    for name in ("custom_pipe", "custom_workflow"):
        environment.install(ROOT / "examples" / name)
    return environment
