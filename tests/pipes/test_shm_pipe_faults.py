"""ShmPipe: what happens when memory is short, a peer sends nonsense or stands still, and processes die."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flarebus_pipes import _segments
from flarebus_pipes._frames import DISCARD, MESSAGE, READ, RELEASE, Frame, FrameSocket
from flarebus_pipes._record import pack
from flarebus_pipes._segments import Mappings, available_memory
from flarebus_pipes.shm_pipe import ShmPipe

from flarebus.errors import DecodeError
from flarebus.pipes import ExportMode, Message
from tests.pipes.links import LIMIT_S, InThread, Peer, wait_until
from tests.pipes.shm_ends import BIG, HEAD, Ends, big, exchange, make, short_folder


@pytest.fixture(params=["memfd", "shm_open"])
def _memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "shm_open":
        monkeypatch.delattr(os, "memfd_create", raising=False)


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder with a short path; at the end nothing may be in it."""
    with short_folder() as made:
        yield made


@pytest.fixture
def ends(root: Path) -> Iterator[Ends]:
    """PASSIVE and ACTIVE, open."""
    passive, active = make(root, "PASSIVE"), make(root, "ACTIVE")
    passive.open("task")
    active.open("task")
    yield passive, active
    passive.close()
    active.close()


# -- memory --


@pytest.mark.usefixtures("_memory")
def test_without_memory_for_the_buffers(ends: Ends) -> None:
    """It is an OSError at the sender that says how much was wanted; smaller messages still come through."""
    passive, active = ends
    exchange(passive, active, Message("train", buffers=[big()]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As a file system of so many bytes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        with pytest.raises(OSError, match="no space for 5046272 bytes of shared memory"):
            passive.send(Message("train", buffers=[bytes(5_000_000)]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    exchange(passive, active, Message("train", buffers=[big()]))


def test_more_than_the_machine_has_is_not_tried(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reserving more than is available would have the system kill somebody; it is an OSError before that."""
    monkeypatch.setattr(_segments, "available_memory", lambda: 1_000_000)
    with pytest.raises(OSError, match=r"no space for 5046272 bytes .*: 1000000 are available") as caught:
        ends[0].send(Message("train", buffers=[bytes(5_000_000)]))
    assert caught.value.errno == errno.ENOMEM


def test_available_memory_is_known() -> None:
    """On Linux there is a figure, and it is not absurd."""
    found = available_memory()
    assert found is None or 1 << 20 < found < 1 << 50


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="seals are Linux's")
def test_a_segment_cannot_be_cut_off(ends: Ends) -> None:
    """Neither end can shorten what the other has mapped."""
    passive, active = ends
    exchange(passive, active, Message("train", buffers=[big()]))
    (segment,) = passive._open_end().pool._spare or passive._open_end().pool._out.values()
    with pytest.raises(PermissionError):
        os.ftruncate(segment.handle, 0)


# -- a hostile peer --


class Raw:
    """A peer that writes what it likes."""

    def __init__(self, end: ShmPipe) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(LIMIT_S)
        self.socket.connect(str(end._open_end().place.socket))

    def message(self, record: bytes, handle: int = -1, head: str = HEAD, number: int = 1) -> None:
        """Send a message of this record, and a descriptor."""
        frames = FrameSocket(self.socket)
        frames.put(Frame(MESSAGE, number, memoryview(record), head.encode(), handle))
        frames.flush()


def sealed(nbytes: int) -> int:
    """A descriptor as an honest sender passes it."""
    return _segments._make(nbytes)


@pytest.fixture
def listening(root: Path) -> Iterator[ShmPipe]:
    """A PASSIVE end; what it was sent must not have cost it a descriptor."""
    before = len(os.listdir("/proc/self/fd"))
    end = make(root, "PASSIVE")
    end.open("task")
    yield end
    end.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def far(lengths: int, name: str = "7") -> bytes:
    """A record whose one buffer lies in segment `name`."""
    good = pack(b"", [memoryview(b"12345678")], name)
    at = 16 + len(name)
    return good[:at] + lengths.to_bytes(8, "little") + good[at + 8 :]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="seals are Linux's")
@pytest.mark.parametrize(
    "what",
    ["too long", "far too long", "not sealed", "empty", "a pipe", "unknown", "name", "no descriptor", "record", "head"],
)
def test_a_message_that_is_none(listening: ShmPipe, what: str) -> None:
    """Claims are checked against the memory that is there; it is a DecodeError, and the next message comes through."""
    raw = Raw(listening)
    handles = [sealed(65536)]
    if what == "too long":
        raw.message(far(65537), handles[0])
    elif what == "far too long":
        raw.message(far(1 << 62), handles[0])
    elif what == "not sealed":
        handles.append(os.memfd_create("x"))
        os.ftruncate(handles[-1], 65536)
        raw.message(far(8), handles[-1])
    elif what == "empty":
        handles.append(os.memfd_create("x"))
        raw.message(far(8), handles[-1])
    elif what == "a pipe":
        handles += os.pipe()
        raw.message(far(8), handles[-1])
    elif what == "unknown":
        raw.message(far(8, "8"))
    elif what == "name":
        raw.message(far(8, "x"), handles[0])
    elif what == "no descriptor":
        raw.message(far(8))
    elif what == "record":
        raw.message(b"nonsense of some length", handles[0])
    else:
        raw.message(far(8), handles[0], head="REQ.a.b.")

    with pytest.raises(DecodeError):
        listening.receive(LIMIT_S)
    raw.message(pack(b"good", []), number=2)
    received = listening.receive(LIMIT_S)
    assert received is not None
    assert received.body == b"good"
    raw.socket.close()
    with pytest.raises(BrokenPipeError):
        listening.receive(LIMIT_S)
    for handle in handles:
        os.close(handle)


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 16,
        b"GET / HTTP/1.1\r\n\r\n",
        bytes([MESSAGE, 0, 0, 0]) + b"\xff" * 12,
        bytes([MESSAGE, 200, 0, 0]) + (100).to_bytes(4, "little") + bytes(8),
        bytes([MESSAGE, 0, 9, 0]) + bytes(12),
        bytes([MESSAGE, 0, 1, 0]) + bytes(12),
        bytes([READ, 0, 0, 0]) + (8).to_bytes(4, "little") + bytes(8),
        bytes([RELEASE, 0, 1, 0]) + bytes(12),
    ],
)
def test_bytes_that_are_no_frame(listening: ShmPipe, data: bytes) -> None:
    """Whoever sends them is hung up on, and nothing is allocated for what they claim."""
    raw = Raw(listening)
    raw.socket.sendall(data)
    with pytest.raises(BrokenPipeError, match="is gone"):
        listening.receive(LIMIT_S)
    with pytest.raises(BrokenPipeError):
        listening.send(Message("train"))
    raw.socket.close()


def test_descriptors_that_belong_to_nothing(listening: ShmPipe) -> None:
    """A peer that floods descriptors is hung up on, and they are closed."""
    raw = Raw(listening)
    raw.socket.setblocking(True)
    handle = sealed(65536)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(10):
            socket.send_fds(raw.socket, [bytes([READ]) + bytes(15)], [handle, handle])
    with pytest.raises(BrokenPipeError):
        listening.receive(LIMIT_S)
    raw.socket.close()
    os.close(handle)


def test_answers_to_nothing(listening: ShmPipe) -> None:
    """Releases, discards and receipts of things that never were change nothing."""
    raw = Raw(listening)
    for kind in (READ, RELEASE, DISCARD, 3, 4):
        raw.socket.sendall(bytes([kind, 0, 0, 0]) + bytes(4) + (77).to_bytes(8, "little"))
    raw.message(pack(b"good", []))
    assert listening.receive(LIMIT_S) is not None
    raw.socket.close()
    with pytest.raises(BrokenPipeError):
        listening.receive(LIMIT_S)


def test_a_segment_that_is_in_use_is_not_lent_twice() -> None:
    """Two messages on one segment would be two owners of one memory."""
    released: list[int] = []
    mappings = Mappings(released.append)
    handle = sealed(65536)
    mappings.add(7, handle)
    os.close(handle)
    views = mappings.lease(7, [8])
    with pytest.raises(DecodeError, match="not free"):
        mappings.lease(7, [8])
    del views
    assert released == [7]
    assert mappings.lease(7, [65536])


def test_a_flood_of_messages_waits_outside(listening: ShmPipe) -> None:
    """What a peer sends without waiting to be read is bounded at the receiver."""
    raw = Raw(listening)
    sending = InThread(
        lambda: [raw.socket.sendall(bytes([MESSAGE, 0, 0, 0]) + bytes(12)) for _ in range(100_000)]  # no record
    )
    wait_until(lambda: len(listening._open_end().link._waiting) >= 64, "they come in")
    for _ in range(200):
        with pytest.raises(DecodeError):
            listening.receive(LIMIT_S)
        assert len(listening._open_end().link._waiting) < 64 + 65
    listening.close()
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        sending.result()
    raw.socket.close()


# -- deaths --


def test_echo_between_processes(root: Path) -> None:
    """Large and small messages go back and forth between processes, and nothing is left."""
    passive = make(root, "PASSIVE")
    passive.open("task")
    peer = Peer(passive, "echo")
    array = np.arange(BIG, dtype=np.float32)
    for buffers in ([memoryview(array).cast("B")], [memoryview(array[:3]).cast("B")]) * 3:
        message = Message("train", b"body", buffers)
        assert passive.send(message, LIMIT_S)
        answer = passive.receive(LIMIT_S)
        assert answer is not None
        assert answer.req_id == message.msg_id
        assert np.array_equal(np.frombuffer(answer.buffers[0], np.float32), np.frombuffer(buffers[0], np.float32) + 1)
    passive.close()
    peer.leave()


def test_a_peer_killed_while_it_waits_to_be_read(root: Path) -> None:
    """What it had sent whole is received and stays valid, then it is gone."""
    passive = make(root, "PASSIVE")
    passive.open("task")
    peer = Peer(passive, "send")
    peer.expect("sending")
    wait_until(lambda: passive._open_end().link._waiting, "the message waits")
    peer.kill()

    received = passive.receive(LIMIT_S)

    assert received is not None
    with pytest.raises(BrokenPipeError, match="is gone"):
        passive.receive()
    with pytest.raises(BrokenPipeError, match="is gone"):
        passive.send(Message("train"))
    passive.close()
    assert np.frombuffer(received.buffers[0], np.float32).sum() == len(received.buffers[0]) // 4


def test_a_peer_killed_while_it_copies(root: Path) -> None:
    """Half a message is never received: whoever waits hears that the peer is gone, and closing leaves nothing."""
    passive = make(root, "PASSIVE")
    passive.open("task")
    receiving = InThread(passive.receive)
    peer = Peer(passive, "send")
    peer.expect("sending")
    os.kill(peer.process.pid, signal.SIGSTOP)
    peer.kill()

    try:
        received = receiving.result()
    except BrokenPipeError:
        received = None
    # Unless it was quicker than this test.
    assert received is None or np.frombuffer(received.buffers[0], np.float32).min() == 1
    passive.close()


def test_a_receiver_killed_with_buffers_in_its_hands(root: Path) -> None:
    """The sender hears it at once."""
    passive = make(root, "PASSIVE")
    passive.open("task")
    peer = Peer(passive, "keep")
    assert passive.send(Message("train", b"", [big()]), LIMIT_S)
    peer.expect(f"received {BIG}")
    sending = InThread(passive.send, Message("train", b"", [big()]))

    peer.kill()

    with pytest.raises(BrokenPipeError, match="is gone"):
        sending.result()
    passive.close()


def test_a_forked_process_gives_nothing_back(root: Path) -> None:
    """That a child drops its copies of the views says nothing about its parent's."""
    passive = make(root, "PASSIVE")
    passive.open("task")
    peer = Peer(passive, "keep_in_parent")
    assert passive.send(Message("train", b"", [big(1)]), LIMIT_S)
    peer.expect("dropped")

    assert passive.send(Message("again", b"", [big(2)]), 0.05) is False
    assert passive._open_end().pool._made == 2
    passive.close()
    peer.leave()


def test_a_peer_that_stands_still(root: Path) -> None:
    """A stopped process makes a send fail in time; the message may be sent again when it goes on."""
    passive = make(root, "PASSIVE")
    passive.open("task")
    peer = Peer(passive, "drain")
    os.kill(peer.process.pid, signal.SIGSTOP)
    message = Message("train", b"", [bytes(BIG)])
    try:
        assert passive.send(message, 0.05) is False
    finally:
        os.kill(peer.process.pid, signal.SIGCONT)
    assert passive.send(message, LIMIT_S)
    peer.expect(f"received {message.msg_id}")
    passive.close()
    peer.leave()


def test_a_client_job_that_is_killed(root: Path) -> None:
    """The trainer's end hears it, and the last to leave removes the folder."""
    active = make(root, "ACTIVE")
    active.open("task")
    peer = Peer(active, "hold")
    receiving = InThread(active.receive)
    wait_until(lambda: active.get_last_peer_active_time() > 0, "they are connected")
    peer.kill()
    with pytest.raises(BrokenPipeError, match="is gone"):
        receiving.result()
    active.close()


def test_a_new_trainer_in_the_place_of_a_killed_one(root: Path) -> None:
    """The next one takes the place over; the client job's end goes on without being opened again."""
    passive = make(root, "PASSIVE")
    passive.open("task")
    first = Peer(passive, "hold")
    first.kill()
    second = Peer(passive, "echo")
    before = passive.get_last_peer_active_time()
    wait_until(lambda: passive.get_last_peer_active_time() >= before and not passive._open_end().link._lost, "noticed")
    assert passive.send(Message("train", b"", [bytes(BIG)]), LIMIT_S)
    assert passive.receive(LIMIT_S) is not None
    passive.close()
    second.leave()


@pytest.mark.parametrize("token", ["job", "another"])
def test_when_both_ends_were_killed_the_next_open_sweeps(root: Path, token: str) -> None:
    """Their folder is gone once an end of the same job, or of another one, has opened and closed."""
    passive = make(root, "PASSIVE")
    sender = Peer(passive, "send_again_and_again")
    keeper = Peer(passive, "keep", side=ExportMode.SELF)
    keeper.expect("received")
    sender.kill()
    keeper.kill()
    assert len(list(root.iterdir())) == 1

    end = make(root, "PASSIVE", token=token)
    end.open("task")

    assert list(root.iterdir()) == [end._open_end().place.path]
    assert sorted(path.name for path in end._open_end().place.path.iterdir()) == ["PASSIVE.owner", "s"]
    end.close()


def test_a_killed_process_whose_children_hold_the_socket(root: Path) -> None:
    """Data loaders that outlive a killed trainer do not keep its end alive."""
    if not hasattr(os, "pidfd_open"):
        pytest.skip("only Linux tells when a process ends that is no child")
    passive = make(root, "PASSIVE")
    passive.open("task")
    _, arguments = passive.export(ExportMode.PEER)
    code = (
        "import json, os, sys; from flarebus_pipes.shm_pipe import ShmPipe\n"
        "end = ShmPipe(**json.loads(sys.argv[1])); end.open('task'); assert end.receive(60)\n"
        "if os.fork():\n"
        "    print('forked', flush=True); sys.stdin.read()\n"
        "else:\n"
        "    sys.stdin.read(); os._exit(0)\n"
    )
    # From Python 3.12 on a fork of a process with threads is warned about.
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, json.dumps(arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(("pipes", "."))},
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert passive.send(Message("train"), LIMIT_S)
    assert process.stdout.readline() == b"forked\n"
    receiving = InThread(passive.receive)

    process.kill()

    with pytest.raises(BrokenPipeError, match="is gone"):
        receiving.result()
    process.wait(LIMIT_S)
    process.stdin.close()
    assert process.stdout.read() == b""  # the child has ended too
    process.stdout.close()
    passive.close()
