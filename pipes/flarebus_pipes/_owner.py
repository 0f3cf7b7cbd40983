"""Owners: which process holds an end of a pipe, and whether it still lives, as a file that says so.

On one machine the process table decides, at once. Across machines the file's own clock does: the owner touches its
record again and again, and whoever doubts it compares the record's age with a file made on the same file system just
now. The clocks of two machines are never compared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from flarebus.errors import UsageError

__all__ = ["BEAT_S", "SILENCE_S", "Owner", "age_of", "claim", "is_dead", "is_surely_dead", "locked", "read_owner"]

BEAT_S = 2.0
"""How often an owner touches its record: seldom enough for a file server with a thousand of them."""
SILENCE_S = 30.0
"""A record that nobody touched for so long, on a machine one cannot look into, has no owner any more."""
_MAX_RECORD_BYTES = 4096
# Whoever holds the lock has a few files to remove.
_LOCK_S = 5.0


@dataclass(frozen=True, slots=True)
class Owner:
    """One process that holds one end."""

    host: str
    machine: str
    """What can see each other's processes: this boot of the machine, and the pid namespace."""
    pid: int
    started: int
    """When the process started, in ticks since boot; 0 where that is not known. Pids are used again."""
    nonce: str
    """16 hexadecimal digits: this opening of the end, and no other by the same process."""

    @classmethod
    def here(cls) -> Owner:
        """This process, with a new nonce."""
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _started(pid) or 0, secrets.token_hex(8))

    @property
    def is_local(self) -> bool:
        """Whether this process can see that one."""
        return self.machine == _machine()

    @property
    def is_running(self) -> bool:
        """Whether the process lives; asked only of local ones. A zombie does not."""
        started = _started(self.pid)
        if started is None:
            return False
        return not self.started or not started or started == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _machine() -> str:
    """A name for what shares this process table."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> int | None:
    """When a process started, 0 if that cannot be known, None if there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        if os.path.exists("/proc/self/stat"):
            return None
    else:
        # After the name, which may hold blanks and brackets: state is the first field, the start the twentieth.
        fields = status.rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0


def read_owner(path: Path) -> Owner | None:
    """Who is written there; None if nobody, or if it cannot be read."""
    try:
        # Opened, not only looked at: a network file system then asks its server.
        with open(path, "rb") as file:
            fields = json.loads(file.read(_MAX_RECORD_BYTES))
        owner = Owner(**fields)
    except (OSError, ValueError, TypeError):
        return None
    strings = (owner.host, owner.machine, owner.nonce)
    if not all(isinstance(each, str) for each in strings) or not isinstance(owner.pid, int) or owner.pid <= 0:
        return None
    return owner


def age_of(path: Path) -> float | None:
    """Seconds since the record was touched, by the clock of its file system; None if it is not there."""
    probe = path.with_name(f"{path.name}.now-{secrets.token_hex(4)}")
    try:
        with open(path, "rb") as file:
            touched = os.fstat(file.fileno()).st_mtime
        with open(probe, "xb") as file:
            now = os.fstat(file.fileno()).st_mtime
    except OSError:
        return None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return now - touched


def is_dead(path: Path, age: Callable[[Path], float | None] = age_of) -> bool:
    """Whether there is a record and its owner is no more; it costs a file where the owner is elsewhere."""
    owner = read_owner(path)
    if owner is not None and owner.is_local:
        return not owner.is_running
    # A record that cannot be read may be half written: it gets the same time.
    seconds = age(path)
    return seconds is not None and seconds > SILENCE_S


def claim(path: Path, end: str, age: Callable[[Path], float | None] = age_of) -> Owner:
    """Write this process down as the owner; takes over what a dead one left.

    Args:
        path: of the record.
        end: what is claimed, for the error.
        age: how old a record is; see `age_of`.

    Raises:
        UsageError: a live process has it; says which.
        OSError: the record cannot be written.
    """
    if is_dead(path, age):
        path.unlink(missing_ok=True)
    owner = Owner.here()
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        first = read_owner(path)
        raise UsageError(f"{end} is open already: {first or 'a process that is just starting'} has it") from None
    try:
        os.write(handle, json.dumps(asdict(owner)).encode())
    finally:
        os.close(handle)
    return owner


def is_surely_dead(record: Path) -> bool:
    """Whether nobody holds an end; a live one on another machine is not asked each time."""
    owner = read_owner(record)
    if owner is None or not owner.is_local:
        try:
            # Roughly, by two clocks: whoever passes is looked at properly.
            if time.time() - record.stat().st_mtime < 2 * SILENCE_S:
                return False
        except FileNotFoundError:
            return True
    return is_dead(record)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone with a folder, as far as its file system can do that.

    Raises:
        FileNotFoundError: it was removed, by whoever had the lock before.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        give_up = time.monotonic() + _LOCK_S
        while time.monotonic() < give_up:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
        if not os.path.samestat(os.fstat(handle), path.stat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        yield
    finally:
        os.close(handle)
