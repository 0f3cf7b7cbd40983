"""ShmPipe: a link between two processes of one user on one machine, through shared memory.

Small things go over a Unix socket in a private folder. Big buffers lie in shared memory without a name, which is
handed over that socket and used again from message to message: see `_segments`. So whatever dies, nothing of it is
left. Who reads and writes the socket stands in `_shm_link`, what goes over it in `_frames`.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flarebus.address import check_name
from flarebus.errors import UsageError
from flarebus.pipes import ExportMode, Message, Mode, Pipe
from flarebus.wire import MAX_INLINE_BYTES
from flarebus_pipes._record import byte_views, pack, room_for
from flarebus_pipes._segments import SegmentPool
from flarebus_pipes._shm_link import ShmLink
from flarebus_pipes._socket_place import SocketPlace, short_root

__all__ = ["ShmPipe"]

_OTHER = {Mode.ACTIVE: Mode.PASSIVE, Mode.PASSIVE: Mode.ACTIVE}
# A copy that is told to stop does so after its next few megabytes.
_STOP_S = 10.0


class ShmPipe(Pipe):
    """A pipe through shared memory; both ends are processes of one user on one machine.

    Args:
        mode: ACTIVE or PASSIVE.
        root_path: a folder for sockets, with a short path; by default the user's folder for such things, or the
            system's for temporary files. Both ends have to have the same.
        site_name: the site,
        token: the job, and
        workspace_dir: the site's folder: ends with the same three belong together.

    Raises:
        ConfigError: an argument cannot be used; says which.
    """

    def __init__(
        self,
        mode: Mode | str,
        root_path: str = "",
        site_name: str = "",
        token: str = "",
        workspace_dir: str = "",
    ) -> None:
        super().__init__(mode)
        self.root_path = short_root(root_path)
        self.workspace_dir = os.path.abspath(workspace_dir) if workspace_dir else ""
        self.token = check_name(token, "token") if token else ""
        self.site_name = check_name(site_name, "site_name") if site_name else ""
        self._end: _End | None = None
        self._closing: weakref.finalize[..., ShmPipe] | None = None

    def open(self, name: str) -> None:
        """Take this end's place on channel `name`; sweeps up after ends that died.

        Raises:
            UsageError: it is open already, or another live process has this place; says which.
            ConfigError: `name` is not the name of a channel.
            OSError: there can be no socket.
        """
        if self._end is not None and not self._end.is_closed:
            raise UsageError(f"this ShmPipe is open already, on channel {self._end.place.name!r}")
        identity = (self.workspace_dir, self.token, self.site_name)
        self._end = _End(SocketPlace(Path(self.root_path), identity, name, self.mode))
        self._closing = weakref.finalize(self, self._end.close)

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Hand a message over; see `Pipe.send`. Waits for the other end if it is not there yet.

        Raises:
            BrokenPipeError: this end is not open, or the peer is gone.
            UsageError: the message carries a manifest, or is too big.
            OSError: there is not enough memory; says how much was wanted.
        """
        return self._open_end().send(message, timeout)

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message; see `Pipe.receive`. What a peer sent before it died is received first.

        Raises:
            BrokenPipeError: this end is not open, or the peer is gone and nothing waits.
            DecodeError: what came is no message.
        """
        end = self._open_end()
        message = end.link.receive(None if timeout is None else time.monotonic() + timeout)
        if message is not None:
            end.moved_bytes += message.nbytes
        return message

    def deliver(self, to: Callable[[Message], None]) -> bool:
        """Give messages to `to` on the pipe's own thread."""
        end = self._open_end()

        def pass_on(message: Message) -> None:
            end.moved_bytes += message.nbytes
            to(message)

        end.link.deliver(pass_on)
        return True

    def clear(self) -> None:
        """Drop what waits to be received; to their senders these messages were read."""
        if self._end is not None:
            self._end.link.clear()

    def close(self) -> None:
        """Leave; buffers that were received stay valid until they are dropped."""
        if self._closing is not None:
            self._closing()

    def export(self, side: ExportMode) -> tuple[str, dict[str, Any]]:
        """The class path and the arguments of this end or the other; paths are absolute."""
        arguments = {
            "mode": (self.mode if side is ExportMode.SELF else _OTHER[self.mode]).value,
            "root_path": self.root_path,
            "site_name": self.site_name,
            "token": self.token,
            "workspace_dir": self.workspace_dir,
        }
        return f"{type(self).__module__}.{type(self).__qualname__}", arguments

    def can_resend(self) -> bool:
        """Yes. Big buffers that are still in their segment from the last time are not copied again."""
        return True

    def release_send_cache(self, message: Message) -> None:
        """The segment of `message` may be used for others."""
        if self._end is not None:
            self._end.pool.forget(message.msg_id)

    def get_last_peer_active_time(self) -> float:
        """When something last came from the peer, in monotonic seconds; 0.0 if nothing did."""
        return self._end.link.last_active if self._end is not None else 0.0

    def moved_bytes(self) -> int:
        """Bytes of big buffers copied into segments, and of messages received, since `open`."""
        return self._end.moved_bytes if self._end is not None else 0

    def _open_end(self) -> _End:
        if self._end is None:
            raise BrokenPipeError("this ShmPipe was never opened")
        return self._end


class _End:
    """What an open end has. It does not know its pipe, so that a pipe nobody refers to any more is closed."""

    def __init__(self, place: SocketPlace) -> None:
        self.place = place
        self.moved_bytes = 0
        self.is_closed = False
        self._pid = os.getpid()
        self._writing = threading.Lock()
        self._owner = place.enter()
        self.pool = SegmentPool(self._on_moved, self._on_dropped)
        try:
            self.link = ShmLink(place, self.pool)
        except BaseException:
            place.leave(self._owner)
            raise

    def _on_moved(self, nbytes: int) -> None:
        self.moved_bytes += nbytes
        self.link.check()

    def _on_dropped(self, number: int) -> None:
        self.link.discard(number)

    def send(self, message: Message, timeout: float | None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        if message.manifest is not None:
            raise UsageError("ShmPipe carries no manifests: give it the buffers")
        views = byte_views(message.buffers)
        number = 0
        if room_for([view.nbytes for view in views]) > MAX_INLINE_BYTES:
            with self._writing:
                self.link.check()
                number = self.pool.store(message.msg_id, views).number
        try:
            record = pack(message.body, views, str(number) if number else "")
            return self.link.send(message.head(), record, number, deadline)
        except (BrokenPipeError, UsageError):
            self.pool.take_back(number)  # if it is still here
            raise

    def close(self) -> None:
        # A forked process has a copy of this object, and no part in the pipe.
        if self.is_closed or os.getpid() != self._pid:
            return
        self.is_closed = True
        self.link.stop("this ShmPipe was closed")
        is_quiet = self._writing.acquire(timeout=_STOP_S)
        try:
            self.pool.close()
            self.place.leave(self._owner)
        finally:
            if is_quiet:
                self._writing.release()
