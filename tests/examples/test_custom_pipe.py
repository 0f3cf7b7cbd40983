"""The custom pipe, installed beside flarebus into an environment of its own and used as its README says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.examples.fresh import ROOT, FreshEnvironment
from tests.examples.readme import commands

EXAMPLE = ROOT / "examples" / "custom_pipe"
INSTALL, BY_NAME, BY_PATH, CHECK = commands(EXAMPLE / "README.md")

pytestmark = pytest.mark.slow


def test_all_that_is_imported_was_installed(fresh: FreshEnvironment, tmp_path: Path) -> None:
    """Neither flarebus nor the pipe comes from this checkout."""
    assert INSTALL == ["pip", "install", "."]
    code = "import flarebus, flarebus_pipes, flarebus_tcp_pipe as t; print(flarebus.__file__, t.__file__)"

    found = fresh.run(["python", "-c", code], tmp_path)

    assert found.returncode == 0, found.stderr
    assert all(Path(path).is_relative_to(fresh.place) for path in found.stdout.split())


@pytest.mark.parametrize("command", [BY_NAME, BY_PATH], ids=["by name", "by path"])
def test_job_runs_over_the_pipe(fresh: FreshEnvironment, command: list[str]) -> None:
    """Each way to name the pipe runs the job to its end, and every round added one."""
    done = fresh.run(command, EXAMPLE)

    assert done.returncode == 0, done.stderr
    assert "status: completed" in done.stdout
    result = Path(re.findall(r"^result: (.*)$", done.stdout, re.MULTILINE)[0])
    assert (load_file(result / "server" / "models" / "FL_global_model.safetensors")["weights"] == 3).all()
    for site in ("site-1", "site-2"):
        log = (result / site / "log.txt").read_text()
        assert "talks through flarebus_tcp_pipe.pipe.TcpPipe" in log
        assert "round 2: mean weight 2.00" in log


def test_pipe_keeps_its_promises_where_it_is_installed(fresh: FreshEnvironment) -> None:
    """The tests of the distribution, the conformance kit among them, pass against the installed packages."""
    assert CHECK == ["python", "-m", "pytest", "tests"]

    done = fresh.run([*CHECK, "-p", "no:cacheprovider"], EXAMPLE, 300)

    assert done.returncode == 0, done.stdout


def test_unknown_name_lists_what_is_installed(fresh: FreshEnvironment) -> None:
    """A job that names no pipe says what the site has, where each comes from, and which name is near."""
    done = fresh.run(["python", "job.py", "--pipe", "tpc"], EXAMPLE)

    assert done.returncode != 0
    assert "did you mean 'tcp'?" in done.stderr
    assert "tcp from flarebus_tcp_pipe:TcpPipe (flarebus-tcp-pipe 1.0)" in done.stderr
    assert "cell from flarebus_pipes.cell_pipe:CellPipe (flarebus" in done.stderr
