"""docs/write-a-pipe.md shows code that exists, calls that work, and all of the contract."""

from __future__ import annotations

import re

import numpy as np
import pytest

from flarebus.pipes import Pipe
from flarebus.recipe import FedAvgRecipe, FrameworkType
from tests.docs.pages import ROOT, blocks, is_excerpt

PAGE = "write-a-pipe.md"
EXAMPLE = ROOT / "examples" / "custom_pipe"
SOURCES = [*sorted(EXAMPLE.glob("**/*.py")), EXAMPLE / "pyproject.toml"]
PYTHON = blocks(PAGE, "python")
CALLS = [block for block in PYTHON if block.startswith("recipe.")]


@pytest.mark.parametrize("block", [*(block for block in PYTHON if block not in CALLS), *blocks(PAGE, "toml")])
def test_code_is_that_of_the_example(block: str) -> None:
    """Whatever the page shows of a pipe stands in the example, line for line."""
    assert is_excerpt(block, *SOURCES)


def test_calls_on_a_recipe_are_accepted() -> None:
    """Every way to name a pipe on the page can be used."""
    recipe = FedAvgRecipe(
        model={"w": np.zeros(1)},
        framework=FrameworkType.NUMPY,
        min_clients=1,
        train_script=str(EXAMPLE / "client.py"),
        launch_external_process=True,
    )

    for block in CALLS:
        exec(block, {"recipe": recipe})

    assert recipe.definition.site_defaults.client_config["pipe"]["CLASS_NAME"] == "flarebus_tcp_pipe.TcpPipe"
    assert recipe.definition.sites["site-1"].client_config["pipe"] == {"CLASS_NAME": "tcp", "ARG": {"port": 7011}}


def test_every_method_of_the_contract_is_explained() -> None:
    """The two tables name what a pipe implements, and what it may override."""
    text = (ROOT / "docs" / PAGE).read_text(encoding="utf-8")
    tabled = set(re.findall(r"^\| `(\w+)\(", text, re.MULTILINE))

    public = {name for name in vars(Pipe) if not name.startswith("_") and callable(getattr(Pipe, name))}
    assert tabled == public | {"__init__"}
