"""`add_client_input_filter` and `add_client_output_filter`: what a job carries, and what it cannot."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from flarebus.errors import ConfigError
from flarebus.job.class_ref import ClassRef
from flarebus.job.filter_ref import FilterRef
from flarebus.recipe import FedAvgRecipe, Filter, FilterTask
from flarebus.workflow.filter import FilterChain

NOISE = {"class_path": "mine.Noise", "args": {"scale": 0.5}}


class Passing(Filter):
    """A filter that changes nothing; what it is made with is the point."""

    def process(self, model: Any, task: FilterTask) -> Any:
        return model


class Keeps(Passing):
    def __init__(self, scale: float, names: Any = ("a", "b"), *, table: Any = None) -> None:
        self.scale = scale
        self._names = names
        self.table = table


class Forgets(Passing):
    def __init__(self, scale: float = 1.0) -> None:
        self.double = 2 * scale


class TakesAny(Passing):
    def __init__(self, **kwargs: Any) -> None:
        self.kwargs = kwargs


class TakesMany(Passing):
    def __init__(self, *args: Any) -> None:
        self.args = args


class Outer:
    class Inner(Passing):
        pass


def refs(recipe: FedAvgRecipe, site: str, where: str = "input_filters") -> list[tuple[str, Any, Any]]:
    found: tuple[FilterRef, ...] = getattr(recipe.definition.site_config(site), where)
    return [(each.ref.class_path, each.ref.args, each.tasks) for each in found]


def test_filters_are_in_the_order_of_the_calls(make):
    """For all sites and for some, input and output apart, each site has its filters in the order they were added."""
    recipe = make()

    recipe.add_client_input_filter({"class_path": "mine.A"}, clients=["x"])
    recipe.add_client_input_filter({"class_path": "mine.B"}, tasks=["train"])
    recipe.add_client_input_filter({"class_path": "mine.C"}, clients=["x", "y"])
    recipe.add_client_output_filter(NOISE, tasks=("train", "validate"))

    assert [path for path, _, _ in refs(recipe, "x")] == ["mine.A", "mine.B", "mine.C"]
    assert [path for path, _, _ in refs(recipe, "y")] == ["mine.B", "mine.C"]
    assert refs(recipe, "z") == [("mine.B", {}, ("train",))]
    for site in "xyz":
        assert refs(recipe, site, "output_filters") == [("mine.Noise", {"scale": 0.5}, ("train", "validate"))]


def test_instance_is_described_by_its_class_and_attributes(make, tmp_path):
    """An instance becomes the path of its class and the arguments that make it again."""
    recipe = make()

    recipe.add_client_output_filter(Keeps(0.5, table={"a": [1, None]}))
    recipe.add_client_output_filter(Outer.Inner())

    name = Keeps.__module__
    (path, args, _), (inner, _, _) = refs(recipe, "a", "output_filters")
    assert (path, inner) == (f"{name}.Keeps", f"{name}:Outer.Inner")
    assert args == {"scale": 0.5, "names": ["a", "b"], "table": {"a": [1, None]}}
    chain = FilterChain.build(recipe.definition.site_config("a").output_filters, recipe.definition.code_dir)
    assert [type(link.filter).__qualname__ for link in chain._links] == ["Keeps", "Outer.Inner"]
    assert chain._links[0].filter._names == ["a", "b"]


@pytest.mark.parametrize("sites", [None, {"a": {}, "b": {}}])
def test_survives_export(make, tmp_path, sites):
    """Filters are in the job folder and come back, for all sites and for some."""
    recipe = make(per_site_config=sites)
    recipe.add_client_input_filter(NOISE, tasks=["train"])
    recipe.add_client_output_filter({"class_path": "mine.Clip"}, clients=["b"])

    loaded = FedAvgRecipe.load(recipe.export(tmp_path / "job"))

    assert loaded == recipe
    assert loaded != make(per_site_config=sites)
    for site in "ab":
        assert [refs(loaded, site, each) for each in ("input_filters", "output_filters")] == [
            refs(recipe, site, each) for each in ("input_filters", "output_filters")
        ]


def _local() -> Any:
    class Local(Passing):
        pass

    return Local()


@pytest.mark.parametrize(
    ("filter", "said"),
    [
        (None, "has no method process"),
        (3, "has no method process"),
        (Keeps, r"an instance, not the class: Keeps\("),
        (_local(), "no name in its module.*class_path"),
        (Forgets(), "keeps its argument 'scale' neither as scale nor as _scale.*class_path"),
        (TakesAny(), r"of any name \(kwargs\)"),
        (TakesMany(), r"of any number \(args\)"),
        (Keeps(0.5, table={1: "a"}), r"filter\.table=.*not the same in JSON"),
        (Keeps(0.5, table={"x": object()}), r"table.*numbers, strings"),
        (Keeps(float("nan")), r"scale.*numbers, strings"),
        ({"class_path": "mine.Noise", "arg": {}}, "did you mean 'args'"),
        ({"args": {}}, "pkg.mod.Class"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_described_is_refused(make, filter, said):
    """A filter that a site could not make again is refused at once, with what to do; the recipe stays as it was."""
    recipe = make()

    with pytest.raises(ConfigError, match=said) as caught:
        recipe.add_client_input_filter(filter)

    assert str(caught.value).startswith("filter")
    assert recipe == make()


@pytest.mark.parametrize("tasks", ["train", [], [""], [3], 3])
def test_tasks_are_names(make, tasks):
    """A single string or an empty list is a mistake, not a filter for nothing."""
    with pytest.raises(ConfigError, match=r"^tasks="):
        make().add_client_output_filter(NOISE, tasks=tasks)


def test_site_of_no_part_is_refused(make):
    """With sites that are known, a filter for another one is a mistake."""
    with pytest.raises(ConfigError, match=r"clients='c': no site of this job"):
        make(per_site_config={"a": {}}).add_client_input_filter(NOISE, clients=["c"])


class Programmed(Passing):
    """Stands for a class in the program that makes the recipe."""


@pytest.mark.parametrize(
    ("file", "spec", "path"),
    [
        ("job.py", None, "job.Programmed"),
        ("layers/job.py", None, "layers.job.Programmed"),
        ("../elsewhere.py", None, None),
        ("my-job.py", None, None),
        (None, None, None),
        (None, SimpleNamespace(name="package.tool"), "package.tool.Programmed"),
    ],
    ids=str,
)
def test_class_of_the_program_is_found_by_its_file(make, code, monkeypatch, file, spec, path):
    """A class in `__main__` has the name of its file, if that is code of the job; otherwise it has to be described."""
    main = ModuleType("__main__")
    main.__spec__ = spec
    if file is not None:
        main.__file__ = str(code / file)
    main.Programmed = Programmed  # type: ignore[attr-defined]
    recipe = make()
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(Programmed, "__module__", "__main__")

    if path is None:
        with pytest.raises(ConfigError, match="class_path"):
            recipe.add_client_input_filter(Programmed())
    else:
        recipe.add_client_input_filter(Programmed())
        assert recipe.definition.site_config("a").input_filters == (FilterRef(ClassRef(path, {})),)
