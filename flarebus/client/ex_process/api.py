"""ExProcessClientAPI: the Client API as an object, for a trainer in a process of its own.

`flare.init()` and the functions beside it do the same, and choose by themselves; this is for code that holds its API.
"""

from __future__ import annotations

import os
from typing import Any

from flarebus.client import api
from flarebus.errors import ClientApiError
from flarebus.metric import AnalyticsDataType
from flarebus.model import FLModel

__all__ = ["ExProcessClientAPI"]


class ExProcessClientAPI:
    """One rank of a trainer. Every method is the function of the same name in `flarebus.client`.

    Args:
        config_file: the client configuration that the client job wrote for its trainer.
    """

    def __init__(self, config_file: str | os.PathLike[str]) -> None:
        self.config_file = os.fspath(config_file)
        self._context: api.APIContext | None = None

    def init(self, rank: str | int | None = None) -> None:
        """Connect to the client job; see `flarebus.client.init`."""
        self._context = api.init(rank=rank, config_file=self.config_file)

    @property
    def context(self) -> api.APIContext:
        """What `init` made.

        Raises:
            ClientApiError: `init` was not called yet.
        """
        if self._context is None:
            raise ClientApiError("ExProcessClientAPI: call init() first")
        return self._context

    def receive(self, timeout: float | None = None) -> FLModel | None:
        """See `flarebus.client.receive`."""
        return api.receive(timeout, ctx=self.context)

    def send(self, model: FLModel, clear_cache: bool = True) -> None:
        """See `flarebus.client.send`."""
        api.send(model, clear_cache, ctx=self.context)

    def is_running(self) -> bool:
        """See `flarebus.client.is_running`."""
        return api.is_running(ctx=self.context)

    def is_train(self) -> bool:
        """See `flarebus.client.is_train`."""
        return api.is_train(ctx=self.context)

    def is_evaluate(self) -> bool:
        """See `flarebus.client.is_evaluate`."""
        return api.is_evaluate(ctx=self.context)

    def is_submit_model(self) -> bool:
        """See `flarebus.client.is_submit_model`."""
        return api.is_submit_model(ctx=self.context)

    def log(self, key: str, value: Any, data_type: AnalyticsDataType, **kwargs: Any) -> None:
        """See `flarebus.client.log`."""
        api.log(key, value, data_type, ctx=self.context, **kwargs)

    def system_info(self) -> dict[str, str]:
        """See `flarebus.client.system_info`."""
        return api.system_info(ctx=self.context)

    def get_config(self) -> dict[str, Any]:
        """See `flarebus.client.get_config`."""
        return api.get_config(ctx=self.context)

    def get_job_id(self) -> str:
        """See `flarebus.client.get_job_id`."""
        return api.get_job_id(ctx=self.context)

    def get_site_name(self) -> str:
        """See `flarebus.client.get_site_name`."""
        return api.get_site_name(ctx=self.context)

    def get_task_name(self) -> str:
        """See `flarebus.client.get_task_name`."""
        return api.get_task_name(ctx=self.context)

    def clear(self) -> None:
        """See `flarebus.client.clear`."""
        api.clear(ctx=self.context)

    def shutdown(self) -> None:
        """See `flarebus.client.shutdown`. Calling it again does nothing."""
        if self._context is not None and not self._context.closed:
            api.shutdown(ctx=self._context)
