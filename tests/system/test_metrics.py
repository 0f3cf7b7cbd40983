"""Metrics from real scripts in real worker processes to the lines of the server's file."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest

from tests.system.observed import ObservedRun

WRITERS = """
import threading
import numpy as np
import flarebus.client as flare
from flarebus.client.tracking import MLflowWriter, SummaryWriter, WandBWriter

flare.init()
board, ml, wb = SummaryWriter(), MLflowWriter(), WandBWriter()
ml.log_params({"lr": 0.1, "layers": [1, 2]})
ml.set_tag("who", "ada")
while flare.is_running():
    model = flare.receive()
    round = model.current_round
    board.add_scalar("loss", np.float32(0.5), global_step=round)
    board.add_scalar("no step", float("nan"))
    board.add_scalars("both", {"a": 1, "b": np.float64(2)}, round)
    board.add_text("note", "long " * 1000, round)
    board.add_image("image", np.zeros((3, 32, 32), np.uint8), round)
    ml.log_metric("auc", 0.9, step=round)
    ml.log_text("words", "notes.txt")
    wb.log({"f1": 0.7}, step=round)
    threads = [threading.Thread(target=wb.log, args=({"thread": number},)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    flare.log("plain", True, flare.AnalyticsDataType.SCALAR, global_step=round)
    flare.send(flare.FLModel(params={"w": model.params["w"] + 1}))
flare.log("last", 1, "SCALAR")
"""

MANY = """
import flarebus.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    for step in range(5000):
        flare.log("loss", 0.5, flare.AnalyticsDataType.SCALAR, global_step=step)
    flare.send(flare.FLModel(params={"w": model.params["w"] + 1}))
"""


def records_of(observed: ObservedRun, site: str) -> list[dict[str, Any]]:
    text = (observed.run_dir / "server/site_metrics.jsonl").read_text()
    return [record for record in map(json.loads, text.splitlines()) if record["site"] == site]


def test_what_writers_write_lands_in_the_file(observed: ObservedRun) -> None:
    """Every record of every site is there, stamped, in order, to the last line of its script."""
    observed.start(WRITERS)

    assert observed.end() == "completed", observed.reason
    for site in ("site-1", "site-2"):
        found = records_of(observed, site)
        times = [record.pop("time") for record in found]
        assert times == sorted(times)

        def short(record: dict[str, Any]) -> tuple[Any, ...]:
            return tuple(record[name] for name in ("round", "key", "type", "step", "writer", "value"))

        threads = [record for record in found if record["value"] in [{"thread": number} for number in range(4)]]
        assert len(threads) == 8
        in_order = [short(record) for record in found if record not in threads]
        assert in_order == [
            (None, "params", "PARAMETERS", None, "mlflow", {"lr": 0.1, "layers": "[1, 2]"}),
            (None, "who", "TAG", None, "mlflow", "ada"),
            *(
                record
                for round in (0, 1)
                for record in (
                    (round, "loss", "SCALAR", round, "tensorboard", 0.5),
                    (round, "no step", "SCALAR", None, "tensorboard", None),
                    (round, "both", "SCALARS", round, "tensorboard", {"a": 1, "b": 2.0}),
                    (round, "note", "TEXT", round, "tensorboard", "long " * 1000),
                    (round, "image", "IMAGE", round, "tensorboard", {"dtype": "uint8", "shape": [3, 32, 32]}),
                    (round, "auc", "METRIC", round, "mlflow", 0.9),
                    (round, "text", "TEXT", None, "mlflow", "words"),
                    (round, "metrics", "METRICS", round, "wandb", {"f1": 0.7}),
                    (round, "plain", "SCALAR", round, None, True),
                )
            ),
            (None, "last", "SCALAR", None, None, 1),
        ]
        extras = [record["extra"] for record in found if record["key"] == "text"]
        assert extras == [{"path": "notes.txt"}] * 2


@pytest.mark.parametrize("debug", [False, True])
def test_all_that_was_logged_is_there_when_the_job_has_ended(observed: ObservedRun, debug: bool) -> None:
    """Ten thousand records a site, the last ones just before the end: none is missing, and each site's are in order."""
    observed.start(MANY, env={"debug": debug, "num_threads": 1} if debug else None)

    assert observed.end() == "completed", observed.reason
    for site in ("site-1", "site-2"):
        found = [(record["round"], record["step"]) for record in records_of(observed, site)]
        assert found == [(round, step) for round in (0, 1) for step in range(5000)]


def test_listeners_get_the_values_themselves(observed: ObservedRun) -> None:
    """What is only described in the file is whole for whoever listens."""
    observed.start(WRITERS, ["site-1"])

    assert observed.end() == "completed", observed.reason
    told = [fields for event, fields in observed.events if event == "site_metrics"]
    assert {fields["site"] for fields in told} == {"site-1"}
    records = [record for fields in told for record in fields["records"]]
    assert len(records) == len(records_of(observed, "site-1")) == 29
    images = [record["value"] for record in records if record["type"] == "IMAGE"]
    assert [(type(image), image.shape) for image in images] == [(np.ndarray, (3, 32, 32))] * 2


def test_a_listener_that_raises_costs_neither_records_nor_the_job(observed: ObservedRun) -> None:
    """The server's log says what it did; everything else goes on."""

    def fail(_: Any) -> None:
        raise ZeroDivisionError("the tracker is broken")

    observed.on("site_metrics", fail)
    observed.start(MANY, ["site-1"])

    assert observed.end() == "completed", observed.reason
    assert len(records_of(observed, "site-1")) == 10_000
    assert observed.log("server").count("ZeroDivisionError: the tracker is broken") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no file here that is always full")
def test_a_full_disk_costs_records_not_rounds(observed: ObservedRun) -> None:
    """If the file of metrics takes nothing the job goes on to its end, and the log says it."""

    def break_file(fields: dict[str, Any]) -> None:
        (observed.run_dir / "server/site_metrics.jsonl").symlink_to("/dev/full")

    observed.on("job_started", break_file)
    observed.start(MANY, ["site-1"])

    assert observed.end() == "completed", observed.reason
    assert observed.journal() == ([0, 1], "completed")
    assert "metric records are not written: " in observed.log("server")
