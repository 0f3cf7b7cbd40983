"""ExternalSite: a site of this host whose script runs in a trainer. Tasks go through it, and results, unopened.

All of its state belongs to one thread; the bus, the pipes and the process post events to it. A task is *open* from its
coming until the server has an answer, which this class owes: the trainer's result, or the reason why there is none. A
trainer that a signal killed gets a second life for the same task; a script that fails would fail again.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flarebus.cell import Payload
from flarebus.client.config import ClientConfig
from flarebus.client.ex_process.words import CANCEL, RESULT, TASK, pack, unpack
from flarebus.codec import decode, encode
from flarebus.delivery import Delivery
from flarebus.errors import FlarebusError, SourceLost
from flarebus.job.site_config import SiteConfig
from flarebus.message import Buffer
from flarebus.model import FLModel
from flarebus.pending import Pending
from flarebus.pipes import Message, Topic
from flarebus.site.launcher import TrainerExit
from flarebus.site.output import SiteLogs
from flarebus.site.trainer import CONFIG_FILE, Ground, Process, Trainer
from flarebus.slab import unbundle
from flarebus.workflow.filter import FilterChain, FilterTask

__all__ = ["ExternalSite", "Work"]

log = logging.getLogger(__name__)

# Lives of a trainer for one task: the second one only after a signal.
MAX_LIVES = 2
# How long a trainer may take to leave by itself at the end of a job that gives it no time of its own.
LEAVE_S = 10.0
# How long a process that is in the way may take after TERM.
HUNG_S = 3.0
# A connection that broke is mostly that of a process that is about to end; one that still lives after this long hangs.
SUSPECT_S = 1.0


class Work:
    """A task as the server sent it.

    Args:
        number: of the broadcast.
        fields: name, round, total_rounds.
        body: the encoded model.
        delivery: the message that it came with, which leads to its buffers.
    """

    __slots__ = ("body", "delivery", "fields", "lives", "number", "result")

    def __init__(self, number: int, fields: Mapping[str, Any], body: bytes, delivery: Delivery) -> None:
        self.number = number
        self.fields = dict(fields)
        self.body = body
        self.delivery = delivery
        self.lives = 0
        self.result: Message | None = None
        """What the trainer answered, on its way to the server."""


class ExternalSite:
    """One site with a trainer.

    Args:
        site: its name.
        folder: its folder.
        config: what it runs.
        client_config: the client configuration without pipes and secrets.
        filters: on tasks and on results.
        ground: what trainers of this host stand on.
        logs: where the trainer's output goes.
        run_inside: see `Trainer`.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        site: str,
        folder: Path,
        config: SiteConfig,
        client_config: Mapping[str, Any],
        filters: tuple[FilterChain, FilterChain],
        ground: Ground,
        logs: SiteLogs,
        run_inside: Callable[[ClientConfig, Callable[[TrainerExit], None]], Process],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.site = site
        self._folder = folder
        self._config = config
        self._client_config = client_config
        self._input_filters, self._output_filters = filters
        self._ground = ground
        self._logs = logs
        self._run_inside = run_inside
        self._clock = clock
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._work: Work | None = None
        # One at a time: the next one begins when this one has left.
        self._life: Trainer | None = None
        self._is_leaving = False
        # When something is done about the life, and what.
        self._patience: tuple[float, Callable[[], None]] | None = None
        # Why the last life ended before it had anything to do.
        self._stillborn = ""
        self._ended: str | None = None
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"flarebus trainer of {site}", daemon=True)

    # -- from any thread --

    def start(self) -> None:
        """Get ready; a trainer that is launched once is launched now."""
        if self._config.attach or self._config.launch_once:
            self._events.put(self._begin_life)
        self._thread.start()

    def assign(self, work: Work) -> None:
        """A task came; returns at once."""
        self._events.put(lambda: self._assigned(work))

    def cancel(self, number: int) -> None:
        """Task `number` is not wanted any more."""
        self._events.put(lambda: self._cancelled(number))

    def end(self, reason: str) -> None:
        """No more work: the trainer is told, and leaves. Returns at once."""
        self._events.put(lambda: self._end(reason))

    def wait_ended(self, timeout: float) -> bool:
        """Wait until the trainer has left; False if the time was up first."""
        return self._left.wait(timeout)

    @property
    def leave_s(self) -> float:
        """How long the trainer may take to leave by itself."""
        return self._config.shutdown_timeout or LEAVE_S

    # -- events of a life, from its threads --

    def said(self, life: Trainer, rank: int, message: Message) -> None:
        """See `TrainerWatcher`."""
        self._events.put(lambda: self._said(life, rank, message))

    def ready(self, life: Trainer, rank: int) -> None:
        """See `TrainerWatcher`."""
        self._events.put(lambda: self._ready(life, rank))

    def lost(self, life: Trainer, rank: int, topic: str, reason: str) -> None:
        """See `TrainerWatcher`."""
        self._events.put(lambda: self._lost(life, rank, topic, reason))

    def exited(self, life: Trainer, end: TrainerExit) -> None:
        """See `TrainerWatcher`."""
        self._events.put(lambda: self._exited(life, end))

    def line(self, stream: str, text: str) -> None:
        """See `TrainerWatcher`."""
        self._logs.line(self.site, stream, text)

    # -- on this site's thread from here on --

    def _run(self) -> None:
        try:
            while not self._left.is_set():
                self._step()
        finally:
            if self._life is not None:
                self._life.close()
            self._left.set()

    def _step(self) -> None:
        try:
            timeout = None if self._patience is None else max(0.0, self._patience[0] - self._clock())
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            assert self._patience is not None
            (_, event), self._patience = self._patience, None
        try:
            event()
        except FlarebusError as error:
            self._fail(str(error))
        except Exception as error:
            # The thread serves the site for the whole job; what went wrong is the answer to its task.
            log.exception("%s: an event of its trainer failed", self.site)
            self._fail(f"{type(error).__name__}: {error}")

    def _begin_life(self) -> None:
        if self._ended is not None or self._life is not None:
            return
        config = self._config
        try:
            life = Trainer(self.site, self._folder, config, self._client_config, self._ground, self, self._run_inside)
            life.begin()
        except (FlarebusError, OSError) as error:
            self._stillborn = f"its trainer could not be started: {error}"
            self._logs.note(self.site, "ERROR", self._stillborn)
            self._fail_stillborn()
            return
        self._life, self._is_leaving = life, False
        limit_s = config.launch_timeout
        if limit_s is not None:
            late = f"its trainer did not call flare.init() within {limit_s:g} s"
            self._wait(limit_s, lambda: self._give_life_up(late))
        if self._config.attach:
            self._logs.note(self.site, "INFO", f"waiting for a trainer with {self._folder / CONFIG_FILE}")

    def _ready(self, life: Trainer, rank: int) -> None:
        if life is not self._life or self._ended is not None:
            return
        if rank == 0:
            self._patience = None
        if self._work is not None and self._work.result is None:
            self._hand_out(self._work, [rank])

    def _assigned(self, work: Work) -> None:
        if self._ended is not None:
            return
        self._work = work
        if self._stillborn:
            self._fail_stillborn()
        elif self._life is None:
            self._begin_life()
        elif not self._is_leaving:
            self._hand_out(work, list(self._life.ranks))

    def _hand_out(self, work: Work, ranks: Sequence[int]) -> None:
        """Give the task to ranks of the trainer; arrays stay where they are unless somebody wants to see them."""
        life = self._life
        assert life is not None
        if not ranks:
            return
        chain = self._input_filters.for_task(work.fields["name"])
        manifest = work.delivery.message.manifest
        body = self._filtered(chain, work, work.body)
        if body is not None and (life.passes_manifests or manifest is None):
            bundle = work.delivery.message.bundle
            self._give(work, ranks, body, () if bundle is None else unbundle(bundle), manifest)
            return
        if body is None and manifest is not None:
            self._logs.note(self.site, "INFO", "a filter looks at the model: it is fetched here first")

        def pulled(arrived: Pending[Sequence[Buffer]]) -> None:
            self._events.put(lambda: self._pulled(life, work, ranks, body, arrived))

        work.delivery.pull().on_done(pulled)

    def _filtered(self, chain: FilterChain, work: Work, body: bytes) -> bytes | None:
        """An encoded model after its filters; None if one of them has to see values, and none has run yet."""
        return chain.apply_to_body(body, self._filter_task(work)) if chain else body

    def _pulled(
        self,
        life: Trainer,
        work: Work,
        ranks: Sequence[int],
        body: bytes | None,
        arrived: Pending[Sequence[Buffer]],
    ) -> None:
        if life is not self._life or work is not self._work:
            return
        try:
            buffers = arrived.result()
            if body is None:
                chain = self._input_filters.for_task(work.fields["name"])
                # A copy of its own: other sites of this host read the same memory.
                model = chain.apply(_model(work.body, buffers, copy=True), self._filter_task(work))
                body, buffers = encode(model)
        except (FlarebusError, MemoryError, OSError) as error:
            self._fail(f"could not take the task: {error}")
            return
        self._give(work, ranks, body, buffers, None)

    def _give(self, work: Work, ranks: Sequence[int], body: bytes, buffers: Sequence[Buffer], manifest: Any) -> None:
        assert self._life is not None
        fields = pack(number=work.number, model=body, **work.fields)
        for rank in ranks:
            self._life.send(rank, Message(TASK, fields, buffers, manifest=manifest))

    def _cancelled(self, number: int) -> None:
        if self._work is None or self._work.number != number:
            return
        self._work = None
        if self._life is not None:
            for rank in list(self._life.ranks):
                self._life.send(rank, Message(CANCEL, pack(number=number)))

    # -- results --

    def _said(self, life: Trainer, rank: int, message: Message) -> None:
        if message.topic != RESULT or rank != 0:
            life.fail(rank, message, FlarebusError(f"topic {message.topic!r} of rank {rank} is not known"))
            return
        fields = unpack(message.body, number=int, error=(str, type(None)), model=bytes)
        work = self._work
        if life is not self._life or work is None or work.number != fields["number"] or self._ended is not None:
            life.answer(0, message, accepted=False, reason=self._ended or "the round is closed")
            return
        if work.result is not None:
            life.answer(0, message, accepted=False, reason="this task is answered already")
            return
        if fields["error"] is not None:
            life.answer(0, message, accepted=True, reason="")
            self._fail(fields["error"])
            return
        work.result = message
        chain = self._output_filters.for_task(work.fields["name"])
        try:
            body = self._filtered(chain, work, fields["model"])
        except FlarebusError as error:
            self._refuse_result(life, message, error)
            return
        if body is None:
            if message.manifest is not None:
                self._logs.note(self.site, "INFO", "a filter looks at the result: it is fetched here first")

            def pulled(arrived: Pending[Sequence[Buffer]]) -> None:
                self._events.put(lambda: self._filter_result(life, work, chain, fields["model"], arrived))

            life.pull(0, message).on_done(pulled)
            return
        if message.manifest is not None:
            self._forward(life, work, body, Payload(b"", None, message.manifest))
        else:
            self._forward(life, work, body, self._shared(message.buffers))

    def _filter_result(
        self, life: Trainer, work: Work, chain: FilterChain, body: bytes, arrived: Pending[Sequence[Buffer]]
    ) -> None:
        if work is not self._work or work.result is None:
            return
        try:
            model = chain.apply(_model(body, arrived.result(), copy=False), self._filter_task(work))
            body, buffers = encode(model)
        except SourceLost as error:
            self._not_taken(life, work, error)
            return
        except (FlarebusError, MemoryError, OSError) as error:
            self._refuse_result(life, work.result, error)
            return
        self._forward(life, work, body, self._shared(buffers))

    def _refuse_result(self, life: Trainer, message: Message, error: Exception) -> None:
        """A result that a filter failed on does not leave the site."""
        life.fail(0, message, error)
        self._fail(f"its result was not sent: {error}")

    def _shared(self, buffers: Sequence[Buffer]) -> Payload:
        return self._ground.cell.share_encoded(b"", buffers, (self._ground.server,))

    def _forward(self, life: Trainer, work: Work, body: bytes, payload: Payload) -> None:
        fields = {"site": self.site, "number": work.number, "error": None, "model": body}
        sent = self._ground.cell.request(self._ground.server, "task", "result", fields, payload=payload)
        own = payload.manifest is not None and payload.manifest.holder == str(self._ground.cell.address)

        def settled(answer: Pending[Delivery]) -> None:
            if own:
                self._ground.cell.withdraw(payload, wait=False)
            self._events.put(lambda: self._settled(life, work, answer))

        sent.on_done(settled)

    def _settled(self, life: Trainer, work: Work, answer: Pending[Delivery]) -> None:
        """The server has the result whole, or will not have it."""
        error = answer.error()
        message = work.result
        assert message is not None
        if isinstance(error, SourceLost) and work is self._work:
            self._not_taken(life, work, error)
            return
        if work is self._work:
            self._work = None
        if error is not None:
            life.fail(0, message, error)
            return
        verdict = answer.result().plain()
        if not verdict["accepted"]:
            self._logs.note(self.site, "WARNING", f"the server did not use the result: {verdict['reason']}")
        life.answer(0, message, accepted=verdict["accepted"], reason=verdict["reason"])
        if life is self._life and not self._config.launch_once and not self._config.attach:
            self._let_go(life, "this trainer was for one task", self.leave_s)

    def _not_taken(self, life: Trainer, work: Work, error: SourceLost) -> None:
        """The result vanished with whoever held it: its task is open again."""
        message, work.result = work.result, None
        assert message is not None
        if life is self._life:
            # Alive, as far as is known here: it will hear why. If it is dead, that is seen in a moment.
            life.fail(0, message, error)
        else:
            self._try_again(f"its result was lost: {error}", was_killed=True)

    def _filter_task(self, work: Work) -> FilterTask:
        return FilterTask(work.fields["name"], work.fields["round"], self.site)

    # -- the end of lives --

    def _lost(self, life: Trainer, rank: int, topic: str, reason: str) -> None:
        if life is not self._life or self._ended is not None:
            return
        if self._config.attach:
            # There is no process to look at: whoever started it may start another one.
            said = "left without answering its task" if topic == Topic.END else f"is gone: {reason}"
            self._bury(life, f"its trainer {said}", was_killed=topic == Topic.PEER_GONE)
            self._begin_life()
        elif topic == Topic.PEER_GONE and not self._is_leaving:
            # Its process ends, and that will say more; or it hangs.
            self._wait(SUSPECT_S, lambda: self._give_life_up(f"its trainer process hangs: {reason}"))

    def _exited(self, life: Trainer, end: TrainerExit) -> None:
        if life is not self._life:
            return
        described = end.describe()
        self._logs.note(self.site, "INFO" if end.code == 0 or end.was_ended else "ERROR", described)
        if self._ended is not None:
            life.close()
            self._left.set()
            return
        if self._work is None and not life.ranks:
            self._stillborn = described
        self._bury(life, _cause(end, described), was_killed=end.signal is not None and not end.was_ended)

    def _bury(self, life: Trainer, cause: str, was_killed: bool) -> None:
        was_leaving, self._is_leaving = self._is_leaving, False
        self._life = self._patience = None
        life.close()
        work = self._work
        if work is None or work.result is not None:
            return
        if was_leaving:  # the task came when this life had done its own
            self._begin_life()
        else:
            self._try_again(cause, was_killed)

    def _try_again(self, cause: str, was_killed: bool) -> None:
        """Do the open task once more in a new life, if it is worth it; else it has failed."""
        work = self._work
        assert work is not None
        work.lives += 1
        if not was_killed or work.lives >= MAX_LIVES:
            self._fail(cause if work.lives < MAX_LIVES else f"{cause}, {work.lives} times")
            return
        self._logs.note(self.site, "WARNING", f"{cause}; it is started again for the same task")
        if not self._config.attach:
            self._begin_life()

    def _wait(self, seconds: float, act: Callable[[], None]) -> None:
        self._patience = self._clock() + seconds, act

    def _give_life_up(self, cause: str) -> None:
        """This life will not answer any more."""
        self._logs.note(self.site, "ERROR", cause)
        self._fail(cause)
        if self._life is not None and not self._config.attach:
            self._is_leaving = True
            self._life.end(HUNG_S)

    def _let_go(self, life: Trainer, reason: str, seconds: float) -> None:
        """Tell a trainer that there is nothing more for it; it has some time to leave by itself."""
        self._is_leaving = True
        life.say_end(reason)
        self._wait(seconds, lambda: life.end(HUNG_S))

    def _fail(self, reason: str) -> None:
        """Answer the open task with a reason."""
        work, self._work = self._work, None
        if work is None or self._ended is not None:
            return
        fields = {"site": self.site, "number": work.number, "error": reason, "model": b""}
        with contextlib.suppress(FlarebusError):  # the host has ended: nobody asks any more
            self._ground.cell.request(self._ground.server, "task", "result", fields)

    def _fail_stillborn(self) -> None:
        """Answer with why the trainer never came; the next task gets another try."""
        if self._work is not None:
            cause, self._stillborn = self._stillborn, ""
            self._fail(cause)

    def _end(self, reason: str) -> None:
        if self._ended is not None:
            return
        self._ended, self._work, self._patience = reason, None, None
        life = self._life
        if life is None or (not life.ranks and self._config.attach):
            self._left.set()
            return
        if self._config.attach:
            life.say_end(reason)
            self._left.set()
        elif self._is_leaving:
            self._wait(self.leave_s, lambda: life.end(HUNG_S))
        elif life.ranks:
            self._let_go(life, reason, self.leave_s)
        else:  # it has not come yet, and has nothing to finish
            life.end(HUNG_S)


def _model(body: bytes, buffers: Sequence[Buffer], *, copy: bool) -> FLModel:
    model = decode(body, buffers, copy=copy)
    if type(model) is not FLModel:
        raise FlarebusError("it is not an FLModel")
    return model


def _cause(end: TrainerExit, described: str) -> str:
    return f"{described}; it did not answer its task" if end.code == 0 else described
