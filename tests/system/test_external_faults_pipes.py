"""Trainers whose pipe cannot be made, breaks, or has no room: the site says which and why, and the round goes on."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flarebus.recipe import FedAvgRecipe
from tests.system.observed import ONE, ObservedRun
from tests.system.test_faults_disk import FULL, MB, SmallDisk

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


WRONG: dict[str, tuple[Any, str]] = {
    "misspelt": ("fiel", "pipe='fiel': did you mean 'file'? known pipes: cell from"),
    "no-module": ("my_pipe.Whole", "cannot load my_pipe.Whole: No module named 'my_pipe'"),
    "no-class": ("my_pipes.Hole", "cannot load my_pipes.Hole: module 'my_pipes' has no attribute 'Hole'"),
    "no-pipe": ("my_pipes.NoPipe", "my_pipes.NoPipe is not a pipe: derive it from flarebus.pipes.Pipe"),
    "half": ("my_pipes.Half", "my_pipes.Half does not implement export"),
    "narrow": ("my_pipes.Narrow", "my_pipes.Narrow.send cannot be called as send(self, message"),
    "raises": ("my_pipes.Raises", "the constructor of my_pipes.Raises raised RuntimeError: no queue for raises"),
    "closed": ("my_pipes.Closed", "the queue metric is closed"),
    "arg": ({"CLASS_NAME": "file", "ARG": {"root": "/x"}}, "ARG='root': did you mean 'root_path'?"),
    "arg-type": ({"CLASS_NAME": "file", "ARG": {"file_check_interval": "soon"}}, "FilePipe raised TypeError"),
    "arg-value": ({"CLASS_NAME": "file", "ARG": {"file_check_interval": 61}}, "file_check_interval=61"),
    "arg-place": ({"CLASS_NAME": "file", "ARG": {"root_path": "/proc/pipes"}}, "/proc/pipes"),
}


def test_pipes_that_cannot_be_made(observed: ObservedRun) -> None:
    """Each site fails with the class and what is wrong with it, its log says so too, and the round goes on."""
    (observed.folder / "my_pipes.py").write_text(PLUG_IN)

    def prepare(recipe: FedAvgRecipe) -> None:
        for site, (pipe, _) in WRONG.items():
            recipe.add_client_config({"pipe": pipe}, clients=[site])

    sites = ["good", *WRONG]
    observed.start(
        ONE.format(body=""),
        sites,
        min_clients=1,
        launch_external_process=True,
        per_site_config={site: {} for site in sites},
        prepare=prepare,
    )

    assert observed.end() == "completed", observed.reason
    assert [line["accepted"] for line in observed.rounds()] == [["good"]] * 2
    complaints = observed.complaints()
    assert complaints.keys() == WRONG.keys()
    for site, (_, said) in WRONG.items():
        assert complaints[site].startswith("its trainer could not be started: ")
        assert said in complaints[site]
        assert complaints[site] in observed.log(site)
        assert f"{site} failed: {complaints[site]}" in observed.log("server")
    assert "Traceback" not in observed.log("server")


def on_folder(path: Path) -> dict[str, Any]:
    """A pipe through this folder."""
    return {"CLASS_NAME": "file", "ARG": {"root_path": str(path)}}


# Takes the shared folder away, once.
VANISHES = """
    import os, shutil
    if model.current_round == 1 and os.path.basename(os.getcwd()) == "site-1" and not os.path.exists("taken"):
        open("taken", "w").close()
        shutil.rmtree({folder!r})
"""


def test_the_shared_folder_vanishes(observed: ObservedRun) -> None:
    """When the shared folder is taken away under a trainer, another one does the task through a new folder; the site
    says why."""
    folder = observed.folder / "shared"
    script = ONE.format(body=VANISHES.format(folder=str(folder)))
    start(observed, on_folder(folder), script, num_rounds=3)

    assert observed.end() == "completed", observed.reason
    assert observed.model() == [3.0] * 4
    assert [line["accepted"] for line in observed.rounds()] == [["site-1", "site-2"]] * 3
    assert str(folder) in observed.log("site-1")
    assert list(folder.iterdir()) == []


def test_the_shared_folder_vanishes_for_good(observed: ObservedRun) -> None:
    """A site that cannot have its shared folder back fails with its name, and the round goes on without it."""
    folder = observed.folder / "shared"
    body = VANISHES.format(folder=str(folder)).rstrip()
    script = ONE.format(body=f"{body}\n        open({str(folder)!r}, 'w').close()\n")
    start(observed, on_folder(folder), script, min_clients=1, num_rounds=3)

    assert observed.end() == "completed", observed.reason
    assert observed.model() == [3.0] * 4
    assert [line["accepted"] for line in observed.rounds()] == [["site-1", "site-2"], ["site-2"], ["site-2"]]
    reason = observed.complaints()["site-1"]
    assert reason.startswith("its trainer could not be started: ")
    assert str(folder) in reason
    assert reason in observed.log("site-1")
    assert f"site-1 failed: {reason}" in observed.log("server")


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    """A disk of 16 MiB."""
    made = SmallDisk(tmp_path / "disk", monkeypatch)
    try:
        if not made.is_mounted:
            pytest.skip("no small file system can be mounted here")
        yield made
    finally:
        made.close()


def failed(observed: ObservedRun, *said: str) -> None:
    """Site-1 failed in every round with all this in its reason, in its log too; site-2 did all the work."""
    assert observed.end() == "completed", observed.reason
    rounds = observed.rounds()
    assert set(observed.model()) == {float(len(rounds))}
    assert [line["accepted"] for line in rounds] == [["site-2"]] * len(rounds)
    reason = observed.complaints()["site-1"]
    for words in said:
        assert words in reason
    assert f"site-1 failed: {reason}" in observed.log("server")
    assert reason in observed.log("site-1")


def test_no_room_for_the_task(observed: ObservedRun, disk: SmallDisk) -> None:
    """When the disk of the shared folder has no room for the model, the site says so in each round."""
    start(observed, on_folder(disk.folder / "shared"), min_clients=1, size=5 * MB)

    failed(observed, "the task could not be handed to its trainer", FULL)


def test_no_room_for_the_result(observed: ObservedRun, disk: SmallDisk) -> None:
    """When it has room for the model and not for the result beside it, `flare.send` fails with that."""
    script = ONE.format(body="state = {name: model.params['w'].copy() for name in 'mv'}")
    script = script.replace("metrics=", "optimizer_params=state, metrics=")
    start(observed, on_folder(disk.folder / "shared"), script, min_clients=1, size=3 * MB // 2)

    failed(observed, "its trainer process ended with exit code 1", FULL)
    assert "in send" in observed.log("site-1")


# Waits in its second round until there is a file.
GATE = """
    import os, time
    if os.path.basename(os.getcwd()) == "site-1" and model.current_round == 1:
        open("waits", "w").close()
        while not os.path.exists({gate!r}):
            time.sleep(0.01)
"""


def test_the_disk_fills_up_while_a_trainer_works(observed: ObservedRun, disk: SmallDisk) -> None:
    """When not even a small result fits on the disk any more, `flare.send` fails with that; the others go on."""
    gate = observed.folder / "gate"
    start(observed, on_folder(disk.folder / "shared"), ONE.format(body=GATE.format(gate=str(gate))), min_clients=1)
    observed.wait_for_file("site-1", "waits")

    disk.fill()
    gate.touch()

    assert observed.end() == "completed", observed.reason
    assert observed.model() == [2.0] * 4
    assert [line["accepted"] for line in observed.rounds()] == [["site-1", "site-2"], ["site-2"]]
    assert FULL in observed.complaints()["site-1"]
    assert FULL in observed.log("site-1")


def test_the_disk_fills_up_before_a_trainer_is_answered(observed: ObservedRun, disk: SmallDisk) -> None:
    """A trainer that cannot be told what became of its result is not left waiting but ended; the result counts."""
    observed.on("result_accepted", lambda fields: disk.fill() if fields["site"] == "site-1" else None)
    start(observed, on_folder(disk.folder / "shared"), min_clients=1)

    assert observed.end() == "completed", observed.reason
    assert observed.model() == [2.0] * 4
    assert observed.rounds()[0]["accepted"] == ["site-1", "site-2"]
    assert "its trainer could not be answered: could not be sent: " in observed.log("site-1")
    assert FULL in observed.log("site-1")


def test_no_memory_for_a_segment_of_the_client_job(observed: ObservedRun) -> None:
    """When a client job gets no shared memory for a model, its site says so in each round."""

    def limit(fields: dict[str, Any]) -> None:
        for address, pid in fields["pids"].items():
            if address.startswith("worker-1"):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (MB, MB))

    observed.on("workers_started", limit)
    start(observed, "shm", min_clients=1, size=MB)

    failed(observed, "the task could not be handed to its trainer", "bytes of shared memory")


def test_no_memory_for_a_segment_of_the_trainer(observed: ObservedRun) -> None:
    """When a trainer gets none for its result, `flare.send` fails with that."""
    body = f"""
    import os, resource
    if os.path.basename(os.getcwd()) == "site-1":
        resource.setrlimit(resource.RLIMIT_FSIZE, ({MB}, {MB}))
"""
    start(observed, "shm", ONE.format(body=body), min_clients=1, size=MB)

    failed(observed, "its trainer process ended with exit code 1", "bytes of shared memory")
    assert "in send" in observed.log("site-1")
