"""All checks of a pipe, together or one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flarebus.pipes.pipe import Mode, Pipe
from flarebus.testing import check_life, check_messages, check_processes
from flarebus.testing.trial import BIG_BYTES, PATIENCE_S, PipeTrial, PromiseBroken

__all__ = ["ContractBroken", "PipeCheck", "check_pipe", "pipe_checks"]

PipeCheck = Callable[[PipeTrial], None]


class ContractBroken(AssertionError):
    """A pipe breaks promises; `broken` has them by the name of the check that found them."""

    def __init__(self, pipe: type[Pipe], broken: dict[str, PromiseBroken]) -> None:
        self.pipe = pipe
        self.broken = broken
        listed = "".join(f"\n  {name}: {error}" for name, error in broken.items())
        many = f"{len(broken)} promises" if len(broken) > 1 else "a promise"
        super().__init__(f"{pipe.__module__}.{pipe.__qualname__} breaks {many} of a pipe:{listed}")


def pipe_checks(pipe: type[Pipe]) -> list[tuple[str, PipeCheck]]:
    """Name and function of each check that makes sense for a class of pipes.

    A pipe with `same_process` is not asked to work from another process. A check takes a fresh `PipeTrial`; it raises
    `PromiseBroken`, or returns.
    """
    checks: tuple[PipeCheck, ...] = (*check_life.CHECKS, *check_messages.CHECKS)
    if not pipe.same_process:
        checks += check_processes.CHECKS
    return [(check.__name__, check) for check in checks]


def check_pipe(
    make: Callable[[Mode], Pipe],
    *,
    leftovers: Callable[[], list[str]] = list,
    context: Mapping[str, Any] | None = None,
    patience: float = PATIENCE_S,
    big_bytes: int = BIG_BYTES,
    on_check: Callable[[str], None] | None = None,
) -> None:
    """Check that a pipe keeps the promises of `flarebus.pipes.Pipe`; takes some seconds.

    Args:
        make: makes an end of the mode it is given, not open. Ends that are opened on one channel belong together; how
            they find each other (a folder, a router, a port) is up to the author.
        leftovers: names what the pipe left behind outside the process: files, segments, sockets. Without it the promise
            that nothing is left is not checked.
        context: what a client job tells constructors that ask for it by name (`cell`, `root_url`, ...), for ends that
            are made from what `export` says. An end that asks for a `cell` stays in this process.
        patience: seconds that any call may take, beyond a timeout that it was given.
        big_bytes: how big a big message is, 64 MiB by default.
        on_check: called with the name of each check before it runs.

    Raises:
        ContractBroken: promises are broken; names each, with class and method.
    """
    pipe = type(make(Mode.PASSIVE))
    broken: dict[str, PromiseBroken] = {}
    for name, check in pipe_checks(pipe):
        if on_check is not None:
            on_check(name)
        try:
            with PipeTrial(make, leftovers=leftovers, context=context, patience=patience, big_bytes=big_bytes) as trial:
                check(trial)
        except PromiseBroken as error:
            broken[name] = error
    if broken:
        raise ContractBroken(pipe, broken) from next(iter(broken.values()))
