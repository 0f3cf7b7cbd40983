"""The program behind `python -m workflows.fedavg` and its like: a command line in front of a recipe and an environment.

It builds recipe and environment from the options, shows what happens while the job runs, and says at the end what came
out and where it lies. How a job runs is none of its business. Exit codes: 0 done; 1 the job failed; 2 wrong usage; 130
stopped with Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flarebus.errors import ConfigError, FlarebusError, JobAborted, JobFailed, UsageError
from flarebus.workflow.selection import BestModelSelector
from workflows._algorithms import ALGORITHMS, Algorithm
from workflows._options import Options, SectionedCommand, option_of, with_options

if TYPE_CHECKING:
    from rich.console import Console

    from flarebus.recipe import SimEnv
    from workflows._outcome import Outcome
    from workflows._plan import Plan
    from workflows._progress import Watcher

__all__ = ["main"]

_OK, _FAILED, _USAGE, _STOPPED = 0, 1, 2, 130

_ABOUT = """{about}

Without arguments it trains a small network on the handwritten digits that come with scikit-learn, split over four
sites. With --train-script it runs your own script: one that calls flare.init(), flare.receive() and flare.send().
"""

_EXAMPLES = """\b
Examples:
  python -m {module}
  python -m {module} --clients 20 --rounds 30 --threads 2 --json
  python -m {module} --train-script client.py --model net:Net --clients 8
  python -m {module} --train-script client.py --train-args "--epochs 2" \\
      --initial-ckpt start.safetensors --stop-cond "accuracy >= 0.9"

Metrics that a site sends with its update describe the model it received, so the metrics of a round belong to the model
that entered it. For the digits the finished model is measured as well, on the held-out part.

\b
Exit codes:
  0 done   1 the job failed   2 wrong usage   130 stopped with Ctrl-C (a second one leaves at once)
"""


def main(argv: Sequence[str] | None = None, workflow: str = "fedavg") -> int:
    """Run the program; return its exit code.

    Args:
        argv: the arguments; those of the process when None.
        workflow: which of `ALGORITHMS`.
    """
    algorithm = ALGORITHMS[workflow]
    module = f"workflows.{workflow}"
    command = click.command(
        cls=SectionedCommand,
        help=_ABOUT.format(about=algorithm.about),
        epilog=_EXAMPLES.format(module=module),
        context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    )(with_options(partial(_command, algorithm), algorithm.options))
    try:
        code = command.main(None if argv is None else list(argv), f"python -m {module}", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        print("stopped", file=sys.stderr)
        return _STOPPED
    return int(code or _OK)


def _command(algorithm: Algorithm, options: Options) -> int:
    from workflows._progress import Terminal

    # With --json, standard output belongs to the program that reads it.
    console = Terminal(stderr=options.json, highlight=False)
    begin = time.monotonic()
    ending = _run(algorithm, options, console)
    if ending.code != _OK:
        click.echo(f"{'stopped' if ending.code == _STOPPED else 'error'}: {ending.reason}", err=True)
        if ending.run_dir is not None:
            click.echo(f"logs: {ending.run_dir}/server/log.txt, and log.txt of each site beside it", err=True)
    if options.json:
        found = {"workflow": algorithm.workflow} | ending.to_json() | {"total_s": round(time.monotonic() - begin, 3)}
        click.echo(json.dumps(found))
    if ending.at_once:
        # The job's thread would be waited for, whatever it does. What it has committed is safe from any kind of end.
        sys.stdout.flush()
        os._exit(ending.code)
    return ending.code


class _InterruptedTwice(KeyboardInterrupt):
    """The job was told to end, but nobody waits until it has."""


@dataclass(frozen=True, slots=True)
class _Ending:
    """How it went: exit code, the reason unless all went well, what there is to show, whether to leave at once."""

    code: int
    reason: str = ""
    run_dir: Path | None = None
    outcome: Outcome | None = None
    at_once: bool = False

    def to_json(self) -> dict[str, Any]:
        state = {_OK: "completed", _STOPPED: "aborted"}.get(self.code, "failed")
        found = {"rounds": 0, "final": {}, "best": {}, "accuracy_per_round": [], "run_dir": None}
        if self.outcome is not None:
            found |= self.outcome.to_json()
        elif self.run_dir is not None:
            found["run_dir"] = str(self.run_dir)
        return {"state": state} | ({"reason": self.reason} if self.reason else {}) | found


def _run(algorithm: Algorithm, options: Options, console: Console) -> _Ending:
    """Do all of it. What goes wrong becomes an ending here, once; a traceback means a bug."""
    from workflows._plan import plan
    from workflows._progress import Watcher

    watcher = Watcher(console, options.key_metric)
    try:
        # What is added has the options; the recipe that it is added to keeps to its own.
        options = replace(options, min_clients=options.min_clients or algorithm.min_clients)
        named = replace(options, own={}, name=options.name or algorithm.workflow)
        planned = plan(named if algorithm.adds else options)
        _train(algorithm, planned, options, watcher)
        outcome = _outcome(watcher, planned, options)
        if outcome is not None:
            _report(outcome, console)
    except ConfigError as error:
        return _Ending(_USAGE, option_of(error, tuple(options.own)))
    except (UsageError, NotImplementedError) as error:
        return _Ending(_USAGE, str(error))
    except (JobAborted, KeyboardInterrupt) as error:
        outcome, at_once = _outcome(watcher, None, options), isinstance(error, _InterruptedTwice)
        return _Ending(_STOPPED, str(error) or "Ctrl-C", watcher.run_dir, outcome, at_once)
    except ImportError as error:
        if not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        return _Ending(_STOPPED, "Ctrl-C")  # it came while a library in C was being loaded
    except (FlarebusError, OSError, RuntimeError) as error:
        reason = error.reason if isinstance(error, JobFailed) else str(error)
        return _Ending(_FAILED, reason, watcher.run_dir, _outcome(watcher, None, options))
    return _Ending(_OK, "", watcher.run_dir, outcome)


def _train(algorithm: Algorithm, planned: Plan, options: Options, watcher: Watcher) -> None:
    """Run the job to its end.

    Raises:
        FlarebusError: something about it was wrong, it failed, or it was aborted.
        KeyboardInterrupt: Ctrl-C; the job has ended, unless a second one came.
    """
    import flarebus.recipe

    recipe = getattr(flarebus.recipe, algorithm.recipe)(**planned.arguments)
    recipe.add_client_config(planned.client_config)
    if algorithm.adds:
        getattr(flarebus.recipe, algorithm.adds)(recipe, **options.own)
    environment = _environment(options, watcher)
    try:
        with watcher:
            recipe.execute(environment)
    except KeyboardInterrupt as error:
        if environment.kill():
            raise _InterruptedTwice from error
        raise


def _environment(options: Options, watcher: Watcher) -> SimEnv:
    from flarebus.recipe import SimEnv

    return SimEnv(
        clients=list(options.clients),
        num_threads=options.threads,
        gpu_config=options.gpu_config,
        log_config=options.log_config,
        workspace_root=options.workspace,
        extra={"on_event": watcher.on_event},
    )


def _outcome(watcher: Watcher, planned: Plan | None, options: Options) -> Outcome | None:
    """What the run left in its folder; without a plan, of a run that did not get to its end."""
    from workflows._evaluation_report import read_evaluated
    from workflows._outcome import Outcome, model_files, read_rounds

    if watcher.run_dir is None:
        return None
    measured: dict[str, float] = {}
    if planned is not None and planned.measure is not None:
        final = [path for path in model_files(watcher.run_dir) if path.name == "FL_global_model.safetensors"]
        measured = planned.measure(final[0]) if final else {}
    return Outcome(
        run_dir=watcher.run_dir,
        rounds=read_rounds(watcher.run_dir),
        key_metric=options.key_metric,
        mode=BestModelSelector(options.key_metric, options.key_metric_mode, options.stop_cond).mode,
        site_metric=options.key_metric if planned is None else planned.site_metric,
        measured=measured,
        evaluated=read_evaluated(watcher.run_dir),
    )


def _report(outcome: Outcome, console: Console) -> None:
    from workflows._evaluation_report import draw_heat_map
    from workflows._report import draw_plot, show

    plot = heat_map = None
    try:
        plot = draw_plot(outcome)
        if outcome.evaluated is not None:
            heat_map = draw_heat_map(outcome.evaluated, outcome.evaluated_metric)
    except ModuleNotFoundError as error:
        console.print(f"no plot: {error}; pip install 'flarebus[plot]'")
    show(outcome, console, plot, heat_map)
