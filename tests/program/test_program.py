"""The program as people run it: a process with arguments, what it prints, what it leaves, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from workflows._algorithms import ALGORITHMS
from workflows._program import main

# One site's script that adds one; with --fail-in it raises in that round, with --hang it never answers.
SCRIPT = """
import argparse
import threading

import flarebus.client as flare

parser = argparse.ArgumentParser()
parser.add_argument("--fail-in", type=int)
parser.add_argument("--hang", action="store_true")
args = parser.parse_args()
flare.init()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    if args.fail_in == model.current_round:
        raise ValueError("the data of this site are broken")
    if args.hang:
        print("hanging", flush=True)
        threading.Event().wait()
    loss = float(model.params["w"][0])
    flare.send(flare.FLModel(params={"w": model.params["w"] + 1}, metrics={"loss": loss}))
"""


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    """Arguments that run SCRIPT from a checkpoint of zeros."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "client.py").write_text(SCRIPT)
    np.savez(tmp_path / "job" / "zeros.npz", w=np.zeros(4, np.float32))
    return [
        *("--train-script", str(tmp_path / "job" / "client.py"), "--initial-ckpt", str(tmp_path / "job" / "zeros.npz")),
        *("--clients", "2", "--rounds", "3", "--key-metric", "loss", "--workspace", str(tmp_path / "runs")),
    ]


def start(*argv: str, workflow: str = "fedavg", **options: Any) -> subprocess.Popen[str]:
    """The program as a process of its own."""
    command = [sys.executable, "-m", f"workflows.{workflow}", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def run(*argv: str, workflow: str = "fedavg") -> tuple[int, str, str]:
    """Exit code, output and error output."""
    with start(*argv, workflow=workflow) as process:
        try:
            out, err = process.communicate(timeout=100)
        finally:
            process.kill()
    return process.returncode, out, err


def last_line(out: str) -> dict[str, Any]:
    """The JSON object at the end."""
    found = json.loads(out.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.mark.slow
def test_the_digits(tmp_path: Path) -> None:
    """Without a script it learns the digits: well above 0.93 on those that no site has seen."""
    code, out, err = run("--workspace", str(tmp_path), "--json")

    assert code == 0, err
    found = last_line(out)
    assert len(out.splitlines()) == 1
    assert (found["workflow"], found["state"], found["rounds"]) == ("fedavg", "completed", 15)
    assert found["final"]["accuracy"] >= 0.93
    assert found["best"]["accuracy"] >= found["final"]["accuracy"]
    assert len(found["accuracy_per_round"]) == 15
    assert found["accuracy_per_round"][0] < 0.5 < found["accuracy_per_round"][-1]
    run_dir = Path(found["run_dir"])
    assert run_dir.is_relative_to(tmp_path)
    assert (run_dir / "accuracy_per_round.png").stat().st_size > 1000
    assert "examples, by class" in (run_dir / "site-3" / "log.txt").read_text()
    assert "round 15/15" in err


@pytest.mark.usefixtures("checked_out_workflows")
@pytest.mark.parametrize("workflow", [name for name in ALGORITHMS if name != "fedavg"])
def test_other_algorithms_learn_the_digits(tmp_path: Path, workflow: str) -> None:
    """Every algorithm has a program that learns the digits without being told anything."""
    code, out, err = run("--workspace", str(tmp_path), "--json", workflow=workflow)

    assert code == 0, err
    found = last_line(out)
    assert (found["workflow"], found["state"], found["rounds"]) == (workflow, "completed", 15)
    assert found["final"]["accuracy"] >= 0.93
    assert Path(found["run_dir"]).name == workflow


def test_the_same_seed_gives_the_same_model(tmp_path: Path) -> None:
    """With --deterministic two runs of the digits agree bit for bit; another seed gives another model."""
    models = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        argv = ["--workspace", str(tmp_path), "--name", name, "--rounds", "2", "--deterministic", "--seed", seed]
        code, out, err = run(*argv, "--json")
        assert code == 0, err
        models.append((Path(last_line(out)["run_dir"]) / "server/models/FL_global_model.safetensors").read_bytes())

    assert models[0] == models[1]
    assert models[0] != models[2]


def test_somebodys_script(job: list[str]) -> None:
    """A script of one's own runs with its arguments; table, paths and plot come at the end."""
    code, out, err = run(*job)

    assert code == 0, err
    assert "round 3/3" in out
    assert "Traceback" not in out + err
    paths = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1].strip() for line in out.splitlines() if "/" in line}
    assert Path(paths["plot"]).exists()
    assert load_file(paths["model"])["w"].tolist() == [3.0] * 4


@pytest.mark.usefixtures("checked_out_workflows")
def test_turns_in_a_given_order(job: list[str]) -> None:
    """The model goes to the sites that have a turn, and to no other."""
    code, out, err = run(*job, "--clients", "3", "--order", "site-3,site-1", "--json", workflow="cyclic")

    assert code == 0, err
    found = last_line(out)
    assert found["accuracy_per_round"] == [0.0, 2.0, 4.0]
    rows = (Path(found["run_dir"]) / "server" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["accepted"] for row in rows] == [["site-1", "site-3"]] * 3


def test_its_json(job: list[str]) -> None:
    """The JSON line has the metrics of the models that entered the rounds, and the least loss is the best."""
    code, out, err = run(*job, "--json")

    assert code == 0, err
    found = last_line(out)
    assert found["accuracy_per_round"] == [0.0, 1.0, 2.0]
    assert (found["final"], found["best"]) == ({"loss": 2.0}, {"loss": 0.0})
    assert found["total_s"] > 0


def test_a_site_that_fails(job: list[str]) -> None:
    """When too few sites are left the exit code is 1, and the reason and the place of the logs are said."""
    code, out, err = run(*job, "--train-args=--fail-in=1", "--json")

    assert code == 1
    found = last_line(out)
    assert (found["state"], found["rounds"], found["accuracy_per_round"]) == ("failed", 1, [0.0])
    assert "the data of this site are broken" in found["reason"]
    assert "the data of this site are broken" in err
    assert "Traceback" not in err
    assert str(Path(found["run_dir"]) / "server" / "log.txt") in err
    # The job ends with the first of the two that fails; the other may not have come to its turn.
    logs = [(Path(found["run_dir"]) / site / "log.txt") for site in ("site-1", "site-2")]
    assert any("Traceback" in log.read_text() for log in logs if log.exists())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--rounds", "0"], "--rounds 0"),
        (["--rounds", "many"], "--rounds"),
        (["--min-clients", "9"], "--min-clients 9"),
        (["--clients", "a,a"], "--clients"),
        (["--clients", "../x"], "--clients"),
        (["--clients", "2", "--threads", "3"], "--threads 3"),
        (["--train-script", "nowhere.py"], "--train-script 'nowhere.py'"),
        (["--stop-cond", "good enough"], "--stop-cond 'good enough'"),
        (["--initial-ckpt", "x.npz"], "--initial-ckpt"),
        (["--env", "mars"], "--env"),
        (["--colour"], "--colour"),
        (["--workspace", "/proc/nowhere"], "--workspace"),
    ],
)
def test_wrong_usage(capfd: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], said: str) -> None:
    """What cannot work ends with exit code 2 and one line that names the option; nothing was run."""
    if "--workspace" not in argv:
        argv = ["--workspace", str(tmp_path), *argv]

    assert main(argv) == 2

    err = capfd.readouterr().err
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("workflow", "argv", "said"),
    [
        ("fedprox", ["--fedprox-mu", "-1"], "--fedprox-mu -1"),
        ("fedopt", ["--server-optimizer", "adamw"], "--server-optimizer"),
        ("fedopt", ["--optimizer-args", '{"lr": 0}'], "--optimizer-args 0"),
        ("fedopt", ["--optimizer-args", "0.1"], "JSON"),
        ("fedopt", ["--fedprox-mu", "1"], "No such option"),
    ],
)
def test_wrong_usage_of_other_algorithms(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, workflow: str, argv: list[str], said: str
) -> None:
    """The options of an algorithm are checked like all others, and are options of that one only."""
    assert main(["--workspace", str(tmp_path), *argv], workflow) == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize("workflow", ALGORITHMS)
def test_the_help_of_every_algorithm(capsys: pytest.CaptureFixture[str], workflow: str) -> None:
    """Each program's help speaks of its own algorithm and shows its own name in the examples."""
    assert main(["--help"], workflow) == 0

    out = capsys.readouterr().out
    assert ALGORITHMS[workflow].about.partition(":")[0] in out
    assert f"python -m workflows.{workflow} --clients 20" in out
    assert ("The algorithm:" in out) == bool(ALGORITHMS[workflow].options)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """The help has sections, examples and the exit codes."""
    assert main(["--help"]) == 0

    out = capsys.readouterr().out
    for text in ("What to train:", "Who takes part:", "Examples:", "--train-script", "130"):
        assert text in out


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c(job: list[str], tmp_path: Path, presses: int) -> None:
    """Ctrl-C ends the job with exit code 130 and no process is left, even if no site ever answers."""
    process = start(*job, "--train-args=--hang", start_new_session=True)
    assert process.stdout is not None
    try:
        logs = [tmp_path / "runs" / "fedavg" / f"site-{number}" / "log.txt" for number in (1, 2)]
        while not any(log.exists() and "hanging" in log.read_text() for log in logs):
            assert process.poll() is None
        for _ in range(presses):
            # As a terminal does it: to all processes of the group.
            os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        with_rest = _group_exists(process.pid)
        if with_rest:
            os.killpg(process.pid, signal.SIGKILL)

    assert process.returncode == 130, err
    assert not with_rest
    assert "Traceback" not in err


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
