"""What a person sees while a job runs: bars on a terminal, one plain line a round anywhere else.

It is told what happens (`on_event`) and asks nothing. It remembers where the run folder is.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from workflows._evaluation_progress import EvaluationWatcher

__all__ = ["Terminal", "Watcher"]

# A round with hundreds of lost sites must not scroll everything else away.
_MAX_COMPLAINTS = 5


class Terminal(Console):
    """Where the program prints. If nobody reads that any more, the job fails with this reason."""

    def on_broken_pipe(self) -> None:
        """Raise an error, where rich would end the thread that prints: here that of the job.

        Raises:
            BrokenPipeError: always.
        """
        try:
            super().on_broken_pipe()  # leads what is still to be written to nowhere
        except SystemExit:
            raise BrokenPipeError(errno.EPIPE, "nobody reads the output any more") from None


class Watcher:
    """Follow one job. `on_event` may come from any thread, one call at a time.

    Args:
        console: where to show it; its own knowledge of being a terminal decides how.
        key_metric: the metric to show.
    """

    def __init__(self, console: Console, key_metric: str) -> None:
        self.run_dir: Path | None = None
        self._console = console
        self._key_metric = key_metric
        self._total_rounds = 0
        self._complaints = 0
        self._failed: set[str] = set()
        self._bars = _Bars(console) if console.is_terminal else None
        self._handlers: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "job_started": self._job_started,
            "round_started": self._round_started,
            "result_accepted": self._result_accepted,
            "result_refused": lambda fields: self._complain(fields, "refused"),
            "site_failed": self._site_failed,
            "turn_lost": self._turn_lost,
            "round_committed": self._round_committed,
        }
        self._evaluation: EvaluationWatcher | None = None

    def __enter__(self) -> Watcher:
        if self._bars is not None:
            self._bars.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.progress.stop()

    def on_event(self, event: str, fields: Mapping[str, Any]) -> None:
        """Take note of one event; unknown ones are nobody's concern here."""
        if event == "evaluation_started":  # from here on rounds are waves of evaluations
            self._evaluation = EvaluationWatcher(self.say, self._evaluated)
        if self._evaluation is not None:
            self._evaluation.on_event(event, fields)
            return
        handler = self._handlers.get(event)
        if handler is not None:
            handler(fields)

    def say(self, text: str) -> None:
        """Show one line."""
        self._console.print(escape(text), soft_wrap=True)

    def _job_started(self, fields: Mapping[str, Any]) -> None:
        self.run_dir = Path(fields["run_dir"])
        self._total_rounds = fields["total_rounds"]
        self.say(f"{len(fields['sites'])} sites, {self._total_rounds} rounds, run folder {self.run_dir}")
        if self._bars is not None:
            self._bars.start(self._total_rounds)

    def _round_started(self, fields: Mapping[str, Any]) -> None:
        self._complaints = 0
        if self._bars is not None:
            self._bars.begin_round(len(fields["sites"]))

    def _result_accepted(self, fields: Mapping[str, Any]) -> None:
        if self._bars is not None:
            self._bars.answered(fields["n_accepted"])

    def _site_failed(self, fields: Mapping[str, Any]) -> None:
        self._failed.add(fields["site"])
        self._complain(fields, "failed")

    def _turn_lost(self, fields: Mapping[str, Any]) -> None:
        if fields["site"] not in self._failed:  # else that is why, and it was said
            self._complain(fields, "lost its turn")

    def _complain(self, fields: Mapping[str, Any], what: str) -> None:
        self._complaints += 1
        if self._complaints <= _MAX_COMPLAINTS:
            self.say(f"round {fields['round'] + 1}: {fields['site']} {what}: {fields['reason']}")
        elif self._complaints == _MAX_COMPLAINTS + 1:
            self.say(f"round {fields['round'] + 1}: more sites {what}; the log of the server names them")

    def _evaluated(self, n_done: int, n_total: int) -> None:
        if self._bars is not None:
            self._bars.evaluated(n_done, n_total)

    def _round_committed(self, fields: Mapping[str, Any]) -> None:
        self._failed.clear()
        value = fields["metrics"].get(self._key_metric)
        shown = f"{self._key_metric} {value:.4f}" if isinstance(value, int | float) else ""
        if self._bars is not None:
            self._bars.end_round(shown)
        else:
            width = len(str(self._total_rounds))
            self.say(
                f"round {fields['round'] + 1:{width}}/{self._total_rounds}  {fields['seconds']:.3f} s  {shown}".rstrip()
            )


class _Bars:
    """Two bars: rounds of the job, sites of the round."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._rounds: TaskID | None = None
        self._sites: TaskID | None = None
        self._evaluations: TaskID | None = None

    def start(self, total_rounds: int) -> None:
        self._rounds = self.progress.add_task("rounds", total=total_rounds, shown="")
        self._sites = self.progress.add_task("sites ", total=None, shown="")

    def begin_round(self, n_sites: int) -> None:
        if self._sites is not None:
            self.progress.reset(self._sites, total=n_sites)

    def answered(self, n_sites: int) -> None:
        if self._sites is not None:
            self.progress.update(self._sites, completed=n_sites)

    def evaluated(self, n_done: int, n_total: int) -> None:
        if self._evaluations is None:
            self._evaluations = self.progress.add_task("models", total=n_total, shown="")
        self.progress.update(self._evaluations, completed=n_done, total=n_total)

    def end_round(self, shown: str) -> None:
        if self._rounds is not None:
            self.progress.update(self._rounds, advance=1, shown=shown)
