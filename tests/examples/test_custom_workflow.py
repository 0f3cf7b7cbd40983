"""The custom workflow, installed beside flarebus into an environment of its own and used as its README says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.examples.fresh import ROOT, FreshEnvironment
from tests.examples.readme import commands

EXAMPLE = ROOT / "examples" / "custom_workflow"
INSTALL, BY_NAME, BY_PATH, CHECK = commands(EXAMPLE / "README.md")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("command", [BY_NAME, BY_PATH], ids=["by name", "by path"])
def test_job_runs_with_the_workflow(fresh: FreshEnvironment, command: list[str]) -> None:
    """Each way to name the workflow runs the job to its end, and the model that reigns never gets worse."""
    assert INSTALL == ["pip", "install", "."]

    done = fresh.run(command, EXAMPLE)

    assert done.returncode == 0, done.stderr
    assert "status: completed" in done.stdout
    result = Path(re.findall(r"^result: (.*)$", done.stdout, re.MULTILINE)[0])
    rows = [json.loads(line) for line in (result / "server" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["metrics"]["loss"] for row in rows]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 20
    assert "round 4: loss here" in (result / "site-1" / "log.txt").read_text()


def test_workflow_keeps_its_promises_where_it_is_installed(fresh: FreshEnvironment) -> None:
    """The tests of the distribution pass against the installed packages."""
    assert CHECK == ["python", "-m", "pytest", "tests"]

    done = fresh.run([*CHECK, "-p", "no:cacheprovider"], EXAMPLE)

    assert done.returncode == 0, done.stdout


def test_a_workflow_and_a_pipe_from_outside_are_listed_with_their_origin(
    fresh: FreshEnvironment, tmp_path: Path
) -> None:
    """`flarebus plugins` shows both beside the built-in ones, and all of them can be used."""
    done = fresh.run(["flarebus", "plugins"], tmp_path)

    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["workflow", "tournament", "flarebus_tournament:Tournament", "flarebus-tournament", "1.0"] in rows
    assert ["pipe", "tcp", "flarebus_tcp_pipe:TcpPipe", "flarebus-tcp-pipe", "1.0"] in rows
    assert "workflows.cyclic:Cyclic" in done.stdout
    assert "cannot be used" not in done.stdout


def test_unknown_name_lists_what_is_installed(fresh: FreshEnvironment) -> None:
    """A job that names no workflow says what there is, where each comes from, and which name is near."""
    done = fresh.run(["python", "job.py", "--workflow", "turnament"], EXAMPLE)

    assert done.returncode != 0
    assert "did you mean 'tournament'?" in done.stderr
    assert "tournament from flarebus_tournament:Tournament (flarebus-tournament 1.0)" in done.stderr
    assert "fedavg from workflows.fedavg:FedAvg (flarebus" in done.stderr
