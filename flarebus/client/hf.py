"""The Client API for the Trainer of Hugging Face Transformers: `patch` one, and its `evaluate` and `train` work on the
tasks of the job.

    import flarebus.client.hf as flare

    trainer = Trainer(model, TrainingArguments(...), ...)
    flare.patch(trainer)
    while flare.is_running():
        trainer.evaluate()  # the received model: its metrics choose the best one
        trainer.train()  # receives, trains, sends

All names of `flarebus.client` are here, too.

State lives on from round to round in the Trainer's own checkpoints: a round is resumed from the one before as an
interrupted training is, so that optimizer, learning rate, epochs, steps and random numbers are those of one training
that is as long as the job.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

from flarebus.client import (
    AnalyticsDataType,
    APIContext,
    FLModel,
    ParamsType,
    clear,
    evaluate,
    get_config,
    get_job_id,
    get_site_name,
    get_task_name,
    init,
    is_evaluate,
    is_running,
    is_submit_model,
    is_train,
    log,
    receive,
    send,
    shutdown,
    system_info,
    train,
)
from flarebus.client.hf_rounds import HFRounds
from flarebus.client.torch_params import AdapterParams, ModuleParams
from flarebus.client.torch_task import TorchTask, check_ranks, context_of_rank, is_one_task_each, n_ranks
from flarebus.errors import ClientApiError, ConfigError

try:
    import accelerate  # noqa: F401  # without it a Trainer cannot be made
    import transformers
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import TrainOutput
except ImportError as error:
    raise ImportError(
        f"flarebus.client.hf needs Transformers and Accelerate, which cannot be imported here ({error}): "
        "pip install 'flarebus[transformers]'"
    ) from error

__all__ = [
    "APIContext",
    "AnalyticsDataType",
    "FLModel",
    "ParamsType",
    "clear",
    "evaluate",
    "get_config",
    "get_job_id",
    "get_site_name",
    "get_task_name",
    "init",
    "is_evaluate",
    "is_running",
    "is_submit_model",
    "is_train",
    "log",
    "patch",
    "receive",
    "send",
    "shutdown",
    "system_info",
    "train",
]

_FIRST, _END = (4, 40), (6, 0)
"""The versions of Transformers that are known to work: from, and up to but without."""
_SCOPES = ("auto", "model", "adapter")
_PATCHED = "_flarebus"
# How long something took says nothing about the model.
_TIMES = ("_runtime", "_per_second", "_model_preparation_time", "_time")

# One for each script: a second trainer would take the tasks that the first one waits for.
_trainer_of: weakref.WeakKeyDictionary[APIContext, weakref.ref[Any]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class _Settings:
    restore_state: bool
    load_state_dict_strict: bool
    params_scope: str
    server_key_prefix: str | None
    local_epochs: float | None
    local_steps: int | None
    stream_metrics: bool


def patch(
    trainer: Trainer,
    restore_state: bool = True,
    load_state_dict_strict: bool = True,
    params_scope: str = "auto",
    server_key_prefix: str | None = None,
    local_epochs: float | None = None,
    local_steps: int | None = None,
    stream_metrics: bool = False,
) -> None:
    """Let a trainer work on the tasks of the job. The same settings again change nothing.

    `train` receives the model of the task, trains it and sends what came out, with the number of steps as its weight.
    `evaluate` before it measures the received model; that is expected unless the job says ``train_with_eval=False``. In
    an evaluate task `evaluate` sends the metrics, and `train` does nothing; where the site's own model is asked for,
    `train` sends the model as it is. FedProx and SCAFFOLD are on if the recipe asks for them. ``__fl_meta__`` of the
    model, a dict, goes into the meta of what is sent.

    Args:
        trainer: one for each script. Several ranks are started by torchrun, and all of them patch.
        restore_state: a round goes on where the one before ended; a checkpoint in ``args.output_dir``, which must be
            the site's own, carries it over. The schedule of the learning rate spans all rounds of the job. Else each
            round has a fresh optimizer and a schedule of its own.
        load_state_dict_strict: the received model and the module must have the same names. If not, names that only the
            module has stay at the site, and those that only the server has go back as they came.
        params_scope: what travels: the whole ``model``, or only the ``adapter`` of a PEFT model; ``auto`` is the
            adapter where there is one.
        server_key_prefix: what the server's names have in front of the model's, such as ``"model."``.
        local_epochs: epochs of a round, above 0; None: ``args.num_train_epochs``.
        local_steps: steps of a round, from 1; None: ``args.max_steps``, if that is set.
        stream_metrics: send what the trainer logs (loss, learning rate, ...) to the server while it trains.

    Raises:
        ConfigError: an argument is wrong, or the trainer is set up in a way that does not fit.
        ClientApiError: the trainer is patched with other settings, the script has patched another one, a process does
            one task only and so has nothing to restore, or the ranks cannot talk to each other; or as
            `flarebus.client.init`.
    """
    settings = _Settings(
        restore_state,
        load_state_dict_strict,
        params_scope,
        server_key_prefix,
        local_epochs,
        local_steps,
        stream_metrics,
    )
    if not isinstance(trainer, Trainer):
        raise ConfigError("trainer", trainer, "a transformers.Trainer")
    patched = getattr(trainer, _PATCHED, None)
    if patched is not None:
        if patched.settings != settings:
            raise ClientApiError(f"the trainer is patched already, with other settings: {patched.settings}")
        return
    _check_version(transformers.__version__)
    _check_settings(settings)
    _check_trainer(trainer, settings)
    check_ranks()
    context = context_of_rank(trainer.args.process_index)
    _check_script(context, settings)
    _PatchedTrainer(trainer, settings, context)
    _trainer_of[context] = weakref.ref(trainer)


def _check_version(version: str) -> None:
    major, minor = (int(part) for part in version.split(".")[:2])
    if not _FIRST <= (major, minor) < _END:
        raise ConfigError("transformers", version, "a version from 4.40, below 6: pip install 'flarebus[transformers]'")


def _check_settings(settings: _Settings) -> None:
    if settings.params_scope not in _SCOPES:
        raise ConfigError("params_scope", settings.params_scope, f"one of {', '.join(_SCOPES)}")
    prefix = settings.server_key_prefix
    if prefix is not None and not isinstance(prefix, str):
        raise ConfigError("server_key_prefix", prefix, 'a string such as "model.", or None')
    epochs, steps = settings.local_epochs, settings.local_steps
    if epochs is not None and steps is not None:
        raise ConfigError("local_steps", steps, f"None, or local_epochs={epochs!r} must be: a round has one length")
    if epochs is not None and (
        isinstance(epochs, bool) or not isinstance(epochs, int | float) or not 0 < epochs < math.inf
    ):
        raise ConfigError("local_epochs", epochs, "a number above 0, or None")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ConfigError("local_steps", steps, "a whole number from 1, or None")


def _check_trainer(trainer: Any, settings: _Settings) -> None:
    args = trainer.args
    if getattr(args, "deepspeed", None) or trainer.is_deepspeed_enabled:
        raise ConfigError("args.deepspeed", args.deepspeed, "not set: no rank would have the whole model; use DDP")
    if getattr(args, "fsdp", None) or trainer.is_fsdp_enabled:
        raise ConfigError("args.fsdp", args.fsdp, "not set: no rank would have the whole model; use DDP")
    if args.load_best_model_at_end:
        allowed = "False: what is sent must be what was trained from the received model; the server keeps the best one"
        raise ConfigError("args.load_best_model_at_end", True, allowed)
    if settings.restore_state and args.save_only_model:
        allowed = "False: the optimizer comes back from the checkpoint; or patch with restore_state=False"
        raise ConfigError("args.save_only_model", True, allowed)
    if settings.params_scope == "adapter" and not _is_peft(trainer.model):
        raise ConfigError("params_scope", "adapter", "needs a PEFT model; this one is none")


def _check_script(context: APIContext, settings: _Settings) -> None:
    other = _trainer_of.get(context, lambda: None)()
    if other is not None:
        raise ClientApiError("this script has patched another trainer; there can be one, which all tasks go to")
    if settings.restore_state and is_one_task_each(context):
        raise ClientApiError(
            "restore_state=True needs a process that lives from round to round, and launch_once=False gives every task "
            "one of its own: patch with restore_state=False, or leave launch_once"
        )


def _is_peft(model: Any) -> bool:
    kinds = ((each.__module__.partition(".")[0], each.__name__) for each in type(model).__mro__)
    return ("peft", "PeftModel") in kinds


class _PatchedTrainer:
    """What `patch` puts in the place of a trainer's `train` and `evaluate`."""

    def __init__(self, trainer: Any, settings: _Settings, context: APIContext) -> None:
        self.settings = settings
        self._trainer = trainer
        self._train, self._evaluate = trainer.train, trainer.evaluate
        adapts = settings.params_scope == "adapter" or (settings.params_scope == "auto" and _is_peft(trainer.model))
        params = (AdapterParams if adapts else ModuleParams)(
            settings.load_state_dict_strict, settings.server_key_prefix or "", "server_key_prefix"
        )
        self._task = TorchTask(context, params, "trainer.evaluate(...)")
        self._is_busy = False  # the trainer calls itself: `train` evaluates, `evaluate` goes through several data sets
        self._rounds = HFRounds(trainer, settings.restore_state, settings.local_epochs, settings.local_steps)
        trainer.add_callback(_FlareCallback(trainer, self._task, self._rounds))
        if settings.stream_metrics:
            trainer.add_callback(_StreamCallback(context, self._rounds))
        trainer.train, trainer.evaluate = self.train, self.evaluate
        setattr(trainer, _PATCHED, self)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`, of the received model."""
        if self._is_busy:
            return self._evaluate(*args, **kwargs)  # type: ignore[no-any-return]
        self._is_busy = True
        try:
            self._task.begin_evaluation(self._trainer.model)
            metrics: dict[str, float] = self._evaluate(*args, **kwargs)
        finally:
            self._is_busy = False
        self._task.end_evaluation({name: value for name, value in metrics.items() if _is_about_model(name, value)})
        return metrics

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`, for one round."""
        trainer = self._trainer
        if not self._task.begin_training(trainer.model):
            return TrainOutput(trainer.state.global_step, 0.0, {})
        self._is_busy = True
        if n_ranks() > 1:
            # Evaluation before any training leaves this mark, by which Accelerate takes the model for one that is
            # spread over the ranks already: each would train for itself.
            trainer.model._is_accelerate_prepared = False
        try:
            with self._rounds.next(self._task.total_rounds) as resume:
                if resume is not None:
                    args, kwargs = (), {**kwargs, "resume_from_checkpoint": resume}
                output = self._train(*args, **kwargs)
        finally:
            self._is_busy = False
        self._task.answer(trainer.model, self._rounds.n_steps)
        return output


class _FlareCallback(TrainerCallback):  # type: ignore[misc]  # Transformers is Any to the type checker
    """What `patch` does while the trainer trains."""

    def __init__(self, trainer: Any, task: TorchTask, rounds: HFRounds) -> None:
        self._trainer = trainer
        self._task = task
        self._rounds = rounds

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint is loaded by now, and what was received takes the place of its weights."""
        if n_ranks() > 1 and self._trainer.model_wrapped is self._trainer.model:
            raise ClientApiError("Transformers has not spread the model over the ranks: each would train for itself")
        self._task.load(self._trainer.model)
        if self._task.corrects and not hasattr(TrainerCallback, "on_pre_optimizer_step"):
            raise ClientApiError("the recipe's algorithm changes gradients, for which this Transformers is too old")
        self._rounds.begin(state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients of all ranks are averaged, and clipped."""
        if not self._task.corrects:
            return
        if not args.max_grad_norm:  # clipping has not unscaled them
            self._trainer.accelerator.unscale_gradients()
        self._task.correct(self._trainer.model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop when the round has had its steps."""
        if self._rounds.is_over(state):
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer comes by here, too, when it stops within an epoch; it saves after this call."""
        if control.should_training_stop and self._rounds.saves:
            control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Another callback may have stopped training for what it saw in the metrics."""
        if control.should_training_stop and self._rounds.saves:
            control.should_save = True


class _StreamCallback(TrainerCallback):  # type: ignore[misc]
    """Sends what the trainer logs."""

    def __init__(self, context: APIContext, rounds: HFRounds) -> None:
        self._context = context
        self._rounds = rounds

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Numbers only; what else the trainer logs is for people."""
        if self._context.rank != "0":
            return
        step = state.global_step + self._rounds.n_steps_before
        for name, value in (logs or {}).items():
            if _is_number(value):
                log(name, float(value), AnalyticsDataType.SCALAR, global_step=step, ctx=self._context)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_about_model(name: str, value: Any) -> bool:
    return _is_number(value) and name != "epoch" and not name.endswith(_TIMES)
