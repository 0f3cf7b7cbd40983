"""A server job on a real bus in one process, with hosts that a test plays: no sockets, no worker processes, no disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from flarebus.cell import Cell, Payload
from flarebus.codec import decode, encode
from flarebus.delivery import Delivery
from flarebus.job.definition import JobDefinition
from flarebus.job.site_config import SiteConfig
from flarebus.loop import Loop
from flarebus.model import FLModel
from flarebus.pending import Pending
from flarebus.router import Router
from flarebus.server.archive import Archive
from flarebus.server.job import ServerJob
from flarebus.server.pool import HostEnd
from flarebus.wire import bundle
from flarebus.workflow.controller import Task

__all__ = [
    "BIG",
    "LIMIT_S",
    "SERVER",
    "Bus",
    "MemoryArchive",
    "PassingHost",
    "PlayedHost",
    "a_job",
    "task",
    "told",
    "update",
]

LIMIT_S = 30.0
SERVER = "server.job"
# float32 values that are too many to ride in a message; whole pages, so that slabs have exactly their size.
BIG = 80 * 1024


class Clock:
    """Monotonic seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Work(NamedTuple):
    """One assignment, as a host got it."""

    number: int
    task: str
    round: int
    sites: list[str]
    model: FLModel
    readers: list[str]


class MemoryArchive:
    """Stands in for `Archive`: what a job leaves, in memory."""

    def __init__(self, params: dict[str, Any] | None = None) -> None:
        self.params: dict[str, Any] = params or {}
        self.committed: list[tuple[int, dict[str, Any], Mapping[str, Any], bool]] = []
        self.done: list[tuple[Mapping[str, Any], Mapping[str, str]]] = []
        self.records: list[dict[str, Any]] = []
        self.last_round_facts: dict[str, Any] = {}

    @property
    def next_round(self) -> int:
        return len(self.committed)

    def current_params(self) -> dict[str, Any]:
        return self.params

    def pages(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def sites_done(self, answered: Mapping[str, Any], failed: Mapping[str, str]) -> None:
        self.done.append((dict(answered), dict(failed)))

    def commit(self, number: int, params: dict[str, Any], metrics: Mapping[str, Any], best: bool) -> None:
        self.params = params
        self.committed.append((number, params, dict(metrics), best))

    def site_records(self, records: list[dict[str, Any]]) -> None:
        self.records += records


class PlayedHost:
    """A host of some sites; what it does is up to the test."""

    def __init__(self, bus: Bus, name: str, sites: Sequence[str], external: Sequence[str] = ()) -> None:
        self.address = name
        self.sites = list(sites)
        self.external = list(external)
        self.cell = Cell.attach(name, bus.router, bus.loop)
        self.work: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self.cancelled: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.refused: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._hear_tasks()
        self.cell.on("task", "cancel", lambda delivery: self.cancelled.put(delivery.value()))
        self.cell.on("task", "refused", lambda delivery: self.refused.put(delivery.value()))
        self.cell.on("task", "end", lambda delivery: self.ended.put(delivery.value()["reason"]))
        self.join()

    def _hear_tasks(self) -> None:
        self.cell.on("task", "assign", self._assign)

    def join(self) -> None:
        """Say who is here; the job knows when this returns."""
        self.ask("join", {"sites": self.sites, "external": self.external}).result(LIMIT_S)

    def ask(self, topic: str, value: Any) -> Pending[Delivery]:
        return self.cell.request(SERVER, "task", topic, value)

    def take(self) -> Work:
        """The next assignment."""
        return self.work.get(timeout=LIMIT_S)

    def send(
        self, site: str, number: int, result: FLModel | str, bring: bool = False, readers: Sequence[str] = (SERVER,)
    ) -> Pending[Delivery]:
        """Answer task `number` for `site` with a model, whose arrays may ride along, or with the words of an error."""
        payload = self.cell.share("" if isinstance(result, str) else result, readers)
        error = result if isinstance(result, str) else None
        fields = {"site": site, "number": number, "error": error, "model": payload.body}
        return self.cell.request(SERVER, "task", "result", fields, payload=payload, bring=bring)

    def send_together(self, number: int, results: Mapping[str, FLModel]) -> Pending[Delivery]:
        """Answer task `number` for several sites in one message, as a host does with small results."""
        entries, buffers = [], []
        for site, result in results.items():
            body, its = encode(result)
            entries.append({"site": site, "number": number, "model": body, "buffers": len(its)})
            buffers += its
        payload = Payload(b"", bundle(buffers), None)
        return self.cell.request(SERVER, "task", "results", {"results": entries}, payload=payload)

    def answer(self, site: str, number: int, result: FLModel | str) -> tuple[bool, str]:
        """Answer, and wait for what the server says: accepted or not, and why."""
        return told(self.send(site, number, result))

    def settled(self) -> None:
        """Return when the job has heard all that this host said before."""
        assert self.answer(self.sites[0], -1, "") == (False, "the round is closed")

    def mute(self) -> None:
        """From now on serve nobody who pulls: results stay on their way."""
        self.cell._carrier._serve = lambda *_: None  # type: ignore[method-assign]

    def die(self) -> None:
        """Go away without a word."""
        self.cell.close()

    def _assign(self, delivery: Delivery) -> None:
        fields = delivery.plain()
        model = decode(fields["model"], delivery.pull().result())
        named = (fields["number"], fields["task"], fields["round"], fields["sites"])
        self.work.put(Work(*named, model, fields.get("readers", [])))


class PassingHost(PlayedHost):
    """A host whose sites have trainers: it passes manifests on, and pulls nothing itself."""

    def pass_on(self, site: str, number: int, trained: Payload) -> Pending[Delivery]:
        """Answer with a result whose arrays somebody else holds."""
        fields = {"site": site, "number": number, "error": None, "model": trained.body}
        return self.cell.request(SERVER, "task", "result", fields, payload=trained)

    def _hear_tasks(self) -> None:
        self.deliveries: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        """The assignments, unopened."""
        self.cell.inbox("task", "assign", self.deliveries.put)


class Bus:
    """The server's end: loop, router, job; and a thread for its controller.

    Args:
        archive: where the job leaves things; None for memory.
        changes: of the definition of the job.
    """

    def __init__(self, archive: Archive | MemoryArchive | None = None, **changes: Any) -> None:
        self.clock = Clock()
        self.archive = MemoryArchive() if archive is None else archive
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._changed = threading.Condition()
        self.loop = Loop("test bus")
        self.router = Router(self.loop)
        self.cell = Cell.attach(SERVER, self.router, self.loop)
        self.job = ServerJob(a_job(**changes), self.cell, cast(Archive, self.archive), self._note, clock=self.clock)
        self._thread = ThreadPoolExecutor(1, "controller")
        self._hosts: list[PlayedHost] = []

    def host(self, name: str, *sites: str) -> PlayedHost:
        """A host that has joined; while it joins, the controller's thread listens."""
        return self._joined(sites, lambda: PlayedHost(self, name, sites))

    def passing_host(self, name: str, *sites: str) -> PassingHost:
        """Likewise, a host of sites with trainers."""
        host = self._joined(sites, lambda: PassingHost(self, name, sites, sites))
        assert isinstance(host, PassingHost)
        return host

    def _joined(self, sites: Sequence[str], make: Callable[[], PlayedHost]) -> PlayedHost:
        heard = self.start(lambda: self.job.wait_for_sites(sites, LIMIT_S))
        host = make()
        heard.result(LIMIT_S)
        self._hosts.append(host)
        return host

    def trainer(self, address: str) -> Cell:
        """A cell for a trainer; closed with the bus at the latest."""
        return Cell.attach(address, self.router, self.loop)

    def back(self, name: str, *sites: str) -> PlayedHost:
        """A host that joins while a controller runs."""
        host = PlayedHost(self, name, sites)
        self._hosts.append(host)
        return host

    def start(self, work: Callable[[], Any]) -> Future[Any]:
        """Run `work` on the controller's thread."""
        return self._thread.submit(work)

    def collect(self, **how: Any) -> Future[list[str]]:
        """Broadcast a small model; the future has the sites in the order of their results."""
        return self.start(lambda: [result.site for result in self.job.broadcast(task(), **how)])

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and the job look at its clock."""
        self.clock.now += seconds
        self.job._agenda.post(lambda: None)

    def heard(self) -> None:
        """Return when the controller's thread, which runs something, has looked at what came so far."""
        looked = threading.Event()
        self.job._agenda.post(looked.set)
        assert looked.wait(LIMIT_S)

    def lose(self, host: PlayedHost) -> None:
        """The host goes away; the job knows when this returns. Nothing else runs."""

        def listen() -> None:
            while host.address in self.job.roster.hosts:
                self.job._agenda.take(None)

        gone = self.start(listen)
        host.die()
        gone.result(LIMIT_S)

    def bury(self, host: PlayedHost) -> None:
        """Say that the host, which is away, will not come back."""
        end = HostEnd(host.address, tuple(host.sites), "its worker was killed", None, False)
        self.job.host_died(end, lambda: None)

    def wait_for(self, event: str, **fields: Any) -> dict[str, Any]:
        """Wait until the job has told of an event with these fields; all its fields."""

        def found() -> list[dict[str, Any]]:
            return [its for name, its in self.events if name == event and fields.items() <= its.items()]

        with self._changed:
            assert self._changed.wait_for(found, LIMIT_S), f"no {event} {fields} in {self.events}"
            return found()[0]

    def close(self) -> None:
        self.job.abort("the test")
        self._thread.shutdown()
        for host in self._hosts:
            host.cell.close()
        self.cell.close()
        self.router.close()
        self.loop.stop()

    def _note(self, event: str, fields: dict[str, Any]) -> None:
        with self._changed:
            self.events.append((event, fields))
            self._changed.notify_all()


def a_job(**changes: Any) -> JobDefinition:
    """A job whose script is never run here."""
    defaults = SiteConfig(train_script="client.py")
    basic = {"workflow": "fedavg", "workflow_settings": {}, "sites": {}, "code_dir": Path(), "job_id": "1" * 32}
    return JobDefinition(**{"name": "job", "site_defaults": defaults, **basic, **changes})


def task(value: float = 0.0, size: int = 4, round: int = 0) -> Task:
    return Task("train", FLModel(params={"w": np.full(size, value, np.float32)}), round, 3)


def update(value: float, size: int = 4, steps: Any = 1, **metrics: Any) -> FLModel:
    """What a site answers."""
    params = {"w": np.full(size, value, np.float32)}
    return FLModel(params=params, metrics=metrics or None, meta={"NUM_STEPS_CURRENT_ROUND": steps})


def told(sent: Pending[Delivery]) -> tuple[bool, str]:
    answer = sent.result(LIMIT_S).plain()
    return answer["accepted"], answer["reason"]
