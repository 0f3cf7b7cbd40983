"""Trainer: the pipes of one life of a script, and who is let in through them."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flarebus_pipes.memory_pipe import MemoryPipe

from flarebus.client.config import ClientConfig
from flarebus.client.ex_process.engine import TrainerEngine
from flarebus.job.site_config import SiteConfig
from flarebus.pipes.handler import PipeHandler
from flarebus.plugins import origin_of
from flarebus.site import trainer
from flarebus.site.client_config import make_client_config
from flarebus.site.trainer import Trainer

LIMIT_S = 30.0


class Watcher:
    """Notes the ranks that have come."""

    def __init__(self) -> None:
        self.came: list[int] = []

    def ready(self, life: Trainer, rank: int) -> None:
        """See `TrainerWatcher`."""
        self.came.append(rank)
        if rank == 0:
            life.open_others()

    def said(self, *_: Any) -> None:
        """Nothing is said here."""

    lost = exited = line = said


def test_rank_that_speaks_before_its_pipe_is_open_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hello of a further rank may wait in its pipe before the first rank has said how many there are."""
    heard = threading.Event()

    class Eager(PipeHandler):
        """Of the further rank: reads what waits before its maker can do anything else."""

        def __init__(self, pipe: Any, *, on_message: Any, **given: Any) -> None:
            def note(message: Any) -> None:
                try:
                    on_message(message)
                finally:
                    heard.set()

            self._is_further = pipe._seat.key[1] == "task-1"
            super().__init__(pipe, on_message=note if self._is_further else on_message, **given)

        def start(self) -> None:
            super().start()
            if self._is_further:
                assert heard.wait(LIMIT_S)

    monkeypatch.setattr(trainer, "PipeHandler", Eager)
    monkeypatch.setenv("WORLD_SIZE", "2")
    given: list[ClientConfig] = []
    site = SiteConfig("client.py", launch_external_process=True, client_config={"pipe": origin_of(MemoryPipe)})
    ground: Any = SimpleNamespace(cell=None, endpoint="", keys=None, log_config=None, job_id="job")
    watcher = Watcher()
    life = Trainer(
        "site-1",
        tmp_path,
        site,
        make_client_config("site-1", "job", site),
        ground,
        watcher,
        lambda event: event(),
        lambda config, on_exit: given.append(config),  # type: ignore[arg-type, return-value]
    )
    life.begin()
    engines: list[TrainerEngine] = []
    further = threading.Thread(target=lambda: engines.append(TrainerEngine.connect(given[0], 1)))
    further.start()
    engines.append(TrainerEngine.connect(given[0], 0))
    further.join(LIMIT_S)

    assert sorted(engine.rank for engine in engines) == [0, 1]
    assert sorted(watcher.came) == [0, 1]

    for engine in engines:
        engine.close()
    life.close()
