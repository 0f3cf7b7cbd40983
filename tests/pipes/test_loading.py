"""Pipes are found by name or path, and what does not fit is named with its class and the part that is wrong."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from flarebus_pipes.memory_pipe import MemoryPipe

from flarebus.errors import ConfigError
from flarebus.pipes import ExportMode, Message, Mode, Pipe
from flarebus.pipes.loading import known_pipes, load_pipe_class, make_pipe

HERE = __name__


class Whole(Pipe):
    """Implements everything; its constructor asks for some of what the client job knows."""

    def __init__(self, mode: Mode | str, folder: str, site_name: str = "", *, cell: object = None) -> None:
        super().__init__(mode)
        self.given = (folder, site_name, cell)

    def open(self, name: str) -> None:
        """Nothing."""

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Nothing."""
        return True

    def receive(self, timeout: float | None = None) -> Message | None:
        """Nothing."""
        return None

    def clear(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def export(self, side: ExportMode) -> tuple[str, dict[str, Any]]:
        """Nothing."""
        return "", {}


class Half(Pipe):
    """Two methods are still to be written."""

    open, receive, close, export = Whole.open, Whole.receive, Whole.close, Whole.export


class Impatient(MemoryPipe):
    """Its receive knows no timeout."""

    def receive(self) -> Message | None:  # type: ignore[override]
        """Without the argument of the contract."""
        return None


class Fails(MemoryPipe):
    """Cannot be made."""

    def __init__(self, mode: Mode | str) -> None:
        super().__init__(mode)
        raise OSError("no such device")


class Liberal(MemoryPipe):
    """Takes whatever it is given."""

    def __init__(self, mode: Mode | str, **options: Any) -> None:
        super().__init__(mode)
        self.options = options


class Stranger:
    """No pipe at all."""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file can be imported under the name it has, however the tests were collected."""
    monkeypatch.setitem(sys.modules, "my_pipes", sys.modules[__name__])


def test_pipe_is_found_by_its_entry_point_name() -> None:
    """An installed pipe is found by name, and listed with where it comes from."""
    assert load_pipe_class("memory") is MemoryPipe
    assert known_pipes()["memory"].startswith("flarebus_pipes.memory_pipe:MemoryPipe (flarebus ")


@pytest.mark.parametrize("path", ["my_pipes:Whole", "my_pipes.Whole"])
def test_pipe_is_found_by_its_path(path: str) -> None:
    """A job that brings its own pipe names it by its path, with a colon or a dot."""
    assert load_pipe_class(path) is Whole


def test_path_of_nvflare_means_the_pipe_of_that_kind_here() -> None:
    """Configurations written for NVFlare name its classes; nothing of it is imported."""
    assert load_pipe_class("nvflare.fuel.utils.pipe.memory_pipe.MemoryPipe") is MemoryPipe


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("memori", r"did you mean 'memory'\? known pipes: .*memory from flarebus_pipes\.memory_pipe:MemoryPipe \(flar"),
        ("no_such_module.SomePipe", r"cannot load no_such_module\.SomePipe: No module named .*known pipes: .*memory"),
        ("my_pipes:Nothing", r"cannot load my_pipes:Nothing: .*has no attribute 'Nothing'"),
        ("my_pipes.Stranger", r"Stranger is not a pipe: derive it from flarebus\.pipes\.Pipe"),
        ("my_pipes.Half", r"Half does not implement clear and send"),
        ("my_pipes.Impatient", r"Impatient\.receive cannot be called as receive\(self, timeout.*too many positional"),
        ("my_pipes.HERE", "is a str, not a class"),
        ("", "the name of a pipe"),
        (None, "the name of a pipe"),
    ],
)
def test_what_is_no_pipe_says_why(name: Any, said: str) -> None:
    """A name that leads nowhere, or to no pipe, or to half a pipe, is answered with what is wrong with it."""
    with pytest.raises(ConfigError, match=said):
        load_pipe_class(name)


def test_module_that_breaks_while_it_is_imported_is_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the module of a plug-in raises is told with its path, and chained."""
    tmp_path.joinpath("broken_pipe.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    with pytest.raises(ConfigError, match=r"cannot load broken_pipe\.BrokenPipe: ZeroDivisionError") as raised:
        load_pipe_class("broken_pipe.BrokenPipe")

    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_constructor_gets_what_it_asks_for_by_name() -> None:
    """What the configuration gives wins, the context fills in what the signature names, and nothing else goes in."""
    context = {"site_name": "site-1", "token": "job", "cell": "a cell"}

    pipe = make_pipe("my_pipes.Whole", {"folder": "f", "site_name": "mine"}, context, "PASSIVE")

    assert isinstance(pipe, Whole)
    assert pipe.mode is Mode.PASSIVE
    assert pipe.given == ("f", "mine", "a cell")


def test_mode_of_the_configuration_is_passed_over() -> None:
    """A configuration for the trainer's end also makes the client job's: who makes an end knows which it is."""
    assert make_pipe("memory", {"mode": "ACTIVE"}, {}, Mode.PASSIVE).mode is Mode.PASSIVE


def test_constructor_that_takes_anything_gets_the_arguments_but_no_context() -> None:
    """Options without names are for the configuration; the context is for who asks by name."""
    pipe = make_pipe("my_pipes.Liberal", {"port": 7}, {"token": "job"}, Mode.ACTIVE)

    assert isinstance(pipe, Liberal)
    assert pipe.options == {"port": 7}


def test_argument_the_constructor_does_not_take_is_named() -> None:
    """A misspelt argument is answered with the nearest one and with all there are."""
    with pytest.raises(ConfigError, match=r"ARG='tokn': did you mean 'token'\? .*MemoryPipe takes token"):
        make_pipe("memory", {"tokn": "x"}, {}, Mode.ACTIVE)


def test_argument_that_is_missing_is_named() -> None:
    """What the constructor needs and nobody gave is named."""
    with pytest.raises(ConfigError, match=r"Whole also needs folder"):
        make_pipe("my_pipes.Whole", {}, {}, Mode.ACTIVE)


def test_constructor_that_raises_is_named_with_its_exception() -> None:
    """What a constructor raised is told with the class, and chained."""
    with pytest.raises(ConfigError, match=r"the constructor of .*Fails raised OSError: no such device") as raised:
        make_pipe("my_pipes.Fails", {}, {}, Mode.ACTIVE)

    assert isinstance(raised.value.__cause__, OSError)


def test_wrong_mode_is_refused() -> None:
    """A mode that is none is told with those there are."""
    with pytest.raises(ConfigError, match="ACTIVE or PASSIVE"):
        make_pipe("memory", {}, {}, "SIDEWAYS")
