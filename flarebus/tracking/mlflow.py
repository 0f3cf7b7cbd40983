"""MLflow: one run for the job, with the aggregate, and below it one run for each site.

Only `MlflowClient` is used, with its own tracking URI: a script that uses MLflow itself keeps its active run and its
settings.
"""

from __future__ import annotations

import importlib
import logging
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from flarebus.errors import ConfigError
from flarebus.tracking.reach import check_reachable
from flarebus.tracking.settings import FLAG, TEXT, VALUES, check_settings
from flarebus.tracking.tracker import Plain, Point, RunInfo, Tracker

__all__ = ["MLflowTracker"]

_T = TypeVar("_T")
# What MLflow takes in one request, and how long its names and values may be.
_MAX_METRICS, _MAX_OTHERS = 1000, 100
_MAX_KEY, _MAX_PARAM, _MAX_TAG = 250, 6000, 5000
_UNFIT = re.compile(r"[^\w\-. :/]")
_STATES = {"completed": "FINISHED", "failed": "FAILED", "aborted": "KILLED"}
_SQLITE = "sqlite:///"


class MLflowTracker(Tracker):
    """A store at `tracking_uri`; without one where the variable MLFLOW_TRACKING_URI says, or else a SQLite file in the
    folder of the run.

    User, password or token of a server come from MLflow's own variables, MLFLOW_TRACKING_USERNAME and the like.
    """

    requires: ClassVar[tuple[str, ...]] = ("mlflow",)
    extra: ClassVar[str] = "mlflow"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._named: Mapping[str, Any] = config.get("kw_args") or {}
        self._runs: dict[str, str] = {}

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """Check settings.

        `tracking_uri`, `artifact_location`; `log_artifacts`, whether models and reports are kept there, True if left
        out; `kw_args` with any of `experiment_name` (the name of the job), `run_name`, `experiment_tags`, `run_tags`.
        """
        names = {"experiment_name": TEXT, "run_name": TEXT, "experiment_tags": VALUES, "run_tags": VALUES}
        check_settings(
            config, {"tracking_uri": TEXT, "artifact_location": TEXT, "log_artifacts": FLAG, "kw_args": names}
        )

    def open(self, run: RunInfo) -> None:
        """Load MLflow, find or make the experiment, and begin the run."""
        self._run = run
        uri = self.config.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = f"{_SQLITE}{run.folder / 'mlflow.db'}"
        check_reachable(uri)
        location = self.config.get("artifact_location") or _artefacts_beside(uri)
        # What a job does is told to nobody whom the user has not named.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        mlflow = importlib.import_module("mlflow")
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # how it makes its tables
        self._entities: Any = importlib.import_module("mlflow.entities")
        self._client: Any = mlflow.MlflowClient(tracking_uri=uri)
        self._experiment = self._find_experiment(location)
        name = self._named.get("run_name") or f"{run.job_name}-{run.job_id[:8]}"
        self._name = name
        tags = {str(key): str(value) for key, value in (self._named.get("run_tags") or {}).items()}
        self._begin(run.site, f"{name}/{run.site}" if run.site else name, tags)

    def scalars(self, series: str, points: Sequence[Point]) -> None:
        """Metrics of the series' run."""
        metrics = (
            self._entities.Metric(_key(point.key), point.value, int(point.time * 1000), point.step) for point in points
        )
        for batch in _batches(metrics, _MAX_METRICS):
            self._client.log_batch(self._id(series), metrics=batch)

    def params(self, series: str, values: Mapping[str, Plain]) -> None:
        """Parameters of the series' run; MLflow refuses to change one."""
        params = (self._entities.Param(_key(name), str(value)[:_MAX_PARAM]) for name, value in values.items())
        for batch in _batches(params, _MAX_OTHERS):
            self._client.log_batch(self._id(series), params=batch)

    def tags(self, series: str, values: Mapping[str, Plain]) -> None:
        """Tags of the series' run."""
        tags = (self._entities.RunTag(_key(name), str(value)[:_MAX_TAG]) for name, value in values.items())
        for batch in _batches(tags, _MAX_OTHERS):
            self._client.log_batch(self._id(series), tags=batch)

    def text(self, series: str, key: str, text: str, step: int, path: str) -> None:
        """A file of the series' run."""
        self._client.log_text(self._id(series), text, path or f"texts/{_file(key)}/{step}.txt")

    def image(self, series: str, key: str, png: bytes, step: int) -> None:
        """A file of the series' run."""
        folder = self._run.folder / f".mlflow-{os.getpid()}"
        folder.mkdir(exist_ok=True)
        file = folder / f"{step}.png"
        try:
            file.write_bytes(png)
            self._client.log_artifact(self._id(series), str(file), f"images/{_file(key)}")
        finally:
            file.unlink(missing_ok=True)
            folder.rmdir()

    def artefact(self, path: Path, kind: str) -> None:
        """A file of the job's run, unless `log_artifacts` is False."""
        if self.config.get("log_artifacts") is not False:
            self._client.log_artifact(self._id(self._run.site), str(path), f"{kind}s")

    def close(self, state: str) -> None:
        """End all runs, with how the job ended."""
        for run_id in reversed(self._runs.values()):
            self._client.set_terminated(run_id, _STATES.get(state, "FAILED"))

    def _find_experiment(self, location: str | None) -> str:
        name = self._named.get("experiment_name") or self._run.job_name
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                found_id: str = self._client.create_experiment(name, artifact_location=location)
            except Exception:
                # Another site may have made it meanwhile.
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found is not None:
            if found.lifecycle_stage != "active":
                raise ConfigError("experiment_name", name, "an experiment that is not deleted in MLflow; restore it")
            found_id = found.experiment_id
        for key, value in (self._named.get("experiment_tags") or {}).items():
            self._client.set_experiment_tag(found_id, str(key), str(value))
        return found_id

    def _id(self, series: str) -> str:
        found = self._runs.get(series)
        if found is None:
            parent = self._runs[self._run.site]
            found = self._begin(series, f"{self._name}/{series}", {"mlflow.parentRunId": parent})
        return found

    def _begin(self, series: str, name: str, tags: Mapping[str, str]) -> str:
        own = {"flarebus.job_id": self._run.job_id, "flarebus.series": series or "aggregate"}
        made = self._client.create_run(self._experiment, run_name=name, tags={**own, **tags})
        run_id: str = made.info.run_id
        self._runs[series] = run_id
        return run_id


def _artefacts_beside(uri: str) -> str | None:
    """Where artefacts of a SQLite store go: beside it, not into the working directory of whoever comes first."""
    if not uri.startswith(_SQLITE):
        return None
    file = Path(os.path.abspath(uri.removeprefix(_SQLITE).partition("?")[0]))
    file.parent.mkdir(parents=True, exist_ok=True)
    return (file.parent / "mlartifacts").as_uri()


def _key(name: str) -> str:
    """A name that MLflow takes: of some characters only, and no path that leads elsewhere."""
    name = _UNFIT.sub("_", name)[:_MAX_KEY]
    return name if posixpath.normpath(name) == name and name != "." else name.replace("/", "_").replace(".", "_")


def _file(key: str) -> str:
    return _key(key).replace("/", "_").replace(":", "_")


def _batches(items: Iterator[_T], size: int) -> Iterator[list[_T]]:
    while batch := list(islice(items, size)):
        yield batch
