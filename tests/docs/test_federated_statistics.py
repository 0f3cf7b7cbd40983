"""`docs/federated-statistics.md` shows the code of the example, and all that there is to ask for."""

from __future__ import annotations

import pytest

from flarebus.statistics.config import NAMES
from tests.docs.pages import ROOT, blocks, is_excerpt

PAGE = "federated-statistics.md"
EXAMPLE = ROOT / "examples" / "federated_statistics"


@pytest.mark.parametrize("block", blocks(PAGE, "python"), ids=lambda block: block.strip().splitlines()[0][:40])
def test_code_is_that_of_the_example(block: str) -> None:
    """What a reader copies is what the tests run."""
    assert is_excerpt(block, EXAMPLE / "tables.py", EXAMPLE / "job.py")


def test_every_statistic_is_described() -> None:
    """In the table, by the name that a job uses."""
    text = (ROOT / "docs" / PAGE).read_text(encoding="utf-8")

    assert [name for name in NAMES if f"`{name}`" not in text] == []
