"""What a site tells a script about its job."""

from __future__ import annotations

from typing import Any

import pytest

from flarebus.client.config import ClientConfig
from flarebus.job.kinds import ExchangeFormat, FrameworkType, TransferType
from flarebus.job.site_config import SiteConfig
from flarebus.site.client_config import make_client_config

INSIDE = {
    "train_with_eval": True,
    "exchange_format": "pytorch",
    "server_expected_format": "numpy",
    "transfer_type": "FULL",
    "train_task_name": "train",
    "eval_task_name": "validate",
    "submit_model_task_name": "submit_model",
    "memory_gc_rounds": 0,
    "cuda_empty_cache": False,
}
TRAINER = {
    "HEARTBEAT_TIMEOUT": 60.0,
    "heartbeat_interval": 5.0,
    "submit_result_timeout": 300.0,
    "max_resends": 3,
    "download_complete_timeout": 1800.0,
    "launch_once": True,
}


def made(**changes: Any) -> dict[str, Any]:
    config = make_client_config("a", "job-1", SiteConfig("x.py", **changes))
    ClientConfig(config)  # is one
    assert config.keys() == {"SITE_NAME", "JOB_ID", "TASK_EXCHANGE"}
    assert (config["SITE_NAME"], config["JOB_ID"]) == ("a", "job-1")
    section: dict[str, Any] = config["TASK_EXCHANGE"]
    return section


def test_script_inside_is_told_what_it_needs() -> None:
    """A script inside the client job hears nothing about pipes and timeouts."""
    assert made() == INSIDE


@pytest.mark.parametrize("how", [{"launch_external_process": True}, {"attach": True}])
def test_trainer_is_told_everything_in_full(how: dict[str, bool]) -> None:
    """The file of a process of its own leaves nothing to defaults, whoever starts it."""
    assert made(**how) == INSIDE | TRAINER


def test_fields_of_the_site_are_in_it() -> None:
    """Formats, transfer type, memory and launches are those of the site."""
    found = made(
        framework=FrameworkType.RAW,
        server_expected_format=ExchangeFormat.PYTORCH,
        params_transfer_type=TransferType.DIFF,
        memory_gc_rounds=2,
        cuda_empty_cache=True,
        launch_external_process=True,
        launch_once=False,
    )

    assert found == INSIDE | TRAINER | {
        "exchange_format": "raw",
        "server_expected_format": "pytorch",
        "transfer_type": "DIFF",
        "memory_gc_rounds": 2,
        "cuda_empty_cache": True,
        "launch_once": False,
    }


@pytest.mark.parametrize("external", [False, True])
def test_overrides_come_last(external: bool) -> None:
    """What the job changed counts, under the names of the file; the pipe is made by whoever connects the trainer."""
    overrides = {
        "heartbeat_timeout": 20,
        "max_resends": None,
        "exchange_format": "raw",
        "train_task_name": "fit",
        "launch_timeout": 7,
        "pipe": "file",
    }

    found = made(launch_external_process=external, client_config=overrides)

    expected = {"HEARTBEAT_TIMEOUT": 20.0, "max_resends": None, "exchange_format": "raw", "train_task_name": "fit"}
    assert found == INSIDE | (TRAINER if external else {}) | expected
