"""ExternalSite: a site of this host whose script runs in a trainer. Tasks go through it, and results, unopened.

All of its state belongs to one thread; the bus, the pipes and the process post events to it. A task is *open* from its
coming until the server has an answer, which this class owes: the trainer's result, or the reason why there is none. A
trainer that a signal killed gets a second life for the same task; a script that fails would fail again.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flarebus.cell import Payload
from flarebus.client.config import ClientConfig
from flarebus.client.ex_process.words import CANCEL, LEFT, RESULT, pack, unpack
from flarebus.delivery import Delivery
from flarebus.errors import DecodeError, FlarebusError, NoRoute, SourceLost
from flarebus.job.site_config import SiteConfig
from flarebus.message import Buffer
from flarebus.pending import Pending
from flarebus.pipes import Message, Topic
from flarebus.site.handout import HandOut
from flarebus.site.launcher import TrainerExit
from flarebus.site.output import SiteLogs
from flarebus.site.relay_filters import RelayFilters
from flarebus.site.ticket import Kept
from flarebus.site.trainer import CONFIG_FILE, Ground, Process, Trainer
from flarebus.site.upstream import Upstream
from flarebus.site.work import Work, cause_of, real_error
from flarebus.slab import SlabPool
from flarebus.workflow.filter import FilterChain

__all__ = ["ExternalSite"]

log = logging.getLogger(__name__)

# Lives of a trainer for one task: the second one only after a signal.
MAX_LIVES = 2
# How long a trainer may take to leave by itself at the end of a job that gives it no time of its own.
LEAVE_S = 10.0
# How long a process that is in the way may take after TERM.
HUNG_S = 3.0
# The same when the job was aborted and nobody wants anything of it any more.
ABORT_LEAVE_S, ABORT_HUNG_S = 0.5, 1.0
# A connection that broke is mostly that of a process that is about to end; one that still lives after this long hangs.
SUSPECT_S = 3.0


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
        self._filters = RelayFilters(site, *filters)
        self._ground = ground
        self._upstream = Upstream(ground.cell, ground.job_id, site)
        self._logs = logs
        self._run_inside = run_inside
        self._clock = clock
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._handout = HandOut(self, self._events.put, self._filters, self._upstream)
        self._pool = SlabPool()
        self._work: Work | None = None
        self._number = -1
        # One at a time: the next one begins when this one has left.
        self._life: Trainer | None = None
        self._is_leaving = False
        # When something is done about the life, and what.
        self._patience: tuple[float, Callable[[], None]] | None = None
        # Why the last life ended before it had anything to do.
        self._stillborn = ""
        self._ended: str | None = None
        self._is_over = False
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

    def cancel(self, key: tuple[str, int]) -> None:
        """The task whose ticket has `key` is not wanted any more."""
        self._events.put(lambda: self._cancelled(key))

    def end(self, reason: str, aborted: bool = False) -> None:
        """No more work: the trainer is told, and leaves; soon, if the job was aborted. Returns at once."""
        self._events.put(lambda: self._end(reason, aborted))

    def wait_ended(self, timeout: float) -> bool:
        """Wait until the trainer has left; False if the time was up first."""
        return self._left.wait(timeout)

    @property
    def leave_s(self) -> float:
        """How long the trainer may take to leave by itself."""
        return self._config.shutdown_timeout or LEAVE_S

    def line(self, stream: str, text: str) -> None:
        """See `TrainerWatcher`; on any thread."""
        self._logs.line(self.site, stream, text)

    # -- on this site's thread from here on --

    def _run(self) -> None:
        try:
            while not self._is_over:
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
            self.fail(str(error))
        except Exception as error:
            # The thread serves the site for the whole job; what went wrong is the answer to its task.
            log.exception("%s: an event of its trainer failed", self.site)
            self.fail(f"{type(error).__name__}: {error}")

    def _begin_life(self) -> None:
        if self._ended is not None or self._life is not None:
            return
        config = self._config
        try:
            life = Trainer(
                self.site,
                self._folder,
                config,
                self._client_config,
                self._ground,
                self,
                self._events.put,
                self._run_inside,
            )
            life.begin()
        except (FlarebusError, OSError) as error:
            self._stillborn = f"its trainer could not be started: {error}"
            self.note("ERROR", self._stillborn)
            self._fail_stillborn()
            return
        self._life, self._is_leaving = life, False
        if self._work is not None:
            self._work.given.clear()
        if config.attach:
            self.note("INFO", f"waiting for a trainer with {self._folder / CONFIG_FILE}")
        if self._work is not None or not config.attach:
            self._expect()

    def _expect(self) -> None:
        """The trainer is due, within limits: since it was launched, or, with attach, since there is work for it."""
        limit_s = self._config.launch_timeout
        if limit_s is not None:
            what = "no trainer was attached" if self._config.attach else "its trainer did not call flare.init()"
            self._wait(limit_s, lambda: self._give_life_up(f"{what} within {limit_s:g} s"))

    def ready(self, life: Trainer, rank: int) -> None:
        """See `TrainerWatcher`."""
        if life is not self._life:
            return
        if self._ended is not None:  # it came too late
            life.say_end(self._ended)
            return
        if rank == 0:
            self._patience = None
            life.open_others()
        if self._work is not None and self._work.result is None:
            self._handout.give(life, self._work, [rank])

    def _assigned(self, work: Work) -> None:
        if self._ended is not None or self._resumed(work):
            return
        self._close_work()
        self._work = work
        # Also where several give tasks, each with numbers of its own.
        work.number = self._number = max(self._number + 1, work.ticket.number)
        if self._stillborn:
            self._fail_stillborn()
        elif (life := self._life) is None:
            self._begin_life()
        elif self._is_leaving:  # its end begins the next life
            if self._patience is None:
                self._wait(self.leave_s, lambda: life.end(HUNG_S))
        elif life.ranks:
            self._handout.give(life, work, list(life.ranks))
        elif self._patience is None:
            self._expect()

    def _resumed(self, work: Work) -> bool:
        """Whether the answer to the open task will be that to `work`, which is the same for somebody else."""
        open_work = self._work
        if open_work is None or not work.resumes(open_work):
            return False
        open_work.ticket = work.ticket
        if open_work.unsent is not None:
            (life, body, payload), open_work.unsent = open_work.unsent, None
            self._forward(life, open_work, body, payload)
        return True

    def is_open(self, life: Trainer, work: Work) -> bool:
        """See `HandOutOwner`."""
        return life is self._life and work is self._work

    def note(self, level: str, text: str) -> None:
        """See `HandOutOwner`."""
        self._logs.note(self.site, level, text)

    def _cancelled(self, key: tuple[str, int]) -> None:
        if self._work is None or self._work.ticket.key != key:
            return
        number = self._work.number
        self._close_work()
        life = self._life
        if life is not None and life.ranks:
            for rank in list(life.ranks):
                life.send(rank, Message(CANCEL, pack(number=number)))
            self._let_go_after_one(life)

    # -- results --

    def said(self, life: Trainer, rank: int, message: Message) -> None:
        """See `TrainerWatcher`."""
        if message.topic == LEFT and rank == 0:
            life.holds = unpack(message.body, number=int)["number"]
            return
        if message.topic != RESULT or rank != 0:
            life.fail(rank, message, FlarebusError(f"topic {message.topic!r} of rank {rank} is not known"))
            return
        try:
            fields = unpack(message.body, number=int, error=(str, type(None)), model=bytes)
        except DecodeError as error:
            self._refuse_result(life, message, error)
            return
        work = self._work
        if life is not self._life or work is None or work.number != fields["number"] or self._ended is not None:
            self._answer(life, message, self._ended or "the round is closed")
            return
        if work.result is not None:
            self._answer(life, message, "this task is answered already")
            return
        if fields["error"] is not None:
            self._answer(life, message, "")
            self.fail(fields["error"])
            self._let_go_after_one(life)
            return
        work.result = message
        try:
            body = self._filters.result_body(work, fields["model"])
        except FlarebusError as error:
            self._refuse_result(life, message, error)
            return
        if body is None or work.ticket.stays:
            if body is None and message.manifest is not None:
                self.note("INFO", "a filter looks at the result: it is fetched here first")

            def pulled(arrived: Pending[Sequence[Buffer]]) -> None:
                self._events.put(lambda: self._fetched(life, work, body, fields["model"], arrived))

            life.pull(0, message).on_done(pulled)
            return
        if message.manifest is not None:
            self._forward(life, work, body, Payload(b"", None, message.manifest))
        else:
            self._forward(life, work, body, self._upstream.share_result(work, message.buffers))

    def _fetched(
        self, life: Trainer, work: Work, body: bytes | None, unfiltered: bytes, arrived: Pending[Sequence[Buffer]]
    ) -> None:
        """A result is here whole: for a filter, or to stay."""
        if work is not self._work or work.result is None:
            return
        try:
            buffers = arrived.result()
            if body is None:
                body, buffers = self._filters.filter_result(work, unfiltered, buffers)
            if work.ticket.stays:
                self._keep(life, work, body, buffers)
                return
        except SourceLost as error:
            self._not_taken(life, work, error)
            return
        except (FlarebusError, MemoryError, OSError) as error:
            self._refuse_result(life, work.result, error)
            return
        self._forward(life, work, body, self._upstream.share_result(work, buffers))

    def _keep(self, life: Trainer, work: Work, body: bytes, buffers: Sequence[Buffer]) -> None:
        """Offer a result until whoever gave the task releases it. The trainer goes on, or leaves."""
        message = work.result
        assert message is not None
        if message.manifest is None:  # they may lie in what belongs to the pipe
            buffers = Kept((work.fields["name"], work.fields["round"]), body, buffers, self._pool).buffers
        payload = self._upstream.share_result(work, buffers)
        self._upstream.send_result(work, body, payload, lambda _: None)
        self._close_work()
        self._answer(life, message, "")
        self._let_go_after_one(life)

    def _answer(self, life: Trainer, message: Message, refused: str) -> None:
        """Say what became of a result; a trainer that cannot be told would wait for it."""
        life.n_answered += 1

        def done(sent: Pending[bool]) -> None:
            error = real_error(sent)
            if error is not None:
                self._events.put(lambda: self._speechless(life, error))

        life.answer(0, message, accepted=not refused, reason=refused).on_done(done)

    @staticmethod
    def _fail_result(life: Trainer, message: Message, error: BaseException) -> None:
        life.n_answered += 1
        life.fail(0, message, error)

    def _speechless(self, life: Trainer, error: BaseException) -> None:
        if life is self._life:
            self._give_life_up(f"its trainer could not be answered: {error}")

    def _refuse_result(self, life: Trainer, message: Message, error: Exception) -> None:
        """A result that a filter failed on does not leave the site."""
        self._fail_result(life, message, error)
        self.fail(f"its result was not sent: {error}")

    def _forward(self, life: Trainer, work: Work, body: bytes, payload: Payload) -> None:
        def settled(answer: Pending[Delivery]) -> None:
            self._events.put(lambda: self._settled(life, work, body, payload, answer))

        self._upstream.send_result(work, body, payload, settled)

    def _settled(self, life: Trainer, work: Work, body: bytes, payload: Payload, answer: Pending[Delivery]) -> None:
        """Whoever steers has the result whole, or will not have it."""
        error = answer.error()
        message = work.result
        assert message is not None
        if isinstance(error, NoRoute) and work is self._work and work.ticket.readers:
            work.unsent = life, body, payload  # another site may take the round over
            return
        if isinstance(error, SourceLost) and work is self._work:
            self._not_taken(life, work, error)
            return
        if work is self._work:
            self._close_work()
        if error is not None:
            self._fail_result(life, message, error)
            return
        verdict = answer.result().plain()
        if not verdict["accepted"]:
            self.note("WARNING", f"the server did not use the result: {verdict['reason']}")
        self._answer(life, message, "" if verdict["accepted"] else verdict["reason"])
        self._let_go_after_one(life)

    def _let_go_after_one(self, life: Trainer) -> None:
        """A trainer that is launched for each task has done its own, whatever became of it."""
        if life is self._life and not self._config.launch_once and not self._config.attach:
            self._let_go(life, "this trainer was for one task")

    def _not_taken(self, life: Trainer, work: Work, error: SourceLost) -> None:
        """The result vanished with whoever held it: its task is open again."""
        message, work.result = work.result, None
        assert message is not None
        if life is self._life:
            # Alive, as far as is known here: it will hear why. If it is dead, that is seen in a moment.
            life.fail(0, message, error)
        else:
            self._try_again(f"its result was lost: {error}", was_killed=True)

    # -- the end of lives --

    def lost(self, life: Trainer, rank: int, topic: str, reason: str) -> None:
        """See `TrainerWatcher`."""
        if life is not self._life:
            return
        if self._ended is not None:
            if self._config.attach and rank == 0:
                self._finish()
        elif not life.ranks:
            self._reopen(life)
        elif topic != Topic.PEER_GONE:
            if rank == 0:
                self._left_early(life)
        elif self._config.attach:
            # There is no process to look at: whoever started it may start another one.
            self._bury(life, f"its trainer is gone: {reason}", was_killed=True)
            self._begin_life()
        elif not self._is_leaving:
            life.lost = reason
            # Its process ends, and that will say more; or it hangs.
            self._wait(SUSPECT_S, lambda: self._give_life_up(f"its trainer process hangs: {reason}"))

    def _reopen(self, life: Trainer) -> None:
        """Whoever came first was not welcome, and has left: the right one may still come."""
        try:
            life.reopen()
        except (FlarebusError, OSError) as error:
            self._give_life_up(f"its pipe cannot be opened again: {error}")

    def _left_early(self, life: Trainer) -> None:
        """The script said goodbye while the job goes on."""
        said = "its trainer left without answering its task"
        if self._config.attach:
            self._bury(life, said, was_killed=False)
            self._begin_life()
        elif self._work is not None and self._work.result is None and life.took(self._work.number):
            # Mostly its process ends now, and that will say more.
            self._wait(self.leave_s, lambda: self._give_life_up(f"{said}, and its process does not end"))
        else:
            # It may do what it likes until there is work for another one.
            self._is_leaving, self._patience = True, None
            if self._work is not None:
                self._wait(self.leave_s, lambda: life.end(HUNG_S))

    def exited(self, life: Trainer, end: TrainerExit) -> None:
        """See `TrainerWatcher`."""
        if life is not self._life:
            return
        described = end.describe()
        self.note("INFO" if end.code == 0 or end.was_ended else "ERROR", described)
        if self._ended is not None:
            self._finish()
            return
        was_killed = (end.signal is not None or end.guardian_end is not None) and not end.was_ended
        if self._work is None and not (life.has_come or was_killed or end.was_ended):
            self._stillborn = described
        self._bury(life, cause_of(end, described, life.lost), was_killed)

    def _bury(self, life: Trainer, cause: str, was_killed: bool) -> None:
        was_leaving, self._is_leaving = self._is_leaving, False
        self._life = self._patience = None
        life.close()
        work = self._work
        if work is None or work.result is not None:
            return
        if was_leaving:  # the task came when this life was done
            self._begin_life()
        elif not (was_killed or work.spared or life.took(work.number)):
            work.spared = True
            if life.lost:
                self.note("WARNING", f"{cause}; it is started again for the same task")
            self._begin_life()
        else:
            self._try_again(cause, was_killed)

    def _try_again(self, cause: str, was_killed: bool) -> None:
        """Do the open task once more in a new life, if it is worth it; else it has failed."""
        work = self._work
        assert work is not None
        work.lives += 1
        if not was_killed or work.lives >= MAX_LIVES:
            self.fail(cause if work.lives < MAX_LIVES else f"{cause}, {work.lives} times")
            return
        self.note("WARNING", f"{cause}; it is started again for the same task")
        if not self._config.attach:
            self._begin_life()

    def _wait(self, seconds: float, act: Callable[[], None]) -> None:
        self._patience = self._clock() + seconds, act

    def _give_life_up(self, cause: str) -> None:
        """This life will not answer any more."""
        self.note("ERROR", cause)
        life = self._life
        if life is not None and not self._config.attach:
            if self._work is None and not life.has_come:
                self._stillborn = cause
            self._is_leaving = True
            life.end(HUNG_S)
        self.fail(cause)

    def _let_go(self, life: Trainer, reason: str) -> None:
        """Tell a trainer that there is nothing more for it; it has some time to leave by itself."""
        self._is_leaving = True
        life.say_end(reason)
        self._wait(self.leave_s, lambda: life.end(HUNG_S))

    def fail(self, reason: str) -> None:
        """Answer the open task with a reason."""
        work = self._close_work()
        if work is None or self._ended is not None:
            return
        self.note("ERROR", f"the task of round {work.fields['round']} failed: {reason}")
        self._upstream.send_failure(work, reason)

    def _close_work(self) -> Work | None:
        """The task that was open, and is not any more."""
        work, self._work = self._work, None
        if work is not None:
            self._upstream.withdraw_task(work)
        return work

    def _fail_stillborn(self) -> None:
        """Answer with why the trainer never came; the next task gets another try."""
        if self._work is not None:
            cause, self._stillborn = self._stillborn, ""
            self.fail(cause)

    def _end(self, reason: str, aborted: bool) -> None:
        if self._ended is not None:
            return
        self._close_work()
        self._ended, self._patience = reason, None
        life = self._life
        if life is None:
            self._finish()
        elif self._config.attach:
            life.say_end(reason, aborted)
            if aborted or not life.ranks:
                self._finish()
            else:  # its last metrics may be on their way
                self._wait(self.leave_s, self._finish)
        elif aborted:
            life.say_end(reason, aborted)
            self._wait(ABORT_LEAVE_S, lambda: life.end(ABORT_HUNG_S))
        elif self._is_leaving:
            self._wait(self.leave_s, lambda: life.end(HUNG_S))
        elif life.has_come:
            self._let_go(life, reason)
        else:  # it has not come yet, and has nothing to finish
            life.end(HUNG_S)

    def _finish(self) -> None:
        self._is_over = True
