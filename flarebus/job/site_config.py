"""SiteConfig: what one site runs and how it answers. Light: worker processes import it."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

from flarebus.errors import ConfigError
from flarebus.job.checks import check_args, check_enum, check_flag, check_int, check_keys, check_number, check_text
from flarebus.job.client_keys import check_beats, check_overrides
from flarebus.job.executor_ref import ExecutorRef
from flarebus.job.filter_ref import FilterRef
from flarebus.job.kinds import ExchangeFormat, FrameworkType, TransferType

__all__ = ["DEFAULT_COMMAND", "SiteConfig"]

DEFAULT_COMMAND = "python3 -u"
# A command that begins with one of these means "Python"; anything more exact is left alone.
_ANY_PYTHON = frozenset({"python", "python3"})
# Overrides that are fields as well: the field is what counts.
_AS_FIELDS = ("launch_timeout", "memory_gc_rounds", "cuda_empty_cache")


@dataclass(frozen=True, slots=True)
class SiteConfig:
    """What one site runs, and how it answers. Values are checked and brought into the form below.

    Args:
        train_script: absolute path of the training script; its own folder comes first in the script's imports. "" where
            executors do all the work.
        train_args: the script's arguments in one string, split as a shell would.
        framework: what the script is written with.
        server_expected_format: what parameters are on their way to the server.
        params_transfer_type: whether answers are whole models or differences.
        memory_gc_rounds: clean up memory every so many rounds; 0 for never.
        cuda_empty_cache: with each clean-up, give cached GPU memory back too.
        launch_external_process: run the script in a process of its own, which the client job starts.
        command: what starts that process; script and arguments come after it. One string, split as a shell would, or
            the words.
        launch_once: one process for the whole job; False: a new one for every task.
        shutdown_timeout: seconds that the process may take to leave at the end of the job, from 0.
        launch_timeout: seconds until the process must have called `flare.init()`, above 0; None for no limit.
        attach: the process is started by somebody else, with the client configuration that the site publishes.
        client_config: changes to the trainer's configuration, in the words of `add_client_config`. Those that are
            fields here, too, go into the fields.
        input_filters: what every received model goes through, in order, before the script sees it.
        output_filters: what every answer goes through, in order, before it leaves the site.
        executors: what does tasks that are not for the script.

    Raises:
        ConfigError: a value is wrong, or does not go with another one; names the field.
    """

    train_script: str = ""
    train_args: str = ""
    framework: FrameworkType = FrameworkType.PYTORCH
    server_expected_format: ExchangeFormat = ExchangeFormat.NUMPY
    params_transfer_type: TransferType = TransferType.FULL
    memory_gc_rounds: int = 0
    cuda_empty_cache: bool = False
    launch_external_process: bool = False
    command: str | tuple[str, ...] = DEFAULT_COMMAND
    launch_once: bool = True
    shutdown_timeout: float = 0.0
    launch_timeout: float | None = 300.0
    attach: bool = False
    client_config: Mapping[str, Any] = field(default_factory=dict)
    input_filters: tuple[FilterRef, ...] = ()
    output_filters: tuple[FilterRef, ...] = ()
    executors: tuple[ExecutorRef, ...] = ()

    def __post_init__(self) -> None:
        overrides = _overrides(self.client_config)
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        given |= {name: overrides.pop(name) for name in _AS_FIELDS if name in overrides}
        checked = {
            "train_script": _check_script(given["train_script"], given["executors"]),
            "train_args": check_args("train_args", given["train_args"]),
            "framework": check_enum("framework", given["framework"], FrameworkType),
            "server_expected_format": check_enum(
                "server_expected_format", given["server_expected_format"], ExchangeFormat
            ),
            "params_transfer_type": check_enum("params_transfer_type", given["params_transfer_type"], TransferType),
            "memory_gc_rounds": check_int("memory_gc_rounds", given["memory_gc_rounds"], minimum=0),
            "cuda_empty_cache": check_flag("cuda_empty_cache", given["cuda_empty_cache"]),
            "launch_external_process": check_flag("launch_external_process", given["launch_external_process"]),
            "command": _check_command(given["command"]),
            "launch_once": check_flag("launch_once", given["launch_once"]),
            "shutdown_timeout": check_number("shutdown_timeout", given["shutdown_timeout"], minimum=0.0),
            "launch_timeout": None
            if given["launch_timeout"] is None
            else check_number("launch_timeout", given["launch_timeout"], above=0.0),
            "attach": check_flag("attach", given["attach"]),
            "client_config": overrides,
            "input_filters": _check_filters("input_filters", given["input_filters"]),
            "output_filters": _check_filters("output_filters", given["output_filters"]),
            "executors": tuple(given["executors"]),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen for everybody else
        self._check_together()

    def _check_together(self) -> None:
        if self.cuda_empty_cache and not self.memory_gc_rounds:
            raise ConfigError("cuda_empty_cache", True, "needs memory_gc_rounds from 1: it is done at these clean-ups")
        if self.launch_external_process and self.attach:
            allowed = "not beside launch_external_process=True: the process is started by the client job, or by others"
            raise ConfigError("attach", True, allowed)
        if self.launch_external_process:
            return
        beside = "; with attach=True somebody else starts the process" if self.attach else ""
        if _words(self.command) != _words(DEFAULT_COMMAND):
            raise ConfigError("command", self.command, f"needs launch_external_process=True{beside}")
        if not self.launch_once:
            raise ConfigError("launch_once", False, f"needs launch_external_process=True{beside}")
        if self.shutdown_timeout and not self.attach:
            raise ConfigError("shutdown_timeout", self.shutdown_timeout, "needs launch_external_process=True")

    @property
    def is_external(self) -> bool:
        """Whether the script runs in a process of its own, whoever starts it."""
        return self.launch_external_process or self.attach

    def command_line(self, python: str) -> list[str]:
        """The words that start the process: `command`, then script and arguments.

        Args:
            python: the interpreter that stands for a plain `python` or `python3` at the beginning of the command.
        """
        words = _words(self.command)
        if words[0] in _ANY_PYTHON:
            words[0] = python
        return [*words, self.train_script, *shlex.split(self.train_args)]

    def with_client_config(self, overrides: Mapping[str, Any]) -> SiteConfig:
        """The same with some more of the trainer's configuration changed; what is said last counts.

        Raises:
            ConfigError: see the class.
        """
        return replace(self, client_config={**self.client_config, **check_overrides("client_config", overrides)})

    def with_input_filter(self, ref: FilterRef) -> SiteConfig:
        """The same with one more filter between a received model and the script."""
        return replace(self, input_filters=(*self.input_filters, ref))

    def with_output_filter(self, ref: FilterRef) -> SiteConfig:
        """The same with one more filter between an answer and the way out."""
        return replace(self, output_filters=(*self.output_filters, ref))

    def with_executor(self, ref: ExecutorRef) -> SiteConfig:
        """The same with one more executor; it comes before the others where both take a task."""
        return replace(self, executors=(ref, *self.executors))

    def to_json(self) -> dict[str, Any]:
        """Plain data; goes into a job folder and over the bus to a worker."""
        values: dict[str, Any] = {}
        for name, value in ((each.name, getattr(self, each.name)) for each in fields(self)):
            if isinstance(value, Enum):
                values[name] = value.value
            elif isinstance(value, tuple):
                values[name] = [each.to_json() if isinstance(each, FilterRef | ExecutorRef) else each for each in value]
            else:
                values[name] = copy.deepcopy(value)
        return values

    @classmethod
    def from_json(cls, data: Mapping[str, Any], parameter: str = "site") -> SiteConfig:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: a key is unknown or missing, or a value is not one of those allowed.
        """
        check_keys(data, [each.name for each in fields(cls)], ["train_script"], parameter)
        given = dict(data)
        for name, kind in (("input_filters", FilterRef), ("output_filters", FilterRef), ("executors", ExecutorRef)):
            place = f"{parameter}[{name!r}]"
            found = given.get(name, [])
            if not isinstance(found, list):
                raise ConfigError(place, found, "a list of descriptions")
            given[name] = [kind.from_json(each, f"{place}[{index}]") for index, each in enumerate(found)]
        try:
            return cls(**given)
        except ConfigError as error:
            name, bracket, rest = error.parameter.partition("[")
            raise ConfigError(f"{parameter}[{name!r}]{bracket}{rest}", error.value, error.allowed) from error


def _overrides(client_config: object) -> dict[str, Any]:
    if not isinstance(client_config, Mapping):
        raise ConfigError("client_config", client_config, f"a dict, not {type(client_config).__name__}")
    found = check_overrides("client_config", client_config)
    interval, timeout = found.get("heartbeat_interval"), found.get("heartbeat_timeout")
    check_beats("client_config['heartbeat_interval']", interval, timeout)
    return found


def _check_script(value: object, executors: object) -> str:
    return "" if value == "" and executors else check_text("train_script", value)


def _check_filters(parameter: str, value: object) -> tuple[FilterRef, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(each, FilterRef) for each in value):
        raise ConfigError(parameter, value, "a tuple of FilterRef")
    return tuple(value)


def _check_command(value: object) -> str | tuple[str, ...]:
    """A command with at least one word: one string, or its words."""
    if isinstance(value, str):
        found: str | tuple[str, ...] = check_args("command", value)
    elif isinstance(value, list | tuple) and all(isinstance(word, str) for word in value):
        found = tuple(value)
    else:
        raise ConfigError("command", value, "a string, or a list of its words")
    words = _words(found)
    if not words or not words[0] or any("\0" in word for word in words):
        raise ConfigError("command", value, f'a program with its arguments, such as "{DEFAULT_COMMAND}"')
    return found


def _words(command: str | tuple[str, ...]) -> list[str]:
    return shlex.split(command) if isinstance(command, str) else list(command)
