"""Weights & Biases: one run for the job and one for each site, in one group.

The library is kept to what it is asked for: it captures no console, reads no code, and measures no machine.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from flarebus.tracking.reach import check_reachable
from flarebus.tracking.settings import FLAG, NAMES, TEXT, VALUES, check_settings
from flarebus.tracking.tracker import Plain, Point, RunInfo, Tracker

__all__ = ["WandBTracker"]

# Below the time for the last flush, so that the reason is known by then.
_INIT_S = 20.0
STEP = "global_step"
_NO_KEY = "no API key: set the variable WANDB_API_KEY, run `wandb login`, or use mode='offline'"


class WandBTracker(Tracker):
    """Runs in project `wandb_args['project']`, or one of the name of the job.

    The API key comes from WANDB_API_KEY or from `wandb login`, the server from WANDB_BASE_URL. Files go to a folder
    `wandb` in the folder of the run.
    """

    requires: ClassVar[tuple[str, ...]] = ("wandb", "PIL")
    extra: ClassVar[str] = "wandb"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._args: Mapping[str, Any] = config.get("wandb_args") or {}
        self._runs: dict[str, Any] = {}

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """Check settings.

        `mode`, `online` or `offline`, what WANDB_MODE says if left out; `log_artifacts`, whether models and reports are
        kept there, True if left out; `wandb_args` with any of `project entity group name job_type notes tags config`.
        """
        texts = dict.fromkeys(("project", "entity", "group", "name", "job_type", "notes"), TEXT)
        args = {**texts, "tags": NAMES, "config": VALUES}
        check_settings(config, {"mode": ("online", "offline"), "log_artifacts": FLAG, "wandb_args": args})

    def open(self, run: RunInfo) -> None:
        """Load the library and begin the run."""
        self._run = run
        self._mode = self.config.get("mode") or os.environ.get("WANDB_MODE") or "online"
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # told to nobody whom the user has not named
        self._wandb: Any = importlib.import_module("wandb")
        if self._mode == "online":
            check_reachable(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
            # Never asks: nobody would see it, or whoever sits at the terminal would wonder.
            if not self._wandb.login(prompt=False):
                raise PermissionError(_NO_KEY)
        self._name = self._args.get("name") or f"{run.job_name}-{run.job_id[:8]}"
        self._begin(run.site)

    def scalars(self, series: str, points: Sequence[Point]) -> None:
        """Rows of history; points of one step make one row."""
        run = self._of(series)
        row: dict[str, Any] = {}
        for point in points:
            own = {STEP: point.step} if point.round is None else {STEP: point.step, "round": point.round}
            if row and (point.key in row or row[STEP] != point.step or row.get("round") != point.round):
                run.log(row)
                row = {}
            if point.key not in own:
                row |= own | {point.key: point.value}
        if row:
            run.log(row)

    def params(self, series: str, values: Mapping[str, Plain]) -> None:
        """Values of the run's configuration."""
        self._of(series).config.update(dict(values), allow_val_change=True)

    def tags(self, series: str, values: Mapping[str, Plain]) -> None:
        """Values of the run's configuration, for tags have no values here."""
        self._of(series).config.update({f"tags/{name}": value for name, value in values.items()}, allow_val_change=True)

    def text(self, series: str, key: str, text: str, step: int, path: str) -> None:
        """A value in the history."""
        self._of(series).log({STEP: step, path or key: text})

    def image(self, series: str, key: str, png: bytes, step: int) -> None:
        """An image in the history."""
        with tempfile.TemporaryDirectory(prefix=".wandb-", dir=self._run.folder) as folder:
            file = Path(folder, "image.png")
            file.write_bytes(png)
            self._of(series).log({STEP: step, key: self._wandb.Image(str(file))})

    def artefact(self, path: Path, kind: str) -> None:
        """A file of the job's run, unless `log_artifacts` is False."""
        if self.config.get("log_artifacts") is not False:
            artefact = self._wandb.Artifact(f"{self._run.job_id}-{path.name}", type=kind)
            artefact.add_file(str(path))
            self._of(self._run.site).log_artifact(artefact)

    def close(self, state: str) -> None:
        """Finish all runs, with how the job ended."""
        for run in reversed(self._runs.values()):
            run.summary["state"] = state
            run.finish(exit_code=0 if state == "completed" else 1)

    def _of(self, series: str) -> Any:
        return self._runs[series] if series in self._runs else self._begin(series)

    def _begin(self, series: str) -> Any:
        args, run = self._args, self._run
        quiet = self._wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            init_timeout=_INIT_S,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        made = self._wandb.init(
            project=args.get("project") or run.job_name,
            entity=args.get("entity"),
            group=args.get("group") or f"{run.job_name}-{run.job_id[:8]}",
            job_type=args.get("job_type") or ("site" if series else "server"),
            name=f"{self._name}/{series}" if series else self._name,
            notes=args.get("notes"),
            tags=args.get("tags"),
            config={**(args.get("config") or {}), "job_id": run.job_id, "series": series or "aggregate"},
            dir=str(run.folder),
            mode=self._mode,
            reinit="create_new",  # beside the run of a script, and not in its place
            settings=quiet,
        )
        # Its own step only counts up, and sites count as they like.
        made.define_metric("*", step_metric=STEP)
        self._runs[series] = made
        return made
