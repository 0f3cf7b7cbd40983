"""What options become: the recipe's arguments, or an error in terms of the command line."""

from __future__ import annotations

import sys
from typing import Any

import click
import pytest

from flarebus.errors import ConfigError, UsageError
from flarebus.recipe import FedAvgRecipe, FrameworkType, TransferType
from workflows._options import Options, option_of, with_options
from workflows._plan import plan


def parsed(*argv: str) -> Options:
    """The options of a command line."""
    found: list[Options] = []

    @click.command()
    @with_options
    def command(options: Options) -> int:
        found.append(options)
        return 0

    command.main(list(argv), standalone_mode=False)
    return found[0]


@pytest.mark.parametrize(
    ("given", "names"), [("3", ("site-1", "site-2", "site-3")), ("a, b", ("a", "b")), ("solo", ("solo",))]
)
def test_clients_are_a_number_or_names(given: str, names: tuple[str, ...]) -> None:
    """`--clients` takes how many, or what they are called."""
    assert parsed("--clients", given).clients == names


@pytest.mark.parametrize("given", ["0", "-2"])
def test_no_clients_are_refused(given: str) -> None:
    """A number of sites below one is wrong usage."""
    with pytest.raises(click.UsageError, match="at least 1"):
        parsed(f"--clients={given}")


@pytest.mark.parametrize("given", ["[1]", "{", "3"])
def test_model_args_are_a_json_object(given: str) -> None:
    """Anything else is wrong usage, and the message shows what is meant."""
    with pytest.raises(click.UsageError, match="JSON"):
        parsed("--model-args", given)


@pytest.mark.parametrize(
    ("argv", "quorum"),
    [
        (["--clients", "5"], 5),
        (["--clients", "5", "--clients-per-round", "3"], 3),
        (["--clients", "5", "--clients-per-round", "3", "--min-clients", "2"], 2),
    ],
)
def test_a_round_needs_everybody_unless_told_otherwise(argv: list[str], quorum: int) -> None:
    """The default quorum is everybody who is asked to train."""
    assert plan(parsed(*argv, "--train-script", "x.py")).arguments["min_clients"] == quorum


@pytest.mark.parametrize(
    ("argv", "external", "command", "client_config"),
    [
        ([], False, "python3 -u", {}),
        (["--external"], True, "python3 -u", {}),
        (["--command", "torchrun --standalone"], True, "torchrun --standalone", {}),
        (["--pipe", "file"], True, "python3 -u", {"pipe": {"CLASS_NAME": "file", "ARG": {}}}),
        (
            ["--external", "--pipe", '{"CLASS_NAME": "my.Pipe", "ARG": {"root": "/x"}}'],
            True,
            "python3 -u",
            {"pipe": {"CLASS_NAME": "my.Pipe", "ARG": {"root": "/x"}}},
        ),
    ],
)
def test_scripts_run_in_processes_of_their_own_when_asked(
    argv: list[str], external: bool, command: str, client_config: dict[str, Any]
) -> None:
    """A command or a pipe asks for a process as well as --external does, and both reach the sites."""
    planned = plan(parsed(*argv, "--train-script", __file__, "--framework", "raw"))
    recipe = FedAvgRecipe(**planned.arguments)
    recipe.add_client_config(planned.client_config)

    site = recipe.definition.site_config("site-1")
    assert (site.launch_external_process, site.command, site.client_config) == (external, command, client_config)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--command", "'half"], ('--command "\'half": ', "cannot be split")),
        (["--pipe", "two words"], ("--pipe 'two words': ", "the name of a pipe")),
        (["--pipe", "{}"], ("--pipe [", "'CLASS_NAME' is missing")),
    ],
)
def test_wrong_process_is_said_in_terms_of_the_command_line(argv: list[str], said: tuple[str, str]) -> None:
    """A command or pipe that cannot be is named by its option."""
    planned = plan(parsed(*argv, "--train-script", __file__, "--framework", "raw"))

    with pytest.raises(ConfigError) as caught:
        FedAvgRecipe(**planned.arguments).add_client_config(planned.client_config)

    assert option_of(caught.value).startswith(said[0])
    assert said[1] in option_of(caught.value)


@pytest.mark.parametrize(
    ("argv", "framework"),
    [
        (["--model", "net:Net"], FrameworkType.PYTORCH),
        (["--initial-ckpt", "a.pt"], FrameworkType.PYTORCH),
        (["--initial-ckpt", "a.npz"], FrameworkType.NUMPY),
        (["--initial-ckpt", "a.keras"], FrameworkType.TENSORFLOW),
        (["--model", "net:make_net", "--initial-ckpt", "a.weights.h5"], FrameworkType.TENSORFLOW),
        (["--model", "net:Net", "--framework", "raw"], FrameworkType.RAW),
    ],
)
def test_the_framework_is_guessed_from_the_model(argv: list[str], framework: FrameworkType) -> None:
    """A class or a .pt file means PyTorch, files of Keras TensorFlow, others NumPy, and what is said counts."""
    assert plan(parsed("--train-script", "x.py", *argv)).arguments["framework"] is framework


def test_every_option_reaches_the_recipe() -> None:
    """What is asked for on the command line is what the recipe is given, under the recipe's own names."""
    argv = (
        "--train-script x.py --train-args=--epochs=2 --model net:Net --model-args {"
        + '"width":3} --rounds 7 --key-metric loss --key-metric-mode min --patience 3 --transfer-type DIFF '
        "--exclude-vars bn --round-timeout 9 --grace 1 --offload --seed 5 --deterministic --name n "
        "--clients-per-round 2 --min-clients 2"
    )
    found = plan(parsed(*argv.split(), "--stop-cond", "loss < 0.1"))

    assert found.arguments == {
        "name": "n",
        "min_clients": 2,
        "num_rounds": 7,
        "params_transfer_type": TransferType.DIFF,
        "key_metric": "loss",
        "key_metric_mode": "min",
        "stop_cond": "loss < 0.1",
        "patience": 3,
        "exclude_vars": "bn",
        "enable_tensor_disk_offload": True,
        "clients_per_round": 2,
        "round_timeout": 9.0,
        "seed": 5,
        "deterministic": True,
        "wait_time_after_min_received": 1.0,
        "train_script": "x.py",
        "train_args": "--epochs=2",
        "model": {"class_path": "net:Net", "args": {"width": 3}},
        "initial_ckpt": None,
        "framework": FrameworkType.PYTORCH,
    }
    assert found.measure is None


def test_the_digits_are_a_job_that_the_recipe_takes() -> None:
    """Without a script the plan is the digits, and its arguments make a recipe."""
    found = plan(parsed("--clients", "a,b"))

    assert FedAvgRecipe(**found.arguments).name == "fedavg"
    assert "--sites a,b" in found.arguments["train_args"]
    assert found.site_metric == "local_accuracy"


@pytest.mark.parametrize(
    "argv",
    [
        ["--model", "net:Net"],
        ["--initial-ckpt", "a.npy"],
        ["--train-script", "x.py", "--model-args", '{"a": 1}'],
    ],
)
def test_options_that_do_not_go_together(argv: list[str]) -> None:
    """A model without a script, or arguments without a model, are refused by the option's name."""
    with pytest.raises(UsageError, match=argv[-2]):
        plan(parsed(*argv))


def test_the_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """When scikit-learn is missing the message says what to install."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)

    with pytest.raises(UsageError, match=r"flarebus\[sklearn\]"):
        plan(parsed())


@pytest.mark.parametrize(
    ("parameter", "value", "shown"),
    [
        ("num_rounds", 0, "--rounds 0: at least 1"),
        ("min_clients", 9, "--min-clients 9: at least 1"),
        ('model["class_path"]', 9, "--model 9: at least 1"),
        ('model["args"]', 9, "--model-args 9: at least 1"),
        ("aggregator", 9, "aggregator=9: at least 1"),
    ],
)
def test_errors_name_the_option(parameter: str, value: Any, shown: str) -> None:
    """A parameter of the recipe is called by the option that sets it, where there is one."""
    assert option_of(ConfigError(parameter, value, "at least 1")) == shown
