"""Trainers whose pipe cannot be made, breaks, or has no room: the site says which and why, and the round goes on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.system.observed import ONE, ObservedRun

# Beside the script, as a job that brings its own pipe has it.
PLUG_IN = """
from flarebus.pipes import Pipe
from flarebus_pipes.file_pipe import FilePipe


class Whole(FilePipe):
    pass


class NoPipe:
    pass


class Raises(FilePipe):
    def __init__(self, mode, site_name):
        raise RuntimeError(f"no queue for {site_name}")


class Half(Pipe):
    def open(self, name): ...
    def send(self, message, timeout=None): ...
    def receive(self, timeout=None): ...
    def clear(self): ...
    def close(self): ...


class Narrow(FilePipe):
    def send(self, message): ...


class Closed(FilePipe):
    def open(self, name):
        raise OSError(f"the queue {name} is closed")
"""


def start(observed: ObservedRun, pipe: Any, script: str = ONE.format(body=""), **given: Any) -> None:
    """Two sites with trainers; that of site-1 has `pipe`."""
    (observed.folder / "my_pipes.py").write_text(PLUG_IN)
    observed.start(
        script,
        launch_external_process=True,
        prepare=lambda recipe: recipe.add_client_config({"pipe": pipe}, clients=["site-1"]),
        **given,
    )


@pytest.mark.parametrize("pipe", ["file", "my_pipes.Whole", "my_pipes:Whole"])
def test_a_pipe_of_ones_own(observed: ObservedRun, pipe: str) -> None:
    """A pipe that the job brings beside its script is found by the client job and by the trainer."""
    start(observed, pipe)

    assert observed.end() == "completed", observed.reason
    assert observed.model() == [2.0] * 4
    assert [line["accepted"] for line in observed.rounds()] == [["site-1", "site-2"]] * 2
    assert list(observed.run_dir.glob("site-*/*/*")) == []


@pytest.mark.parametrize(
    ("pipe", "said"),
    [
        ("fiel", "pipe='fiel': did you mean 'file'? known pipes: cell from"),
        ("my_pipe.Whole", "cannot load my_pipe.Whole: No module named 'my_pipe'"),
        ("my_pipes.Hole", "cannot load my_pipes.Hole: module 'my_pipes' has no attribute 'Hole'"),
        ("my_pipes.NoPipe", "my_pipes.NoPipe is not a pipe: derive it from flarebus.pipes.Pipe"),
        ("my_pipes.Half", "my_pipes.Half does not implement export"),
        ("my_pipes.Narrow", "my_pipes.Narrow.send cannot be called as send(self, message"),
        ("my_pipes.Raises", "the constructor of my_pipes.Raises raised RuntimeError: no queue for site-1"),
        ("my_pipes.Closed", "the queue task is closed"),
        ({"CLASS_NAME": "file", "ARG": {"root": "/x"}}, "ARG='root': did you mean 'root_path'?"),
        ({"CLASS_NAME": "file", "ARG": {"file_check_interval": "soon"}}, "FilePipe raised TypeError"),
        ({"CLASS_NAME": "file", "ARG": {"file_check_interval": 61}}, "file_check_interval=61"),
        ({"CLASS_NAME": "file", "ARG": {"root_path": "/proc/pipes"}}, "/proc/pipes"),
    ],
)
def test_a_pipe_that_cannot_be_made(observed: ObservedRun, pipe: Any, said: str) -> None:
    """The site fails with the class and what is wrong with it, its log says so too, and the round goes on."""
    start(observed, pipe, min_clients=1, num_rounds=1)

    assert observed.end() == "completed", observed.reason
    reason = observed.complaints()["site-1"]
    assert reason.startswith("its trainer could not be started: ")
    assert said in reason
    assert reason in observed.log("site-1")
    assert f"site-1 failed: {reason}" in observed.log("server")
    assert "Traceback" not in observed.log("server")
    assert observed.rounds()[0]["accepted"] == ["site-2"]
