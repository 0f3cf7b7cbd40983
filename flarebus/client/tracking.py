"""Writers with the calls of the trackers that people know; what they write goes to the server as with `flare.log`.

    from flarebus.client.tracking import SummaryWriter

    flare.init()
    writer = SummaryWriter()
    ...
    writer.add_scalar("loss", loss, global_step=step)

A writer holds no file and no connection, may be used from several threads, and does nothing on ranks other than 0: a
script that runs on all ranks needs no condition. A record without a step has no step: "none given" is something else
than step 0, on which the points of a whole run would come to lie.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, ClassVar

from flarebus.client.api import APIContext, context_of
from flarebus.client.record import hand_over
from flarebus.metric import AnalyticsDataType

__all__ = ["MLflowWriter", "SummaryWriter", "WandBWriter"]


class _Writer:
    """What the writers share.

    Args:
        ctx: the context to use; without it, the first one that the script made, which is looked for at the first write.
    """

    kind: ClassVar[str]
    """Stands in each record as its ``writer``."""

    def __init__(self, *, ctx: APIContext | None = None) -> None:
        self._context = ctx
        self._is_given = ctx is not None
        self._lock = threading.Lock()

    def _write(self, key: str, value: Any, data_type: AnalyticsDataType, step: Any, fields: dict[str, Any]) -> None:
        context = self._context
        if context is None or context.closed or context.seat.closed:
            context = self._find(context)
        if context.rank != "0":
            return
        if step is not None:
            fields["global_step"] = step
        fields["writer"] = self.kind
        hand_over(context.seat.engine.log, key, value, data_type, fields)

    def _find(self, known: APIContext | None) -> APIContext:
        # Kept: a thread of some library, which writes later, could not be traced to the script.
        with self._lock:
            context = context_of(known if self._is_given else None, "log")
            self._context = context
            return context


class SummaryWriter(_Writer):
    """As the one of PyTorch for TensorBoard, for what a server can keep: scalars, texts, images, hyper-parameters.

    All methods raise `ClientApiError` outside a script's session and `ConfigError` for an argument that is wrong.
    """

    kind = "tensorboard"

    def add_scalar(self, tag: str, scalar: float, global_step: int | None = None, **kwargs: Any) -> None:
        """Write one number; an array or tensor of one will do."""
        self._write(tag, scalar, AnalyticsDataType.SCALAR, global_step, kwargs)

    def add_scalars(
        self, tag: str, scalars: Mapping[str, float], global_step: int | None = None, **kwargs: Any
    ) -> None:
        """Write several numbers, by name, that belong into one chart."""
        self._write(tag, scalars, AnalyticsDataType.SCALARS, global_step, kwargs)

    def add_text(self, tag: str, text_string: str, global_step: int | None = None, **kwargs: Any) -> None:
        """Write a text."""
        self._write(tag, text_string, AnalyticsDataType.TEXT, global_step, kwargs)

    def add_image(
        self, tag: str, img_tensor: Any, global_step: int | None = None, *, dataformats: str = "CHW", **kwargs: Any
    ) -> None:
        """Write an image, an array or tensor with its axes in the order of `dataformats`; it is copied."""
        self._write(tag, img_tensor, AnalyticsDataType.IMAGE, global_step, {"dataformats": dataformats, **kwargs})

    def add_hparams(
        self, hparam_dict: Mapping[str, Any], metric_dict: Mapping[str, float], global_step: int | None = None
    ) -> None:
        """Write hyper-parameters, and the metrics that they led to."""
        self._write("hparams", hparam_dict, AnalyticsDataType.PARAMETERS, None, {})
        self._write("hparams", metric_dict, AnalyticsDataType.METRICS, global_step, {})

    def flush(self) -> None:
        """Do nothing: what was written is on its way, and training never waits for it."""

    def close(self) -> None:
        """Do nothing: everything is delivered before the job ends, and a closed writer may be written to again."""

    def __enter__(self) -> SummaryWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class MLflowWriter(_Writer):
    """As the fluent calls of MLflow.

    All methods raise `ClientApiError` outside a script's session and `ConfigError` for an argument that is wrong.
    """

    kind = "mlflow"

    def log_param(self, key: str, value: Any) -> None:
        """Write one parameter of the run; what is no number or string becomes its text."""
        self._write(key, value, AnalyticsDataType.PARAMETER, None, {})

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Write parameters of the run, by name."""
        self._write("params", values, AnalyticsDataType.PARAMETERS, None, {})

    def log_metric(self, key: str, value: float, step: int | None = None) -> None:
        """Write one number."""
        self._write(key, value, AnalyticsDataType.METRIC, step, {})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write several numbers, by name."""
        self._write("metrics", metrics, AnalyticsDataType.METRICS, step, {})

    def log_text(self, text: str, artifact_file_path: str) -> None:
        """Write a text that a tracker keeps as a file of that path among its artifacts."""
        self._write("text", text, AnalyticsDataType.TEXT, None, {"path": artifact_file_path})

    def set_tag(self, key: str, tag: Any) -> None:
        """Set one tag of the run; what is no number or string becomes its text."""
        self._write(key, tag, AnalyticsDataType.TAG, None, {})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags of the run, by name."""
        self._write("tags", tags, AnalyticsDataType.TAGS, None, {})


class WandBWriter(_Writer):
    """As a run of Weights & Biases.

    Raises `ClientApiError` outside a script's session and `ConfigError` for an argument that is wrong.
    """

    kind = "wandb"

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write several values, by name."""
        self._write("metrics", metrics, AnalyticsDataType.METRICS, step, {})
