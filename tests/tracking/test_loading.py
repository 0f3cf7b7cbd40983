"""Trackers by name: what is unknown, not installed or set wrongly is said when the recipe is made."""

from __future__ import annotations

import importlib.abc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flarebus.errors import ConfigError
from flarebus.job.tracking_ref import TrackingRef
from flarebus.tracking.loading import check_installed, check_tracking, load_tracker
from tests.tracking.conftest import FAKE

ROOT = Path(__file__).parents[2]
NAMES = ("mlflow", "tensorboard", "wandb")


class Missing(importlib.abc.MetaPathFinder):
    """As if some packages were not installed."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {fullname!r}")


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Keep packages from being found, also those that another test has imported."""
    monkeypatch.setattr(sys, "meta_path", [Missing(*names), *sys.meta_path])
    for module in [module for module in sys.modules if module.partition(".")[0] in names]:
        monkeypatch.delitem(sys.modules, module)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_library_is_named_with_the_extra_that_brings_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is a line that can be pasted into a shell."""
    hide(monkeypatch, name)

    with pytest.raises(ConfigError) as caught:
        check_installed(TrackingRef(name, {}))

    said = f"tracking_type={name!r}: needs {name}, which is not installed: pip install 'flarebus[{name}]'"
    assert str(caught.value) == said


@pytest.mark.parametrize("name", NAMES)
def test_no_library_is_loaded_to_check_a_recipe(name: str) -> None:
    """Finding a tracker and checking its settings takes no import of what it works with."""
    code = (
        "import sys\n"
        "from flarebus.recipe import add_experiment_tracking\n"
        "from flarebus.job.tracking_ref import TrackingRef\n"
        "from flarebus.tracking.loading import check_tracking\n"
        f"check_tracking(TrackingRef({name!r}, {{}}))\n"
        f"assert not {{'mlflow', 'tensorboard', 'wandb', 'sqlalchemy', 'PIL'}} & set(sys.modules)\n"
    )

    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tensorbord", "did you mean 'tensorboard'? known tracking_types: mlflow from "),
        ("comet", "known tracking_types: mlflow from flarebus.tracking.mlflow:MLflowTracker"),
        ("flarebus.tracking.nothing:X", "cannot load flarebus.tracking.nothing:X"),
        ("flarebus.tracking.thread:TrackerThread", "TrackerThread is no flarebus.tracking.Tracker"),
        ("flarebus.tracking:Tracker", "Tracker lacks the methods artefact, check, close"),
        ("", "the name of a tracking_type"),
    ],
)
def test_what_is_no_tracker_is_refused_with_those_there_are(name: str, said: str) -> None:
    """By name or path."""
    with pytest.raises(ConfigError) as caught:
        load_tracker(name)

    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        (
            "mlflow",
            {"tracking_url": "x"},
            "tracking_config['tracking_url']='***': unknown key; did you mean 'tracking_uri'?",
        ),
        (
            "mlflow",
            {"kw_args": {"runname": "x"}},
            "['kw_args']['runname']='***': unknown key; did you mean 'run_name'?",
        ),
        ("mlflow", {"kw_args": "x"}, "a dict with any of experiment_name, "),
        ("mlflow", {"log_artifacts": "no"}, "['log_artifacts']='***': True or False; it is str"),
        ("mlflow", {"kw_args": {"run_tags": {"a": [1]}}}, "['run_tags']='***': a dict of name -> "),
        ("wandb", {"wandb_args": {"projekt": "x"}}, "did you mean 'project'?"),
        ("wandb", {"mode": "shared"}, "['mode']='***': one of online, offline"),
        ("wandb", {"wandb_args": {"tags": "a"}}, "['tags']='***': a list of strings"),
        ("tensorboard", {"log_dir": "x"}, "unknown key; known: tb_folder"),
        ("tensorboard", {"tb_folder": ""}, "['tb_folder']='***': a string"),
        (FAKE, {"url": "x"}, "did you mean 'uri'?"),
    ],
)
def test_wrong_settings_are_named_with_the_nearest_right_ones(name: str, config: dict[str, Any], said: str) -> None:
    """Values are not shown: one may be a key that was put into the wrong place."""
    with pytest.raises(ConfigError) as caught:
        check_tracking(TrackingRef(name, config))

    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("tensorboard", {"tb_folder": "events"}),
        ("mlflow", {"tracking_uri": None, "artifact_location": "/x", "kw_args": {"experiment_tags": {"a": 1}}}),
        ("wandb", {"mode": "offline", "wandb_args": {"project": "p", "tags": ["a"], "config": {"b": 0.5}}}),
    ],
)
def test_right_settings_pass(name: str, config: dict[str, Any]) -> None:
    """None is as good as leaving a setting out."""
    check_tracking(TrackingRef(name, config))
