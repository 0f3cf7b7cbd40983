"""Watch: the thread of an open `FilePipe` that wakes whoever waits, keeps its record alive and looks after the peer.

The kernel says what happens in the folder, and when the peer's process ends. What another machine does it does not
say: there, and where there is no inotify, the watch wakes everybody at an interval to look for themselves. Those who
wait take every waking as a reason to look, never as news.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from flarebus_pipes._folder import Folder
from flarebus_pipes._inotify import IN_ARRIVED, IN_LEFT, IN_MADE, Inotify
from flarebus_pipes._owner import BEAT_S, SILENCE_S, Owner, read_owner

__all__ = ["Watch"]

T = TypeVar("T")

# How often the records are read where nothing tells that they changed.
_RECORDS_S = 1.0
# A thread that is told to end does so at once, unless the file system hangs.
_END_S = 5.0


class Watch:
    """Made and started by an end that has its place.

    Args:
        folder: to be watched.
        owner: this end.
        hears_all: whether inotify hears of all that happens there; otherwise everybody is woken at the interval.
        interval: seconds.
    """

    def __init__(self, folder: Folder, owner: Owner, hears_all: bool, interval: float) -> None:
        self.last_active = 0.0
        """When the peer gave a sign of life, in monotonic seconds; 0.0 if it never did."""
        self._folder = folder
        self._owner = owner
        self._changed = threading.Condition()
        self._changes = 0
        self._end = ""
        """Why there will be nothing more, ever."""
        self._lost = ""
        """Why there will be nothing more from the peer that was there."""
        self._peer: Owner | None = None
        self._peer_touched = 0.0
        self._peer_silent_since = 0.0
        self._peer_process: int | None = None
        self._inotify = Inotify.start()
        self._records_number = -1
        self._beat_at = time.monotonic() + BEAT_S
        self._records_at = 0.0
        folder.revive()
        heard = self._add_watches()
        self._interval = _RECORDS_S if hears_all and heard else min(interval, _RECORDS_S)
        self._woken, self._wake = socket.socketpair()
        for each in (self._woken, self._wake):
            each.setblocking(False)
        self._look_at_records()
        self._thread = threading.Thread(target=self._run, name=f"flarebus-pipe-{folder.path.name}", daemon=True)
        self._thread.start()

    # -- for whoever waits --

    def wait_for(self, look: Callable[[], T | None], deadline: float | None) -> T | None:
        """What `look` finds, once it finds something; None at the deadline (monotonic seconds).

        Raises:
            BrokenPipeError: this end was closed, its folder is gone, or the peer is.
        """
        while True:
            before = self._changes
            if self._end:
                raise BrokenPipeError(self._end)
            lost = self._lost
            try:
                found = look()
            except BrokenPipeError as error:
                if self._end:  # closed meanwhile: that is why
                    raise BrokenPipeError(self._end) from error
                raise
            if found is not None:
                return found
            if lost:
                raise BrokenPipeError(lost)
            with self._changed:
                while self._changes == before:
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        return None
                    self._changed.wait(left)

    def check(self) -> None:
        """Raise BrokenPipeError if there will be nothing more."""
        if self._end or self._lost:
            raise BrokenPipeError(self._end or self._lost)

    @property
    def is_over(self) -> bool:
        """Whether this end was closed, or lost its folder."""
        return bool(self._end)

    def is_peers(self, nonce: str) -> bool:
        """Whether the peer that is there has this nonce. From any thread, and in the garbage collector."""
        peer = self._peer
        return not self._end and not self._lost and peer is not None and peer.nonce == nonce

    def note_sign_of_life(self) -> None:
        """The peer has just sent or taken something."""
        self.last_active = time.monotonic()

    def stop(self, why: str) -> None:
        """End all waiting, and the thread."""
        self._finish(why)
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")
        if threading.current_thread() is not self._thread:
            self._thread.join(_END_S)

    # -- the thread --

    def _run(self) -> None:
        try:
            while not self._end:
                self._turn()
        except OSError as error:
            self._finish(f"the folder {self._folder.path} cannot be watched: {error}")
        finally:
            self._finish("the thread of this pipe has failed")  # unless it has another reason
            for each in (self._woken, self._wake):
                each.close()
            if self._inotify is not None:
                self._inotify.close()
            self._follow(None)

    def _turn(self) -> None:
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        if self._inotify is not None:
            poll.register(self._inotify, select.POLLIN)
        if self._peer_process is not None:
            poll.register(self._peer_process, select.POLLIN)
        ready = {handle for handle, _ in poll.poll(self._interval * 1000)}
        if self._end:
            return
        now = time.monotonic()
        heard = self._inotify.read() if self._inotify is not None else set()
        if self._records_number in heard or self._peer_process in ready or now >= self._records_at:
            self._look_at_records()
        if now >= self._beat_at:
            self._beat_at = now + BEAT_S
            with contextlib.suppress(OSError):
                os.utime(self._folder.record)
        self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changes += 1
            self._changed.notify_all()

    def _finish(self, why: str) -> None:
        self._end = self._end or why
        self._notify()

    def _add_watches(self) -> bool:
        if self._inotify is None:
            return False
        folder = self._folder
        self._records_number = self._inotify.watch(folder.path, IN_MADE | IN_LEFT)
        numbers = (self._inotify.watch(folder.inbox, IN_ARRIVED), self._inotify.watch(folder.outbox, IN_LEFT))
        return min(self._records_number, *numbers) >= 0

    def _look_at_records(self) -> None:
        """Who holds the two ends, as their records say."""
        self._records_at = time.monotonic() + _RECORDS_S
        mine = read_owner(self._folder.record)
        if mine is None and not self._folder.record.exists():
            self._finish(f"the folder {self._folder.path} of this pipe is gone")
        elif mine is not None and mine.nonce != self._owner.nonce:
            self._finish(f"{mine} has taken over this end of {self._folder.path}")
        else:
            self._add_watches()  # a subfolder may be a new one
            self._look_at_peer()

    def _look_at_peer(self) -> None:
        now = time.monotonic()
        peer = read_owner(self._folder.peer_record)
        if peer is None:
            if self._peer is not None and not self._folder.peer_record.exists():
                self._lose(f"the other end of {self._folder.path} was closed by {self._peer}")
            return
        touched = _touched(self._folder.peer_record)
        if self._peer is None or peer.nonce != self._peer.nonce:
            if peer.is_local and not peer.is_running:
                return  # left behind by somebody who was never here in our time
            self._follow(peer)
            self._lost = ""
            self._peer_touched = 0.0
        if touched != self._peer_touched:
            self._peer_touched, self._peer_silent_since, self.last_active = touched, now, now
        if peer.is_local:
            if not peer.is_running:
                self._lose(f"the other end of {self._folder.path} is gone: {peer} has ended")
        elif now - self._peer_silent_since > SILENCE_S:
            self._lose(f"the other end of {self._folder.path} is silent: {peer}")
        else:
            self._lost = ""

    def _lose(self, why: str) -> None:
        self._lost = why
        self._drop_process()

    def _follow(self, peer: Owner | None) -> None:
        """Have the kernel tell when the peer's process ends, where it can."""
        self._drop_process()
        self._peer = peer
        if peer is not None and peer.is_local and hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self._peer_process = os.pidfd_open(peer.pid)
                if not peer.is_running:  # so the number is somebody else's by now
                    self._drop_process()

    def _drop_process(self) -> None:
        handle, self._peer_process = self._peer_process, None
        if handle is not None:
            os.close(handle)


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
