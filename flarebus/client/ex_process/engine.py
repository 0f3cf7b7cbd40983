"""TrainerEngine: what the Client API talks to in a process of its own. Its client job is at the other end of a pipe.

The arrays of a task are fetched as soon as it comes, so that the script finds them here. A result is answered when the
server has all of it: until then this process offers the arrays, and `answer` does not return.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flarebus.client.config import ClientConfig, ConfigKey
from flarebus.client.engine import Assignment
from flarebus.client.ex_process.words import (
    CANCEL,
    HELLO,
    LEFT,
    PROTOCOL,
    RECORDS,
    RESULT,
    TASK,
    channel_of,
    pack,
    unpack,
)
from flarebus.client.metrics import MetricOutbox
from flarebus.codec import decode, encode
from flarebus.errors import ClientApiError, ConfigError, DeadlineExceeded, DecodeError, FlarebusError, LinkError
from flarebus.message import Buffer
from flarebus.metric import AnalyticsDataType
from flarebus.model import FLModel
from flarebus.pending import Pending
from flarebus.pipes import Message, Mode, Pipe, Topic
from flarebus.pipes.handler import PipeHandler
from flarebus.pipes.loading import make_pipe

__all__ = ["TrainerEngine"]

log = logging.getLogger("flarebus.client")

_NO_NULLS = (int, type(None))
# How long the last metrics may take to leave when the script ends.
FAREWELL_S = 10.0
# Whoever waits for an answer hears of the end of a pipe just before its reason is told here.
REASON_S = 5.0
# A follower that lags behind rank 0 sees at most so many tasks later.
MAX_BEHIND = 2


class TrainerEngine:
    """One rank of a trainer; an `Engine` to its script. `connect` makes it.

    Args:
        config: the client configuration that the client job wrote for this trainer.
        rank: which process of the trainer this is.
        task_pipe: open; closed by `close`, as is the other one.
        metric_pipe: likewise, or None.
    """

    def __init__(self, config: ClientConfig, rank: int, task_pipe: Pipe, metric_pipe: Pipe | None) -> None:
        self.site_name = config.get_site_name() or ""
        self.job_id = config.get_job_id() or ""
        self.config: Mapping[str, Any] = config.public()
        self.rank = rank
        self.ended: str | None = None
        self._settings = config
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Assignment, Pending[Sequence[Buffer]]]] = deque(maxlen=MAX_BEHIND if rank else 1)
        self._open: Assignment | None = None
        self._unwanted = -1
        self._closed = False
        self._is_welcome = False
        # Whether somebody may still take what was logged: also after the end of the job, not after its abort.
        self._is_heard = True
        self._pipe = task_pipe
        self._handler = self._handle(task_pipe, self._on_message, self._on_status)
        self._metric_pipe = metric_pipe
        self._metric_handler = None if metric_pipe is None else self._handle(metric_pipe, _ignore, _ignore)
        self._metrics = MetricOutbox(self._send_records)

    @classmethod
    def connect(cls, config: ClientConfig, rank: int) -> TrainerEngine:
        """Open the pipes that the configuration names, and say hello.

        Raises:
            ConfigError: the configuration names a pipe that cannot be made.
            LinkError: the client job is not there.
            ClientApiError: it does not want this process.
        """
        for name, value in ((ConfigKey.SITE_NAME, config.get_site_name()), (ConfigKey.JOB_ID, config.get_job_id())):
            if value is None:
                raise ConfigError(name, value, "the client configuration of a trainer says for whom it works")
        keys = config.get_connection()
        context = {"rank": rank} | ({} if keys is None else {"keys": keys})
        pipes = []
        try:
            # Only rank 0 logs.
            for section in (ConfigKey.TASK_EXCHANGE, ConfigKey.METRICS_EXCHANGE)[: 1 if rank else 2]:
                pipe = make_pipe(config.get_pipe_class(section), config.get_pipe_args(section), context, Mode.ACTIVE)
                pipe.open(channel_of(config.get_pipe_channel_name(section), rank))
                pipes.append(pipe)
            engine = cls(config, rank, pipes[0], pipes[1] if pipes[1:] else None)
        except BaseException:
            for pipe in pipes:
                pipe.close()
            raise
        try:
            engine._say_hello()
        except BaseException:
            engine.close()
            raise
        return engine

    # -- the Engine protocol --

    @property
    def is_follower(self) -> bool:
        """Whether this is a rank other than 0: it sees every task, and only rank 0 answers."""
        return self.rank != 0

    def next_task(self, timeout: float | None) -> Assignment | None:
        """Wait for the next task and its arrays; see `Engine`.

        A task whose arrays cannot be had is none for the script: mostly its round was closed without this site.
        """
        given_up, self._open = self._open, None
        if given_up is not None:
            self._give_up(given_up, "the script asked for its next task without answering this one")
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._changed:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                self._changed.wait_for(lambda: self.ended is not None or self._is_first_here(), left)
                if not self._is_first_here():
                    return None
                assignment, pulled = self._waiting.popleft()
            error = pulled.error()
            if error is None:
                self._open = assignment
                return assignment
            self._give_up(assignment, f"could not take the task: {error}")

    def _is_first_here(self) -> bool:
        return bool(self._waiting) and self._waiting[0][1].is_done

    def still_wanted(self, assignment: Assignment) -> bool:
        """Whether the task was not cancelled; see `Engine`."""
        if int(assignment.task_id) > self._unwanted:
            return True
        self._open = None
        return False

    def answer(self, assignment: Assignment, result: FLModel) -> Callable[[], None]:
        """Send the result; the wait is over when the server has it whole."""
        body, buffers = encode(result)
        fields = pack(number=int(assignment.task_id), error=None, model=body)
        sent = self._handler.request(Message(RESULT, fields, buffers, readers=assignment.readers))

        def wait() -> None:
            try:
                answer = self._wait_while_moving(sent)
            except LinkError:
                if self._handler.has_ended:
                    # A script is not told of an error where its job has ended.
                    with self._changed:
                        self._changed.wait_for(lambda: self.ended is not None, REASON_S)
                raise
            verdict = unpack(answer.body, accepted=bool, reason=str)
            self._open = None
            if not verdict["accepted"]:
                log.warning("%s: the server did not use the result: %s", self.site_name, verdict["reason"])

        return wait

    def log(self, key: str, value: Any, data_type: AnalyticsDataType, fields: dict[str, Any]) -> None:
        """Hand over one metric record."""
        open_task = self._open
        self._metrics.put(self.site_name, None if open_task is None else open_task.round, key, value, data_type, fields)

    def close(self) -> None:
        """Say goodbye: what was logged still leaves, within limits. Idempotent."""
        if self._closed:
            return
        self._closed = True
        # Before the goodbye: after it the client job may open the pipes for the next trainer. Also when the job has
        # ended: the client job waits for this process, unless it was aborted.
        if self._metric_handler is not None:
            self._metrics.close(FAREWELL_S if self._is_heard else 0.0)
            self._metric_handler.stop()
        if self.ended is None:
            if self._is_welcome and not self.is_follower:
                # A task that came and was never looked at is somebody else's to do.
                held = self._open
                self._handler.post(Message(LEFT, pack(number=-1 if held is None else int(held.task_id))))
            self._handler.notify_end("the script has ended")
        self._end("the script has ended")
        self._handler.stop()

    # -- from the pipe --

    def _on_message(self, message: Message) -> None:
        if message.topic == TASK:
            self._take_task(message)
        elif message.topic == CANCEL:
            self._cancel(unpack(message.body, number=int)["number"])
        else:
            raise DecodeError(f"topic {message.topic!r} is not known")

    def _take_task(self, message: Message) -> None:
        task = unpack(
            message.body, number=int, name=str, round=_NO_NULLS, total_rounds=_NO_NULLS, model=bytes, readers=list
        )
        if self.ended is not None or task["number"] <= self._unwanted:
            return
        # Now, so that the model is on its way while the script still does something else.
        pulled = self._pipe.pull(message)
        take = _Take(task["model"], pulled)
        round, total_rounds, readers = task["round"], task["total_rounds"], tuple(task["readers"])
        assignment = Assignment(str(task["number"]), task["name"], round, total_rounds, take, readers)
        with self._changed:
            if self.ended is None and task["number"] > self._unwanted:
                self._waiting.append((assignment, pulled))
        pulled.on_done(lambda _: self._wake())

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _cancel(self, number: int) -> None:
        with self._changed:
            self._unwanted = max(self._unwanted, number)
            wanted = [entry for entry in self._waiting if int(entry[0].task_id) > number]
            self._waiting.clear()
            self._waiting.extend(wanted)

    def _on_status(self, topic: str, reason: str) -> None:
        said = {
            Topic.ABORT: reason or "the job was aborted",
            Topic.END: reason or "the job has ended",
        }
        # Whoever says that there is no more work still listens to what this trainer has to tell.
        self._is_heard = topic == Topic.END
        self._end(said.get(topic) or f"the client job is gone: {reason}")

    def _end(self, reason: str) -> None:
        with self._changed:
            self.ended = self.ended or reason
            self._waiting.clear()
            self._changed.notify_all()

    # -- to the pipe --

    def _handle(
        self, pipe: Pipe, on_message: Callable[[Message], None], on_status: Callable[[str, str], None]
    ) -> PipeHandler:
        settings = self._settings
        handler = PipeHandler(
            pipe,
            on_message=on_message,
            on_status=on_status,
            heartbeat_interval=settings.get_heartbeat_interval(),
            heartbeat_timeout=settings.get_heartbeat_timeout(),
            max_resends=settings.get_max_resends(),
        )
        handler.start()
        return handler

    def _say_hello(self) -> None:
        fields = {
            "protocol": PROTOCOL,
            "job_id": self.job_id,
            "site": self.site_name,
            "rank": self.rank,
            "world_size": _world_size(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "token": self._settings.get_auth_token() or "",
        }
        try:
            answer = self._handler.request(Message(HELLO, pack(**fields))).result(
                self._settings.get_submit_result_timeout()
            )
        except LinkError as error:
            raise LinkError(
                f"flare.init(): the client job of {self.site_name}, job {self.job_id}, did not answer: {error}"
            ) from error
        verdict = unpack(answer.body, accepted=bool, reason=str)
        if not verdict["accepted"]:
            raise ClientApiError(f"flare.init(): the client job refused this process: {verdict['reason']}")
        self._is_welcome = True

    def _wait_while_moving(self, pending: Pending[Message]) -> Message:
        """The answer, however long it takes as long as bytes move to where they are wanted."""
        lease_s = self._settings.get_download_complete_timeout()
        moved = self._pipe.moved_bytes()
        while True:
            try:
                return pending.result(lease_s)
            except DeadlineExceeded as error:
                if pending.is_done or self._pipe.moved_bytes() == moved:
                    # It is settled, unless an answer came just now: the arrays are not offered any longer.
                    pending.fail(error)
                    return pending.result()
                moved = self._pipe.moved_bytes()

    def _give_up(self, task: Assignment, reason: str) -> None:
        if self.ended is None and not self.is_follower and int(task.task_id) > self._unwanted:
            fields = pack(number=int(task.task_id), error=reason, model=b"")
            self._handler.request(Message(RESULT, fields))

    def _send_records(self, fields: Mapping[str, Any]) -> Pending[Any]:
        if self._metric_handler is None:
            raise FlarebusError("there is no metric channel")
        return self._metric_handler.request(Message(RECORDS, pack(**fields)))


class _Take:
    """Makes the model of one task, once."""

    def __init__(self, body: bytes, pulled: Pending[Sequence[Buffer]]) -> None:
        self._body = body
        self._pulled: Pending[Sequence[Buffer]] | None = pulled

    def __call__(self) -> FLModel:
        pulled, self._pulled = self._pulled, None
        assert pulled is not None, "a model is taken once"
        model = decode(self._body, pulled.result())
        if type(model) is not FLModel:
            raise DecodeError("the task holds no FLModel")
        return model


def _world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16 else 1


def _ignore(*_: object) -> None:
    """Nothing comes this way that would have to be answered."""
