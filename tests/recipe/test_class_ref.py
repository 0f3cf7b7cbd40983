"""Classes named by path: found in the job's folder first, built with their arguments, and errors that help."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from flarebus.errors import ConfigError
from flarebus.job.class_ref import ClassRef, code_folder_first


@pytest.fixture(autouse=True)
def forget():
    """Modules of one test's folder are not there for the next."""
    yield
    for name in ("model", "layers"):
        sys.modules.pop(name, None)


def _write(folder, text):
    folder.mkdir(exist_ok=True)
    folder.joinpath("model.py").write_text(text)
    return folder


@pytest.mark.parametrize("path", ["model.Net", "model:Net"])
def test_class_of_the_job_is_built_with_its_arguments(make, path):
    """The class beside the training script becomes the initial model, on both spellings."""
    job = make(model={"class_path": path, "args": {"size": 4}}).definition

    np.testing.assert_array_equal(job.initial_params()["w"], np.full(4, 7.0, np.float32), strict=True)


def test_each_job_gets_its_own_module_of_the_same_name(tmp_path):
    """Everybody has a `model.py`: the folder decides, not who came first, and nothing stays on the path."""
    folders = [
        _write(tmp_path / name, f"from layers import SIZE\nclass Net(list):\n    of = {name!r}, SIZE\n")
        for name in "ab"
    ]
    for size, folder in enumerate(folders):
        folder.joinpath("layers.py").write_text(f"SIZE = {size}\n")
    path = list(sys.path)

    found = [ClassRef("model.Net", {}).build(folder, "model").of for folder in (*folders, folders[0])]

    assert found == [("a", 0), ("b", 1), ("a", 0)]
    assert sys.path == path


def test_module_that_is_already_loaded_from_the_folder_is_used(tmp_path, monkeypatch):
    """What the job's own program imported is the same class, not a second copy of it."""
    folder = _write(tmp_path / "own", "class Net:\n    pass\n")
    monkeypatch.syspath_prepend(str(folder))
    import model

    assert type(ClassRef("model.Net", {}).build(folder, "model")) is model.Net


def test_foreign_modules_are_put_back(tmp_path, monkeypatch):
    """A module put aside for the time of an import is the same object afterwards."""
    other = type(sys)("model")
    other.__file__ = str(tmp_path / "elsewhere" / "model.py")
    monkeypatch.setitem(sys.modules, "model", other)
    folder = _write(tmp_path / "own", "class Net:\n    pass\n")

    with code_folder_first(folder):
        assert "model" not in sys.modules

    assert sys.modules["model"] is other


def test_standard_library_is_never_put_aside(tmp_path):
    """A `json.py` beside the script does not take the place of the loaded one."""
    import json

    tmp_path.joinpath("json.py").write_text("raise RuntimeError('wrong one')\n")

    with code_folder_first(tmp_path):
        assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("text", "path", "args", "said"),
    [
        ("", "nothing.Net", {}, "no module named nothing; looked in"),
        ("import not_installed_anywhere", "model.Net", {}, "no module named not_installed_anywhere"),
        ("1 / 0", "model.Net", {}, "importing model raised ZeroDivisionError"),
        ("class Nett: pass", "model.Net", {}, "model has no 'Net'; did you mean 'Nett'?"),
        ("class Net: pass", "model.Net", {"size": 2}, "model.Net raised TypeError"),
        ("Net = 3", "model.Net", {}, "is a int, not a class"),
    ],
)
def test_what_cannot_be_built_says_why(tmp_path, text, path, args, said):
    """The error names the parameter, the class and the cause, which is chained."""
    folder = _write(tmp_path / "own", text)

    with pytest.raises(ConfigError) as caught:
        ClassRef(path, args).build(folder, "model")

    assert said in str(caught.value)
    assert caught.value.parameter.startswith("model[")


def test_arguments_are_what_json_gives_back():
    """Tuples become lists at once, so that a job behaves alike before and after an export."""
    given = {"class_path": "a.B", "args": {"sizes": (1, (2, 3))}}

    ref = ClassRef.parse(given, "model")

    assert ref.args == {"sizes": [1, [2, 3]]}
    assert ClassRef.parse(ref.to_json(), "model") == ref


@pytest.mark.parametrize(
    ("value", "described"),
    [
        ({"class_path": "a.B"}, True),
        ({"path": "a.B"}, True),
        ({"args": {}}, True),
        ({"path": [1.0], "w": [2.0]}, False),
        ({"w": [2.0]}, False),
        ([1.0], False),
    ],
)
def test_arrays_may_have_any_name(value, described):
    """A dict of arrays is not taken for a description because an array is called `path`."""
    assert ClassRef.is_description(value) is described


def test_checkpoint_must_fit_the_model(make, tmp_path):
    """With both, names and shapes are compared before the job starts, and the checkpoint's values are used."""

    def job(**arrays):
        np.savez(tmp_path / "start.npz", **arrays)
        return make(model={"class_path": "model.Net"}, initial_ckpt=str(tmp_path / "start.npz")).definition

    good = job(w=np.array([1.0, 2.0], np.float32)).initial_params()

    np.testing.assert_array_equal(good["w"], np.array([1.0, 2.0], np.float32), strict=True)
    with pytest.raises(ConfigError, match="the model has 'w', the checkpoint has not"):
        job(v=np.ones(2)).initial_params()
    with pytest.raises(ConfigError, match="the checkpoint has 'v', the model has not"):
        job(w=np.ones(2), v=np.ones(2)).initial_params()
    with pytest.raises(ConfigError, match=r"'w' has shape \(3,\), the model has \(2,\)"):
        job(w=np.ones(3)).initial_params()
