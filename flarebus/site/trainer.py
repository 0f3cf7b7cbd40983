"""Trainer: one life of a site's training script outside the client job, and the pipes to it.

A life begins when the pipes are open and the process is started (or, with attach, when the configuration is published),
and ends with the process. Everything that happens in it is posted to its owner's thread together with the life itself,
so that words of a former life are known as such.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flarebus.cell import Cell
from flarebus.client.config import ClientConfig, ConfigKey
from flarebus.client.ex_process.words import HELLO, PROTOCOL, RECORDS, channel_of, pack, unpack
from flarebus.errors import Closed, ConfigError, DecodeError
from flarebus.job.class_ref import code_folder_first
from flarebus.job.site_config import SiteConfig
from flarebus.message import Buffer
from flarebus.pending import Pending
from flarebus.pipes import ExportMode, Message, Mode, Pipe
from flarebus.pipes.handler import PipeHandler
from flarebus.pipes.loading import load_pipe_class, make_pipe
from flarebus.site.launcher import TrainerExit, TrainerProcess, trainer_environ

__all__ = ["CONFIG_FILE", "Ground", "Process", "Trainer", "TrainerWatcher"]

log = logging.getLogger(__name__)

CONFIG_FILE = Path("config", "client_api_config.json")
# Of one trainer; more is a mistake.
MAX_RANKS = 4096
DEFAULT_PIPE = "cell"
TASK_CHANNEL, METRIC_CHANNEL = "task", "metric"


@dataclass(frozen=True, slots=True)
class Ground:
    """What all trainers of a host stand on.

    Args:
        cell: the host's.
        job_id: the job.
        endpoint: of the router, for trainers to dial.
        keys: CURVE keys for trainers, or None where connections are not encrypted.
        log_config: of the sites' logs, as the user gave it.
        forward_records: hands metric records of a trainer on, unopened.
    """

    cell: Cell
    job_id: str
    endpoint: str
    keys: Mapping[str, str] | None
    log_config: str | None
    forward_records: Callable[[Mapping[str, Any]], Pending[Any]]


class Process(Protocol):
    """What runs a training script."""

    def end(self, grace_s: float) -> None:
        """Ask it to end now, and make it after `grace_s` seconds; returns at once."""

    def wait(self, timeout: float | None) -> bool:
        """Wait for its end; whether it has come."""


class TrainerWatcher(Protocol):
    """The owner of a life; its methods are called as its `post` has them called, except `line`."""

    def said(self, life: Trainer, rank: int, message: Message) -> None:
        """A rank that was welcomed sent a message."""

    def ready(self, life: Trainer, rank: int) -> None:
        """A rank has come."""

    def lost(self, life: Trainer, rank: int, topic: str, reason: str) -> None:
        """A rank left (END), gave up (ABORT) or gives no sign of life (PEER_GONE)."""

    def exited(self, life: Trainer, end: TrainerExit) -> None:
        """The process has ended."""

    def line(self, stream: str, text: str) -> None:
        """The process wrote a line; on a thread of the process's own."""


class Trainer:
    """One life.

    Args:
        site: its name.
        folder: of the site; the script's working directory.
        config: what the site runs.
        client_config: the client configuration, without pipes and secrets.
        ground: what it stands on.
        watcher: told what happens.
        post: has it told, from threads of the pipes and of the process; must not block.
        run_inside: runs the script in this process with the given client configuration, for a pipe that does not leave
            it; told of the end like a process.

    Raises:
        ConfigError: the pipe that is asked for cannot be made.
        OSError: the configuration cannot be written.
    """

    def __init__(
        self,
        site: str,
        folder: Path,
        config: SiteConfig,
        client_config: Mapping[str, Any],
        ground: Ground,
        watcher: TrainerWatcher,
        post: Callable[[Callable[[], None]], None],
        run_inside: Callable[[ClientConfig, Callable[[TrainerExit], None]], Process],
    ) -> None:
        self.site = site
        self.ranks: dict[int, PipeHandler] = {}
        """The ranks that have come."""
        self.has_come = False
        """Whether its first rank was ever here."""
        self.world_size = 1
        """How many ranks there are, when the first one has said so."""
        self.n_answered = 0
        """How many of its results were answered."""
        self.holds: int | None = None
        """Once it said goodbye: the task that it took and did not answer, or -1."""
        self.lost = ""
        """Why its pipe broke."""
        self._folder = folder
        self._config = config
        self._ground = ground
        self._watcher = watcher
        self._post = post
        self._run_inside = run_inside
        self._token = secrets.token_urlsafe(32)
        self._link = secrets.token_hex(8)
        self._client_config = dict(client_config)
        self._config_file = folder / CONFIG_FILE
        self._pipe_of: dict[PipeHandler, Pipe] = {}
        self._metric_handler: PipeHandler | None = None
        self._process: Process | None = None
        self._closed = False
        # A rank may be opened, on the thread of another one's handler, while the owner closes.
        self._lock = threading.Lock()
        pipe = config.client_config.get(ConfigKey.PIPE) or {ConfigKey.CLASS_NAME: DEFAULT_PIPE, ConfigKey.ARG: {}}
        self._pipe_name, self._pipe_args = pipe[ConfigKey.CLASS_NAME], dict(pipe[ConfigKey.ARG])
        # A job may bring its own class; to the trainer it is beside the script that it runs.
        self._code_dir = Path(config.train_script).parent
        with code_folder_first(self._code_dir):
            self._pipe_class = load_pipe_class(self._pipe_name)
        if self._pipe_class.same_process and config.attach:
            allowed = "with attach=True a pipe that leaves the process, which this one does not"
            raise ConfigError("pipe", self._pipe_name, allowed)

    @property
    def passes_manifests(self) -> bool:
        """Whether arrays may stay where they are while a message about them goes through the pipe."""
        return self._pipe_class.passes_manifests

    @property
    def is_over(self) -> bool:
        """Whether the process has ended; False for one that somebody else started."""
        return self._process is not None and self._process.wait(0)

    def begin(self) -> None:
        """Open the pipes and start the process, or publish the configuration for whoever starts it.

        Raises:
            ConfigError: the pipe cannot be made.
            FlarebusError, OSError: it cannot be opened, or the configuration cannot be written.
        """
        try:
            metric = self._open_metric()
            task = self._open_rank(0)
            config = self._whole_config(task, metric)
            if self._pipe_class.same_process:
                self._process = self._run_inside(ClientConfig(config), self._exited)
                return
            self._config_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            ClientConfig(config).to_json(self._config_file)
            if not self._config.attach:
                self._process = TrainerProcess(
                    self._config.command_line(sys.executable),
                    folder=self._folder,
                    environ=trainer_environ(self._config_file),
                    on_line=self._watcher.line,
                    on_exit=self._exited,
                )
        except BaseException:
            self.close()
            raise

    def reopen(self) -> None:
        """Listen again, with the same configuration, when somebody has come and left who was not welcome.

        Raises:
            FlarebusError, OSError: the pipe cannot be opened.
        """
        # The task pipe last, both times: whoever is welcomed there finds the other one open.
        for handler in list(self._pipe_of):
            handler.stop()
        self._pipe_of.clear()
        self._open_metric()
        self._open_rank(0)

    def open_others(self) -> None:
        """Listen to the ranks beside the first.

        Raises:
            FlarebusError, OSError: a pipe cannot be opened.
        """
        for rank in range(1, self.world_size):
            self._open_rank(rank)

    def took(self, number: int) -> bool:
        """Whether a task that this life leaves behind was in work there, as far as is known."""
        return self.holds == number or self.n_answered == 0

    def send(self, rank: int, message: Message) -> Pending[bool]:
        """Send a message to a rank that has come."""
        return self.ranks[rank].post(message)

    def pull(self, rank: int, message: Message) -> Pending[Sequence[Buffer]]:
        """Bring the buffers of a message of `rank` here."""
        return self._pipe_of[self.ranks[rank]].pull(message)

    def answer(self, rank: int, message: Message, **fields: Any) -> Pending[bool]:
        """Answer a message of `rank`."""
        return self.ranks[rank].reply(message, pack(**fields))

    def fail(self, rank: int, message: Message, error: BaseException) -> None:
        """Answer a message of `rank` with an error."""
        self.ranks[rank].fail(message, error)

    def say_end(self, reason: str, aborted: bool = False) -> None:
        """Tell all ranks that there is no more work."""
        for handler in list(self.ranks.values()):
            if aborted:
                handler.notify_abort(reason)
            else:
                handler.notify_end(reason)

    def end(self, grace_s: float) -> None:
        """Ask the process to end, and make it after `grace_s` seconds; returns at once."""
        if self._process is not None:
            self._process.end(grace_s)

    def close(self) -> None:
        """Close the pipes and remove the configuration, which holds a secret. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            handlers = list(self._pipe_of)
        for handler in handlers:
            handler.stop()
        with contextlib.suppress(OSError):
            self._config_file.unlink(missing_ok=True)
            self._config_file.parent.rmdir()  # unless somebody has put something there

    # -- pipes --

    def _make_pipe(self, channel: str) -> Pipe:
        ground = self._ground
        context = {
            "site_name": self.site,
            "token": ground.job_id,
            "root_url": ground.endpoint,
            "secure_mode": ground.keys is not None,
            "workspace_dir": str(self._folder),
            "cell": ground.cell,
            "link": self._link,
        }
        with code_folder_first(self._code_dir):
            pipe = make_pipe(self._pipe_name, self._pipe_args, context, Mode.PASSIVE)
        pipe.open(channel)
        return pipe

    def _open_rank(self, rank: int) -> Pipe:
        pipe = self._make_pipe(channel_of(TASK_CHANNEL, rank))
        handler: PipeHandler

        def on_message(message: Message) -> None:
            self._heard(rank, handler, message)

        def on_status(topic: str, reason: str) -> None:
            self._post(lambda: self._watcher.lost(self, rank, topic, reason))

        timeout_s = ClientConfig(self._client_config).get_heartbeat_timeout()
        handler = self._handle(pipe, on_message, on_status, timeout_s)
        # Now, not before: what a rank said may be there already, and is told to `handler`.
        handler.start()
        return pipe

    def _open_metric(self) -> Pipe:
        pipe = self._make_pipe(METRIC_CHANNEL)
        self._metric_handler = self._handle(pipe, self._records, lambda *_: None, timeout_s=0.0)
        self._metric_handler.start()
        return pipe

    def _handle(
        self,
        pipe: Pipe,
        on_message: Callable[[Message], None],
        on_status: Callable[[str, str], None],
        timeout_s: float,
    ) -> PipeHandler:
        settings = ClientConfig(self._client_config)
        handler = PipeHandler(
            pipe,
            on_message=on_message,
            on_status=on_status,
            heartbeat_interval=settings.get_heartbeat_interval(),
            heartbeat_timeout=timeout_s,
            awaits_peer=True,
            max_resends=settings.get_max_resends(),
        )
        with self._lock:
            if not self._closed:
                self._pipe_of[handler] = pipe
                return handler
        pipe.close()
        raise Closed(f"{self.site}: this life of its trainer is over")

    def _whole_config(self, task: Pipe, metric: Pipe) -> dict[str, Any]:
        """The client configuration as the trainer gets it."""
        config = {**self._client_config, "auth_token": self._token, "log_config": self._ground.log_config}
        if self._ground.keys is not None:
            config["connection"] = dict(self._ground.keys)
        for section, channel, pipe in (
            ("TASK_EXCHANGE", TASK_CHANNEL, task),
            ("METRICS_EXCHANGE", METRIC_CHANNEL, metric),
        ):
            class_path, args = pipe.export(ExportMode.PEER)
            config[section] = {
                **config.get(section, {}),
                "pipe_channel_name": channel,
                "pipe": {"CLASS_NAME": class_path, "ARG": args},
            }
        return config

    # -- on threads of the handlers and of the process --

    def _heard(self, rank: int, handler: PipeHandler, message: Message) -> None:
        if message.topic != HELLO:
            if self.ranks.get(rank) is not handler:
                raise DecodeError(f"rank {rank} said {message.topic!r} before hello")
            self._post(lambda: self._watcher.said(self, rank, message))
            return
        reason, world_size = self._why_not(rank, message)
        handler.reply(message, pack(accepted=not reason, reason=reason))
        if reason:
            log.warning("%s: a trainer was refused: %s", self.site, reason)
            return
        self.ranks[rank] = handler
        if rank == 0:
            self.has_come = True
            self.world_size = world_size
        self._post(lambda: self._watcher.ready(self, rank))

    def _why_not(self, rank: int, message: Message) -> tuple[str, int]:
        """Why this process is not welcome, or ""; and of how many its trainer consists."""
        hello = unpack(message.body, protocol=int, job_id=str, site=str, rank=int, world_size=int, token=str)
        size = hello["world_size"]
        if not hmac.compare_digest(hello["token"].encode(), self._token.encode()):
            return "its token is not the one in the configuration file of this launch; start it with the new file", 1
        if hello["protocol"] != PROTOCOL:
            return f"it speaks version {hello['protocol']} of the protocol, this end {PROTOCOL}", 1
        if (hello["job_id"], hello["site"]) != (self._ground.job_id, self.site):
            return f"its configuration is for {hello['site']} in job {hello['job_id']}", 1
        if hello["rank"] != rank or not 0 < size <= MAX_RANKS:
            return f"it calls itself rank {hello['rank']} of {size} on the channel of rank {rank}", 1
        if rank in self.ranks:
            return f"{self.site} has a rank {rank} already", 1
        return "", size

    def _records(self, message: Message) -> None:
        if message.topic != RECORDS:
            raise DecodeError(f"topic {message.topic!r} on the metric channel")
        fields = unpack(message.body, records=bytes, dropped=dict)
        handler = self._metric_handler
        assert handler is not None
        self._ground.forward_records(fields).on_done(lambda done: _pass_on(handler, message, done))

    def _exited(self, end: TrainerExit) -> None:
        self._post(lambda: self._watcher.exited(self, end))


def _pass_on(handler: PipeHandler, message: Message, done: Pending[Any]) -> None:
    error = done.error()
    if error is None:
        handler.reply(message, pack())
    else:
        handler.fail(message, error)
