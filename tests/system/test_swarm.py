"""Swarm learning with real processes: the model of federated averaging, at every site, whoever dies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from flarebus.recipe import FedAvgRecipe, FrameworkType, SimEnv, SwarmRecipe
from flarebus.site.import_path import import_path
from tests.system.observed import GONE_S, LIMIT_S, ObservedRun, marked_processes, wait_until

SITES = ("site-1", "site-2", "site-3", "site-4")
ROUNDS = 5
LAST, BEST = "FL_global_model", "best_FL_global_model"

TRAIN = """
import os
import numpy as np
import flarebus.client as flare

ACCURACY = {accuracy}

flare.init()
name = flare.get_site_name()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    number, weights = model.current_round, model.params["w"]
    with open("trained", "a") as file:
        print(number, file=file)
{body}
    step = np.random.default_rng([int(name[5:]), number]).standard_normal(weights.shape, np.float32)
    metrics = ACCURACY[number] if number < len(ACCURACY) else {{"accuracy": 0.0}}
    meta = {{"NUM_STEPS_CURRENT_ROUND": 10 + int(name[5:])}}
    flare.send(flare.FLModel(params={{"w": weights + step}}, metrics=metrics, meta=meta))
"""


def script(body: str = "pass", accuracy: str = '[{"accuracy": 0.1}, {"accuracy": 0.9}]') -> str:
    """A script whose steps are other ones at each site and in each round; `body` runs before it answers."""
    return TRAIN.format(body=textwrap.indent(textwrap.dedent(body), "    "), accuracy=accuracy)


def swarm(observed: ObservedRun, text: str, sites: tuple[str, ...] = SITES, **given: Any) -> None:
    """Start a swarm with a worker for each site."""
    settings = {"deterministic": True, "num_rounds": ROUNDS, "key_metric": "accuracy", **given}
    observed.start(text, sites, size=1000, kind=SwarmRecipe, env={"num_threads": len(sites)}, **settings)


def models(observed: ObservedRun, stem: str = LAST) -> dict[str, bytes]:
    """The model that the server and each site ended with."""
    found = observed.run_dir.glob(f"*/models/{stem}.safetensors")
    return {path.parent.parent.name: load_file(path)["w"].tobytes() for path in found}


def everywhere(model: bytes, sites: tuple[str, ...] = SITES) -> dict[str, bytes]:
    """The same model at the server and at every site."""
    return dict.fromkeys(("server", *sites), model)


def trained(observed: ObservedRun, site: str) -> list[int]:
    """The rounds that the script of `site` began."""
    return [int(line) for line in (observed.run_dir / site / "trained").read_text().split()]


class Averaged:
    """What federated averaging makes of the script."""

    def __init__(self, run_dir: Path) -> None:
        self.model = load_file(run_dir / f"server/models/{LAST}.safetensors")["w"].tobytes()
        self.best = load_file(run_dir / f"server/models/{BEST}.safetensors")["w"].tobytes()


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Averaged:
    """The models of federated averaging with the same seeds."""
    folder = tmp_path_factory.mktemp("fedavg")
    (folder / "client.py").write_text(script())
    recipe = FedAvgRecipe(
        name="job",
        min_clients=len(SITES),
        num_rounds=ROUNDS,
        model={"w": np.zeros(1000, np.float32)},
        train_script=str(folder / "client.py"),
        framework=FrameworkType.NUMPY,
        deterministic=True,
    )
    recipe.execute(SimEnv(clients=list(SITES), num_threads=2, workspace_root=folder / "runs"))
    return Averaged(folder / "runs/job")


class KillLeader:
    """Kills the worker of whoever leads round `number` when it reports `what` of it, once."""

    def __init__(self, observed: ObservedRun, what: str, number: int = 1) -> None:
        self.killed = ""
        self._observed = observed
        self._what = what
        self._number = number
        observed.on("site_report", self._heard)

    def _heard(self, fields: dict[str, Any]) -> None:
        if not self.killed and fields["what"] == self._what and fields["fields"]["round"] == self._number:
            self.killed = fields["site"]
            self._observed.kill(f"worker-{self.killed[5:]}")


# --- without faults


def test_swarm_is_federated_averaging_bit_for_bit(observed: ObservedRun, averaged: Averaged) -> None:
    """Last and best model are those of federated averaging, at every site and at the server; sites lead by turns."""
    swarm(observed, script())

    assert observed.end() == "completed", observed.reason
    assert models(observed) == everywhere(averaged.model)
    assert models(observed, BEST) == everywhere(averaged.best)
    assert [line["accepted"] for line in observed.rounds()] == [list(SITES)] * ROUNDS
    assert all(trained(observed, site) == list(range(ROUNDS)) for site in SITES)
    leads = [fields["site"] for _, fields in observed.events if fields.get("what") == "swarm_leads"]
    assert len(leads) == ROUNDS
    assert len(set(leads)) > 1
    for site in SITES:  # no files of the work are left
        assert sorted(path.stem for path in (observed.run_dir / site / "models").iterdir()) == [LAST, BEST]


# --- deaths


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("swarm_leads", id="before"),
        pytest.param("result_accepted", id="while"),
        pytest.param("swarm_round_done", id="after"),
    ],
)
def test_a_leader_killed_around_gathering_is_replaced(observed: ObservedRun, averaged: Averaged, what: str) -> None:
    """All rounds end with the model that they have without a fault, and nobody else trains a round twice."""
    kill = KillLeader(observed, what)
    swarm(observed, script())

    assert observed.end() == "completed", observed.reason
    assert kill.killed
    assert models(observed) == everywhere(averaged.model)
    assert [line["round"] for line in observed.rounds()] == list(range(ROUNDS))
    assert all(trained(observed, site) == list(range(ROUNDS)) for site in SITES if site != kill.killed)

    for site in SITES:  # what the killed life has left is gone, too
        assert sorted(path.stem for path in (observed.run_dir / site / "models").iterdir()) == [LAST, BEST]


# The holder of the result dies with the first chunk that it is asked for.
DIES_WHILE_FETCHED = """
if name == "site-2" and number == 1 and not os.path.exists("dead"):
    open("dead", "w").close()
    from flarebus.transfer import Offers
    Offers.serve = lambda *_: os.kill(os.getpid(), 9)
"""


def test_a_trainer_killed_while_its_result_is_fetched_leaves_its_place(observed: ObservedRun) -> None:
    """With one place to submit at, the others go on at once; the result that is lost is made again."""
    observed.start(
        script(DIES_WHILE_FETCHED),
        SITES[:3],
        size=5_000_000,  # above all that goes without asking for it
        kind=SwarmRecipe,
        env={"num_threads": 3},
        num_rounds=3,
        # Site 2 never leads before, so that somebody else fetches its result.
        aggr_clients=["site-1"],
        max_concurrent_submissions=1,
    )

    assert observed.end() == "completed", observed.reason
    assert (observed.run_dir / "site-2/dead").exists()
    assert trained(observed, "site-1") == trained(observed, "site-3") == [0, 1, 2]
    assert [line["accepted"] for line in observed.rounds()] == [list(SITES[:3])] * 3
    assert len(set(models(observed).values())) == 1


def test_a_site_that_does_not_answer_in_time_is_heard_in_a_later_round(observed: ObservedRun) -> None:
    """The grace ends the round without it; its late answer does not count; the next round has it again."""
    gate = observed.folder / "gate"
    os.mkfifo(gate)
    body = f"""
    if name == "site-3" and number == 1:
        open({str(gate)!r}).read()
    if number == 2 and name != "site-3":  # its answer to the round before comes while this one runs
        open("../go", "w").close()
    """
    observed.on("round_committed", lambda fields: fields["round"] == 1 and gate.write_text(""))  # type: ignore[arg-type]
    swarm(observed, script(body), SITES[:3], min_responses=2, wait_time_after_min_received=0.3)

    assert observed.end() == "completed", observed.reason
    accepted = {line["round"]: line["accepted"] for line in observed.rounds()}
    assert accepted[1] == ["site-1", "site-2"]
    assert accepted[ROUNDS - 1] == list(SITES[:3])
    assert "the round is closed" in observed.log("site-3")
    assert len(set(models(observed).values())) == 1


DIES = """
if name != "site-1" and number == 1:
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("min_clients", [2, 1])
def test_all_but_one_site_lost(observed: ObservedRun, min_clients: int) -> None:
    """The job fails and says why when fewer are left than it needs; it goes on with one if that is allowed."""
    # Three lives of two workers take as long as they take: the round must not end over them.
    lives = {"wait_time_after_min_received": LIMIT_S}
    swarm(observed, script(DIES), SITES[:3], num_rounds=3, min_clients=min_clients, **lives)
    ending = observed.end()

    assert set(observed.complaints("site_lost")) == {"site-2", "site-3"}
    if min_clients == 1:
        assert ending == "completed", observed.reason
        assert [line["accepted"] for line in observed.rounds()][1:] == [["site-1"], ["site-1"]]
        found = models(observed)
        assert found["site-1"] == found["server"]
    else:
        assert ending == "failed"
        assert "1 sites are left, 2 are needed" in observed.reason
        # Whichever of the two is given up first.
        assert re.search(r"site-[23]: its worker process was killed by SIGKILL, 3 times", observed.reason)


PROGRAM = """
import sys
import numpy as np
from flarebus.recipe import FrameworkType, SimEnv, SwarmRecipe

recipe = SwarmRecipe(
    name="job",
    min_clients=3,
    num_rounds=100_000,
    model={"w": np.zeros(100_000, np.float32)},
    train_script=sys.argv[1],
    framework=FrameworkType.NUMPY,
)
recipe.execute(SimEnv(num_clients=3, num_threads=3, workspace_root=sys.argv[2]))
"""


def test_the_server_killed_leaves_no_process_and_whole_models(tmp_path: Path, mark: str, sockets: Path) -> None:
    """All is gone within seconds, and what every site keeps can be read."""
    (tmp_path / "client.py").write_text(script())
    (tmp_path / "program.py").write_text(PROGRAM)
    argv = [sys.executable, "program.py", str(tmp_path / "client.py"), str(tmp_path / "runs")]
    process = subprocess.Popen(argv, cwd=tmp_path, env={**os.environ, **import_path(os.environ)})
    try:
        rounds = tmp_path / "runs/job/server/metrics.jsonl"
        wait_until(lambda: rounds.exists() and rounds.read_text().count("\n") >= 20, "20 rounds")
    finally:
        process.kill()
        process.wait(LIMIT_S)

    wait_until(lambda: not marked_processes(mark), f"processes end: {marked_processes(mark)}", GONE_S)
    kept = sorted((tmp_path / "runs/job").glob("site-*/models/kept.json"))
    assert kept
    for path in kept:
        note = json.loads(path.read_text())
        assert np.isfinite(load_file(path.parent / note["file"])["w"]).all()
        assert note["round"] > 0


# --- which model is the best, and who does what


def test_selection_passes_over_what_is_no_number(observed: ObservedRun) -> None:
    """NaN and a missing metric choose nothing; the best of the others is at every site. Sites do what they are named
    for only."""
    accuracy = '[{"accuracy": 0.1}, {"accuracy": float("nan")}, {"accuracy": 0.5}, {}, {"accuracy": 0.2}]'
    swarm(
        observed,
        script('np.save(f"received-{number}.npy", weights)', accuracy),
        SITES[:3],
        aggr_clients=["site-1", "site-2"],
        train_clients=["site-2", "site-3"],
        min_responses=2,
    )

    assert observed.end() == "completed", observed.reason
    received = np.load(observed.run_dir / "site-3/received-2.npy").tobytes()
    assert models(observed, BEST) == everywhere(received, SITES[:3])
    assert not (observed.run_dir / "site-1/trained").exists()
    assert [line["accepted"] for line in observed.rounds()] == [["site-2", "site-3"]] * ROUNDS
    leads = {fields["site"] for _, fields in observed.events if fields.get("what") == "swarm_leads"}
    assert leads == {"site-1", "site-2"}


OWN_CLASSES = """
from flarebus.model import FLModel


class Sum:
    def reset_stats(self):
        self.sum = 0

    def accept_model(self, model):
        self.sum = self.sum + model.params["w"]

    def aggregate_model(self):
        return FLModel(params={"w": self.sum})


class NearestTo:
    def __init__(self, value):
        self.value = value

    def compare(self, a, b):
        return abs(b - self.value) - abs(a - self.value)
"""


def test_a_job_read_back_brings_its_own_classes(tmp_path: Path) -> None:
    """Aggregator and comparator of the job do their work at the sites, also when all run in one process."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/client.py").write_text(script(accuracy='[{"accuracy": a} for a in (0.1, 0.9, 0.4, 0.2)]'))
    (tmp_path / "code/own.py").write_text(OWN_CLASSES)
    recipe = SwarmRecipe(
        name="job",
        min_clients=2,
        num_rounds=4,
        model={"w": np.ones(8, np.float32)},
        train_script=str(tmp_path / "code/client.py"),
        framework=FrameworkType.NUMPY,
        aggregator={"class_path": "own:Sum", "args": {}},
        metric_comparator={"class_path": "own:NearestTo", "args": {"value": 0.5}},
    )
    recipe.export(tmp_path / "exported")
    read_back = SwarmRecipe.load(tmp_path / "exported")
    assert read_back == recipe

    run = read_back.execute(SimEnv(num_clients=2, workspace_root=tmp_path / "runs", debug=True))

    assert run.get_status() == "completed"
    expected = [np.ones(8, np.float32)]
    for number in range(4):
        steps = [np.random.default_rng([site, number]).standard_normal(8, np.float32) for site in (1, 2)]
        expected.append(sum(expected[-1] + step for step in steps))
    for owner in ("server", "site-1", "site-2"):
        folder = tmp_path / "runs/job" / owner / "models"
        np.testing.assert_allclose(load_file(folder / f"{LAST}.safetensors")["w"], expected[4], rtol=1e-6)
        np.testing.assert_allclose(load_file(folder / f"{BEST}.safetensors")["w"], expected[2], rtol=1e-6)


# --- trainers in processes of their own


def test_trainers_of_a_killed_leader_and_of_others(observed: ObservedRun, averaged: Averaged) -> None:
    """Scripts in processes of their own make the same model, though a leader is killed in the middle of a round."""
    kill = KillLeader(observed, "result_accepted")
    swarm(observed, script(), launch_external_process=True)

    assert observed.end() == "completed", observed.reason
    assert kill.killed
    assert models(observed) == everywhere(averaged.model)
    assert models(observed, BEST) == everywhere(averaged.best)
