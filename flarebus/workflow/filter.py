"""Filter: what a job puts between a site and its script, and the chain that a site builds of them. Fails closed.

An input filter sees every received model before the script does, an output filter every answer before it leaves the
site. A chain gives a model through all of its filters or raises: nothing passes half filtered.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flarebus.codec import edit_model
from flarebus.errors import ConfigError, FilterFailed
from flarebus.job.filter_ref import FilterRef
from flarebus.message import Buffer
from flarebus.model import FLModel

__all__ = ["Filter", "FilterChain", "FilterTask"]


@dataclass(frozen=True, slots=True)
class FilterTask:
    """What a model comes with.

    Args:
        name: of the task.
        round: from 0, or None outside rounds.
        site: whose script it is.
    """

    name: str
    round: int | None
    site: str


class Filter(ABC):
    """Changes, or refuses, models on their way. A site builds its own, which then sees all of its models in order."""

    needs_values: bool = True
    """Whether `process` needs the parameters. With False it is given metrics, meta and rounds only, and what it returns
    replaces those: the site then need not fetch the parameters, which stay as they are."""

    @abstractmethod
    def process(self, model: FLModel, task: FilterTask) -> FLModel:
        """Return what goes on in place of `model`; raise to let nothing go on.

        Args:
            model: not to be changed: its arrays may be those that the script trains in. Its values may be in what is
                returned.
            task: what it comes with.
        """


@dataclass(frozen=True, slots=True)
class _Link:
    """One filter of a chain. Any object with a method `process` is a filter, hence `Any`."""

    name: str
    filter: Any
    tasks: tuple[str, ...] | None
    needs_values: bool
    turn: threading.Lock = field(default_factory=threading.Lock)

    def process(self, model: FLModel, task: FilterTask) -> FLModel:
        try:
            with self.turn:
                found = self.filter.process(model, task)
        except Exception as error:
            raise FilterFailed(self.name, f"raised {type(error).__name__}: {error}") from error
        if not isinstance(found, FLModel):
            raise FilterFailed(self.name, f"returned an object of type {type(found).__name__}, not an FLModel")
        return found

    def process_around(self, model: FLModel, task: FilterTask) -> FLModel:
        """Let the filter see `model` without parameters, which must not come back with any."""
        found = self.process(model, task)
        if found.params is not None or found.optimizer_params is not None:
            raise FilterFailed(self.name, "returned params, and they would be lost: it says needs_values = False")
        return found


class FilterChain:
    """The filters of one site for one direction, in order. Made by `build`; without arguments it holds none.

    Any thread may use it: each filter sees one model at a time.
    """

    __slots__ = ("_links", "needs_values")

    def __init__(self, links: Sequence[_Link] = ()) -> None:
        self._links = tuple(links)
        self.needs_values = any(link.needs_values for link in self._links)
        """Whether any of them needs the parameters."""

    @classmethod
    def build(cls, refs: Sequence[FilterRef], code_dir: Path, parameter: str = "filters") -> FilterChain:
        """Import the classes, `code_dir` first, and make one filter of each description.

        Args:
            parameter: where the descriptions stand, for errors.

        Raises:
            ConfigError: a class is not there or raised, or what it made is no filter.
        """
        return cls([_build(ref, code_dir, f"{parameter}[{index}]") for index, ref in enumerate(refs)])

    def __len__(self) -> int:
        return len(self._links)

    def for_task(self, name: str) -> FilterChain:
        """The part of the chain that is for models of task `name`; the filters themselves are the same."""
        return FilterChain([link for link in self._links if link.tasks is None or name in link.tasks])

    def apply(self, model: FLModel, task: FilterTask) -> FLModel:
        """Return what comes out at the end of the chain; `model` itself if there is no filter.

        Raises:
            FilterFailed: a filter raised, or returned what it must not. Nothing of `model` may go on.
        """
        for link in self._links:
            if link.needs_values:
                model = link.process(model, task)
            else:
                around = link.process_around(_around(model), task)
                model = FLModel(
                    model.params_type,
                    model.params,
                    model.optimizer_params,
                    around.metrics,
                    around.start_round,
                    around.current_round,
                    around.total_rounds,
                    around.meta,
                )
        return model

    def apply_to_body(self, body: Buffer, task: FilterTask) -> bytes | None:
        """The same on an encoded model, whose parameters are neither decoded nor needed.

        Returns:
            The body in which metrics, meta and rounds are replaced; its buffers are the same. None if that cannot be:
            a filter needs values, or metrics or meta hold arrays. Then no filter was called, and the model has to be
            fetched and given to `apply`.

        Raises:
            FilterFailed: see `apply`.
            DecodeError: the body is not that of a model.
            EncodeError: what a filter returned may not travel.
        """
        if not self._links:
            return bytes(body)
        if self.needs_values:
            return None

        return edit_model(body, lambda model: self.apply_around(model, task))

    def apply_around(self, model: FLModel, task: FilterTask) -> FLModel:
        """The same on a model whose parameters stay with somebody else.

        Raises:
            FilterFailed: a filter raised, or needs the parameters.
        """
        for link in self._links:
            if link.needs_values:
                raise FilterFailed(link.name, "needs the parameters, which stay where they were made")
            model = link.process_around(model, task)
        return model


def _around(model: FLModel) -> FLModel:
    return FLModel(
        metrics=None if model.metrics is None else dict(model.metrics),
        start_round=model.start_round,
        current_round=model.current_round,
        total_rounds=model.total_rounds,
        meta=dict(model.meta),
    )


def _build(ref: FilterRef, code_dir: Path, parameter: str) -> _Link:
    made = ref.ref.build(code_dir, parameter)
    name = ref.ref.class_path
    if not callable(getattr(made, "process", None)):
        raise ConfigError(f'{parameter}["class_path"]', name, f"a {type(made).__name__} has no method process")
    needs_values = getattr(made, "needs_values", True)
    if not isinstance(needs_values, bool):
        raise ConfigError(f'{parameter}["class_path"]', name, f"needs_values is True or False, not {needs_values!r}")
    return _Link(name, made, ref.tasks, needs_values)
