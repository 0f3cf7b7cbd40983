"""A site with a trainer that a test plays: a real bus, pipe and engine, no process, and time that passes on demand.

The server is a cell that keeps what it is told. The "process" is an object: the test lets it call `flare.init()` (by
making a `TrainerEngine` from the configuration that it was started with) and says how it ends.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flarebus_pipes.cell_pipe import CellPipe

from flarebus.cell import Cell, Payload
from flarebus.client.config import ClientConfig
from flarebus.client.engine import Assignment
from flarebus.client.ex_process.engine import TrainerEngine
from flarebus.codec import decode
from flarebus.delivery import Delivery
from flarebus.job.site_config import SiteConfig
from flarebus.model import FLModel
from flarebus.site.client_config import make_client_config
from flarebus.site.external import ExternalSite
from flarebus.site.launcher import TrainerExit
from flarebus.site.ticket import Ticket
from flarebus.site.trainer import Ground
from flarebus.site.work import Work
from flarebus.workflow.filter import FilterChain
from tests.core.bus import Bus
from tests.pipes.links import InThread, wait_until

__all__ = ["BIG", "LIMIT_S", "InsideCellPipe", "PlayedProcess", "PlayedSite", "model_of", "send", "take"]

LIMIT_S = 30.0
# float32 values that are too many to ride in a message.
BIG = 80 * 1024


class InsideCellPipe(CellPipe):
    """A CellPipe whose trainer lives in the client job's process."""

    same_process = True


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def hurry(self) -> None:
        """Let everybody's patience be over."""
        self.now += 1000.0


class Logs:
    """What a site notes."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, str]] = []

    def note(self, site: str, level: str, text: str, *more: object) -> None:
        self.notes.append((level, text))

    def line(self, site: str, stream: str, text: str) -> None:
        self.notes.append((stream, text))


class PlayedProcess:
    """One launch."""

    def __init__(self, config: ClientConfig, on_exit: Callable[[TrainerExit], None]) -> None:
        self.config = config
        self.ended: queue.SimpleQueue[float] = queue.SimpleQueue()
        """The grace of each time that it was told to end."""
        self.engines: list[TrainerEngine] = []
        self._on_exit = on_exit
        self._over = threading.Event()

    def init(self, rank: int = 0) -> TrainerEngine:
        """What `flare.init()` does."""
        engine = InThread(TrainerEngine.connect, self.config, rank).result()
        self.engines.append(engine)
        return engine

    def exit(self, **how: Any) -> None:
        """It ends, by itself or not: then its engines have not said goodbye."""
        is_clean = how.get("signal") is None
        for engine in self.engines:
            if not is_clean:
                engine.ended = "killed"
            engine.close()
        self._over.set()
        self._on_exit(TrainerExit(**how))

    # -- Process

    def end(self, grace_s: float) -> None:
        """Note it."""
        self.ended.put(grace_s)

    def wait(self, timeout: float | None) -> bool:
        """Whether it has ended."""
        return self._over.wait(timeout)


class PlayedSite:
    """An `ExternalSite` and all around it.

    Args:
        folder: of the site.
        pipe: `memory`, or `cell`: one that passes manifests.
        filters: on tasks and on results.
        config: changes to what the site runs.
    """

    def __init__(
        self,
        folder: Path,
        pipe: str = "cell",
        filters: tuple[FilterChain, FilterChain] | None = None,
        pipe_args: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        self.folder = folder
        self.clock, self.logs = Clock(), Logs()
        self.bus = Bus("ipc")
        self.server: Cell = self.bus.attach("server.job")
        self.host: Cell = self.bus.attach("worker-1.job", aliases=["site-1.job"])
        self.results: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.records: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.launched: queue.SimpleQueue[PlayedProcess] = queue.SimpleQueue()
        self.fault: Exception | None = None
        """What the next launch raises."""
        self.attached: list[TrainerEngine] = []
        """Trainers that nobody launched; closed at the end."""
        self.server.inbox("task", "result", self.results.put)
        self.server.on("metric", "records", lambda delivery: self.records.put(delivery.value()))
        self.host.inbox("task", "assign", self._assign)
        names = {"cell": f"{__name__}.InsideCellPipe", "memory": "memory"}
        overrides = {"pipe": {"CLASS_NAME": names.get(pipe, pipe), "ARG": pipe_args or {}}}
        launches = {} if config.get("attach") else {"launch_external_process": True}
        made = SiteConfig("/nowhere/client.py", client_config=overrides, **{**launches, **config})
        send = lambda fields: self.host.request("server.job", "metric", "records", dict(fields))  # noqa: E731
        self.site = ExternalSite(
            "site-1",
            folder,
            made,
            make_client_config("site-1", "job", made),
            filters or (FilterChain(), FilterChain()),
            Ground(self.host, "job", self.bus.endpoint, None, None, send),
            self.logs,  # type: ignore[arg-type]
            self._launch,
            clock=self.clock,
        )
        self._payloads: list[Payload] = []
        self._processes: list[PlayedProcess] = []

    def _launch(self, config: ClientConfig, on_exit: Callable[[TrainerExit], None]) -> PlayedProcess:
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault
        process = PlayedProcess(config, on_exit)
        self._processes.append(process)
        self.launched.put(process)
        return process

    def _assign(self, delivery: Delivery) -> None:
        fields = delivery.plain()
        about = {"name": fields["task"], "round": fields["round"], "total_rounds": 9}
        self.site.assign(Work(Ticket.of(fields, delivery.source), about, fields["model"], delivery))
        delivery.reply()

    # -- what the test does

    def launch(self) -> PlayedProcess:
        """The next process that was started."""
        return self.launched.get(timeout=LIMIT_S)

    def give(
        self, number: int, value: float = 0.0, size: int = BIG, giver: Cell | None = None, **ticket: Any
    ) -> Payload:
        """The server, or `giver`, hands a task out with such a ticket; the site has been told when this returns."""
        model = FLModel(params={"w": np.full(size, value, np.float32)}, meta={"from": "server"})
        cell = giver or self.server
        payload = cell.share(model, ["worker-1.job", "site-1.job"])
        fields = {"number": number, "round": number, "owner": "", "task": "train", "model": payload.body, **ticket}
        cell.request("worker-1.job", "task", "assign", fields, payload=payload).result(LIMIT_S)
        if giver is None:
            self._payloads.append(payload)
        return payload

    def result(self) -> Delivery:
        """The next answer of the site."""
        return self.results.get(timeout=LIMIT_S)

    def failure(self) -> str:
        """The next answer, which has to be an error; its reason."""
        delivery = self.result()
        fields = delivery.plain()
        delivery.reply({"accepted": True, "reason": ""})
        assert fields["error"] is not None, "a result, not an error"
        return str(fields["error"])

    def accept(self, delivery: Delivery, accepted: bool = True, reason: str = "") -> FLModel:
        """Fetch a result as the server does, and answer it."""
        body = delivery.plain()["model"]
        model: FLModel = decode(body, delivery.pull().result(LIMIT_S))
        delivery.reply({"accepted": accepted, "reason": reason})
        return model

    def settle(self) -> None:
        """Return when the site has done all that it was told before."""
        done = threading.Event()
        self.site._events.put(done.set)
        assert done.wait(LIMIT_S)

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and the site look at its clock."""
        self.clock.now += seconds
        self.settle()
        wait_until(lambda: self.site._patience is None or self.site._patience[0] > self.clock.now, "it looks")
        self.settle()

    def noted(self, part: str) -> bool:
        """Whether something like this was noted."""
        return any(part in text for _, text in self.logs.notes)

    def close(self) -> None:
        """End everything."""
        self.site.end("the test is over")
        for process in self._processes:
            if not process.wait(0):
                process.exit(code=0)
        for engine in self.attached:
            engine.close()
        self.site._events.put(self.clock.hurry)
        assert self.site.wait_ended(LIMIT_S)
        self.site._thread.join(LIMIT_S)
        for payload in self._payloads:
            self.server.withdraw(payload)
        self.bus.__exit__()


def take(engine: TrainerEngine) -> tuple[Assignment, list[float]]:
    """The next task, and what its model begins with."""
    task = engine.next_task(LIMIT_S)
    assert task is not None, engine.ended
    model = task.take()
    assert model.params is not None
    return task, model.params["w"][:2].tolist()


def send(engine: TrainerEngine, task: Assignment, value: float, size: int = BIG) -> InThread[None]:
    """Answer; the thread waits for the verdict."""
    return InThread(engine.answer(task, FLModel(params={"w": np.full(size, value, np.float32)})))


def model_of(model: FLModel) -> list[float]:
    """What a model begins with."""
    assert model.params is not None
    found: list[float] = model.params["w"][:2].tolist()
    return found
