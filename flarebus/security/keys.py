"""CURVE keys: pairs, and files of them that only their owner can read.

A key is 40 characters of Z85 text, as ZeroMQ prints it. A secret never appears in a `repr`, an argument list or a log.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from flarebus.address import check_name
from flarebus.errors import ConfigError

__all__ = ["DialKeys", "KeyPair", "ListenKeys", "read_key"]

_Z85 = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


@dataclass(frozen=True)
class KeyPair:
    """One CURVE key pair."""

    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> KeyPair:
        """A fresh pair."""
        return cls(*zmq.curve_keypair())

    def save(self, folder: Path, name: str) -> None:
        """Write `<name>.pub` (0644) and `<name>.key` (0600) in `folder` (made 0700 if new).

        Raises:
            FileExistsError: a key of that name is there; nothing was written.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (folder / f"{name}.pub").exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder / f"{name}.pub"))
        _write_key(folder / f"{name}.key", self.secret, 0o600)
        _write_key(folder / f"{name}.pub", self.public, 0o644)

    @classmethod
    def load(cls, folder: Path, name: str) -> KeyPair:
        """Read what `save` wrote.

        Raises:
            ConfigError: a file is missing, is no key, or others may read the secret.
        """
        secret_file = folder / f"{name}.key"
        secret = read_key(secret_file)
        if stat.S_IMODE(secret_file.stat().st_mode) & 0o077:
            raise ConfigError("keys", str(secret_file), "others can read this secret key; chmod 600 it")
        return cls(zmq.curve_public(secret), secret)


def _write_key(path: Path, key: bytes, mode: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(key + b"\n")


def read_key(path: Path) -> bytes:
    """One key from a file.

    Raises:
        ConfigError: the file is missing or holds no key. The content is never shown.
    """
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError("keys", str(path), f"cannot be read: {error.strerror}") from error
    if not _Z85.fullmatch(key):
        raise ConfigError("keys", str(path), "does not hold a CURVE key (40 characters of Z85)")
    return key


@dataclass(frozen=True)
class DialKeys:
    """What a dialling end needs: its own pair and the key of the router it means to reach."""

    own: KeyPair
    server: bytes

    @classmethod
    def load(cls, folder: Path) -> DialKeys:
        """`cell.key` and `cell.pub`, this end's own, and `router.pub`: what `ListenKeys.hand_out` made.

        Raises:
            ConfigError: something is missing or no key, or others may read the secret.
        """
        return cls(KeyPair.load(folder, "cell"), read_key(folder / "router.pub"))


@dataclass(frozen=True)
class ListenKeys:
    """What a listening end needs: its own pair, and the public keys that may come in."""

    own: KeyPair
    admitted: frozenset[bytes]

    @classmethod
    def load(cls, folder: Path) -> ListenKeys:
        """`router.key` and `router.pub`, and every `*.pub` in the folder `admitted` beside them.

        Raises:
            ConfigError: something is missing or no key, or nobody is admitted.
        """
        own = KeyPair.load(folder, "router")
        admitted = frozenset(read_key(path) for path in sorted((folder / "admitted").glob("*.pub")))
        if not admitted:
            raise ConfigError("keys", str(folder), "nobody is admitted: put public keys into its folder 'admitted'")
        return cls(own, admitted)

    @staticmethod
    def hand_out(folder: Path, name: str, target: Path) -> None:
        """Make a pair, admit it to the router whose keys lie in `folder`, and put what its owner needs into `target`.

        Args:
            name: whom it is for; only the name of a file.
            target: a new folder, to be carried to the owner on a way that nobody else can read.

        Raises:
            ConfigError: `folder` holds no keys of a router, or `name` may not be the name of a file.
            FileExistsError: somebody of that name is admitted already, or `target` holds keys.
        """
        router = KeyPair.load(folder, "router")
        admitted = folder / "admitted" / f"{check_name(name)}.pub"
        pair = KeyPair.generate()
        admitted.parent.mkdir(mode=0o700, exist_ok=True)
        _write_key(admitted, pair.public, 0o644)
        pair.save(target, "cell")
        _write_key(target / "router.pub", router.public, 0o644)
