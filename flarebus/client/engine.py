"""What stands behind the Client API, and how a call finds the script that made it.

An `Engine` brings tasks to one site's script and carries its answers away. A `Seat` is one running script: its engine
and what the Client API keeps for it. Many scripts may run in one process, each in a thread of its own, so there is no
"the" engine: `seat_of_caller` asks, in this order,

1. the context variable that `sit` set in the script's thread (asyncio tasks and `asyncio.to_thread` inherit it);
2. the stack: a thread that the script started runs a function of the script, whose globals are that script's alone;
3. the fallback, if one was set (the site that has the turn), for a script's thread that runs only library code.
   The main thread and threads whose name begins with ``flarebus`` are the host's own and never fall back;
4. the one script that this process is for, in a trainer.

No transport is known here, and nothing is patched.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from flarebus.metric import AnalyticsDataType
from flarebus.model import FLModel

if TYPE_CHECKING:
    from flarebus.client.api import APIContext
    from flarebus.client.session import Session

__all__ = [
    "HOST_THREAD_PREFIX",
    "Assignment",
    "Engine",
    "Seat",
    "seat_of_caller",
    "seat_of_traceback",
    "set_fallback",
    "set_process_seat",
    "sit",
]

HOST_THREAD_PREFIX = "flarebus"


@dataclass(frozen=True, slots=True)
class Assignment:
    """One task as a script sees it.

    Args:
        task_id: names this task for this site.
        task_name: ``train``, ``validate`` or ``submit_model``, or what the job calls them.
        round: its round from 0, or None outside rounds.
        total_rounds: rounds of the job, or None.
        take: makes the site's own writable model; called at most once, on the thread that receives.
        readers: addresses whose cells may fetch the answer, where it stays in this process.
    """

    task_id: str
    task_name: str
    round: int | None
    total_rounds: int | None
    take: Callable[[], FLModel]
    readers: tuple[str, ...] = ()


class Engine(Protocol):
    """Tasks in, answers and metrics out, for one site. Any thread may call."""

    @property
    def job_id(self) -> str:
        """The job this site works for."""

    @property
    def site_name(self) -> str:
        """The name of the site."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The client configuration, without secrets: scripts may print it."""

    @property
    def ended(self) -> str | None:
        """None while the job runs, else why it does not any more."""

    @property
    def is_follower(self) -> bool:
        """Whether this process only follows rank 0: it sees every task, in order, and its answers do not count."""

    def next_task(self, timeout: float | None) -> Assignment | None:
        """Wait up to `timeout` seconds (None: without limit); None on timeout and once the job has ended.

        A call while the assignment before is unanswered says that the script has given that one up.
        """

    def still_wanted(self, assignment: Assignment) -> bool:
        """Whether an answer would still count, as far as is known here; if not, this takes the assignment back.

        Asked before the script sees it: with many sites in a process its turn may come long after the task.
        """

    def answer(self, assignment: Assignment, result: FLModel) -> Callable[[], None] | None:
        """Send `result`. What is returned waits until the server holds all of it, and is called, once, while the script
        is away; None: there is nothing to wait for. `result` may be read until then, not later.

        Raises:
            FlarebusError: it could not be delivered; the assignment is still open. So does the wait.
        """

    def log(self, key: str, value: Any, data_type: AnalyticsDataType, fields: dict[str, Any]) -> None:
        """Hand over one metric, with ``global_step`` and the like in `fields`, which is emptied; never blocks."""


class Seat:
    """One running script, from its first line to its last.

    Args:
        engine: what it gets its tasks from.
        away: makes the context in which the script waits for others; a host that lets scripts run by turns gives the
            turn to somebody else in it. Entered for every wait inside the Client API, by whichever thread waits.
        on_shutdown: called when the script has closed its last context.
    """

    __slots__ = ("away", "closed", "contexts", "default", "engine", "on_shutdown", "session")

    def __init__(
        self,
        engine: Engine,
        away: Callable[[], AbstractContextManager[Any]] = nullcontext,
        on_shutdown: Callable[[], None] | None = None,
    ) -> None:
        self.engine = engine
        self.away = away
        self.on_shutdown = on_shutdown
        self.session: Session | None = None
        self.contexts: dict[tuple[str, str | None], APIContext] = {}
        self.default: APIContext | None = None
        self.closed = False


_current: ContextVar[Seat | None] = ContextVar("flarebus_seat", default=None)
_by_namespace: dict[int, Seat] = {}
_fallback: Callable[[], Seat | None] | None = None
_process_seat: Seat | None = None


@contextmanager
def sit(seat: Seat, namespace: dict[str, Any]) -> Iterator[None]:
    """Run the body as the script of `seat`; `namespace` is the dict that holds that script's globals."""
    token = _current.set(seat)
    _by_namespace[id(namespace)] = seat
    try:
        yield
    finally:
        seat.closed = True
        _by_namespace.pop(id(namespace), None)
        _current.reset(token)


def set_fallback(find: Callable[[], Seat | None] | None) -> None:
    """Say who is meant when a thread cannot be traced to a script; None: nobody."""
    global _fallback
    _fallback = find


def set_process_seat(seat: Seat | None) -> None:
    """Say which script this whole process is for; None: it is not for one."""
    global _process_seat
    _process_seat = seat


def seat_of_caller() -> Seat | None:
    """The script on whose behalf the calling code runs, or None outside any."""
    seat = _current.get()
    if seat is not None:
        return seat
    if _by_namespace:
        frame = sys._getframe(1)
        while frame is not None:
            seat = _by_namespace.get(id(frame.f_globals))
            if seat is not None:
                return seat
            frame = frame.f_back  # type: ignore[assignment]  # the stub forgets None at the bottom
    if _fallback is None:
        return _process_seat
    thread = threading.current_thread()
    if thread is threading.main_thread() or thread.name.startswith(HOST_THREAD_PREFIX):
        return None
    return _fallback()


def seat_of_traceback(traceback: TracebackType | None) -> Seat | None:
    """The script whose code an exception came through, or None."""
    while traceback is not None:
        seat = _by_namespace.get(id(traceback.tb_frame.f_globals))
        if seat is not None:
            return seat
        traceback = traceback.tb_next
    return None
