"""Scripts that were written for NVFlare's Client API: the import is replaced, nothing else, and they run wherever."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

import flarebus.client
from flarebus.recipe import FedAvgRecipe
from tests.system.observed import ObservedRun

LOOP = """
import argparse

import numpy as np

import nvflare.client as flare
from nvflare.client.config import ClientConfig, ConfigKey, ExchangeFormat, TransferType
from nvflare.client.tracking import MLflowWriter, SummaryWriter, WandBWriter


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--step", type=float, default=0.0)
    args = parser.parse_args()

    context = flare.init()
    assert isinstance(context, flare.APIContext)
    info = flare.system_info()
    assert info["site_name"] == flare.get_site_name() and info["job_id"] == flare.get_job_id()
    config = flare.get_config()
    task_exchange = config[ConfigKey.TASK_EXCHANGE]
    assert task_exchange[ConfigKey.TRAIN_TASK_NAME] == "train"
    client_config = ClientConfig(config)
    assert client_config.get_exchange_format() == ExchangeFormat.NUMPY
    assert client_config.get_transfer_type() == TransferType.FULL
    writer, mlflow, wandb = SummaryWriter(), MLflowWriter(), WandBWriter()
    mlflow.log_params({"lr": 0.1})

    while flare.is_running():
        input_model = flare.receive(timeout=60.0)
        print(f"{flare.get_task_name()} {input_model.current_round + 1}/{input_model.total_rounds}")
        if flare.is_evaluate() or flare.is_submit_model() or not flare.is_train():
            raise RuntimeError("this job only trains")
        weights = input_model.params["w"]
        writer.add_scalar("mean", float(np.mean(weights)), global_step=input_model.current_round)
        mlflow.log_metric("mlflow_mean", float(np.mean(weights)), step=input_model.current_round)
        wandb.log({"wandb_mean": float(np.mean(weights))}, step=input_model.current_round)
        flare.log("typed", 1.0, flare.AnalyticsDataType.SCALAR, global_step=input_model.current_round)
        output_model = flare.FLModel(
            params_type=flare.ParamsType.FULL,
            params={"w": weights + args.step},
            metrics={"accuracy": 0.5},
            meta={"NUM_STEPS_CURRENT_ROUND": 2},
        )
        flare.send(output_model)
        flare.clear()
    flare.shutdown()
    print("done")


if __name__ == "__main__":
    main()
"""

DECORATED = """
import nvflare.client as flare


@flare.train
def train(input_model=None, step=0.0):
    return flare.FLModel(params={"w": input_model.params["w"] + step}, meta={"NUM_STEPS_CURRENT_ROUND": 2})


@flare.evaluate
def evaluate(input_model=None):
    return {"accuracy": 0.5}


flare.init()
while flare.is_running():
    input_model = flare.receive()
    print(f"{flare.get_task_name()} {input_model.current_round + 1}/{input_model.total_rounds}")
    evaluate(input_model)
    train(input_model, step=1.0)
print("done")
"""

AS_OBJECT = """
from nvflare.client.ex_process.api import ExProcessClientAPI
import nvflare.client as flare

api = ExProcessClientAPI("config/client_api_config.json")
api.init()
assert api.system_info() == {"job_id": api.get_job_id(), "site_name": api.get_site_name()}
while api.is_running():
    input_model = api.receive()
    assert api.is_train() and not api.is_evaluate() and not api.is_submit_model()
    print(f"{api.get_task_name()} {input_model.current_round + 1}/{input_model.total_rounds}")
    api.log("typed", 1.0, flare.AnalyticsDataType.SCALAR)
    api.send(flare.FLModel(params={"w": input_model.params["w"] + 1}, metrics={"accuracy": 0.5}))
api.shutdown()
print("done")
"""

INSIDE = {"launch_external_process": False}
OUTSIDE = {"launch_external_process": True}


def moved(script: str) -> str:
    """The script after the one change that a user makes."""
    return script.replace("nvflare.client", "flarebus.client")


def run(
    observed: ObservedRun, script: str, prepare: Callable[[FedAvgRecipe], None] | None = None, **given: bool
) -> None:
    """Run a script on two sites for two rounds of steps of one."""
    observed.start(moved(script), prepare=prepare, train_args="--step 1.0", key_metric="accuracy", **given)
    assert observed.end() == "completed", observed.reason
    assert observed.model() == [2.0] * 4
    assert [row["metrics"]["accuracy"] for row in observed.rounds()] == [0.5, 0.5]
    for site in ("site-1", "site-2"):
        log = observed.log(site)
        assert re.findall(r"train \d/\d", log) == ["train 1/2", "train 2/2"]
        assert "done" in log


@pytest.mark.parametrize("where", [INSIDE, OUTSIDE], ids=["inside", "outside"])
@pytest.mark.parametrize("script", [LOOP, DECORATED], ids=["loop", "decorators"])
def test_script_runs_with_its_import_replaced(observed: ObservedRun, script: str, where: dict[str, bool]) -> None:
    """In the client job and in a process of its own a script does what it did."""
    run(observed, script, **where)


@pytest.mark.parametrize("where", [INSIDE, OUTSIDE], ids=["inside", "outside"])
def test_what_trackers_were_told_arrives(observed: ObservedRun, where: dict[str, bool]) -> None:
    """Metrics of each writer arrive with their site and step."""
    run(observed, LOOP, **where)

    lines = (observed.run_dir / "server" / "site_metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for key, writer in (("mean", "tensorboard"), ("mlflow_mean", "mlflow"), ("metrics", "wandb"), ("typed", None)):
        found = [(row["site"], row["step"]) for row in rows if row["key"] == key and row.get("writer") == writer]
        assert sorted(found) == [(site, step) for site in ("site-1", "site-2") for step in (0, 1)], key


def test_api_can_be_an_object(observed: ObservedRun) -> None:
    """Code that holds an ExProcessClientAPI finds its configuration where it was."""
    run(observed, AS_OBJECT, **OUTSIDE)


def test_configuration_may_name_the_old_pipes(observed: ObservedRun) -> None:
    """The class path of a pipe of NVFlare means the one of that kind."""
    pipe = {"CLASS_NAME": "nvflare.fuel.utils.pipe.file_pipe.FilePipe", "ARG": {"mode": "PASSIVE"}}

    run(observed, LOOP, lambda recipe: recipe.add_client_config({"pipe": pipe}), **OUTSIDE)


def test_scripts_use_every_name() -> None:
    """Nothing that `flarebus.client` offers is missing in the scripts above."""
    used = set(re.findall(r"flare\.(\w+)", LOOP + DECORATED))

    assert set(flarebus.client.__all__) <= used
