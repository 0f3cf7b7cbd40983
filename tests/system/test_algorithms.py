"""Algorithms on the frame of federated averaging, from recipe to model file: sites that differ, and what helps.

Each site pulls the two parameters towards a place of its own, in directions of its own. Its many local steps take it
there, and the mean of where the sites arrive is not where their common objective is least.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from flarebus.recipe import FedAvgRecipe, FedOptRecipe, FedProxRecipe, ScaffoldRecipe, SimEnv

pytestmark = pytest.mark.usefixtures("checked_out_workflows")

CURVES = [[[1.0, 0.0], [0.0, 0.1]], [[0.2, 0.1], [0.1, 1.0]], [[0.5, -0.2], [-0.2, 0.3]]]
GOALS = [[2.0, 1.0], [-1.0, 3.0], [0.0, -4.0]]
SCRIPT = f"""
import argparse

import torch

import flarebus.client as flare
from flarebus.client.algorithms import FedProxLoss, Scaffold

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--alike", action="store_true")
parser.add_argument("--bad")
args = parser.parse_args()
flare.init()
number = int(flare.get_site_name().rpartition("-")[2]) - 1
curves, goals = torch.tensor({CURVES}), torch.tensor({GOALS})
if args.alike:
    best = torch.linalg.solve(curves.sum(0), torch.einsum("sij,sj->i", curves, goals))
    curve, goal = torch.eye(2), best + 0.1 * (number - 3)
else:
    curve, goal = curves[number], goals[number]
model = torch.nn.ParameterDict({{"w": torch.nn.Parameter(torch.zeros(2))}})
scaffold = Scaffold()
while flare.is_running():
    received = flare.receive()
    model.load_state_dict(received.params)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    proximal = FedProxLoss(model, received)
    scaffold.begin(received)
    for _ in range(args.steps):
        optimizer.zero_grad()
        away = model["w"] - goal
        (away @ curve @ away / 2 + proximal()).backward()
        scaffold.correct(model)
        optimizer.step()
    if args.bad == flare.get_site_name():
        torch.nn.init.constant_(model["w"], 1e6)
    flare.send(flare.FLModel(params=model.state_dict(), optimizer_params=scaffold.finish()))
"""


@pytest.fixture
def gap(tmp_path: Path) -> Any:
    """Runs a recipe; returns how far the objective of the model that comes out is above its least value."""
    (tmp_path / "client.py").write_text(SCRIPT)
    curves, goals = np.array(CURVES), np.array(GOALS)
    best = np.linalg.solve(curves.sum(0), np.einsum("sij,sj->i", curves, goals))

    def objective(w: Any) -> float:
        away = w - goals
        return float(np.einsum("si,sij,sj->", away, curves, away)) / 2 / len(goals)

    def run(kind: type[FedAvgRecipe], rounds: int = 10, n_sites: int = 3, **changes: Any) -> float:
        recipe = kind(
            **{
                "model": {"w": torch.zeros(2)},
                "min_clients": n_sites,
                "num_rounds": rounds,
                "train_script": str(tmp_path / "client.py"),
                "deterministic": True,
                **changes,
            }
        )
        run = recipe.execute(SimEnv(num_clients=n_sites, debug=True, workspace_root=tmp_path / "runs"))
        found = load_file(Path(run.get_result() or "") / "server" / "models" / "FL_global_model.safetensors")["w"]
        return objective(found.astype(float)) - objective(best)

    return run


def test_fedprox_comes_closer_than_averaging_alone(gap: Any) -> None:
    """On sites that differ, holding them back leaves the model nearer to the best one; mu = 0 is plain averaging."""
    plain = gap(FedAvgRecipe)

    assert gap(FedProxRecipe, fedprox_mu=0.0) == plain
    assert gap(FedProxRecipe, fedprox_mu=0.5) < plain / 2


def test_fedopt_gets_there_in_fewer_rounds(gap: Any) -> None:
    """Where a site's steps are short, a server with momentum covers more ground in the same rounds."""
    plain = gap(FedAvgRecipe, rounds=4, train_args="--steps 1")

    assert gap(FedOptRecipe, rounds=4, train_args="--steps 1", server_optimizer="sgd") < plain / 2
    assert gap(FedOptRecipe, rounds=4, train_args="--steps 1", optimizer_args={"lr": 0.5}) < plain


@pytest.mark.parametrize("transfer", ["FULL", "DIFF"])
def test_scaffold_reaches_the_best_model(gap: Any, transfer: str) -> None:
    """However much sites differ, the model goes where their common objective is least; averaging alone does not."""
    plain = gap(FedAvgRecipe, rounds=20)

    assert gap(ScaffoldRecipe, rounds=20, params_transfer_type=transfer) < plain / 1000


def test_scaffold_with_trainers(gap: Any) -> None:
    """Control variates find their way to scripts in processes of their own, and live there from round to round."""
    plain = gap(FedAvgRecipe, rounds=5)

    assert gap(ScaffoldRecipe, rounds=5, launch_external_process=True) < plain / 2


@pytest.mark.parametrize("aggregator", ["Median", "TrimmedMean", "Krum"])
def test_a_bad_site_does_not_lead_astray(gap: Any, aggregator: str) -> None:
    """One site of seven sends nonsense: the mean is lost, a robust aggregator stays with the others.

    The aggregator is described by its class, as in a job that is exported.
    """
    args = {"num_byzantine": 1, "num_selected": 3} if aggregator == "Krum" else {}
    described = {"class_path": f"flarebus.workflow.robust.{aggregator}Aggregator", "args": args}
    alike = {"rounds": 4, "n_sites": 7, "train_args": "--alike --bad site-4"}

    assert gap(FedAvgRecipe, **alike) > 1e6
    assert gap(FedAvgRecipe, **alike, aggregator=described) < 0.5
