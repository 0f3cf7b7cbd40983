"""InsideTrainer: a training script that talks through a pipe like a trainer, but runs in this process, by turns.

For pipes that do not leave a process. What holds for scripts inside the client job holds for it: one at a time has the
turn, and its end is not the end of a process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from flarebus.client.config import ClientConfig
from flarebus.client.engine import HOST_THREAD_PREFIX, Engine
from flarebus.client.ex_process.engine import TrainerEngine
from flarebus.errors import FlarebusError
from flarebus.site.launcher import TrainerExit
from flarebus.site.script import Outcome, SiteScript

__all__ = ["InsideTrainer"]

ScriptMaker = Callable[[Engine, Callable[[], bool], Callable[[Outcome], None]], SiteScript]


class InsideTrainer:
    """One life of a script; started at once.

    Args:
        config: the client configuration, with pipes.
        make_script: makes the script for an engine; given as well who knows whether a task waits, and whom to tell of
            ends.
        on_exit: told once how it ended.
    """

    def __init__(self, config: ClientConfig, make_script: ScriptMaker, on_exit: Callable[[TrainerExit], None]) -> None:
        self._config = config
        self._make_script = make_script
        self._on_exit = on_exit
        self._over = threading.Event()
        name = f"{HOST_THREAD_PREFIX} trainer {config.get_site_name()}"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def end(self, grace_s: float) -> None:
        """It was told through the pipe; a thread cannot be made to end, and ends with the process."""

    def wait(self, timeout: float | None) -> bool:
        """Wait for its end; whether it has come."""
        return self._over.wait(timeout)

    def _run(self) -> None:
        outcomes: list[Outcome] = []
        cause, code = "", 1
        try:
            engine = TrainerEngine.connect(self._config, rank=0)
            try:
                # Until it has had a task, one is about to come: that is what it was started for.
                script = self._make_script(engine, lambda: False, outcomes.append)
                script.wake()
                script.wait_ended()
            finally:
                engine.close()
            cause, code = outcomes[-1].cause, outcomes[-1].exit_code
        except Exception as error:  # whatever it was: the owner waits for the end, and tells the server its reason
            cause = str(error) if isinstance(error, FlarebusError) else f"{type(error).__name__}: {error}"
        self._over.set()
        self._on_exit(TrainerExit(code=code or (1 if cause else 0), last_words=cause))
