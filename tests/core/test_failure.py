"""Failures: an exception crosses the wire as words, and comes back as one of a closed set of kinds."""

from __future__ import annotations

import subprocess
import sys

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flarebus import errors
from flarebus.errors import (
    DeadlineExceeded,
    DecodeError,
    FlarebusError,
    JobAborted,
    NoRoute,
    RemoteError,
    SourceLost,
    UpdateRefused,
)
from flarebus.failure import MAX_TEXT, decode_failure, encode_failure
from tests.core.halves import thorough

texts = st.text(max_size=80)


def crossed(error: BaseException) -> FlarebusError:
    """What `error`, raised at site-1, is at the other end."""
    return decode_failure(encode_failure(error), "site-1")


@given(texts, texts)
@thorough(60)
def test_kinds_that_mean_something_survive(name: str, text: str) -> None:
    """Nobody there, source lost and too late come back as what they were, with their fields."""
    no_route, lost, late = (
        crossed(NoRoute(name, text)),
        crossed(SourceLost(name, text)),
        crossed(DeadlineExceeded(text)),
    )

    assert type(no_route) is NoRoute
    assert (no_route.target, no_route.reason) == (name, text)
    assert type(lost) is SourceLost
    assert (lost.holder, lost.reason) == (name, text)
    assert type(late) is DeadlineExceeded
    assert str(late) == f"site-1: {text}"


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("wrong"), "ValueError", "wrong"),
        (KeyError("key"), "KeyError", "'key'"),
        (MemoryError(), "MemoryError", ""),
        (SystemExit(3), "SystemExit", "3"),
        (UpdateRefused("NaN", "w", "site-1"), "UpdateRefused", "site-1: 'w': NaN"),
        (JobAborted("somebody"), "JobAborted", "aborted by somebody"),
        (DecodeError("no"), "DecodeError", "no"),
    ],
)
def test_everything_else_is_a_remote_error(error: BaseException, kind: str, text: str) -> None:
    """Whatever a handler raised is named, with its text and whose handler it was, and blames nobody here."""
    found = crossed(error)

    assert type(found) is RemoteError
    assert (found.address, found.kind, found.text, found.details) == ("site-1", kind, text, "")


def test_a_remote_error_is_passed_on() -> None:
    """One that was relayed keeps its kind and text, and says who relayed it."""
    found = crossed(RemoteError("site-1.job", "ValueError", "wrong", details="secret traceback"))

    assert str(found) == "site-1: ValueError: wrong"
    assert str(crossed(RemoteError("site-1.job", "DeadlineExceeded", "late"))) == "site-1: DeadlineExceeded: late"
    assert b"secret" not in encode_failure(RemoteError("a", "b", "c", "secret"))


def test_no_traceback_travels() -> None:
    """Only kind and text: neither where it was raised nor what caused it."""
    try:
        try:
            raise OSError("cause with a password")
        except OSError as cause:
            raise ValueError("effect") from cause
    except ValueError as error:
        body = encode_failure(error)

    assert msgpack.unpackb(body) == ["ValueError", "effect"]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("€" * 100_000),
        NoRoute("x" * 100_000, "y" * 100_000),
        SourceLost("x" * 100_000, "\U0001f600" * 100_000),
        RemoteError("a", "k" * 100_000, "t" * 100_000),
        type("K" * 100_000, (Exception,), {})(),
    ],
)
def test_long_texts_are_cut(error: Exception) -> None:
    """However much an exception says, its report is small and can be read at the other end."""
    body = encode_failure(error)
    found = decode_failure(body, "site-1")

    assert len(body) < 10 * MAX_TEXT
    assert not isinstance(found, DecodeError)


def test_a_text_that_is_none_does_not_hide_the_error() -> None:
    """Half a character, as in the name of a file that is no text, is replaced."""
    found = crossed(FileNotFoundError("model\udcff.npy"))

    assert isinstance(found, RemoteError)
    assert (found.kind, found.text) == ("FileNotFoundError", "model?.npy")


def test_an_exception_that_cannot_be_printed_is_still_reported() -> None:
    """A class of the user's own that fails in its own text is named all the same."""

    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError("not even this")

    found = crossed(Odd())

    assert isinstance(found, RemoteError)
    assert (found.kind, found.text) == ("Odd", "")


@pytest.mark.parametrize("kind", [*errors.__all__, "SystemExit", "KeyboardInterrupt", "os.system", "__class__", ""])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_no_class_is_looked_up_by_name(kind: str, count: int) -> None:
    """Three kinds with their own number of texts mean something; all others are a remote error of that name."""
    known = {("NoRoute", 2): NoRoute, ("SourceLost", 2): SourceLost, ("DeadlineExceeded", 1): DeadlineExceeded}
    found = decode_failure(msgpack.packb([kind, *["text"] * count]), "site-1")

    assert type(found) is known.get((kind, count), RemoteError)
    if type(found) is RemoteError and (kind, count) != ("RemoteError", 2):
        assert (found.kind, found.text) == (kind, " ".join(["text"] * count))


def test_nothing_is_imported_for_a_name_from_the_wire() -> None:
    """A body that names modules and classes leaves the list of imported modules as it was."""
    program = (
        "import sys, msgpack; from flarebus.failure import decode_failure; before = set(sys.modules);"
        "kinds = ('antigravity.x', 'turtle', 'wave:open', 'flarebus.cell.Cell', 'builtins.exit');"
        "found = [decode_failure(msgpack.packb([kind, 'text']), 'a') for kind in kinds];"
        "assert set(sys.modules) == before, set(sys.modules) - before"
    )

    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


HOSTILE = [
    b"",
    b"\xc1",
    b"\xdd\xff\xff\xff\xff",
    b"\xdc\xff\xff" * 20_000,
    b"\x94" * 20_000,
    b"\xdb\xff\xff\xff\xff",
    b"\x91\xa1\xff",
    msgpack.packb([]),
    msgpack.packb(None),
    msgpack.packb(7),
    msgpack.packb([b"NoRoute", b"x"]),
    msgpack.packb(["NoRoute", 7]),
    msgpack.packb(["NoRoute", ["x"], "y"]),
    msgpack.packb(["a"] * 5),
    msgpack.packb(["a", "x" * (4 * MAX_TEXT + 1)]),
    msgpack.packb(["a", "b"]) + b"\x00",
    msgpack.packb([msgpack.ExtType(1, b"x")]),
    msgpack.packb({"kind": "NoRoute"})[:-1],
]


@pytest.mark.parametrize("body", HOSTILE)
def test_a_body_that_cannot_be_read_is_a_failure_too(body: bytes) -> None:
    """Whoever asked hears that it failed, and who answered like that, but nothing of the content."""
    found = decode_failure(body, "site-1")

    assert type(found) is DecodeError
    assert "site-1" in str(found)
    assert len(str(found)) < 120


@given(
    st.binary(max_size=100)
    | st.lists(st.text(max_size=10) | st.integers(0, 9) | st.none(), max_size=5).map(msgpack.packb)
)
@thorough(150)
def test_any_body_is_some_failure(body: bytes) -> None:
    """Reading a failure never fails, and never makes anything but the four kinds."""
    assert type(decode_failure(body, "site-1")) in (NoRoute, SourceLost, DeadlineExceeded, RemoteError, DecodeError)
