"""CURVE keys: pairs, and files of them that only their owner can read.

A key is 40 characters of Z85 text, as ZeroMQ prints it. A secret never appears in a `repr`, an argument list or a log.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from flarebus.errors import ConfigError

__all__ = ["DialKeys", "KeyPair", "ListenKeys"]

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
            FileExistsError: a key of that name is there; it is never overwritten.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for suffix, key, mode in ((".key", self.secret, 0o600), (".pub", self.public, 0o644)):
            handle = os.open(folder / (name + suffix), os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(handle, "wb") as file:
                file.write(key + b"\n")

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
