"""The Client API for PyTorch Lightning: `patch` a trainer, and its `validate` and `fit` work on the tasks of the job.

    import flarebus.client.lightning as flare

    trainer = Trainer(max_epochs=1)
    flare.patch(trainer)
    while flare.is_running():
        trainer.validate(module, data)  # the received model: its metrics choose the best one
        trainer.fit(module, data)  # receives, trains, sends

All names of `flarebus.client` are here, too. `lightning` and `pytorch_lightning` will both do; whichever the script has
imported is used.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any

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
from flarebus.client.torch_params import ModuleParams
from flarebus.client.torch_task import TorchTask, context_of_rank, is_one_task_each
from flarebus.errors import ClientApiError, ConfigError

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.optim import Optimizer
else:

    def _import_callback() -> type:
        """The base class of callbacks. Trainers of either package take those of both, so one is enough."""
        packages = ["lightning.pytorch", "pytorch_lightning"]
        problems = []
        for name in sorted(packages, key=lambda name: name not in sys.modules):
            try:
                return importlib.import_module(name).Callback
            except ImportError as error:
                problems.append(str(error))
        raise ImportError(
            f"flarebus.client.lightning needs PyTorch Lightning, which cannot be imported here ({problems[0]}): "
            "pip install 'flarebus[lightning]'"
        )

    Callback = _import_callback()

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

_log = logging.getLogger("flarebus.client")

# Strategies under which no rank has the whole model.
_SHARDED = frozenset({"DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"})
_VALIDATE = "trainer.validate(...)"


def patch(
    trainer: Trainer,
    restore_state: bool = True,
    load_state_dict_strict: bool = True,
    update_fit_loop: bool = True,
) -> None:
    """Let a trainer work on the tasks of the job. The same settings again change nothing.

    `fit` receives the model of the task, trains it and sends what came out, with the number of steps as its weight.
    `validate` before it measures the received model; that is expected unless the job says ``train_with_eval=False``. In
    an evaluate task `validate` sends the metrics, and `fit` does nothing; where the site's own model is asked for,
    `fit` sends the module as it is. FedProx and SCAFFOLD are on if the recipe asks for them. ``__fl_meta__`` of the
    module, a dict, goes into the meta of what is sent.

    Args:
        trainer: of `lightning` or `pytorch_lightning`. Several ranks are started by torchrun, and all of them patch.
        restore_state: optimizers and learning-rate schedulers go on where the round before ended; they stay in memory.
            Else each round has fresh ones.
        load_state_dict_strict: the received model and the module must have the same names. If not, names that only the
            module has stay at the site, and those that only the server has go back as they came.
        update_fit_loop: ``max_epochs``, ``max_steps`` and their ``min_`` are for each round, on top of what the trainer
            has done before. Else they are for all rounds together, and the script moves them.

    Raises:
        ConfigError: it is no trainer of Lightning, or has a strategy that does not fit.
        ClientApiError: the trainer is patched with other settings, or as `flarebus.client.init`.
    """
    _check(trainer)
    settings = (restore_state, load_state_dict_strict, update_fit_loop)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by the connector of callbacks
        if isinstance(callback, _FlareCallback):
            if callback.settings != settings:
                raise ClientApiError(f"the trainer is patched already, with other settings: {callback.settings}")
            return
    context = context_of_rank(trainer.global_rank)
    if restore_state and is_one_task_each(context):
        _log.warning(
            "launch_once=False: each task has a process of its own, so there is no state to restore; "
            "every round begins with fresh optimizers"
        )
    trainer.callbacks.append(_FlareCallback(context, settings))  # type: ignore[attr-defined]


def _check(trainer: Any) -> None:
    kinds = {(each.__module__.partition(".")[0], each.__name__) for each in type(trainer).__mro__}
    if not kinds & {("lightning", "Trainer"), ("pytorch_lightning", "Trainer")}:
        raise ConfigError("trainer", trainer, "a Trainer of lightning.pytorch or pytorch_lightning")
    strategy = trainer.strategy
    sharded = _SHARDED & {each.__name__ for each in type(strategy).__mro__}
    if sharded:
        raise ConfigError(
            "trainer.strategy", min(sharded), "one under which every rank has the whole model, such as ddp"
        )
    launcher, cluster = strategy.launcher, getattr(strategy, "cluster_environment", None)
    is_started = cluster is not None and cluster.creates_processes_externally
    spawns = launcher is not None and "MultiProcessing" in type(launcher).__name__
    if spawns or (trainer.world_size > 1 and not is_started):
        raise ConfigError(
            "trainer.strategy",
            type(strategy).__name__,
            "would start further processes itself, which the client job does not know; let torchrun start them: "
            'command="torchrun --standalone --nproc_per_node=2" in the recipe',
        )


class _FlareCallback(Callback):
    """What `patch` adds to a trainer."""

    def __init__(self, context: APIContext, settings: tuple[bool, bool, bool]) -> None:
        self.settings = settings
        self._restores, is_strict, self._moves_limits = settings
        self._task = TorchTask(context, ModuleParams(is_strict), _VALIDATE)
        self._state = _OptimizerState()
        self._limits = _Limits()
        self._trains = False
        self._first_step = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The received model is what is measured; validation within `fit` is the script's own."""
        if trainer.state.fn == "validate":
            self._task.begin_evaluation(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """By now all that was logged is put together."""
        if trainer.state.fn == "validate":
            self._task.end_evaluation(trainer.callback_metrics)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Module and optimizers are on their devices, and no hook has seen the module yet."""
        self._trains = self._task.begin_training(pl_module)
        if not self._trains:
            self._limits.stop(trainer)
            return
        if self._moves_limits:
            self._limits.move(trainer)
        self._task.load(pl_module)
        self._task.check_optimizers(len(trainer.optimizers))
        if self._restores:
            self._state.restore(trainer)
        self._first_step = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gradients of all ranks are averaged, and unscaled."""
        if self._trains and self._task.corrects:
            self._task.correct(pl_module, (each for group in optimizer.param_groups for each in group["params"]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once training is over optimizers are taken off their device."""
        if self._restores and self._trains:
            self._state.keep(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All other callbacks are done with the module."""
        if not self._trains:
            self._limits.go_on(trainer)
            return
        self._trains = False
        self._task.answer(pl_module, trainer.global_step - self._first_step)


class _OptimizerState:
    """What optimizers and learning-rate schedulers know, from one `fit` to the next, which makes new ones."""

    def __init__(self) -> None:
        self._optimizers: list[Any] = []
        self._schedulers: list[Any] = []

    def keep(self, trainer: Trainer) -> None:
        """Take the state as it is now; not copied, for those who have it are done with it."""
        self._optimizers = [trainer.strategy.optimizer_state(each) for each in trainer.optimizers]
        self._schedulers = [each.scheduler.state_dict() for each in trainer.lr_scheduler_configs]

    def restore(self, trainer: Trainer) -> None:
        """Give it to the new ones; nothing in the first round."""
        if self._optimizers:
            trainer.strategy.load_optimizer_state_dict({"optimizer_states": self._optimizers})
        for config, state in zip(trainer.lr_scheduler_configs, self._schedulers, strict=False):
            config.scheduler.load_state_dict(state)


class _Limits:
    """Limits of the fit loop, which counts epochs and steps from the first round on."""

    _NAMES = ("max_epochs", "min_epochs", "max_steps", "min_steps")

    def __init__(self) -> None:
        self._per_round: dict[str, int | None] = {}
        self._held: int | None = None

    def move(self, trainer: Trainer) -> None:
        """Set them for a round that begins now: what the user said, on top of what is done."""
        if not self._per_round:
            self._per_round = {name: getattr(self._loop_of(trainer, name), name) for name in self._NAMES}
        done = {"epochs": trainer.current_epoch, "steps": trainer.global_step}
        for name, limit in self._per_round.items():
            if limit is not None and limit >= 0:  # None and -1 are no limit
                setattr(self._loop_of(trainer, name), name, limit + done[name[4:]])

    def stop(self, trainer: Trainer) -> None:
        """Let the loop end before it begins."""
        self._held = trainer.fit_loop.max_epochs
        trainer.fit_loop.max_epochs = trainer.current_epoch

    def go_on(self, trainer: Trainer) -> None:
        """Undo `stop`."""
        trainer.fit_loop.max_epochs = self._held

    def _loop_of(self, trainer: Trainer, name: str) -> Any:
        return trainer.fit_loop if name.endswith("epochs") else trainer.fit_loop.epoch_loop
