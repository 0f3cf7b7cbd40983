"""Key files: who may read them, what is refused, and that a secret shows nowhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import zmq

from flarebus.errors import ConfigError
from flarebus.security.keys import DialKeys, KeyPair, ListenKeys, read_key


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The keys of a router that admits `site-1`, whose own are in `site-1` beside it."""
    KeyPair.generate().save(tmp_path / "router", "router")
    ListenKeys.hand_out(tmp_path / "router", "site-1", tmp_path / "site-1")
    return tmp_path


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_secrets_are_for_their_owner(tmp_path: Path, umask: int) -> None:
    """Whatever the umask, nobody else can read a secret key or look into a folder that was made for it."""
    before = os.umask(umask)
    try:
        KeyPair.generate().save(tmp_path / "keys", "router")
        ListenKeys.hand_out(tmp_path / "keys", "site-1", tmp_path / "site-1")
    finally:
        os.umask(before)

    for path in (tmp_path / "keys" / "router.key", tmp_path / "site-1" / "cell.key"):
        assert mode(path) == 0o600
        assert mode(path.parent) == 0o700
    assert mode(tmp_path / "keys" / "router.pub") == 0o644 & ~umask


def test_a_pair_comes_back(tmp_path: Path) -> None:
    """What was saved is what is loaded, and two pairs are never the same."""
    pair = KeyPair.generate()
    pair.save(tmp_path, "x")

    assert KeyPair.load(tmp_path, "x") == pair
    assert zmq.curve_public(pair.secret) == pair.public
    assert KeyPair.generate() != KeyPair.generate()


@pytest.mark.parametrize("there", ["x.key", "x.pub"])
def test_keys_are_never_overwritten(tmp_path: Path, there: str) -> None:
    """Where one file of a pair exists, nothing is written."""
    (tmp_path / there).write_text("precious")

    with pytest.raises(FileExistsError) as error:
        KeyPair.generate().save(tmp_path, "x")

    assert str(error.value.filename).endswith(there)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_a_key_is_written_through_no_link(tmp_path: Path) -> None:
    """A link in the place of a key file is not followed, wherever it leads."""
    (tmp_path / "x.key").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(OSError, match=r"exists|links"):
        KeyPair.generate().save(tmp_path, "x")

    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_a_secret_that_others_can_read_is_refused(folder: Path, bits: int) -> None:
    """Looser than its owner only is an error that says what to do."""
    (folder / "router" / "router.key").chmod(bits)

    with pytest.raises(ConfigError, match="chmod 600"):
        ListenKeys.load(folder / "router")


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 41, b"\xff" * 40, b"a" * 39 + b" ", b'"' * 40])
def test_what_is_no_key_is_refused_unseen(tmp_path: Path, content: bytes) -> None:
    """The error names the file and never shows what is in it."""
    path = tmp_path / "x.pub"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=r"x\.pub.*does not hold a CURVE key") as error:
        read_key(path)

    assert len(content) < 6 or content.decode("latin-1") not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A key that is not there is an error of the parameter, not a traceback."""
    with pytest.raises(ConfigError, match=r"router\.key.*No such file"):
        ListenKeys.load(tmp_path)


def test_a_router_needs_somebody_to_admit(tmp_path: Path) -> None:
    """Keys of a router that admits nobody are refused: it could only turn everybody away."""
    KeyPair.generate().save(tmp_path, "router")

    with pytest.raises(ConfigError, match="nobody is admitted"):
        ListenKeys.load(tmp_path)


def test_handed_out_keys_fit(folder: Path) -> None:
    """What is handed out is admitted, leads to the right router, and is of no use to pose as it."""
    listen, dial = ListenKeys.load(folder / "router"), DialKeys.load(folder / "site-1")

    assert listen.admitted == {dial.own.public}
    assert dial.server == listen.own.public
    assert sorted(path.name for path in (folder / "site-1").iterdir()) == ["cell.key", "cell.pub", "router.pub"]
    assert [path.name for path in (folder / "router" / "admitted").iterdir()] == ["site-1.pub"]


def test_nobody_is_admitted_twice(folder: Path) -> None:
    """A second pair for a name, or into a folder that holds one, is refused."""
    with pytest.raises(FileExistsError):
        ListenKeys.hand_out(folder / "router", "site-1", folder / "again")
    with pytest.raises(FileExistsError):
        ListenKeys.hand_out(folder / "router", "site-2", folder / "site-1")
    assert not (folder / "again").exists()


@pytest.mark.parametrize("name", ["", "..", "../site-9", "a/b", "a b", "x" * 64, "-rf"])
def test_a_name_is_a_name(folder: Path, name: str) -> None:
    """A name that could lead to another file is refused before anything is written."""
    with pytest.raises(ConfigError, match="name"):
        ListenKeys.hand_out(folder / "router", name, folder / "out")
    assert not (folder / "out").exists()


def test_only_a_router_hands_out(tmp_path: Path) -> None:
    """A folder without a router's keys admits nobody."""
    with pytest.raises(ConfigError, match=r"router\.key"):
        ListenKeys.hand_out(tmp_path, "site-1", tmp_path / "out")


def test_a_secret_shows_nowhere(folder: Path) -> None:
    """No representation of keys holds a secret."""
    listen, dial = ListenKeys.load(folder / "router"), DialKeys.load(folder / "site-1")
    secrets = [listen.own.secret.decode(), dial.own.secret.decode()]

    for shown in (repr(listen), str(listen), repr(dial), f"{dial.own}", f"{listen.own!r}"):
        assert not any(secret in shown for secret in secrets)
        assert listen.own.public.decode() in shown or dial.own.public.decode() in shown
