"""TorchTask: the Client API for loops that belong to a framework; what Lightning and Transformers share.

A framework calls back where it evaluates, trains and steps. Here is what that means for the task at hand: when to wait
for one, what goes into the module, what is added to gradients, and what is the answer. All ranks go through the same
calls and work on the same task; rank 0 answers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flarebus.client.algorithms import SCAFFOLD_CONTROL, FedProxLoss, Scaffold
from flarebus.client.api import APIContext, init, send
from flarebus.client.engine import seat_of_caller
from flarebus.client.torch_params import ModuleParams
from flarebus.errors import ClientApiError
from flarebus.model import FLModel, MetaKey

__all__ = ["FL_META", "TorchTask", "check_ranks", "context_of_rank", "is_one_task_each", "n_ranks"]

_log = logging.getLogger("flarebus.client")

FL_META = "__fl_meta__"
"""Attribute of a module: a dict that goes into the meta of what is sent."""


class TorchTask:
    """The task that a patched trainer works on.

    Args:
        context: of this rank.
        params: what of the module travels.
        evaluate_call: how a user evaluates, for errors: ``trainer.validate(...)``.
    """

    def __init__(self, context: APIContext, params: ModuleParams, evaluate_call: str) -> None:
        self.context = context
        self._session = context.session
        self._params = params
        self._evaluate_call = evaluate_call
        self._received: FLModel | None = None
        self._is_measuring = False
        self._has_measured = False
        self._last_answer = ""  # the name of the task that was answered last, of those answered here
        self._proximal: FedProxLoss | None = None
        self._scaffold = Scaffold()

    # -- evaluating --

    def begin_evaluation(self, module: nn.Module) -> None:
        """Before the module is evaluated: put the received model into it.

        Not if the script has just sent what it trained: then it looks at its own model, and waits for nobody.
        """
        settings = self._session.settings
        own = self._session.open_task is None and self._last_answer == settings.train_task
        received = None if own else self._receive()
        self._is_measuring = received is not None and self._session.task_name != settings.submit_task
        if received is not None and self._is_measuring:
            self._params.load(module, received.params)

    def end_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Keep the metrics for the train result, or send them if the task was to evaluate.

        Args:
            metrics: name -> number, or a tensor of one; of the received model.
        """
        if not self._is_measuring:
            return
        self._is_measuring = False
        self._has_measured = True
        found = {name: float(value) for name, value in metrics.items()}
        if self._session.task_name == self._session.settings.eval_task:
            self._send(FLModel(metrics=found))
        else:
            self._session.metrics = found

    # -- training --

    def begin_training(self, module: nn.Module) -> bool:
        """Before training: receive. Whether there is something to train.

        There is not once the job has ended, after an evaluate task was answered, or where the site's own model is asked
        for, which is then sent.

        Raises:
            ClientApiError: the task is to evaluate only; or a train task is expected to evaluate, and did not.
        """
        settings = self._session.settings
        if self._session.open_task is None and self._last_answer not in ("", settings.train_task):
            return False
        self._received = self._receive()
        if self._received is None:
            return False
        name = self._session.task_name
        if name == settings.submit_task:
            self._send(FLModel(params=self._params.take(module)))
            return False
        if name == settings.eval_task:
            raise ClientApiError(f"the task is to evaluate the received model: call {self._evaluate_call} for it")
        if settings.train_with_eval and not self._has_measured:
            raise ClientApiError(
                "the metrics of a train task describe the received model, and choose the best one, but it was not "
                f"evaluated: call {self._evaluate_call} before, when flare.is_running() has brought the task; or do "
                "without: "
                'recipe.add_client_config({"train_with_eval": False})'
            )
        return True

    def load(self, module: nn.Module) -> FLModel:
        """Put the received model into the module that is to be trained, on its device; return what was received."""
        received = self._received
        assert received is not None, "training has begun"
        self._params.load(module, received.params)
        self._proximal = FedProxLoss(module, received)
        control = (received.optimizer_params or {}).get(SCAFFOLD_CONTROL)
        local = None if control is None else {SCAFFOLD_CONTROL: self._params.to_local(control)}
        self._scaffold.begin(FLModel(optimizer_params=local))
        return received

    @property
    def total_rounds(self) -> int | None:
        """Of the job, as far as the task says."""
        return None if self._received is None else self._received.total_rounds

    @property
    def corrects(self) -> bool:
        """Whether the server's algorithm changes gradients."""
        return self._scaffold.is_on or (self._proximal is not None and self._proximal.mu > 0)

    def check_optimizers(self, n_optimizers: int) -> None:
        """See that the algorithm can be done with so many optimizers.

        Raises:
            ClientApiError: it cannot.
        """
        if self._scaffold.is_on and n_optimizers != 1:
            raise ClientApiError(
                f"SCAFFOLD counts the steps of one optimizer, and the module has {n_optimizers}: "
                "use one, or another recipe"
            )

    def correct(self, module: nn.Module, parameters: Iterable[Tensor] | None = None) -> None:
        """Do to the gradients of a step what the algorithm asks for, before the optimizer uses them.

        Args:
            parameters: those that the optimizer steps; None: all.
        """
        if self._proximal is not None:
            self._proximal.add_gradients(parameters)
        self._scaffold.correct(module)

    def answer(self, module: nn.Module, n_steps: int) -> None:
        """Send what was trained; return when the server has it.

        Args:
            n_steps: steps of the optimizer, of one rank. The weight of the result is this times the number of ranks:
                each of them saw data of its own.

        Raises:
            ClientApiError: ``__fl_meta__`` of the module is no dict.
        """
        own = getattr(module, FL_META, {})
        if not isinstance(own, dict):
            raise ClientApiError(f"{FL_META} of the module must be a dict, not {type(own).__name__}")
        control = self._scaffold.finish()
        if control is not None:
            control = {SCAFFOLD_CONTROL: self._params.to_server(control[SCAFFOLD_CONTROL])}
        self._proximal = self._received = None
        self._has_measured = False
        meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: n_steps * n_ranks(), **own}
        params = self._params.take(module) if self.context.rank == "0" else {}  # what others send does not count
        self._send(FLModel(params=params, optimizer_params=control, meta=meta))

    # -- tasks --

    def _receive(self) -> FLModel | None:
        """The model of the open or next task, the same on all ranks; None once the job has ended.

        A task that was taken back may have been seen by some ranks and not by others. Those who are behind let it go.
        """
        session = self._session
        received = session.receive(None)
        while n_ranks() > 1:
            mine = None if received is None or session.open_task is None else int(session.open_task)
            numbers = _gather(mine)
            if None in numbers:
                received = None
            if None in numbers or len(set(numbers)) == 1:
                break
            if mine != max(numbers):
                session.clear()
                received = session.receive(None)
        if received is None:
            _log.warning("%s: there is no task to work on: the job has ended", self.context.seat.engine.site_name)
        return received

    def _send(self, model: FLModel) -> None:
        self._last_answer = self._session.task_name
        send(model, ctx=self.context)


def context_of_rank(rank: int) -> APIContext:
    """The context that the script has made, or a new one for this rank.

    Raises:
        ClientApiError: that one is another rank's; or as `flarebus.client.init`.
    """
    seat = seat_of_caller()
    context = None if seat is None or seat.closed else seat.default
    if context is None or context.closed:
        return init(rank=rank)
    if context.rank != str(rank):
        raise ClientApiError(
            f"the trainer is rank {rank}, but flare.init() made this process rank {context.rank}: leave the rank out "
            "and start the ranks with torchrun"
        )
    return context


def is_one_task_each(context: APIContext) -> bool:
    """Whether every task gets a process of its own, in which nothing lives on to the next one."""
    section: Mapping[str, Any] = context.seat.engine.config.get("TASK_EXCHANGE", {})
    return section.get("launch_once") is False


def check_ranks() -> None:
    """See that ranks which were started together can talk to each other.

    Raises:
        ClientApiError: they cannot.
    """
    said = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if n_ranks() == 1 and (said["RANK"] not in ("", "0") or said["WORLD_SIZE"] not in ("", "1")):
        raise ClientApiError(
            f"this is rank {said['RANK'] or 0} of {said['WORLD_SIZE']}, but torch.distributed is not initialised, so "
            "the ranks cannot work on the same task: start them with torchrun, and make the trainer in each of them"
        )


def n_ranks() -> int:
    """How many processes train together, as far as PyTorch knows."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def _gather(number: int | None) -> list[Any]:
    found: list[Any] = [None] * n_ranks()
    torch.distributed.all_gather_object(found, number)
    return found
