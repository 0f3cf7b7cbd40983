"""A client job that a test plays: the other ends of a trainer's pipes, in this process, under real handlers."""

from __future__ import annotations

import queue
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
from flarebus_pipes.memory_pipe import MemoryPipe

from flarebus.client.config import ClientConfig
from flarebus.client.ex_process.engine import TrainerEngine
from flarebus.client.ex_process.words import CANCEL, TASK, channel_of, pack, unpack
from flarebus.client.metric_batch import decode_batch
from flarebus.codec import decode, encode
from flarebus.message import Buffer
from flarebus.model import FLModel
from flarebus.pending import Pending
from flarebus.pipes import Message, Mode
from flarebus.pipes.handler import PipeHandler
from flarebus.pipes.loading import make_pipe

__all__ = ["LIMIT_S", "SIZE", "PlayedJob", "SlowPipe", "weights"]

LIMIT_S = 30.0
# Values of a model: so many that they do not stand in the body of a message.
SIZE = 1000


class SlowPipe(MemoryPipe):
    """A trainer's end whose arrays come when the test lets them."""

    def __init__(self, token: str) -> None:
        super().__init__(Mode.ACTIVE, token)
        self.pulls: queue.SimpleQueue[tuple[Message, Pending[Sequence[Buffer]]]] = queue.SimpleQueue()
        self.moved = 0

    def pull(self, message: Message) -> Pending[Sequence[Buffer]]:
        """Wait for the test."""
        pulled: Pending[Sequence[Buffer]] = Pending()
        self.pulls.put((message, pulled))
        return pulled

    def arrive(self) -> None:
        """The arrays of the next message are here."""
        message, pulled = self.pulls.get(timeout=LIMIT_S)
        pulled.set(message.buffers)

    def lose(self, error: Exception) -> None:
        """They will never be."""
        self.pulls.get(timeout=LIMIT_S)[1].fail(error)

    def moved_bytes(self) -> int:
        """As the test says."""
        return self.moved


class PlayedJob:
    """The client job's ends; all that comes is put into queues.

    Args:
        ranks: how many channels for tasks it opens.
        pipe: the section of the configuration that names one; None for pipes within this process.
    """

    def __init__(self, ranks: int = 1, pipe: dict[str, Any] | None = None) -> None:
        self.token = uuid.uuid4().hex
        self._section = pipe or {
            "CLASS_NAME": "flarebus_pipes.memory_pipe.MemoryPipe",
            "ARG": {"token": self.token},
        }
        self.said: queue.SimpleQueue[tuple[int, Message]] = queue.SimpleQueue()
        self.records: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.statuses: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.handlers: dict[int, PipeHandler] = {}
        for rank in range(ranks):
            self.open(rank)
        self.metrics = self._handle("metric", self._record)

    def open(self, rank: int = 0) -> None:
        """Listen to a rank."""
        channel = channel_of("task", rank)
        self.handlers[rank] = self._handle(channel, lambda message: self.said.put((rank, message)))

    def _handle(self, channel: str, take: Any) -> PipeHandler:
        pipe = make_pipe(self._section["CLASS_NAME"], self._section["ARG"], {}, Mode.PASSIVE)
        pipe.open(channel)

        def tell(topic: str, reason: str) -> None:
            if channel == "task":
                self.statuses.put((topic, reason))

        handler = PipeHandler(pipe, on_message=take, on_status=tell, awaits_peer=True)
        handler.start()
        return handler

    def _record(self, message: Message) -> None:
        fields = unpack(message.body, records=bytes, dropped=dict)
        for record in decode_batch(fields)[0]:
            self.records.put(record)
        self.metrics.reply(message, pack())

    def config(self, **section: Any) -> ClientConfig:
        """What its trainer is told."""
        pipe = self._section
        return ClientConfig(
            {
                "SITE_NAME": "site-1",
                "JOB_ID": "job-1",
                "auth_token": "secret",
                "TASK_EXCHANGE": {"pipe": pipe, **section},
                "METRICS_EXCHANGE": {"pipe": pipe},
            }
        )

    def engine(self, pipe: MemoryPipe | None = None, rank: int = 0, **section: Any) -> TrainerEngine:
        """A trainer's engine that has not said hello."""
        pipe = pipe or MemoryPipe(Mode.ACTIVE, self.token)
        pipe.open(channel_of("task", rank))
        metric = None
        if rank == 0:
            metric = MemoryPipe(Mode.ACTIVE, self.token)
            metric.open("metric")
        return TrainerEngine(self.config(**section), rank, pipe, metric)

    def next(self, topic: str, rank: int = 0) -> Message:
        """The next message; it must be of this topic."""
        who, message = self.said.get(timeout=LIMIT_S)
        assert (who, message.topic) == (rank, topic)
        return message

    def welcome(self, message: Message, reason: str = "") -> None:
        """Answer a hello."""
        self.handlers[0].reply(message, pack(accepted=not reason, reason=reason))

    def give(
        self, number: int, value: float = 0.0, ranks: Sequence[int] = (0,), size: int = SIZE
    ) -> list[Pending[Any]]:
        """Hand a task out."""
        body, buffers = encode(FLModel(params={"w": np.full(size, value, np.float32)}))
        fields = pack(number=number, name="train", round=number, total_rounds=9, model=body, readers=["server.job-1"])
        return [self.handlers[rank].post(Message(TASK, fields, buffers)) for rank in ranks]

    def cancel(self, number: int, rank: int = 0) -> None:
        """Take a task back; the trainer knows when this returns."""
        assert self.handlers[rank].post(Message(CANCEL, pack(number=number))).result(LIMIT_S)

    def answer(self, message: Message, accepted: bool = True, reason: str = "") -> None:
        """Answer a result."""
        self.handlers[0].reply(message, pack(accepted=accepted, reason=reason))

    def close(self) -> None:
        """Close everything."""
        for handler in (*self.handlers.values(), self.metrics):
            handler.stop()


def weights(message: Message) -> list[float]:
    """What a result holds."""
    model = decode(unpack(message.body, model=bytes)["model"], message.buffers)
    found: list[float] = model.params["w"].tolist()
    return found
