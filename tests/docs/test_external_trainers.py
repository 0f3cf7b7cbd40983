"""docs/external-trainers.md: its table is that of the code, and its calls are accepted."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flarebus.job.client_keys import TASK_KEYS
from flarebus.job.site_config import SiteConfig
from flarebus.model import FLModel
from flarebus.recipe import FedAvgRecipe, Filter, FrameworkType
from flarebus.site.client_config import make_client_config
from flarebus.site.external import HUNG_S, LEAVE_S, MAX_LIVES
from flarebus.site.trainer import CONFIG_FILE, DEFAULT_PIPE
from tests.docs.pages import ROOT, blocks

PAGE = "external-trainers.md"
TEXT = (ROOT / "docs" / PAGE).read_text(encoding="utf-8")
PYTHON = blocks(PAGE, "python")


def table(heading: str) -> dict[str, list[str]]:
    """First cell of each row -> the others, of the first table below a heading."""
    rows = re.search(rf"^## {heading}\n.*?^\|---.*?\n(.*?)^$", TEXT, re.DOTALL | re.MULTILINE)
    assert rows is not None
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows[1].splitlines()]
    return {row[0].strip("`"): row[1:] for row in cells}


def value_of(cell: str) -> Any:
    """The Python value that a cell shows."""
    return ast.literal_eval(cell.strip("`"))


def test_keys_and_defaults_are_those_of_a_job() -> None:
    """The table of `add_client_config` has every key, with what a trainer is told when nothing is said."""
    site = SiteConfig("client.py", framework=FrameworkType.NUMPY, launch_external_process=True)
    told = make_client_config("site-1", "job", site)["TASK_EXCHANGE"]
    expected = {key.override: told.get(key.name, key.default) for key in TASK_KEYS.values() if key.override}
    expected |= {"pipe": DEFAULT_PIPE, "launch_timeout": site.launch_timeout, "exchange_format": "by framework"}

    by_framework = ["exchange_format"]
    shown = {key: cell if key in by_framework else value_of(cell) for key, (cell, _) in table("Configuration").items()}
    assert shown == expected


def test_parameters_and_defaults_are_those_of_the_recipe() -> None:
    """What starts a trainer has the names and defaults of the recipe's parameters."""
    parameters = inspect.signature(FedAvgRecipe).parameters

    for name, cells in table("What starts it").items():
        assert value_of(cells[0]) == parameters[name].default, name


def test_figures_in_the_text_are_those_of_the_code() -> None:
    """Seconds and places that the page names."""
    assert f"0 means {LEAVE_S:g}" in TEXT
    assert f"SIGTERM, {HUNG_S:g} s later SIGKILL" in TEXT
    assert MAX_LIVES == 2
    assert f"<site's folder>/{CONFIG_FILE}" in TEXT


@pytest.mark.parametrize("block", [block for block in PYTHON if block.startswith("recipe")])
def test_calls_are_accepted(block: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each recipe can be made, and each call on one does what it says."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "client.py").write_text("")
    given = {"train_script": "client.py", "framework": FrameworkType.NUMPY, "launch_external_process": True}
    recipe = FedAvgRecipe(model={"w": np.zeros(1)}, min_clients=1, **given)  # type: ignore[arg-type]
    names = {"recipe": recipe, "FedAvgRecipe": FedAvgRecipe, "Net": lambda: {"w": np.zeros(1)}}

    exec(block, names)

    made: Any = names["recipe"]
    assert made.definition.site_defaults.is_external


def test_filter_leaves_parameters_where_they_are() -> None:
    """The filter on the page needs no values, and rounds metrics."""
    (block,) = (block for block in PYTHON if block.startswith("class"))
    names: dict[str, Any] = {"Filter": Filter, "FLModel": FLModel}
    exec(block, names)
    filter = names["RoundMetrics"]()

    found = filter.process(FLModel(metrics={"loss": 0.12345}), SimpleNamespace())

    assert not filter.needs_values
    assert found.metrics == {"loss": 0.123}


def test_names_to_move_to_exist() -> None:
    """Whatever the last table promises can be imported."""
    for module, names in {
        "flarebus.client.config": ["ClientConfig", "ConfigKey", "ExchangeFormat", "TransferType", "from_file"],
        "flarebus.client.ex_process.api": ["ExProcessClientAPI"],
        "flarebus.client.tracking": ["SummaryWriter", "MLflowWriter", "WandBWriter"],
        "flarebus.client": ["FLModel", "AnalyticsDataType"],
    }.items():
        assert all(hasattr(importlib.import_module(module), name) for name in names)
        assert module in TEXT or module == "flarebus.client"
        assert all(name in TEXT for name in names)
