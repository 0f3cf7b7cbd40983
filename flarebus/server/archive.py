"""Archive: what a job leaves on disk. Models, the journal of its rounds, and metrics as lines of JSON.

A round is committed in one step: its model file is durable, then its row stands in the journal. That takes the disk its
time, so it happens on a thread while the next round goes out; nothing of that round is committed before it is done, and
the pages it wrote are not written again before it is done.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flarebus.job.checkpoint import GLOBAL_NAME, CheckpointStore, export_pt
from flarebus.job.definition import JobDefinition
from flarebus.job.file_names import stem_of
from flarebus.job.initial import map_initial
from flarebus.job.journal import Journal, append_metrics
from flarebus.job.keras_models import export_keras
from flarebus.job.kinds import FrameworkType
from flarebus.job.report import write_report
from flarebus.job.tensor_file import load_params
from flarebus.server.site_metrics import MetricFile

__all__ = ["Archive"]

_GLOBAL_STEM = stem_of(Path(GLOBAL_NAME))


class Archive:
    """The durable side of one job. One thread calls it, the controller's.

    Args:
        folder: the server's folder of the run.
        job: what runs.
        params: the model that it begins with; referenced until the first commit.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, folder: Path, job: JobDefinition, params: dict[str, Any]) -> None:
        self._folder = folder
        self._job = job
        with ExitStack() as undo:
            self._journal = Journal(folder / "rounds.sqlite")
            undo.callback(self._journal.close)
            self._journal.begin(job.job_id, job.name)
            self._store = CheckpointStore(folder / "models", f"{job.best_stem}.safetensors")
            undo.pop_all()
        self._params = params
        self._site_metrics = MetricFile(folder / "site_metrics.jsonl")
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="flarebus commit")
        self._committing: Future[None] | None = None
        self._began = time.monotonic()
        self._answered: dict[str, dict[str, Any]] = {}
        self._failed: dict[str, str] = {}
        self.last_round_facts: dict[str, Any] = {}
        """Seconds and model path of the round committed last."""

    @property
    def next_round(self) -> int:
        """The first round that is not committed."""
        last = self._journal.last_round()
        return 0 if last is None else last + 1

    def current_params(self) -> dict[str, Any]:
        """The model that the next round begins with."""
        return self._params

    def models(self) -> dict[str, dict[str, Any]]:
        """The models that are here, by the names of their files; see `Job.models`."""
        self._finish_commit()
        found = {
            name: map_initial(ref.path, self._folder, f"models[{name!r}]") for name, ref in self._job.models.items()
        }
        suffix = ".pt" if self._job.framework is FrameworkType.PYTORCH else ".safetensors"
        for stem, path in ((_GLOBAL_STEM, self._store.current_path), (self._job.best_stem, self._store.best_path)):
            if path is not None:
                found[f"{stem}{suffix}"] = load_params(path)
        return found

    def pages(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Writable arrays like those in `params`, on the pages of the file that holds no committed model."""
        self._finish_commit()
        return self._store.next_arrays(params)

    def sites_done(self, answered: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str]) -> None:
        """A broadcast is over: whose results counted, with their metrics, and why the others' did not.

        A round may have several; of a site the last one counts.
        """
        for site in (*answered, *failed):
            self._answered.pop(site, None)
            self._failed.pop(site, None)
        self._answered |= {site: dict(metrics) for site, metrics in answered.items()}
        self._failed |= failed

    def commit(self, number: int, params: dict[str, Any], metrics: Mapping[str, Any], best: bool) -> None:
        """End a round. The durable part goes on in the background; its error is raised by the next call."""
        self._finish_commit()
        now = time.monotonic()
        record = {
            "round": number,
            "metrics": dict(metrics),
            "sites": self._answered,
            "accepted": sorted(self._answered),
            "refused": self._failed,
            "seconds": round(now - self._began, 6),
        }
        self._began = now
        self._answered, self._failed = {}, {}
        if best:
            self._store.keep_best(self._params)
        path = self._store.finish(params)
        self._params = params
        self.last_round_facts = {"seconds": record["seconds"], "model_path": str(path)}
        self._committing = self._committer.submit(self._make_durable, record, path)

    def note_round(self, number: int, metrics: Mapping[str, Any], sites: Sequence[str]) -> None:
        """A round was committed elsewhere: keep a line about it."""
        now = time.monotonic()
        record = {
            "round": number,
            "metrics": dict(metrics),
            "sites": {},
            "accepted": sorted(sites),
            "refused": {},
            "seconds": round(now - self._began, 6),
        }
        self._began = now
        self.last_round_facts = {"seconds": record["seconds"]}
        append_metrics(self._folder / "metrics.jsonl", record)

    def keep(self, params: dict[str, Any], best: bool) -> None:
        """Keep a model that was made elsewhere, as the last one or as the best; durable when this returns."""
        self._finish_commit()
        if best:
            self._store.save_best(params)
        else:
            self._store.finish(params)
            self._params = params
        self._store.sync()

    def site_records(self, records: list[dict[str, Any]]) -> None:
        """Keep metric records that sites sent; a disk that does not take them costs records, never the job."""
        self._site_metrics.write(records)

    def report(self, path: str, report: Mapping[str, Any]) -> Path:
        """Keep a report of the workflow; see `Job.save_report`."""
        return write_report(self._folder, path, report)

    def close(self, state: str, reason: str | None) -> None:
        """The job has ended: finish the last commit, note the end, and leave plain files behind.

        Raises:
            OSError: something could not be written; what was committed before stays good.
        """
        self._params = {}
        with ExitStack() as steps:
            # Last in, first out; each is done whatever becomes of the others.
            steps.callback(self._journal.close)
            steps.callback(self._store.close)
            steps.callback(self._committer.shutdown)
            try:
                self._finish_commit()
            except BaseException as error:
                state, reason = "failed", str(error)
                raise
            finally:
                self._journal.end(state, reason)
        if self._job.framework is FrameworkType.PYTORCH:
            self._export_pt()
        elif self._job.framework is FrameworkType.TENSORFLOW:
            self._export_keras()

    def _finish_commit(self) -> None:
        """Wait until the round before is durable; raises what kept it from being so."""
        committing, self._committing = self._committing, None
        if committing is not None:
            committing.result()

    def _make_durable(self, record: dict[str, Any], path: Path) -> None:
        try:
            self._store.sync()
            self._journal.commit(record["round"], path.name, record["metrics"], record["accepted"], time.time())
        except BaseException:
            # Without its row it is not committed, and the model of the round before is the last good one.
            self._store.take_back()
            raise
        append_metrics(self._folder / "metrics.jsonl", record)

    def _export_pt(self) -> None:
        for file in self._model_files():
            export_pt(load_params(file), file.with_suffix(".pt"))

    def _export_keras(self) -> None:
        model = self._job.keras_model()
        if model is not None:
            for file in self._model_files():
                export_keras(model, load_params(file), file)

    def _model_files(self) -> list[Path]:
        return sorted((self._folder / "models").glob("*.safetensors"))
