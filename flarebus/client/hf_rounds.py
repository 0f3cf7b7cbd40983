"""Rounds of a Trainer of Transformers: their length in its epochs and steps, and the checkpoints between them.

Transformers is not imported here; whoever has a trainer has it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flarebus.errors import ClientApiError

__all__ = ["HFRounds"]

# As many as a trainer keeps that says nothing else: the last one, and the one that is being written.
_KEPT_CHECKPOINTS = 2


class HFRounds:
    """How long a round is, and where it goes on.

    If state is restored, the trainer is told of one training that is as long as the job, and stopped after each round's
    share of it; a round is resumed from the checkpoint at the end of the one before. Else each round is a training of
    its own.

    Args:
        trainer: of Transformers.
        restores: whether state is restored.
        epochs: of a round; None: as the arguments of the trainer say.
        steps: of a round; None likewise. They count before epochs.
    """

    def __init__(self, trainer: Any, restores: bool, epochs: float | None, steps: int | None) -> None:
        self._trainer = trainer
        self._restores = restores
        args = trainer.args
        self._epochs = epochs or args.num_train_epochs
        steps = steps or (args.max_steps if epochs is None else -1)
        self._steps = steps if steps > 0 else None
        self._n_done = 0
        self._n_rounds = 1
        self._checkpoint: str | None = None
        self._first_step = self._last_step = 0
        self.n_steps = 0
        """Steps of the optimizer in the round that is over."""
        self.n_steps_before = 0
        """What the steps that the trainer counts are to be shifted by to go on from round to round."""
        # Those that the user made cannot be made anew.
        given = (trainer.optimizer, trainer.lr_scheduler)
        self._given = [None if self._restores or each is None else copy.deepcopy(each.state_dict()) for each in given]
        if self._restores and args.save_total_limit is None:
            args.save_total_limit = _KEPT_CHECKPOINTS

    @contextmanager
    def next(self, total_rounds: int | None) -> Iterator[str | None]:
        """Set the trainer up for a round; gives the checkpoint that it is to go on from, if any.

        Args:
            total_rounds: of the job; None if the server does not say: then the schedule ends with each round.

        Raises:
            ClientApiError: the trainer has saved no checkpoint at the end of the round.
        """
        args = self._trainer.args
        self._n_rounds = max(total_rounds or 0, self._n_done + 1) if self._restores else 1
        said = args.num_train_epochs, args.max_steps
        args.num_train_epochs = self._epochs * self._n_rounds
        args.max_steps = -1 if self._steps is None else self._steps * self._n_rounds
        if not self._restores:
            self._forget()
        try:
            yield self._checkpoint
        finally:
            args.num_train_epochs, args.max_steps = said
        step = self._trainer.state.global_step
        self.n_steps = step - self._first_step
        self._n_done += 1
        if self._restores:
            self._checkpoint = os.path.join(args.output_dir, f"checkpoint-{step}")
            if not os.path.isdir(self._checkpoint):
                raise ClientApiError(
                    f"there is no {self._checkpoint}: something keeps the trainer from saving its state"
                )
        else:
            self.n_steps_before += self.n_steps

    def begin(self, state: Any) -> None:
        """The trainer knows how long its training is."""
        done = self._n_done if self._restores else 0
        share = state.max_steps * (done + 1) // self._n_rounds - state.max_steps * done // self._n_rounds
        self._first_step = state.global_step
        self._last_step = state.global_step + max(1, share)

    def is_over(self, state: Any) -> bool:
        """Whether the round has had its share of steps."""
        return bool(state.global_step >= self._last_step)

    @property
    def saves(self) -> bool:
        """Whether there must be a checkpoint at the end of a round."""
        return self._restores

    def _forget(self) -> None:
        for name, state in zip(("optimizer", "lr_scheduler"), self._given, strict=True):
            if state is None:
                setattr(self._trainer, name, None)  # the trainer makes another one
            else:
                getattr(self._trainer, name).load_state_dict(copy.deepcopy(state))
