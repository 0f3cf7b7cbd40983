"""The examples, run as their READMEs say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.readme import commands

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, command: list[str]) -> tuple[Path, str]:
    """Run a command of an example in its folder; return its run folder and its output."""
    assert command[0] == "python"
    done = subprocess.run(
        [sys.executable, *command[1:]], cwd=EXAMPLES / name, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "status: completed" in done.stdout
    found = re.search(r"^result: (.*)$", done.stdout, re.MULTILINE)
    assert found is not None
    return Path(found[1]), done.stdout


def rounds(run_dir: Path) -> list[dict[str, object]]:
    """The lines of the metrics file of a run."""
    return [json.loads(line) for line in (run_dir / "server" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("number", "expected_rounds", "expected_first"), [(0, 3, 3.0), (1, 10, 5.0)], ids=["plain", "with arguments"]
)
def test_hello_numpy(number: int, expected_rounds: int, expected_first: float) -> None:
    """Each command of the README completes, and the weights have grown by one step in each round."""
    from safetensors.numpy import load_file

    run_dir, _ = run("hello_numpy", commands(EXAMPLES / "hello_numpy" / "README.md")[number])

    weights = load_file(run_dir / "server" / "models" / "FL_global_model.safetensors")["weights"]
    assert len(rounds(run_dir)) == expected_rounds
    assert weights.ravel().tolist() == [expected_first + index for index in range(9)]
    assert "mean weight 4.00" in (run_dir / "site-1" / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "expected_rounds"), [(0, 5), (1, 8), (2, 5)], ids=["plain", "with arguments", "external"]
)
def test_hello_torch(number: int, expected_rounds: int) -> None:
    """Each command of the README completes, and the network has learnt the digits."""
    run_dir, output = run("hello_torch", commands(EXAMPLES / "hello_torch" / "README.md")[number])

    accuracy = re.search(r"^accuracy: (.*)$", output, re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.85
    assert len(rounds(run_dir)) == expected_rounds
    is_external = "its trainer process ended with exit code 0" in (run_dir / "site-1" / "log.txt").read_text()
    assert is_external == (number == 2)


def test_every_example_is_run() -> None:
    """No command in a README of an example is left untested."""
    assert {readme.parent.name: len(commands(readme)) for readme in EXAMPLES.glob("*/README.md")} == {
        "custom_pipe": 4,  # in test_custom_pipe
        "hello_numpy": 2,
        "hello_torch": 3,
    }
