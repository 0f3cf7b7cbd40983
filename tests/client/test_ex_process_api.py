"""How `flare.init()` finds out that a script is a trainer, and the Client API as an object."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flarebus.client as flare
from flarebus.client.engine import Seat, set_process_seat, sit
from flarebus.client.ex_process import seat as ex_seat
from flarebus.client.ex_process.api import ExProcessClientAPI
from flarebus.errors import ClientApiError, ConfigError
from flarebus.metric import AnalyticsDataType
from flarebus.model import FLModel
from tests.client.fake_engine import FakeEngine
from tests.client.played_job import PlayedJob

ENVIRON = ("FLAREBUS_CLIENT_CONFIG", "CLIENT_API_TYPE", "RANK", "WORLD_SIZE")


class Opened:
    """Stands in for the seat of this process."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.engine = FakeEngine()
        self.seat = Seat(self.engine)

    def __call__(self, config_file: str, rank: str) -> Seat:
        """Note what was asked for."""
        self.asked.append((config_file, rank))
        set_process_seat(self.seat)
        return self.seat


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """No trainer yet, and an environment that says nothing."""
    for name in ENVIRON:
        monkeypatch.delenv(name, raising=False)
    stand_in = Opened()
    monkeypatch.setattr(ex_seat, "open_process_seat", stand_in)
    yield stand_in
    set_process_seat(None)


def test_without_a_hint_a_script_is_nobodys(opened: Opened) -> None:
    """Started by hand, a script is told how to be run; nothing is opened."""
    with pytest.raises(ClientApiError, match="no job runs this script"):
        flare.init()

    assert opened.asked == []


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        ({"config_file": "mine.json"}, {}, ("mine.json", "0")),
        ({"config_file": Path("mine.json"), "rank": 3}, {}, ("mine.json", "3")),
        ({}, {"FLAREBUS_CLIENT_CONFIG": "theirs.json"}, ("theirs.json", "0")),
        ({}, {"FLAREBUS_CLIENT_CONFIG": "theirs.json", "RANK": "2"}, ("theirs.json", "2")),
        ({"rank": "1"}, {"FLAREBUS_CLIENT_CONFIG": "theirs.json", "RANK": "2"}, ("theirs.json", "1")),
        ({"config_file": "mine.json"}, {"FLAREBUS_CLIENT_CONFIG": "theirs.json"}, ("mine.json", "0")),
        ({}, {"CLIENT_API_TYPE": "EX_PROCESS_API"}, ("config/client_api_config.json", "0")),
        (
            {},
            {"CLIENT_API_TYPE": "EX_PROCESS_API", "FLAREBUS_CLIENT_CONFIG": "theirs.json"},
            ("theirs.json", "0"),
        ),
    ],
)
def test_init_finds_the_configuration(
    opened: Opened,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, object],
    environ: dict[str, str],
    expected: tuple[str, str],
) -> None:
    """An argument comes before the variable, and that before the usual place."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    context = flare.init(**given)  # type: ignore[arg-type]

    assert opened.asked == [expected]
    assert (context.seat, context.rank) == (opened.seat, expected[1])


def test_another_client_api_type_is_no_hint(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one value says that the usual place is meant."""
    monkeypatch.setenv("CLIENT_API_TYPE", "IN_PROCESS_API")

    with pytest.raises(ClientApiError, match="no job runs this script"):
        flare.init()


def test_a_script_inside_its_client_job_is_no_trainer(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment of the client job says, its scripts talk to it directly."""
    monkeypatch.setenv("FLAREBUS_CLIENT_CONFIG", "theirs.json")
    inside = Seat(FakeEngine("site-9"))

    with sit(inside, {}):
        context = flare.init(config_file="mine.json")

    assert context.seat is inside
    assert opened.asked == []


@pytest.mark.parametrize("rank", ["first", "-1", "", "70000", "1.5"])
def test_a_rank_is_a_number(rank: str, tmp_path: Path) -> None:
    """A rank that is none is named before anything is opened."""
    with pytest.raises(ConfigError) as caught:
        ex_seat.open_process_seat(str(tmp_path / "nothing.json"), rank)

    assert caught.value.parameter == "rank"


def test_a_configuration_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that was started without its client job says which file it looked for."""
    for name in ENVIRON:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLAREBUS_CLIENT_CONFIG", str(tmp_path / "gone.json"))

    with pytest.raises(ConfigError, match=r"gone\.json"):
        flare.init()


def test_the_object_is_the_functions(opened: Opened) -> None:
    """Every method does what the function of its name does, on the object's own context."""
    api, engine = ExProcessClientAPI(Path("mine.json")), opened.engine
    with pytest.raises(ClientApiError, match=r"init\(\) first"):
        api.receive()
    api.shutdown()  # nothing to do
    api.init(rank=0)
    model = FLModel(params={"w": 1.0})
    engine.give(model, round=4)

    assert opened.asked == [("mine.json", "0")]
    assert (api.get_job_id(), api.get_site_name()) == ("job-7", "site-1")
    assert api.system_info() == {"job_id": "job-7", "site_name": "site-1"}
    assert api.get_config() == {}
    assert api.is_running()
    assert (api.is_train(), api.is_evaluate(), api.is_submit_model()) == (True, False, False)
    assert api.receive(1.0) is model
    assert api.get_task_name() == "train"
    api.log("loss", 0.5, AnalyticsDataType.SCALAR, global_step=3)
    assert engine.logged == [("loss", 0.5, AnalyticsDataType.SCALAR, {"global_step": 3})]
    api.send(FLModel(params={"w": 2.0}), clear_cache=False)
    assert engine.next_answer().params == {"w": 2.0}
    engine.give(model)
    api.receive()
    api.clear()
    with pytest.raises(ClientApiError):
        api.send(FLModel(params={"w": 2.0}))
    api.shutdown()
    api.shutdown()
    with pytest.raises(ClientApiError, match=r"after flare\.shutdown"):
        api.is_running()


FORKING = """
import os, sys
import flarebus.client as flare

flare.init()
child = os.fork()
if child == 0:
    sys.exit(0)  # runs what was registered for the end of this process's parent
assert os.waitpid(child, 0)[1] == 0
print("still" if flare.is_running() else "ended", flush=True)
"""


def test_the_end_of_a_forked_child_is_not_the_end_of_the_trainer(tmp_path: Path) -> None:
    """A child that ends by itself says no goodbye in its parent's name."""
    played = PlayedFileJob(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(FORKING)
    environ = {
        **os.environ,
        "FLAREBUS_CLIENT_CONFIG": str(played.path),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    process = subprocess.Popen([sys.executable, script], env=environ, stdout=subprocess.PIPE, text=True)
    try:
        played.serve()
        said, _ = process.communicate(timeout=60)
        assert (said.strip(), process.returncode) == ("still", 0)
    finally:
        process.kill()
        played.job.close()


class PlayedFileJob:
    """A client job whose trainer is another process: its pipes are folders."""

    def __init__(self, folder: Path) -> None:
        self.job = PlayedJob(pipe={"CLASS_NAME": "file", "ARG": {"root_path": str(folder / "pipes")}})
        (folder / "pipes").mkdir(exist_ok=True)
        self.path = folder / "client.json"
        self.job.config().to_json(self.path)

    def serve(self) -> None:
        """Let it in, and give it a task."""
        self.job.welcome(self.job.next("hello"))
        self.job.give(1)
