"""TensorBoard: one folder of event files for each series, so that the sites stand side by side in a chart."""

from __future__ import annotations

import importlib
import time as clock
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from flarebus.tracking.settings import TEXT, check_settings
from flarebus.tracking.tracker import Plain, Point, RunInfo, Tracker

__all__ = ["TensorBoardTracker"]

DEFAULT_FOLDER = "tb_events"
# The name of the series of the job; no site is called that.
SERVER = "server"
# Whoever looks at a running job sees it this much later, in seconds; so much is lost if the process is killed.
_FLUSH_S = 2


class TensorBoardTracker(Tracker):
    """Event files below `tb_folder`, `tb_events` in the folder of the run if that is left out.

    Artefacts stay where they are; a text says where.
    """

    requires: ClassVar[tuple[str, ...]] = ("tensorboard",)
    extra: ClassVar[str] = "tensorboard"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._writers: dict[str, Any] = {}
        self._artefacts: dict[str, Plain] = {}

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """Check settings: `tb_folder`, absolute or relative to the folder of the run."""
        check_settings(config, {"tb_folder": TEXT})

    def open(self, run: RunInfo) -> None:
        """Load TensorBoard and make the folder."""
        self._run = run
        self._folder = run.folder / (self.config.get("tb_folder") or DEFAULT_FOLDER)
        self._event_files = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._event: Any = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
        self._summaries: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        self._tensors: Any = importlib.import_module("tensorboard.compat.proto.tensor_pb2")
        self._types: Any = importlib.import_module("tensorboard.compat.proto.types_pb2")
        self._folder.mkdir(parents=True, exist_ok=True)

    def scalars(self, series: str, points: Sequence[Point]) -> None:
        """One value for each point."""
        for point in points:
            self._add(series, point.step, point.time, tag=point.key, simple_value=point.value)

    def params(self, series: str, values: Mapping[str, Plain]) -> None:
        """A table among the texts."""
        self._add_text(series, "parameters", _table(values), 0)

    def tags(self, series: str, values: Mapping[str, Plain]) -> None:
        """A table among the texts."""
        self._add_text(series, "tags", _table(values), 0)

    def text(self, series: str, key: str, text: str, step: int, path: str) -> None:
        """A text; there are no files here for one to become."""
        self._add_text(series, path or key, text, step)

    def image(self, series: str, key: str, png: bytes, step: int) -> None:
        """An image."""
        # Width and height stand at fixed places of every PNG file.
        width, height = (int.from_bytes(png[place : place + 4], "big") for place in (16, 20))
        image = self._summaries.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._add(series, step, None, tag=key, image=image)

    def artefact(self, path: Path, kind: str) -> None:
        """Remember where it is."""
        self._artefacts[str(path)] = kind

    def close(self, state: str) -> None:
        """Write the last texts and close all files."""
        if self._artefacts:
            self._add_text(self._run.site, "artefacts", _table(self._artefacts), 0)
        self.tags(self._run.site, {"job_id": self._run.job_id, "state": state})
        for writer in self._writers.values():
            writer.close()

    def _add_text(self, series: str, tag: str, text: str, step: int) -> None:
        value = self._summaries.Summary.Value
        plugin = self._summaries.SummaryMetadata.PluginData(plugin_name="text")
        tensor = self._tensors.TensorProto(
            dtype=self._types.DT_STRING,
            string_val=[text.encode()],
            tensor_shape={"dim": [{"size": 1}]},
        )
        metadata = self._summaries.SummaryMetadata(plugin_data=plugin)
        self._write(series, step, None, value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor))

    def _add(self, series: str, step: int, time: float | None, **fields: Any) -> None:
        self._write(series, step, time, self._summaries.Summary.Value(**fields))

    def _write(self, series: str, step: int, time: float | None, value: Any) -> None:
        writer = self._writers.get(series)
        if writer is None:
            folder = self._folder / (series or SERVER)
            writer = self._event_files.EventFileWriter(str(folder), flush_secs=_FLUSH_S)
            self._writers[series] = writer
        when = clock.time() if time is None else time
        writer.add_event(self._event(wall_time=when, step=step, summary=self._summaries.Summary(value=[value])))


def _table(values: Mapping[str, Plain]) -> str:
    """A table in Markdown, which TensorBoard shows as one."""
    cells = [(str(name).replace("|", "\\|"), str(value).replace("|", "\\|")) for name, value in values.items()]
    return "\n".join(["|name|value|", "|-|-|", *(f"|{name}|{value}|" for name, value in cells)])
