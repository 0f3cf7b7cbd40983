"""Sockets: their options, where they may listen, and frames in and out."""

from __future__ import annotations

import os
import socket as sockets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

import flarebus.sockets
from flarebus.errors import ConfigError, UsageError
from flarebus.loop import has_message
from flarebus.security.admission import DOMAIN
from flarebus.security.keys import DialKeys, KeyPair, ListenKeys
from flarebus.sockets import (
    HIGH_WATER_MARK,
    IpcGuard,
    check_bind,
    check_dial,
    dealer,
    frame_bytes,
    receive_head,
    receive_rest,
    router,
    send_frames,
)
from flarebus.wire import MAX_FRAME_BYTES
from tests.core.bus import WAIT_S

OWN, OTHER = KeyPair.generate(), KeyPair.generate()
LISTEN = ListenKeys(OWN, frozenset({OTHER.public}))
DIAL = DialKeys(OTHER, OWN.public)

PROFILE = {
    zmq.LINGER: 0,
    zmq.SNDHWM: HIGH_WATER_MARK,
    zmq.RCVHWM: HIGH_WATER_MARK,
    zmq.MAXMSGSIZE: MAX_FRAME_BYTES,
    zmq.HEARTBEAT_IVL: 5000,
    zmq.HEARTBEAT_TIMEOUT: 15000,
    zmq.HEARTBEAT_TTL: 15000,
    zmq.HANDSHAKE_IVL: 3000,
    zmq.TCP_KEEPALIVE: 1,
}


class Keeper(zmq.Context[zmq.Socket[bytes]]):
    """A context that holds its sockets until it closes them."""

    def socket(self, *args: Any, **kwargs: Any) -> zmq.Socket[bytes]:
        socket = super().socket(*args, **kwargs)
        _kept.append(socket)
        return socket


_kept: list[zmq.Socket[bytes]] = []


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """A context whose sockets are closed at the end, and not before."""
    yield (context := Keeper())
    context.destroy(linger=0)
    _kept.clear()


@pytest.mark.parametrize("make", [router, dealer])
def test_every_socket_has_the_profile(
    context: zmq.Context[Any], make: Callable[[zmq.Context[Any], None], zmq.Socket[bytes]]
) -> None:
    """Every option of the common profile is read back as it was set."""
    socket = make(context, None)

    assert {option: socket.getsockopt(option) for option in PROFILE} == PROFILE


def test_a_listening_socket(context: zmq.Context[Any]) -> None:
    """It takes many connections at once, holds no secret without keys, and refuses what it cannot deliver."""
    socket = router(context, None)

    assert socket.type == zmq.ROUTER
    assert socket.getsockopt(zmq.BACKLOG) == 1024
    assert socket.getsockopt(zmq.MECHANISM) == zmq.NULL
    # Two of its options cannot be read back, so they are tried.
    with pytest.raises(zmq.ZMQError) as error:
        send_frames(socket, [b"nobody", b"x"])
    assert error.value.errno == zmq.EHOSTUNREACH
    endpoint = bind(socket)
    for number in (b"1", b"2"):
        peer = context.socket(zmq.DEALER)
        peer.routing_id = b"same"
        peer.connect(endpoint)
        peer.send(number)
        assert socket.poll(WAIT_S * 1000)
        assert socket.recv_multipart() == [b"same", number]
    socket.send_multipart([b"same", b"to the newer one"])
    assert peer.poll(WAIT_S * 1000)


def test_a_listening_socket_with_keys(context: zmq.Context[Any]) -> None:
    """It speaks CURVE only, and asks for every key in a domain that must answer."""
    socket = router(context, LISTEN)

    assert socket.getsockopt(zmq.MECHANISM) == zmq.CURVE
    assert socket.getsockopt(zmq.CURVE_SERVER) == 1
    assert socket.getsockopt(zmq.ZAP_DOMAIN) == DOMAIN
    assert socket.getsockopt(zmq.ZAP_ENFORCE_DOMAIN) == 1


def test_a_dialling_socket(context: zmq.Context[Any]) -> None:
    """It backs off when it dials again, keeps what has come in when a connection ends, and nobody can guess its id."""
    socket = dealer(context, None)

    assert socket.type == zmq.DEALER
    assert socket.getsockopt(zmq.IMMEDIATE) == 0
    assert socket.getsockopt(zmq.RECONNECT_IVL) == 250
    assert socket.getsockopt(zmq.RECONNECT_IVL_MAX) == 30_000
    ids = {dealer(context, None).getsockopt(zmq.ROUTING_ID) for _ in range(10)}
    assert len(ids) == 10
    assert all(isinstance(own, bytes) and len(own) == 17 and own[0] for own in ids)


def test_a_dialling_socket_with_keys(context: zmq.Context[Any]) -> None:
    """It speaks CURVE only. Keys cannot be read back: that they are the right ones, a bus with keys shows."""
    socket = dealer(context, DIAL)

    assert socket.getsockopt(zmq.MECHANISM) == zmq.CURVE
    assert socket.getsockopt(zmq.CURVE_SERVER) == 0


def bind(socket: zmq.Socket[bytes]) -> str:
    socket.bind("tcp://127.0.0.1:*")
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


ENDPOINTS = {
    "tcp://127.0.0.1:8002": "",
    "tcp://127.9.9.9:1": "",
    "tcp://localhost:65535": "",
    "tcp://[::1]:80": "",
    "ipc:///run/me/bus": "",
    "": "an endpoint such as",
    "127.0.0.1:80": "an endpoint such as",
    "tcp://": "an endpoint such as",
    "tcp://127.0.0.1": "an endpoint such as",
    "tcp://127.0.0.1:65536": "an endpoint such as",
    "tcp://127.0.0.1:-1": "an endpoint such as",
    "tcp://127.0.0.1:0": "an endpoint such as",
    "tcp://127.0.0.1:²": "an endpoint such as",
    "inproc://x": "an endpoint such as",
    "udp://127.0.0.1:80": "an endpoint such as",
    "ipc://": "an absolute path",
    "ipc://bus": "an absolute path",
    "ipc://@bus": "an absolute path",
    "ipc://*": "an absolute path",
    "ipc:///" + "x" * 107: "may have",
    "tcp://0.0.0.0:80": "beyond loopback only with keys",
    "tcp://*:80": "beyond loopback only with keys",
    "tcp://eth0:80": "beyond loopback only with keys",
    "tcp://localhost.example.org:80": "beyond loopback only with keys",
    "tcp://128.0.0.1:80": "beyond loopback only with keys",
    "tcp://[::]:80": "beyond loopback only with keys",
}


@pytest.mark.parametrize(("endpoint", "wrong"), ENDPOINTS.items(), ids=ENDPOINTS)
@pytest.mark.parametrize("check", [check_bind, check_dial])
def test_endpoints_are_checked(check: Callable[[str, Any], None], endpoint: str, wrong: str) -> None:
    """An endpoint that is none, or that strangers could reach without keys, is refused, to listen and to dial."""
    if not wrong:
        check(endpoint, None)
        return
    with pytest.raises(ConfigError, match=wrong) as error:
        check(endpoint, None)

    assert error.value.value == endpoint
    if "keys" in wrong:
        check(endpoint, LISTEN if check is check_bind else DIAL)


def test_any_port_is_for_listening_only() -> None:
    """A `*` is filled in when a router listens; nobody can dial it."""
    check_bind("tcp://127.0.0.1:*", None)
    with pytest.raises(ConfigError):
        check_dial("tcp://127.0.0.1:*", None)


def test_a_guard_holds_a_place(tmp_path: Path) -> None:
    """While one holds a place no other can, in this process or elsewhere; afterwards nothing is left of it."""
    endpoint = f"ipc://{tmp_path}/bus"
    guard = IpcGuard(endpoint)
    (tmp_path / "bus").touch()
    guard.restrict()

    assert (tmp_path / "bus").stat().st_mode & 0o777 == 0o600
    (tmp_path / "bus").unlink()
    with pytest.raises(UsageError, match="another live process listens here"):
        IpcGuard(endpoint)
    code = f"from flarebus.sockets import IpcGuard; IpcGuard({endpoint!r})"
    other = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=WAIT_S)
    assert "another live process listens here" in other.stderr

    guard.release()
    assert list(tmp_path.iterdir()) == []
    IpcGuard(endpoint).release()


def test_what_a_dead_process_left_is_no_hindrance(tmp_path: Path) -> None:
    """The lock and the socket file of a killed router are taken over."""
    with sockets.socket(sockets.AF_UNIX) as left:
        left.bind(str(tmp_path / "bus"))
    (tmp_path / "bus.lock").touch()

    IpcGuard(f"ipc://{tmp_path}/bus").release()

    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_removed_meanwhile_protects_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking, its holder may remove the file: then the new one is locked, not the removed one."""
    flock = flarebus.sockets.fcntl.flock
    lock = tmp_path / "bus.lock"
    calls: list[int] = []

    def remove_first(handle: int, operation: int) -> None:
        if not calls:
            lock.unlink()
        calls.append(handle)
        flock(handle, operation)

    monkeypatch.setattr(flarebus.sockets.fcntl, "flock", remove_first)
    guard = IpcGuard(f"ipc://{tmp_path}/bus")

    assert len(calls) == 2
    assert os.path.samestat(os.fstat(guard._handle), lock.stat())
    guard.release()


@pytest.mark.parametrize("name", ["file", "folder", "link"])
def test_a_guard_never_harms_a_file(tmp_path: Path, name: str) -> None:
    """What is no socket is never removed to make room for one."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "file")

    with pytest.raises(ConfigError, match="a file is in its place"):
        IpcGuard(f"ipc://{tmp_path / name}")

    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


def test_a_guard_needs_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing folder is named; one that others may write to is refused unless it is ours."""
    with pytest.raises(ConfigError, match="No such file"):
        IpcGuard(f"ipc://{tmp_path}/missing/bus")
    (tmp_path / "bus.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"bus\.lock"):
        IpcGuard(f"ipc://{tmp_path}/bus")
    tmp_path.chmod(0o777)
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="belongs to somebody else"):
        IpcGuard(f"ipc://{tmp_path}/other")
    assert not (tmp_path / "elsewhere").exists()


@pytest.fixture
def pair(context: zmq.Context[Any]) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """Two sockets with a way between them."""
    near, far = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    near.bind("inproc://pair")
    far.connect("inproc://pair")
    return near, far


def test_frames_arrive_as_they_went(pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]) -> None:
    """A message is read in two parts: four frames, and the rest; small and large, bytes, views and frames alike."""
    near, far = pair
    large = os.urandom(100_000)
    frames = [b"target", bytearray(b"source"), memoryview(b"header"), zmq.Frame(b"body"), memoryview(large), b""]
    assert not has_message(far)
    send_frames(near, frames)
    send_frames(near, [b"a", b"b", b"c", b"d"])

    assert has_message(far)
    head = receive_head(far)
    assert head is not None
    assert head[:5] == (b"target", b"source", b"header", b"body", True)
    assert [frame_bytes(frame) for frame in receive_rest(far, head.more)] == [large, b""]
    assert receive_head(far)[:5] == (b"a", b"b", b"c", b"d", False)  # type: ignore[index]
    assert not has_message(far)
    with pytest.raises(zmq.Again):
        receive_head(far)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_short_message_is_read_whole(pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]], count: int) -> None:
    """A message that ends before its body is dropped, and the one after it is read as what it is."""
    near, far = pair
    send_frames(near, [b"x"] * count)
    send_frames(near, [b"a", b"b", b"c", b"d"])

    assert receive_head(far) is None
    assert receive_head(far) is not None


def test_bytes_of_frames() -> None:
    """The content of a frame is the same however it is held."""
    for frame in (b"abc", bytearray(b"abc"), memoryview(b"abc"), zmq.Frame(b"abc")):
        assert frame_bytes(frame) == b"abc"
