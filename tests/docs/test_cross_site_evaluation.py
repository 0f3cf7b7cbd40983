"""`docs/cross-site-evaluation.md` shows the code of the example, and figures that are those of the code."""

from __future__ import annotations

import inspect

import pytest

from flarebus.recipe import add_cross_site_evaluation
from tests.docs.pages import ROOT, blocks, is_excerpt
from workflows.cross_site_eval import CrossSiteEval

PAGE = "cross-site-evaluation.md"
EXAMPLE = ROOT / "examples" / "cross_site_eval_numpy"
TEXT = (ROOT / "docs" / PAGE).read_text(encoding="utf-8")


def test_code_is_that_of_the_example() -> None:
    """What a reader copies is what the tests run; the recipe of its own has tests of its own."""
    added, script, alone = blocks(PAGE, "python")

    assert is_excerpt(added, EXAMPLE / "job.py")
    assert is_excerpt(script, EXAMPLE / "client.py")
    assert "CrossSiteEvalRecipe(" in alone


@pytest.mark.parametrize("function", [add_cross_site_evaluation, CrossSiteEval.__init__])
def test_defaults_are_those_of_the_page(function: object) -> None:
    """Of the timeouts, and of the memory budget."""
    parameters = inspect.signature(function).parameters  # type: ignore[arg-type]
    for name in ("submit_model_timeout", "validation_timeout", "participating_clients", "memory_budget"):
        if name in parameters:
            default = parameters[name].default
            shown = "4e9" if default == 4e9 else default
            assert f"{name}={shown}" in TEXT
