"""Tracker: what a tracker implements. Its library is loaded in `open`, not before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

__all__ = ["JOB", "Plain", "Point", "RunInfo", "Tracker"]

JOB = ""
"""The series of the job itself: the aggregate. Every other series has the name of a site."""

Plain: TypeAlias = str | int | float | bool


class Point(NamedTuple):
    """One number of one series."""

    key: str
    value: float
    """May be NaN or infinite."""
    step: int
    round: int | None
    """None: logged outside a round."""
    time: float
    """Seconds since the epoch, at the site."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What is tracked.

    Args:
        job_name: name of the job.
        job_id: identity of this run of it.
        site: who tracks: a site, or `JOB` for the server.
        folder: absolute; where files go that have no other place.
    """

    job_name: str
    job_id: str
    site: str
    folder: Path


class Tracker(ABC):
    """One tracker of one run. All methods are called on one thread; any may raise, which costs what it was given.

    Args:
        config: its settings, as `check` returned them, with variables of the environment put in.
    """

    requires: ClassVar[tuple[str, ...]] = ()
    """Modules that must be installed."""
    extra: ClassVar[str] = ""
    """The extra of the distribution that installs them: `pip install 'flarebus[<extra>]'`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """Check settings when a recipe is made, without the library.

        Raises:
            ConfigError: a key is unknown, or a value is wrong.
        """

    @abstractmethod
    def open(self, run: RunInfo) -> None:
        """Load the library and begin; called once. If it raises, another instance is asked later."""

    @abstractmethod
    def scalars(self, series: str, points: Sequence[Point]) -> None:
        """Take numbers of one series, in order."""

    @abstractmethod
    def params(self, series: str, values: Mapping[str, Plain]) -> None:
        """Take parameters of a run."""

    @abstractmethod
    def tags(self, series: str, values: Mapping[str, Plain]) -> None:
        """Set tags of a run; what is said last counts."""

    @abstractmethod
    def text(self, series: str, key: str, text: str, step: int, path: str) -> None:
        """Take a text.

        Args:
            path: the relative path of a file that it is to be among the artefacts, without `..`; or "".
        """

    @abstractmethod
    def image(self, series: str, key: str, png: bytes, step: int) -> None:
        """Take an image, as the bytes of a PNG file."""

    @abstractmethod
    def artefact(self, path: Path, kind: str) -> None:
        """Keep a file of the job.

        Args:
            kind: `model` or `report`.
        """

    @abstractmethod
    def close(self, state: str) -> None:
        """Deliver what is left and end; called once, after `open`.

        Args:
            state: how the job ended: `completed`, `failed` or `aborted`.
        """
