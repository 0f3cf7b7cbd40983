"""Cross-site evaluation in recipes: added to one, or one of its own; what is refused, and that it comes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flarebus.errors import ConfigError
from flarebus.recipe import CrossSiteEvalRecipe, FedAvgRecipe, FedStatsRecipe, FrameworkType, Recipe
from flarebus.recipe import add_cross_site_evaluation as add
from flarebus.statistics import ColumnStatistics
from workflows.cross_site_eval import CrossSiteEval
from workflows.fedavg import FedAvg

Make = Callable[..., FedAvgRecipe]
VALIDATOR = "flarebus.workflow.array_validator.ArrayValidator"


class Nothing(ColumnStatistics):
    """A generator of no tables."""

    def load(self, site_name: str) -> Any:
        return {}


def tasks_of(recipe: Recipe, site: str = "site-1") -> list[list[str]]:
    """The tasks of each validator at a site."""
    refs = recipe.definition.site_config(site).executors
    return [list(ref.tasks) for ref in refs if ref.ref.class_path == VALIDATOR]


# --- added to a recipe


def test_evaluation_runs_after_the_training_with_the_figures_of_the_docs(make: Make) -> None:
    """And knows what every model needs beside it."""
    recipe = make(hyper_params={"loss": "hinge"})
    add(recipe)

    first, second = recipe.definition.make_workflows()
    assert isinstance(first, FedAvg)
    assert isinstance(second, CrossSiteEval)
    assert (second.submit_model_timeout, second.validation_timeout) == (600, 6000)
    assert (second.participating_clients, second.hyper_params) == (None, {"loss": "hinge"})


def test_parameters_reach_the_workflow(make: Make) -> None:
    """All of them."""
    recipe = make()
    add(
        recipe, submit_model_timeout=5, validation_timeout=7.5, participating_clients=("a", "b", "a"), memory_budget=1e6
    )

    workflow = recipe.definition.make_workflows()[1]
    assert workflow.memory_budget == 1e6
    assert (workflow.submit_model_timeout, workflow.validation_timeout) == (5, 7.5)
    assert workflow.participating_clients == ["a", "b"]


def test_a_second_one_is_refused(make: Make) -> None:
    """As a RuntimeError, as people expect; the first one stays."""
    recipe = make()
    add(recipe)
    with pytest.raises(RuntimeError, match="added once"):
        add(recipe, validation_timeout=5)
    with pytest.raises(RuntimeError, match="has a cross-site evaluation"):
        add(CrossSiteEvalRecipe(framework=FrameworkType.NUMPY))

    assert len(recipe.definition.afterwards) == 1


@pytest.mark.parametrize(
    "recipe",
    [None, "fedavg", FedStatsRecipe(statistic_configs={"count": {}}, stats_generator=Nothing())],
    ids=["none", "text", "statistics"],
)
def test_what_trains_no_model_is_refused(recipe: Any) -> None:
    """As a ValueError that says what is needed."""
    with pytest.raises(ValueError, match="a recipe"):
        add(recipe)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"submit_model_timeout": 0}, "submit_model_timeout=0: a finite number above 0"),
        ({"validation_timeout": "6000"}, "validation_timeout='6000'"),
        ({"validation_timeout": None}, "validation_timeout=None"),
        ({"memory_budget": 0}, "memory_budget=0"),
        ({"participating_clients": []}, "participating_clients=.*at least one"),
        ({"participating_clients": "site-1"}, "participating_clients='site-1': a list"),
        ({"participating_clients": ["server"]}, "participating_clients='server': this name is reserved"),
        ({"participating_clients": ["sit-1"]}, "participating_clients.*'sit-1': no site of this job; .*site-1"),
    ],
)
def test_wrong_parameters_are_refused_by_name(make: Make, wrong: dict[str, Any], said: str) -> None:
    """And the recipe is as it was."""
    recipe = make(per_site_config={"site-1": {}, "site-2": {}})
    before = recipe.definition
    with pytest.raises(ConfigError, match=said):
        add(recipe, **wrong)

    assert recipe.definition is before


def test_participants_that_the_environment_lacks_are_refused_there(make: Make) -> None:
    """Before anything is started."""
    recipe = make()
    add(recipe, participating_clients=["site-7"])

    with pytest.raises(ConfigError, match=r"participating_clients\['site-7'\].*no such site"):
        recipe.definition.check_sites(["site-1", "site-2"])


# --- validators


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("flare.receive()", [["validate", "submit_model"]]),
        ("if flare.is_evaluate(): pass", [["submit_model"]]),
        ("@flare.evaluate\ndef f(m): pass", [["submit_model"]]),
        ("@flare.evaluate()\ndef f(m): pass", [["submit_model"]]),
        ("def evaluate(m): pass\nevaluate(1)", [["validate", "submit_model"]]),
        ("from flarebus.client import is_submit_model\nis_submit_model()", [["validate"]]),
        ("flare.is_evaluate() or flare.is_submit_model()", []),
        ("match flare.get_task_name(): case _: pass", []),
        ("if flare.is_train(): pass", []),
        ("# is_evaluate", [["validate", "submit_model"]]),
        ("this is no Python", []),
    ],
)
def test_numpy_scripts_get_a_validator_for_what_they_do_not_answer(
    make: Make, code: Path, script: str, expected: list[list[str]]
) -> None:
    """As far as their code tells; what cannot be read is left alone."""
    code.joinpath("client.py").write_text(script.replace(": case _", ":\n    case _"))
    recipe = make(framework=FrameworkType.NUMPY)
    add(recipe)

    assert tasks_of(recipe) == expected


def test_modules_beside_the_script_are_read_too(make: Make, code: Path) -> None:
    """The loop may be there."""
    code.joinpath("model.py").write_text("def loop():\n    return flare.is_evaluate()\n")
    recipe = make(framework=FrameworkType.NUMPY)
    add(recipe)

    assert tasks_of(recipe) == [["submit_model"]]


def test_a_script_among_too_many_files_is_read_alone(make: Make, code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script in a home folder can be run, though not exported; so can its models be evaluated."""
    code.joinpath("client.py").write_text("flare.is_evaluate()")
    recipe = make(framework=FrameworkType.NUMPY)
    monkeypatch.setattr("flarebus.job.code._MAX_FILES", 1)
    add(recipe)

    assert tasks_of(recipe) == [["submit_model"]]


@pytest.mark.parametrize("framework", [FrameworkType.PYTORCH, FrameworkType.TENSORFLOW, FrameworkType.RAW])
def test_scripts_of_other_frameworks_answer_themselves(make: Make, framework: FrameworkType) -> None:
    """Nothing is added to them."""
    recipe = make(framework=framework)
    add(recipe)

    assert tasks_of(recipe) == []


def test_somebodys_own_validator_stays_the_only_one(make: Make) -> None:
    """Whether it was added before or is added afterwards, it comes first."""
    own = {"class_path": VALIDATOR, "args": {"model_file": "mine.npy"}}
    recipe = make(framework=FrameworkType.NUMPY)
    recipe.add_executor(own, ["validate"])
    add(recipe)
    assert tasks_of(recipe) == [["validate"], ["submit_model"]]

    recipe = make(framework=FrameworkType.NUMPY)
    add(recipe)
    recipe.add_executor(own, ["validate"])
    assert recipe.definition.site_config("a").executors[0].ref.args == {"model_file": "mine.npy"}


# --- a recipe of its own


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two model files in the working directory."""
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "one.npy", np.full(3, 1, np.float32))
    np.savez(tmp_path / "two.npz", w=np.full(3, 2, np.float32))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {}),
        ("one.npy", {"one.npy": "one.npy"}),
        (Path("one.npy"), {"one.npy": "one.npy"}),
        (["one.npy", "two.npz"], {"one.npy": "one.npy", "two.npz": "two.npz"}),
        ({"before": "one.npy", "after": "two.npz"}, {"before": "one.npy", "after": "two.npz"}),
    ],
)
def test_models_have_the_names_of_their_files_or_their_own(
    models: Path, code: Path, given: Any, expected: dict[str, str]
) -> None:
    """A relative path is part of the job, an absolute one the server's business."""
    recipe = CrossSiteEvalRecipe(server_models=given, eval_script=str(code / "client.py"))

    assert {name: (ref.path, ref.is_bundled) for name, ref in recipe.definition.models.items()} == {
        name: (models / path, True) for name, path in expected.items()
    }
    elsewhere = CrossSiteEvalRecipe(server_models="/models/big.safetensors", eval_script=str(code / "client.py"))
    assert not elsewhere.definition.models["big.safetensors"].is_bundled


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"server_models": "three.npy"}, r"server_models\['three.npy'\].*no such file"),
        ({"server_models": "one.txt"}, r"server_models\['one.txt'\].*a file ending in"),
        ({"server_models": "/a/net.weights.h5"}, "weights without their model"),
        ({"server_models": {"a b": "one.npy"}}, "server_models='a b': a name of letters"),
        ({"server_models": {"a": None}}, r"server_models\['a'\]=None"),
        ({"server_models": ["one.npy", "/else/one.npy"]}, "another file is called one.npy"),
        ({"server_models": 3}, "server_models=3: a path, a list"),
        ({"eval_script": None}, "eval_script=None: needed, unless"),
        ({"eval_script": None, "framework": FrameworkType.NUMPY, "eval_args": "-v"}, "eval_args='-v': needs an eval_s"),
        ({"eval_script": "gone.py"}, "eval_script='gone.py': no such file"),
        ({"eval_args": "'"}, 'eval_args="\'"'),
        (
            {"per_site_config": {"a": {"train_script": "x.py"}}},
            r"per_site_config\['a'\]\['train_script'\].*'eval_script'",
        ),
        ({"per_site_config": {"a": {"eval_script": "gone.py"}}}, r"per_site_config\['a'\]\['eval_script'\]"),
        ({"per_site_config": {"a": {"params_transfer_type": "DIFF"}}}, "params_transfer_type.*unknown key"),
        ({"validation_timeout": -1}, "validation_timeout=-1"),
        ({"hyper_params": {"a": object()}}, "hyper_params"),
        ({"name": "a/b"}, "name='a/b'"),
    ],
)
@pytest.mark.usefixtures("models")
def test_a_recipe_of_its_own_refuses_by_name(code: Path, wrong: dict[str, Any], said: str) -> None:
    """In the words of the one who wrote it."""
    with pytest.raises(ConfigError, match=said):
        CrossSiteEvalRecipe(**{"eval_script": str(code / "client.py"), **wrong})


def test_without_a_script_arrays_are_validated(models: Path) -> None:
    """There is nothing to write for plain arrays."""
    recipe = CrossSiteEvalRecipe(server_models="one.npy", framework=FrameworkType.NUMPY)

    assert tasks_of(recipe) == [["validate", "submit_model"]]
    assert isinstance(recipe.definition.make_workflow(), CrossSiteEval)


# --- written down


def test_an_added_evaluation_comes_back(make: Make, code: Path, tmp_path: Path) -> None:
    """With its validators, and it is still the only one."""
    recipe = make(framework=FrameworkType.NUMPY)
    add(recipe, 5, 7, ["a"])
    back = FedAvgRecipe.load(recipe.export(tmp_path / "job"))

    assert back == recipe
    assert tasks_of(back) == [["validate", "submit_model"]]
    with pytest.raises(RuntimeError):
        add(back)
    assert back != make(framework=FrameworkType.NUMPY)


@pytest.mark.parametrize("script", [True, False])
def test_a_recipe_of_its_own_comes_back(models: Path, code: Path, script: bool) -> None:
    """From a folder that has all of it, wherever the files were."""
    given: dict[str, Any] = {"server_models": {"best": "one.npy", "far": "/far/away.pt"}, "validation_timeout": 9}
    if script:
        given |= {"eval_script": str(code / "client.py"), "per_site_config": {"a": {"eval_args": "-v"}, "b": {}}}
    recipe = CrossSiteEvalRecipe(**{"framework": FrameworkType.NUMPY, **given})
    job = recipe.export(models / "job")
    models.joinpath("one.npy").rename(models / "moved.npy")
    (models / "one.npy").write_bytes(models.joinpath("moved.npy").read_bytes())
    back = Recipe.load(job)

    assert back == recipe
    assert isinstance(back, CrossSiteEvalRecipe)
    assert back.definition.models["best"].path == job / "models" / "best" / "one.npy"
    assert str(back.definition.models["far"].path) == "/far/away.pt"
    assert Recipe.load(back.export(models / "again")) == recipe


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"afterwards": [{"workflow": "cross_site_evil", "settings": {}}]}, "did you mean 'cross_site_eval'"),
        ({"afterwards": [{"workflow": "cross_site_eval", "settings": {"timeout": 5}}]}, "settings of cross_site_eval"),
        ({"afterwards": [{"workflow": "cross_site_eval"}]}, r"afterwards\[0\]"),
        ({"afterwards": ["cross_site_eval"]}, r"afterwards\[0\]"),
        ({"afterwards": {}}, "afterwards"),
        ({"models": {"../up": {"path": "/a.npy", "is_bundled": False}}}, "models='../up'"),
        ({"models": {"up": {"path": "../a.npy", "is_bundled": True}}}, r"models\['up'\]"),
        ({"models": {"up": {"path": "a.npy", "is_bundled": False}}}, r"models\['up'\]\['path'\].*an absolute path"),
        ({"models": {"up": {"path": "/a.npy"}}}, r"models\['up'\]"),
    ],
)
def test_what_was_written_by_hand_is_checked(make: Make, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """With the name of the file and the place in it."""
    job = make().export(tmp_path / "job")
    data = json.loads(job.joinpath("job.json").read_text())
    job.joinpath("job.json").write_text(json.dumps({**data, **change}))

    with pytest.raises(ConfigError, match=said):
        FedAvgRecipe.load(job)
