"""docs/write-a-workflow.md shows code that exists, calls that work, and all of what a controller may call."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import pytest

from flarebus.recipe import WorkflowRecipe
from flarebus.workflow.controller import Job, TaskGiver
from tests.docs.pages import ROOT, blocks, is_excerpt

PAGE = "write-a-workflow.md"
EXAMPLE = ROOT / "examples" / "custom_workflow"
SOURCES = [*sorted(EXAMPLE.glob("**/*.py")), EXAMPLE / "pyproject.toml"]
PYTHON = blocks(PAGE, "python")
CALLS = [block for block in PYTHON if block.startswith("recipe.")]


@pytest.fixture
def _example(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example as if it were installed, and its folder the working directory."""
    monkeypatch.chdir(EXAMPLE)
    monkeypatch.syspath_prepend(str(EXAMPLE / "src"))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("data", "flarebus_tournament"):
            del sys.modules[name]


@pytest.mark.parametrize("block", [*(block for block in PYTHON if block not in CALLS), *blocks(PAGE, "toml")])
def test_code_is_that_of_the_example(block: str) -> None:
    """Whatever the page shows of a workflow stands in the example, line for line."""
    assert is_excerpt(block, *SOURCES)


@pytest.mark.usefixtures("_example")
def test_calls_on_a_recipe_are_accepted() -> None:
    """Every way to add an executor on the page can be used."""
    recipe = WorkflowRecipe(
        workflow="flarebus_tournament:Tournament",
        settings={"num_rounds": 1, "min_clients": 1},
        train_script="client.py",
    )

    for block in CALLS:
        exec(block, {"recipe": recipe})

    found = [ref.tasks for ref in recipe.definition.site_config("site-1").executors]
    assert found == [("score_*",), ("score",)]


def test_all_that_a_controller_may_call_is_explained() -> None:
    """The table names every part of a job."""
    text = (ROOT / "docs" / PAGE).read_text(encoding="utf-8")
    table = text.partition("| `job` |")[2].partition("\n\n")[0]
    first_cells = " ".join(line.split("|")[1] for line in table.splitlines()[1:] if "|" in line)

    public = {name for kind in (TaskGiver, Job) for name in vars(kind) if not name.startswith("_")}
    assert set(re.findall(r"`(\w+)", first_cells)) == public
