"""What the program runs: the digits, or somebody's own script.

A plan is the arguments of the recipe and the way to look at the outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flarebus.errors import UsageError
from flarebus.job.file_names import KERAS_SUFFIXES, suffix_of
from flarebus.job.kinds import FrameworkType, TransferType
from workflows._options import Options

__all__ = ["Plan", "plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe's arguments and what to make of the outcome.

    Args:
        arguments: for the recipe.
        client_config: for its `add_client_config`.
        site_metric: the metric that a site's line shows in table and plot.
        measure: model file -> metrics of the finished model; None where only the sites can tell.
    """

    arguments: dict[str, Any]
    client_config: dict[str, Any]
    site_metric: str
    measure: Callable[[Path], dict[str, float]] | None


def plan(options: Options) -> Plan:
    """Choose by whether there is a training script.

    Raises:
        UsageError: options that do not go together, or the digits are asked for without scikit-learn.
    """
    common = {
        "min_clients": options.quorum,
        "num_rounds": options.rounds,
        "params_transfer_type": TransferType(options.transfer_type),
        "key_metric": options.key_metric,
        "key_metric_mode": options.key_metric_mode,
        "stop_cond": options.stop_cond,
        "patience": options.patience,
        "exclude_vars": options.exclude_vars,
        "enable_tensor_disk_offload": options.offload,
        "clients_per_round": options.clients_per_round,
        "round_timeout": options.round_timeout,
        "seed": options.seed,
        "deterministic": options.deterministic,
    }
    if options.name is not None:
        common["name"] = options.name
    if options.grace is not None:
        common["wait_time_after_min_received"] = options.grace
    if options.external or options.command is not None or options.pipe is not None:
        common["launch_external_process"] = True
    if options.command is not None:
        common["command"] = options.command
    common |= options.own
    return _own_script(options, common) if options.train_script is not None else _digits(options, common)


def _own_script(options: Options, common: dict[str, Any]) -> Plan:
    if options.model_args and options.model is None:
        raise UsageError("--model-args: there is no --model to give them to")
    model = None if options.model is None else {"class_path": options.model, "args": options.model_args}
    framework = options.framework
    if framework is None:
        ckpt = suffix_of(Path(options.initial_ckpt or ""))
        of_torch = model is not None or ckpt in (".pt", ".pth")
        framework = "tensorflow" if ckpt in KERAS_SUFFIXES else "pytorch" if of_torch else "numpy"
    arguments = common | {
        "train_script": options.train_script,
        "train_args": options.train_args,
        "model": model,
        "initial_ckpt": options.initial_ckpt,
        "framework": FrameworkType(framework),
    }
    return Plan(arguments, _client_config(options), options.key_metric, None)


def _client_config(options: Options) -> dict[str, Any]:
    return {} if options.pipe is None else {"pipe": options.pipe}


def _digits(options: Options, common: dict[str, Any]) -> Plan:
    for option, value in (("--model", options.model), ("--initial-ckpt", options.initial_ckpt)):
        if value is not None:
            raise UsageError(f"{option} {value}: belongs to a --train-script of your own; the digits bring their model")
    try:
        from workflows import _digits

        digits = _digits.load_digits(options.seed)
    except ModuleNotFoundError as error:
        raise UsageError(f"the digits need scikit-learn ({error}): pip install 'flarebus[sklearn]'") from None
    arguments = common | {
        "train_script": str(Path(__file__).with_name("_scripts") / "digits_client.py"),
        "train_args": f"--sites {','.join(options.clients)} --seed {options.seed} {options.train_args}".strip(),
        "model": _digits.initial_model(options.seed),
        "framework": FrameworkType.NUMPY,
    }

    def measure(model_file: Path) -> dict[str, float]:
        from safetensors.numpy import load_file

        return {"accuracy": _digits.accuracy(load_file(model_file), digits.test_x, digits.test_y)}

    return Plan(arguments, _client_config(options), "local_accuracy", measure)
