"""Trainers that somebody else starts: the configuration that they need, and what may be wrong with it or with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flarebus.site.import_path import import_path
from tests.system.observed import LIMIT_S, ONE, ObservedRun, wait_until

Attach = Callable[..., "Attached"]

# With the first argument, answers one task and leaves.
SCRIPT = ONE.format(body="open('came', 'w').close(); flare.log('x', 1.0, flare.AnalyticsDataType.SCALAR)") + (
    "    if __import__('sys').argv[1:] == ['once']:\n        break\n"
)
# Waits in its first round until it is told to go on.
GATED = ONE.format(
    body="""
    open("came", "w").close()
    import os, time
    while model.current_round == 0 and not os.path.exists("go"):
        time.sleep(0.01)
"""
)


class Attached:
    """A trainer started by hand, as by a batch system."""

    def __init__(self, observed: ObservedRun, config: Path, folder: Path, *args: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(observed.folder / "client.py"), *args],
            env={**os.environ, **import_path(os.environ), "FLAREBUS_CLIENT_CONFIG": str(config)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self) -> tuple[int, str]:
        """Wait for its end; exit code and output."""
        output, _ = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, output

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def attach(observed: ObservedRun) -> Iterator[Attach]:
    """Starts a trainer for a site by hand, in a folder of its own."""
    started: list[Attached] = []

    def begin(*args: str, config: Path | None = None) -> Attached:
        config = config or published(observed)
        started.append(Attached(observed, config, observed.folder / f"by-hand-{len(started)}", *args))
        return started[-1]

    yield begin
    for trainer in started:
        trainer.close()


def published(observed: ObservedRun) -> Path:
    """The configuration that site-1 waits with."""
    return observed.wait_for_file("site-1", "config", "client_api_config.json")


def start(observed: ObservedRun, script: str = SCRIPT, **given: Any) -> None:
    """One site, whose trainer is started by somebody else."""
    observed.start(script, given.pop("sites", ["site-1"]), attach=True, **given)


def changed(observed: ObservedRun, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the published configuration with something else in it."""
    config = json.loads(published(observed).read_text())
    change(config)
    copy = observed.folder / "copy.json"
    copy.write_text(json.dumps(config))
    copy.chmod(0o600)
    return copy


def complete(observed: ObservedRun, rounds: int = 2) -> None:
    """The run ends well and the site missed nothing."""
    assert observed.end() == "completed", observed.reason
    assert observed.model() == [float(rounds)] * 4
    assert observed.complaints() == {}


@pytest.mark.parametrize("pipe", ["cell", "file", "shm"])
def test_a_trainer_is_attached(observed: ObservedRun, attach: Attach, pipe: str) -> None:
    """A trainer that somebody starts with the published configuration does the work and leaves with the job."""
    start(observed, prepare=lambda recipe: recipe.add_client_config({"pipe": pipe}))
    assert published(observed).stat().st_mode & 0o777 == 0o600

    trainer = attach()

    complete(observed)
    code, output = trainer.end()
    assert code == 0, output
    assert "no more tasks: completed" in output
    logged = [len(fields["records"]) for name, fields in observed.events if name == "site_metrics"]
    assert sum(logged) == 2
    assert str(published_name(observed)) in observed.log("site-1")


def published_name(observed: ObservedRun) -> Path:
    """Where the configuration was; it is gone with the job."""
    return observed.run_dir / "site-1/config/client_api_config.json"


@pytest.mark.parametrize("pipe", ["cell", "file", "shm"])
def test_one_trainer_after_the_other(observed: ObservedRun, attach: Attach, pipe: str) -> None:
    """A trainer that leaves after its task may be followed by another one; the site misses nothing."""
    start(observed, num_rounds=3, prepare=lambda recipe: recipe.add_client_config({"pipe": pipe}))
    token = None
    for _ in range(3):
        wait_until(lambda seen=token: token_of(observed) not in (None, seen), "the next configuration is published")
        token = token_of(observed)
        code, output = attach("once").end()
        assert code == 0, output

    complete(observed, 3)


def token_of(observed: ObservedRun) -> str | None:
    """The secret in the configuration that is published now, if one is."""
    try:
        return str(json.loads(published_name(observed).read_text())["auth_token"])
    except FileNotFoundError:
        return None


def test_a_trainer_that_is_killed_is_replaced(observed: ObservedRun, attach: Attach) -> None:
    """When an attached trainer dies in the middle of its task, another one may do it."""
    start(observed, GATED)
    first = attach()
    wait_until((first.folder / "came").exists, "the first trainer has the task")
    before = token_of(observed)
    first.process.kill()

    wait_until(lambda: token_of(observed) not in (None, before), "the next configuration is published")
    second = attach()
    wait_until((second.folder / "came").exists, "the second trainer has the task")
    (second.folder / "go").touch()

    complete(observed)
    assert second.end()[0] == 0
    assert "its trainer is gone" in observed.log("site-1")


@pytest.mark.parametrize("pipe", ["cell", "file", "shm"])
def test_a_second_trainer_is_refused(observed: ObservedRun, attach: Attach, pipe: str) -> None:
    """Of two trainers that are started with one configuration the second is told who is there; the first goes on."""
    start(observed, GATED, prepare=lambda recipe: recipe.add_client_config({"pipe": pipe}))
    first = attach()
    wait_until((first.folder / "came").exists, "the first trainer has the task")

    code, output = attach().end()

    assert code == 1
    said = {"cell": "has a trainer already (site-1."}.get(pipe, f"process {first.process.pid} on ")
    assert said in output.splitlines()[-1], output
    (first.folder / "go").touch()
    complete(observed)
    assert first.end()[0] == 0


def wrong_token(config: dict[str, Any]) -> None:
    config["auth_token"] = "x" * len(config["auth_token"])


def another_job(config: dict[str, Any]) -> None:
    config["JOB_ID"] = "another"


def another_site(config: dict[str, Any]) -> None:
    config["SITE_NAME"] = "site-7"


def another_pipe(config: dict[str, Any]) -> None:
    for section in ("TASK_EXCHANGE", "METRICS_EXCHANGE"):
        config[section]["pipe"]["ARG"]["token"] = "another"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (wrong_token, "refused this process: its token is not the one in the configuration file of this launch"),
        (another_job, "refused this process: its configuration is for site-1 in job another"),
        (another_site, "refused this process: its configuration is for site-7 in job "),
        (another_pipe, "did not answer: the client job: site-1.another: no such cell"),
    ],
)
def test_a_trainer_with_a_wrong_configuration(
    observed: ObservedRun, attach: Attach, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    """It is refused and told why, no secret is shown, and the right trainer finds its place free."""
    start(observed)
    token = token_of(observed) or json.loads(published(observed).read_text())["auth_token"]

    code, output = attach(config=changed(observed, change)).end()

    assert code == 1
    assert said in output.splitlines()[-1], output
    assert token not in output
    right = attach()
    complete(observed)
    assert right.end()[0] == 0
    assert token not in observed.log("site-1") + observed.log("server")


def test_files_that_are_no_configuration(observed: ObservedRun, attach: Attach, tmp_path: Path) -> None:
    """A configuration that is cut off, missing, or readable by others is refused by its name, and shows no secret."""
    start(observed)
    text = published(observed).read_text()
    cut, readable = tmp_path / "cut.json", tmp_path / "readable.json"
    cut.write_text(text[: len(text) // 2])
    cut.chmod(0o600)
    readable.write_text(text)
    readable.chmod(0o644)
    said = {
        cut: "cut.json",
        readable: "others can read or write it (mode 644), and it holds a secret: chmod 600",
        tmp_path / "missing.json": "missing.json': cannot be read: No such file or directory",
    }
    for path, cause in said.items():
        code, output = attach(config=path).end()
        assert code == 1
        assert cause in output.splitlines()[-1], output
        assert "config_file=" in output
        assert json.loads(text)["auth_token"] not in output

    attach()
    complete(observed)


def test_nobody_comes(observed: ObservedRun, attach: Attach) -> None:
    """A site that waits for a trainer in vain fails each round with that after `launch_timeout`; the others go on."""
    own = {"site-1": {"attach": True, "launch_timeout": 1.0}, "site-2": {}}
    observed.start(SCRIPT, min_clients=1, per_site_config=own)

    assert observed.end() == "completed", observed.reason
    assert observed.model() == [2.0] * 4
    assert observed.complaints() == {"site-1": "no trainer was attached within 1 s"}
    assert [line["refused"].keys() for line in observed.rounds()] == [{"site-1"}] * 2
    assert "no trainer was attached within 1 s" in observed.log("site-1")
    assert "site-1 failed: no trainer was attached within 1 s" in observed.log("server")


def test_it_comes_too_late_for_one_round(observed: ObservedRun, attach: Attach) -> None:
    """A trainer that comes after its time was up takes part from the next round on."""
    own = {"site-1": {"attach": True, "launch_timeout": 8.0}, "site-2": {}}
    late: list[Attached] = []

    def bring(fields: dict[str, Any]) -> None:
        if fields["round"] == 0:
            late.append(attach())

    observed.on("round_committed", bring)
    observed.start(SCRIPT, min_clients=1, per_site_config=own)

    assert observed.end() == "completed", observed.reason
    assert [line["accepted"] for line in observed.rounds()] == [["site-2"], ["site-1", "site-2"]]
    assert late[0].end()[0] == 0


def test_an_abort_while_nobody_is_there(observed: ObservedRun) -> None:
    """A job that waits for somebody to start a trainer can be aborted at once, and takes its secret along."""
    start(observed)
    published(observed)

    observed.run.abort()

    assert observed.run.get_result(10) is not None
    assert observed.end() == "aborted"


def test_the_client_job_is_killed(observed: ObservedRun, attach: Attach) -> None:
    """When the client job of an attached trainer dies the trainer comes to its end, and another one may go on."""
    start(observed, GATED)
    first = attach()
    wait_until((first.folder / "came").exists, "the trainer has the task")
    before = token_of(observed)

    observed.kill("worker-1")
    (first.folder / "go").touch()

    code, output = first.end()
    assert (code, "the client job is gone" in output) == (0, True), output
    wait_until(lambda: token_of(observed) not in (None, before), "the next configuration is published")
    second = attach()
    second.folder.joinpath("go").touch()
    complete(observed)
