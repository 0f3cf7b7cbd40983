"""The examples, run as their READMEs say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sklearn.cluster import KMeans
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

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


def said(name: str, output: str) -> float:
    """The number that a program printed under a name."""
    found = re.search(rf"^{name}: (.*)$", output, re.MULTILINE)
    assert found is not None
    return float(found[1])


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

    assert said("accuracy", output) > 0.85
    assert len(rounds(run_dir)) == expected_rounds
    is_external = "its trainer process ended with exit code 0" in (run_dir / "site-1" / "log.txt").read_text()
    assert is_external == (number == 2)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected_rounds"), [(0, 10), (1, 20)], ids=["plain", "with arguments"])
def test_sklearn_linear(number: int, expected_rounds: int) -> None:
    """Each command of the README completes; the model is as accurate as one of all data in one place, within 0.02."""
    command = commands(EXAMPLES / "sklearn_linear" / "README.md")[number]
    run_dir, output = run("sklearn_linear", command)

    x, y = load_breast_cancer(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    loss = command[command.index("--loss") + 1] if "--loss" in command else "log_loss"
    pooled = make_pipeline(StandardScaler(), SGDClassifier(loss, alpha=0.001, random_state=0)).fit(x_train, y_train)
    assert said("accuracy", output) == pytest.approx(pooled.score(x_test, y_test), abs=0.02)
    assert len(rounds(run_dir)) == expected_rounds


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected_rounds"), [(0, 5), (1, 8)], ids=["plain", "with arguments"])
def test_sklearn_kmeans(number: int, expected_rounds: int) -> None:
    """Each command of the README completes; the inertia is that of all flowers in one place, within 0.5 %."""
    command = commands(EXAMPLES / "sklearn_kmeans" / "README.md")[number]
    run_dir, output = run("sklearn_kmeans", command)

    n_clusters = int(command[command.index("--n-clusters") + 1]) if "--n-clusters" in command else 3
    pooled = KMeans(n_clusters, n_init=20, random_state=0).fit(load_iris().data)
    assert said("inertia", output) == pytest.approx(pooled.inertia_, rel=0.005)
    assert said("homogeneity", output) > 0.7
    assert len(rounds(run_dir)) == expected_rounds


@pytest.mark.slow
def test_hello_tensorflow() -> None:
    """The command of the README completes, and the network has learnt the digits."""
    (command,) = commands(EXAMPLES / "hello_tensorflow" / "README.md")
    run_dir, output = run("hello_tensorflow", command)

    assert said("accuracy", output) > 0.85
    assert len(rounds(run_dir)) == 5
    assert all(not row["refused"] for row in rounds(run_dir))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hello_lightning", "hello_huggingface"])
def test_trainers_of_other_libraries(name: str) -> None:
    """The command of the README completes, the network has learnt the digits, and sites measured what they received."""
    run_dir, output = run(name, commands(EXAMPLES / name / "README.md")[0])

    assert said("accuracy", output) > 0.8
    assert len(rounds(run_dir)) == 3
    for site in ("site-1", "site-2"):
        assert "round 2: received accuracy 0." in (run_dir / site / "log.txt").read_text()


@pytest.mark.slow
def test_swarm_torch() -> None:
    """Both commands of the README complete; the swarm is as accurate as federated averaging, and every site has it."""
    swarm, fedavg = commands(EXAMPLES / "swarm_torch" / "README.md")
    run_dir, output = run("swarm_torch", swarm)
    _, averaged = run("swarm_torch", fedavg)

    assert said("accuracy", output) == pytest.approx(said("accuracy", averaged), abs=0.02)
    assert said("accuracy", output) > 0.85
    assert len(rounds(run_dir)) == 6
    for owner in ("server", "site-1", "site-2", "site-3"):
        files = {path.name for path in (run_dir / owner / "models").glob("*.pt")}
        assert files == {"FL_global_model.pt", "best_FL_global_model.pt"}


@pytest.mark.parametrize(("number", "has_histogram"), [(0, True), (1, False)], ids=["plain", "too many bins"])
def test_federated_statistics(number: int, has_histogram: bool) -> None:
    """The means are those of all irises; a histogram with too many bins is left out, and why is told."""
    run_dir, _ = run("federated_statistics", commands(EXAMPLES / "federated_statistics" / "README.md")[number])

    folder = run_dir / "server" / "statistics"
    report = json.loads((folder / "irises.json").read_text())
    names = ["sepal_length", "sepal_width", "petal_length", "petal_width"]
    for name, column in zip(names, load_iris().data.T, strict=True):
        found = {statistic: rows["Global"]["garden"] for statistic, rows in report[name].items()}
        assert found["count"] == 150
        assert found["mean"] == pytest.approx(column.mean(), abs=0.05)
        assert ("histogram" in found) is has_histogram
    assert sum(report[name]["failure_count"]["Global"]["garden"] for name in names) > 0
    assert (folder / "irises.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "irises_left_out.json").exists() is not has_histogram


@pytest.mark.parametrize(
    ("number", "n_sites", "rows"),
    [(0, 3, {"site-1", "site-2", "site-3"}), (1, 5, {"site-1", "site-2", "site-5"})],
    ids=["plain", "participants"],
)
def test_cross_site_eval_numpy(number: int, n_sites: int, rows: set[str]) -> None:
    """Every model is measured everywhere, and what a site sees of the server's best one is what it saw in training."""
    run_dir, output = run("cross_site_eval_numpy", commands(EXAMPLES / "cross_site_eval_numpy" / "README.md")[number])

    folder = run_dir / "server" / "cross_site_val"
    results = json.loads((folder / "cross_val_results.json").read_text())
    server = {f"SRV_{stem}FL_global_model.safetensors" for stem in ("", "best_")}
    assert {site: set(row) for site, row in results.items()} == dict.fromkeys(rows, rows | server)
    assert json.loads((folder / "cross_val_gaps.json").read_text()) == {"models": {}, "evaluations": {}}
    in_training = [line["sites"] for line in rounds(run_dir)]
    assert all(len(sites) == n_sites for sites in in_training)  # type: ignore[arg-type]
    for site in rows:
        best = results[site]["SRV_best_FL_global_model.safetensors"]
        assert best in [sites[site] for sites in in_training]  # type: ignore[index]
    picture = re.search(r"^picture: (.*)$", output, re.MULTILINE)
    assert picture is not None
    assert Path(picture[1]).read_bytes().startswith(b"\x89PNG")


def test_every_example_is_run() -> None:
    """No command in a README of an example is left untested."""
    assert {readme.parent.name: len(commands(readme)) for readme in EXAMPLES.glob("*/README.md")} == {
        "cross_site_eval_numpy": 2,
        "custom_pipe": 4,  # in test_custom_pipe
        "custom_workflow": 4,  # in test_custom_workflow
        "federated_statistics": 2,
        "hello_huggingface": 1,
        "hello_lightning": 1,
        "hello_numpy": 2,
        "hello_tensorflow": 1,
        "hello_torch": 3,
        "sklearn_kmeans": 2,
        "sklearn_linear": 2,
        "swarm_torch": 2,
    }
