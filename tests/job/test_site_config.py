"""What one site runs: checked values, the command that starts its process, and the way through JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from flarebus.errors import ConfigError
from flarebus.job.class_ref import ClassRef
from flarebus.job.filter_ref import FilterRef
from flarebus.job.kinds import ExchangeFormat, FrameworkType, TransferType
from flarebus.job.site_config import SiteConfig

EVERYTHING: dict[str, Any] = {
    "train_script": "/code/client.py",
    "train_args": "--lr 1",
    "framework": FrameworkType.RAW,
    "server_expected_format": ExchangeFormat.PYTORCH,
    "params_transfer_type": TransferType.DIFF,
    "memory_gc_rounds": 2,
    "cuda_empty_cache": True,
    "launch_external_process": True,
    "command": ("torchrun", "--standalone"),
    "launch_once": False,
    "shutdown_timeout": 3.0,
    "launch_timeout": None,
    "client_config": {"max_resends": None, "pipe": {"CLASS_NAME": "file", "ARG": {"root_path": "/x"}}},
    "input_filters": (FilterRef(ClassRef("mine.Noise", {"scale": 0.5}), ("train",)),),
    "output_filters": (FilterRef(ClassRef("mine.Clip", {})), FilterRef(ClassRef("mine.Noise", {}), ("train", "eval"))),
}


@pytest.mark.parametrize("changes", [{}, {"launch_external_process": False, "command": "python3 -u", "attach": True}])
def test_comes_back_from_json_equal(changes: dict[str, Any]) -> None:
    """Every field survives the way through a job folder or over the bus."""
    site = SiteConfig(**(EVERYTHING | ({**changes, "launch_once": True} if changes else {})))

    assert SiteConfig.from_json(json.loads(json.dumps(site.to_json()))) == site


def test_what_json_leaves_out_has_its_default() -> None:
    """Only the script has to be named."""
    assert SiteConfig.from_json({"train_script": "x.py"}) == SiteConfig("x.py")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("python3 -u", ["/bin/this-python", "-u"]),
        ("python", ["/bin/this-python"]),
        ("/usr/bin/python3 -u", ["/usr/bin/python3", "-u"]),
        ("python3.11 -u", ["python3.11", "-u"]),
        ("torchrun --nproc-per-node 2", ["torchrun", "--nproc-per-node", "2"]),
        ("env 'A=two words' python3", ["env", "A=two words", "python3"]),
        (["python3", "-X", "a b"], ["/bin/this-python", "-X", "a b"]),
    ],
)
def test_command_line_is_command_script_and_arguments(command: Any, words: list[str]) -> None:
    """A plain Python is the running one; everything else is taken as it stands."""
    site = SiteConfig("/code/my client.py", "--name 'two words' -v", launch_external_process=True, command=command)

    expected = [*words, "/code/my client.py", "--name", "two words", "-v"]
    assert site.command_line("/bin/this-python") == expected
    assert site.command_line("/bin/this-python") == expected


def test_default_command_may_be_spelt_out_for_a_script_inside() -> None:
    """The default in any spelling asks for no process."""
    assert not SiteConfig("x.py", command=("python3", "-u")).is_external


@pytest.mark.parametrize(
    ("changes", "parameter", "said"),
    [
        ({"train_script": 3}, "train_script", "a string"),
        ({"framework": "jax"}, "framework", "FrameworkType.NUMPY"),
        ({"cuda_empty_cache": True}, "cuda_empty_cache", "needs memory_gc_rounds"),
        ({"command": "'half"}, "command", "cannot be split"),
        ({"command": " "}, "command", "a program"),
        ({"command": ("",)}, "command", "a program"),
        ({"command": ["a\0b"]}, "command", "a program"),
        ({"command": 3}, "command", "list of its words"),
        ({"command": "torchrun"}, "command", "needs launch_external_process=True"),
        ({"launch_once": False}, "launch_once", "needs launch_external_process=True"),
        ({"shutdown_timeout": 1}, "shutdown_timeout", "needs launch_external_process=True"),
        ({"launch_once": False, "attach": True}, "launch_once", "needs launch_external_process=True"),
        ({"attach": True, "launch_external_process": True}, "attach", "not beside"),
        ({"shutdown_timeout": math.inf}, "shutdown_timeout", "finite"),
        ({"launch_timeout": 0}, "launch_timeout", "above 0"),
        ({"input_filters": ({"class_path": "a.B"},)}, "input_filters", "FilterRef"),
        ({"client_config": [1]}, "client_config", "a dict"),
        ({"client_config": {"max_resend": 1}}, "client_config['max_resend']", "did you mean 'max_resends'?"),
        ({"client_config": {"launch_timeout": -1}}, "client_config['launch_timeout']", "above 0"),
    ],
    ids=str,
)
def test_wrong_value_is_named(changes: dict[str, Any], parameter: str, said: str) -> None:
    """A wrong value is refused where the configuration is made, and where it is read, by its field."""
    with pytest.raises(ConfigError) as made:
        SiteConfig(**({"train_script": "x.py"} | changes))
    with pytest.raises(ConfigError) as read:
        SiteConfig.from_json({"train_script": "x.py"} | changes, "sites['a']")

    assert (made.value.parameter, said in str(made.value)) == (parameter, True)
    name = parameter.partition("[")[0]
    assert read.value.parameter.startswith(f"sites['a'][{name!r}]")


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        ({}, "a list"),
        ([3], "a dict"),
        ([{"args": {}}], "'class_path' is missing"),
        ([{"class_path": "a.B", "task": ["x"]}], "did you mean 'tasks'"),
        ([{"class_path": "a.B", "tasks": []}], "names of tasks"),
        ([{"class_path": "a.B", "tasks": "train"}], "names of tasks"),
        ([{"class_path": "no path", "tasks": ["x"]}], "pkg.mod.Class"),
    ],
    ids=str,
)
def test_wrong_filter_in_json_is_named(filters: Any, said: str) -> None:
    """A mistake in the description of a filter says where it stands."""
    with pytest.raises(ConfigError, match=r"site\['output_filters'\]") as caught:
        SiteConfig.from_json({"train_script": "x.py", "output_filters": filters})

    assert said in str(caught.value)


def test_overrides_that_are_fields_go_into_the_fields() -> None:
    """There is one truth: who reads the field sees what the override says."""
    site = SiteConfig("x.py").with_client_config(
        {"external_pre_init_timeout": 9, "client_memory_gc_rounds": 3, "cuda_empty_cache": True, "max_resends": 1}
    )

    assert (site.launch_timeout, site.memory_gc_rounds, site.cuda_empty_cache) == (9.0, 3, True)
    assert site.client_config == {"max_resends": 1}


def test_overrides_add_up_and_the_last_one_counts() -> None:
    """A second call changes what it names and keeps the rest; aliases are the same key."""
    site = SiteConfig("x.py").with_client_config({"HEARTBEAT_TIMEOUT": 20, "max_resends": 1})

    again = site.with_client_config({"heartbeat_timeout": 30.0, "train_task_name": "fit"})

    assert again.client_config == {"heartbeat_timeout": 30.0, "max_resends": 1, "train_task_name": "fit"}
    assert site.client_config == {"heartbeat_timeout": 20.0, "max_resends": 1}


def test_heartbeats_are_checked_with_what_was_said_before() -> None:
    """Interval and timeout have to fit, whichever call they came with."""
    site = SiteConfig("x.py").with_client_config({"heartbeat_interval": 0.5})

    assert site.with_client_config({"heartbeat_timeout": 2}).client_config["heartbeat_timeout"] == 2.0
    with pytest.raises(ConfigError, match="less than the heartbeat timeout, 2 s"):
        SiteConfig("x.py").with_client_config({"heartbeat_timeout": 2})
