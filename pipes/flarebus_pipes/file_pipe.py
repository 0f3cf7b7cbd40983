"""FilePipe: a link through a folder that both ends can see, for where no socket is allowed.

A message is a file that is written aside and renamed into place; the receiver takes it by renaming it away, and the
sender sees that it is gone. Big buffers lie in files of their own, which are mapped and not read: see `_spool`. What
lies where, and what makes it safe over a network file system, stands in `_folder`; who wakes whom in `_watch`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from flarebus.address import check_name
from flarebus.errors import ConfigError, DecodeError, UsageError
from flarebus.pipes import ExportMode, Message, Mode, Pipe
from flarebus.wire import MAX_INLINE_BYTES
from flarebus_pipes._folder import OTHER, SEQUENCE_DIGITS, Folder, is_message_name
from flarebus_pipes._inotify import file_system_of
from flarebus_pipes._owner import Owner
from flarebus_pipes._record import byte_views, pack, room_for, unpack
from flarebus_pipes._spool import Borrower, Spool
from flarebus_pipes._watch import Watch

__all__ = ["FilePipe"]

# File systems on which all that happens is heard by inotify. On others, other machines may do things.
_LOCAL = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"})
# Those that write a reserved page where it is; the others copy it, and a full disk would be a SIGBUS for the reader.
_IN_PLACE = _LOCAL - {"btrfs", "zfs"}
# A write that is told to stop does so after its next few megabytes.
_STOP_S = 10.0


class FilePipe(Pipe):
    """A pipe through a shared folder.

    Args:
        mode: ACTIVE or PASSIVE.
        root_path: the shared folder; by default `pipe` in `workspace_dir`. It is made if it is not there.
        file_check_interval: seconds between two looks at the folder where the system does not tell what happens in it
            (no inotify, or a network file system).
        site_name: the site, and
        token: the job: pipes of several of them may share a root.
        workspace_dir: the site's folder.

    Raises:
        ConfigError: an argument cannot be used; says which.
    """

    def __init__(
        self,
        mode: Mode | str,
        root_path: str = "",
        file_check_interval: float = 0.1,
        site_name: str = "",
        token: str = "",
        workspace_dir: str = "",
    ) -> None:
        super().__init__(mode)
        if not root_path and not workspace_dir:
            raise ConfigError("root_path", root_path, "the folder that both ends share, or workspace_dir")
        if not 0 < file_check_interval <= 60:
            raise ConfigError("file_check_interval", file_check_interval, "seconds, above 0 and at most 60")
        self.root_path = os.path.abspath(root_path) if root_path else ""
        self.workspace_dir = os.path.abspath(workspace_dir) if workspace_dir else ""
        self.file_check_interval = float(file_check_interval)
        self.token = check_name(token, "token") if token else ""
        self.site_name = check_name(site_name, "site_name") if site_name else ""
        self._end: _End | None = None
        self._closing: weakref.finalize[..., FilePipe] | None = None

    def open(self, name: str) -> None:
        """Take this end's place in the folder of channel `name`; sweeps up after ends that died.

        Raises:
            UsageError: it is open already, or another live process has this place; says which.
            ConfigError: `name` cannot be one of a folder.
            OSError: the folder cannot be made.
        """
        if self._end is not None and not self._end.is_closed:
            raise UsageError(f"this FilePipe is open already, on {self._end.folder.path}")
        root = Path(self.root_path or os.path.join(self.workspace_dir, "pipe"))
        names = (*(part for part in (self.token, self.site_name) if part), name)
        folder = Folder(root, names, self.mode, owns_root=not self.root_path)
        self._end = _End(folder, self.file_check_interval)
        self._closing = weakref.finalize(self, self._end.close)

    def send(self, message: Message, timeout: float | None = None) -> bool:
        """Hand a message over; see `Pipe.send`.

        Raises:
            BrokenPipeError: this end is not open, the folder is gone, or the peer is.
            UsageError: the message carries a manifest, or is too big.
            OSError: the disk is full; says how much was wanted.
        """
        return self._open_end().send(message, timeout)

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message; see `Pipe.receive`. What a peer sent before it died is received first.

        Raises:
            BrokenPipeError: this end is not open, the folder is gone, or the peer is and nothing waits.
            DecodeError: a file is no message; it was removed.
        """
        return self._open_end().receive(timeout)

    def clear(self) -> None:
        """Drop what waits to be received; to their senders these messages were read."""
        if self._end is not None:
            self._end.clear()

    def close(self) -> None:
        """Leave the folder, and take along what this end made; the last end removes the folder."""
        if self._closing is not None:
            self._closing()

    def export(self, side: ExportMode) -> tuple[str, dict[str, Any]]:
        """The class path and the arguments of this end or the other; paths are absolute."""
        arguments = {
            "mode": (self.mode if side is ExportMode.SELF else OTHER[self.mode]).value,
            "root_path": self.root_path,
            "file_check_interval": self.file_check_interval,
            "site_name": self.site_name,
            "token": self.token,
            "workspace_dir": self.workspace_dir,
        }
        return f"{type(self).__module__}.{type(self).__qualname__}", arguments

    def can_resend(self) -> bool:
        """Yes. Big buffers that are still on disk from the last time are not written again."""
        return True

    def release_send_cache(self, message: Message) -> None:
        """The files of `message` may be used for others."""
        if self._end is not None:
            self._end.spool.forget(message.msg_id)

    def get_last_peer_active_time(self) -> float:
        """When the peer sent, took or touched something, in monotonic seconds; 0.0 if it never did."""
        return self._end.watch.last_active if self._end is not None else 0.0

    def moved_bytes(self) -> int:
        """Bytes of big buffers written and mapped since `open`."""
        return self._end.moved_bytes if self._end is not None else 0

    def _open_end(self) -> _End:
        if self._end is None:
            raise BrokenPipeError("this FilePipe was never opened")
        return self._end


class _End:
    """What an open end has. It does not know its pipe, so that a pipe nobody refers to any more is closed."""

    def __init__(self, folder: Folder, interval: float) -> None:
        self.folder = folder
        self.moved_bytes = 0
        self.is_closed = False
        self._pid = os.getpid()
        self._sequence = 0
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._owner: Owner = folder.enter()
        try:
            kind = file_system_of(folder.path)
            self.watch = Watch(folder, self._owner, kind in _LOCAL, interval)
        except BaseException:
            folder.leave(self._owner)
            raise
        self.spool = Spool(folder, self._owner.nonce, kind in _LOCAL, self._on_moved)
        self._borrower = Borrower(folder, kind in _IN_PLACE, self.watch.is_peers)

    def _on_moved(self, nbytes: int) -> None:
        self.moved_bytes += nbytes
        self.watch.check()

    def send(self, message: Message, timeout: float | None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        if message.manifest is not None:
            raise UsageError("FilePipe carries no manifests: give it the buffers")
        views = byte_views(message.buffers)
        with self._writing:
            self.watch.check()
            name = self._put(message, views)
        try:
            is_read = self.watch.wait_for(lambda: self.folder.is_read(name) or None, deadline)
        except BrokenPipeError:
            if self._withdraw(name):
                raise
            self.folder.check()  # when everything is gone, nobody can know
            is_read = True
        if is_read or not self._withdraw(name):
            self.watch.note_sign_of_life()
            return True
        return False

    def _withdraw(self, name: str) -> bool:
        """Take a message back; False if the peer has it. Whoever closes this end has taken it back already."""
        with self._writing:
            if self.watch.is_over:
                self.watch.check()
            return self.folder.withdraw(name, self._owner.nonce)

    def _put(self, message: Message, views: list[memoryview]) -> str:
        is_big = room_for([view.nbytes for view in views]) > MAX_INLINE_BYTES
        file = self.spool.store(message.msg_id, views) if is_big else ""
        self._sequence += 1
        name = f"{self._sequence:0{SEQUENCE_DIGITS}d}.{message.head()}"
        self.folder.put(name, pack(message.body, views, file), self._owner.nonce)
        return name

    def receive(self, timeout: float | None) -> Message | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        message = self.watch.wait_for(self._next, deadline)
        if message is not None:
            self.watch.note_sign_of_life()
        return message

    def _next(self) -> Message | None:
        with self._reading:
            for name in self.folder.waiting():
                message = self._take(name)
                if message is not None:
                    return message
        return None

    def _take(self, name: str) -> Message | None:
        """The message in a file; None if its sender withdrew it meanwhile."""
        try:
            message = self._read(name)
        except DecodeError:
            if not self.folder.accept(name, self._owner.nonce):
                return None
            raise
        if message is None or not self.folder.accept(name, self._owner.nonce):
            return None
        self.moved_bytes += message.nbytes
        return message

    def _read(self, name: str) -> Message | None:
        if not is_message_name(name):
            raise DecodeError(f"{self.folder.inbox / name[:80]} is no message")
        data = self.folder.read(name)
        if data is None:
            return None
        record = unpack(data)
        buffers = self._borrower.borrow(record.name, record.lengths) if record.name else record.buffers
        if buffers is None:
            # Withdrawn, then it does not wait any more either; otherwise there is nothing to wait for.
            raise DecodeError(f"the buffers of {name} are not there")
        return Message.from_head(name[SEQUENCE_DIGITS + 1 :], record.body, buffers)

    def clear(self) -> None:
        with self._reading:
            for name in self.folder.waiting():
                with contextlib.suppress(DecodeError):
                    self._take(name)

    def close(self) -> None:
        # A forked process has a copy of this object, and no part in the pipe.
        if self.is_closed or os.getpid() != self._pid:
            return
        self.is_closed = True
        self.watch.stop("this FilePipe was closed")
        # Whoever is writing or reading stops now; what it made then goes too.
        quiet = [lock for lock in (self._writing, self._reading) if lock.acquire(timeout=_STOP_S)]
        try:
            self.folder.leave(self._owner)
        finally:
            for lock in quiet:
                lock.release()
