"""Admission: only keys on the list come in, and when in doubt nobody does."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import zmq
from zmq.utils import z85

from flarebus.cell import Cell
from flarebus.errors import LinkError
from flarebus.loop import Loop
from flarebus.security.admission import DOMAIN, Admission
from flarebus.security.keys import DialKeys, KeyPair
from tests.core.bus import WAIT_S, Bus, value_of

KNOWN, STRANGER = KeyPair.generate(), KeyPair.generate()


@pytest.fixture
def asked() -> Iterator[tuple[Admission, zmq.Socket[bytes]]]:
    """An admission that knows one key, and a socket that asks it as ZeroMQ does."""
    loop = Loop("test")
    admission = loop.run(Admission, loop, [KNOWN.public])
    asker = loop.context.socket(zmq.REQ)
    asker.rcvtimeo = int(WAIT_S * 1000)
    asker.connect("inproc://zeromq.zap.01")
    yield admission, asker
    asker.close(linger=0)
    loop.stop()


def question(**changed: Any) -> list[bytes]:
    fields = {
        "version": b"1.0",
        "request": b"7",
        "domain": DOMAIN,
        "address": b"127.0.0.1",
        "identity": b"",
        "mechanism": b"CURVE",
        "key": z85.decode(KNOWN.public),
    }
    return [value for value in (fields | changed).values() if value is not None]


def test_a_known_key_comes_in(asked: tuple[Admission, zmq.Socket[bytes]]) -> None:
    """The answer admits it and names it, so that the connection is known by its key."""
    admission, asker = asked
    asker.send_multipart(question())

    assert asker.recv_multipart() == [b"1.0", b"7", b"200", b"OK", KNOWN.public, b""]
    assert admission.refused == 0


WRONG: dict[str, dict[str, Any]] = {
    "another key": {"key": z85.decode(STRANGER.public)},
    "empty key": {"key": b""},
    "no key": {"key": None},
    "no domain": {"domain": b""},
    "any domain": {"domain": b"*"},
    "another domain": {"domain": b"other"},
    "clear text": {"mechanism": b"NULL"},
    "password": {"mechanism": b"PLAIN"},
    "another version": {"version": b"2.0"},
    "more": {"more": b"x"},
}


@pytest.mark.parametrize("changed", WRONG.values(), ids=WRONG)
def test_all_else_stays_out(
    asked: tuple[Admission, zmq.Socket[bytes]], changed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Another key, domain, mechanism or version, or a question of another length, is refused, counted and logged."""
    admission, asker = asked
    with caplog.at_level(logging.WARNING):
        asker.send_multipart(question(**changed))
        answer = asker.recv_multipart()

    assert answer[2] == b"400"
    assert answer[4] == b""
    assert admission.refused == 1
    assert "not admitted" in caplog.text


@pytest.fixture
def bus() -> Iterator[Bus]:
    """A router with keys, and a cell on it that echoes."""
    with Bus("curve") as bus:
        bus.attach("server").on("test", "echo", lambda delivery: delivery.value())
        yield bus


def refused(bus: Bus, keys: DialKeys | None) -> None:
    """Check that a cell with these keys does not come in."""
    cell = bus.close_later(Cell.dial("site", bus.endpoint, keys))
    with pytest.raises(LinkError):
        cell.wait_until_up(0.3 if keys is None or keys.server != bus.listen.own.public else WAIT_S)  # type: ignore[union-attr]


def test_an_unknown_key_is_refused_and_counted(bus: Bus, caplog: pytest.LogCaptureFixture) -> None:
    """It hears so, it shows in the statistics and the log, and those who are known are served."""
    assert bus.dial is not None
    refused(bus, DialKeys(STRANGER, bus.dial.server))

    assert bus.router.statistics().refused >= 1
    assert bus.router.statistics().names == 1
    assert "not admitted" in caplog.text
    assert value_of(bus.connect("known").request("server", "test", "echo", 1)) == 1


@pytest.mark.parametrize("case", ["no keys", "another router"])
def test_who_does_not_speak_curve_with_it_is_refused(bus: Bus, case: str) -> None:
    """A peer in clear text, and one that means another router, never come as far as a hello."""
    assert bus.dial is not None
    refused(bus, None if case == "no keys" else DialKeys(bus.dial.own, STRANGER.public))

    assert bus.router.statistics().names == 1


def test_it_fails_closed(bus: Bus) -> None:
    """When nobody answers for the list any more, even a known key stays out; who is in stays in."""
    inside = bus.connect("inside")
    assert bus.router._admission is not None
    bus.loop.run(bus.router._admission.close)
    bus.loop.run(bus.router._admission.close)

    cell = bus.close_later(Cell.dial("late", bus.endpoint, bus.dial))
    with pytest.raises(LinkError):
        cell.wait_until_up(0.3)

    assert value_of(inside.request("server", "test", "echo", 1)) == 1


def test_secrets_are_in_no_log(bus: Bus, caplog: pytest.LogCaptureFixture) -> None:
    """At the finest level, with admissions, refusals and errors, nothing of a secret key is logged."""
    assert bus.dial is not None
    assert bus.listen is not None
    caplog.set_level(logging.DEBUG)
    value_of(bus.connect("known").request("server", "test", "echo", 1))
    refused(bus, DialKeys(STRANGER, bus.dial.server))

    for pair in (bus.dial.own, bus.listen.own, STRANGER):
        assert pair.secret.decode() not in caplog.text
        assert repr(pair.secret) not in caplog.text
