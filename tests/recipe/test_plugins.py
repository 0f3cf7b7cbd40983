"""Workflows are found by name or path, and a name that is not there is answered with those that are."""

from __future__ import annotations

import sys

import pytest

from flarebus.errors import ConfigError
from flarebus.job.plugins import known_workflows, load_workflow


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution on the path that brings workflows, as an installer would leave it."""

    def install(name: str, entries: str) -> None:
        folder = tmp_path / f"{name}-1.5.dist-info"
        folder.mkdir()
        folder.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        folder.joinpath("entry_points.txt").write_text(f"[flarebus.workflows]\n{entries}\n")

    tmp_path.joinpath("my_flow.py").write_text(
        "from flarebus.workflow.controller import Controller\n\n"
        "class Flow(Controller):\n"
        "    def __init__(self, **settings):\n        self.settings = settings\n\n"
        "    def run(self, job):\n        pass\n\n"
        "class Half(Controller):\n    pass\n\n"
        "class Stranger:\n    pass\n\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield install
    sys.modules.pop("my_flow", None)


def test_entry_point_is_found_by_name(installed):
    """An installed workflow is found by its name, and listed with where it comes from."""
    installed("my-plugin", "my_flow = my_flow:Flow")

    assert load_workflow("my_flow").__name__ == "Flow"
    assert known_workflows()["my_flow"] == "my_flow:Flow (my-plugin 1.5)"


@pytest.mark.parametrize("path", ["my_flow:Flow", "my_flow.Flow"])
def test_dotted_path_needs_no_entry_point(installed, path):
    """A job that brings its own workflow names it by its path."""
    assert load_workflow(path).__name__ == "Flow"


def test_unknown_name_lists_what_there_is(installed):
    """The error for a wrong name has the nearest one, and every known one with its origin."""
    installed("my-plugin", "my_flow = my_flow:Flow")

    with pytest.raises(ConfigError, match=r"did you mean 'my_flow'\?.*my_flow from my_flow:Flow \(my-plugin 1\.5\)"):
        load_workflow("my_flo")


def test_two_claims_of_one_name_are_refused(installed):
    """Which of two plug-ins of one name is meant is not for flarebus to guess."""
    installed("one", "my_flow = my_flow:Flow")
    installed("two", "my_flow = other:Flow")

    with pytest.raises(ConfigError, match=r"claimed more than once: .*one 1\.5.*two 1\.5"):
        load_workflow("my_flow")


def test_same_claim_twice_is_one(installed):
    """A distribution that is seen twice, as editable installs are, is no contradiction."""
    installed("one", "my_flow = my_flow:Flow")
    installed("one-again", "my_flow = my_flow:Flow")

    assert load_workflow("my_flow").__name__ == "Flow"


def test_installed_name_that_cannot_be_loaded_says_why_and_no_more(installed):
    """The name was right, so which others there are is left out."""
    installed("my-plugin", "my_flow = no_such_module:Flow")

    with pytest.raises(ConfigError, match=r"cannot load no_such_module:Flow: No module named 'no_such_module'$"):
        load_workflow("my_flow")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:Flow", "cannot load no_such_module:Flow"),
        ("my_flow:Nothing", "cannot load my_flow:Nothing"),
        ("my_flow:number", "is a int, not a class"),
        ("my_flow:Stranger", "Stranger is no workflow: derive it from flarebus.workflow.controller.Controller"),
        ("my_flow:Half", "my_flow.Half does not implement run"),
        (".", "cannot load"),
        ("", "the name of a workflow"),
        (None, "the name of a workflow"),
    ],
)
def test_what_cannot_be_loaded_says_so(installed, name, said):
    """A path that leads nowhere is a mistake of the user, with its cause."""
    with pytest.raises(ConfigError, match=said):
        load_workflow(name)


def test_workflow_is_built_with_the_settings_of_the_recipe(installed, make):
    """The definition builds its workflow with exactly its settings, a described aggregator made into an object."""
    from dataclasses import replace

    job = make(aggregator={"class_path": "model.Keeper"}).definition
    job.code_dir.joinpath("model.py").write_text("class Keeper:\n    pass\n")

    flow = replace(job, workflow="my_flow:Flow").make_workflow()

    assert type(flow.settings.pop("aggregator")).__name__ == "Keeper"
    assert flow.settings == {key: value for key, value in job.workflow_settings.items() if key != "aggregator"}
    sys.modules.pop("model", None)
