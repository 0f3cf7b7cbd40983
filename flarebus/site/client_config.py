"""What a site tells a script about its job, in the words of the client configuration file. No pipe and no secret."""

from __future__ import annotations

from typing import Any

from flarebus.job.client_keys import TASK_KEYS, ConfigKey, overrides_in_file
from flarebus.job.kinds import ExchangeFormat, FrameworkType
from flarebus.job.site_config import SiteConfig

__all__ = ["make_client_config"]

# What a script of each framework works with.
_EXCHANGE_FORMAT = {
    FrameworkType.NUMPY: ExchangeFormat.NUMPY,
    FrameworkType.PYTORCH: ExchangeFormat.PYTORCH,
    FrameworkType.TENSORFLOW: ExchangeFormat.KERAS_LAYER_WEIGHTS,
    FrameworkType.RAW: ExchangeFormat.RAW,
}
_TASK_NAMES = (ConfigKey.TRAIN_TASK_NAME, ConfigKey.EVAL_TASK_NAME, ConfigKey.SUBMIT_MODEL_TASK_NAME)
# What only a script in a process of its own has to wait for.
_OF_TRAINERS = (
    ConfigKey.HEARTBEAT_TIMEOUT,
    ConfigKey.HEARTBEAT_INTERVAL,
    ConfigKey.SUBMIT_RESULT_TIMEOUT,
    ConfigKey.MAX_RESENDS,
    ConfigKey.DOWNLOAD_COMPLETE_TIMEOUT,
)


def make_client_config(site: str, job_id: str, config: SiteConfig) -> dict[str, Any]:
    """The configuration of the script of `site`, as plain data of the caller's own.

    What the job changed with `add_client_config` is in it, wherever the script runs. What is about a process of its own
    is there if it has one.
    """
    names = (*_TASK_NAMES, *(_OF_TRAINERS if config.is_external else ()))
    section: dict[str, Any] = {
        # Metrics that come with an update describe the model that was received: scripts are expected to measure it.
        ConfigKey.TRAIN_WITH_EVAL: True,
        ConfigKey.EXCHANGE_FORMAT: _EXCHANGE_FORMAT[config.framework].value,
        ConfigKey.SERVER_EXPECTED_FORMAT: config.server_expected_format.value,
        ConfigKey.TRANSFER_TYPE: config.params_transfer_type.value,
        ConfigKey.MEMORY_GC_ROUNDS: config.memory_gc_rounds,
        ConfigKey.CUDA_EMPTY_CACHE: config.cuda_empty_cache,
        **{name: TASK_KEYS[name].default for name in names},
    }
    if config.is_external:
        section[ConfigKey.LAUNCH_ONCE] = config.launch_once
    section |= overrides_in_file(config.client_config)
    return {ConfigKey.SITE_NAME: site, ConfigKey.JOB_ID: job_id, ConfigKey.TASK_EXCHANGE: section}
