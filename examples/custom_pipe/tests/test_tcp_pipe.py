"""TcpPipe keeps the promises of a pipe, and lets no stranger in."""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from flarebus_tcp_pipe import TcpPipe, meeting

from flarebus.errors import ConfigError, UsageError
from flarebus.pipes import ExportMode, Message, Mode
from flarebus.pipes.loading import make_pipe
from flarebus.testing import PipeCheck, PipeTrial, pipe_checks

LIMIT_S = 30.0
SECRET = secrets.token_hex(32)


@pytest.fixture
def port() -> Iterator[int]:
    """A port that nobody else gets as long as the test runs: bound, but not listened on."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.fixture
def listening(port: int) -> Iterator[TcpPipe]:
    """The client job's end, open."""
    with contextlib.closing(TcpPipe(Mode.PASSIVE, port, SECRET)) as end:
        end.open("task")
        yield end


def listeners(port: int) -> list[str]:
    """Who listens on the port."""
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), LIMIT_S):
        return [f"a listener on port {port}"]
    return []


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in pipe_checks(TcpPipe)])
def test_keeps_the_promises_of_a_pipe(check: PipeCheck, port: int) -> None:
    """Each check of the conformance kit passes."""
    with PipeTrial(lambda mode: TcpPipe(mode, port, SECRET), leftovers=lambda: listeners(port)) as trial:
        check(trial)


def test_all_ranks_of_a_trainer_come_by_one_port() -> None:
    """Ends of one job at one site share a port; a configuration holds it, and another rank has only its channel."""
    here = [TcpPipe(Mode.PASSIVE, site_name="site-1", token="job") for _ in range(2)]
    other_site = TcpPipe(Mode.PASSIVE, site_name="site-2", token="job")
    with contextlib.ExitStack() as ends:
        for end, channel in zip((*here, other_site), ("task", "task-1", "task"), strict=True):
            end.open(channel)
            ends.enter_context(contextlib.closing(end))
        path, args = here[0].export(ExportMode.PEER)
        trainer = ends.enter_context(contextlib.closing(make_pipe(path, args, {}, Mode.ACTIVE)))

        trainer.open("task-1")

        assert trainer.send(Message("hello"), 0.0) is False
        received = here[1].receive(LIMIT_S)
        assert received is not None
        assert received.topic == "hello"
        assert here[1].export(ExportMode.PEER)[1] == args
        assert other_site.export(ExportMode.PEER)[1]["port"] != args["port"]


def test_whoever_does_not_know_the_secret_is_turned_away(listening: TcpPipe, port: int) -> None:
    """A trainer with another secret gets no place, and the one with the right secret still gets it."""
    with pytest.raises(PermissionError, match="does not know its secret"):
        TcpPipe(Mode.ACTIVE, port, "guessed").open("task")

    with contextlib.closing(TcpPipe(Mode.ACTIVE, port, SECRET)) as trainer:
        trainer.open("task")
        assert trainer.send(Message("hello"), 0.0) is False
        assert listening.receive(LIMIT_S) is not None


def test_trainer_tells_nothing_to_whoever_else_listens(port: int) -> None:
    """On a port that somebody else has by now a trainer shows nonces and proofs, never its secret or a message."""
    with (
        socket.create_server(("127.0.0.1", port)) as squatter,
        contextlib.closing(TcpPipe(Mode.ACTIVE, port, SECRET)) as trainer,
    ):
        squatter.settimeout(LIMIT_S)
        answered = bytearray()

        def answer() -> None:
            connection, _ = squatter.accept()
            with connection:
                connection.settimeout(LIMIT_S)
                connection.sendall(bytes(64))
                while data := connection.recv(4096):
                    answered.extend(data)

        answering = threading.Thread(target=answer)
        answering.start()
        with pytest.raises(PermissionError):
            trainer.open("task")
        answering.join(LIMIT_S)

    assert len(answered) == 64
    assert SECRET.encode() not in answered


def test_silent_stranger_is_turned_away_in_time(listening: TcpPipe, port: int) -> None:
    """Somebody who connects and says nothing is hung up on; trainers get in after him."""
    with socket.create_connection(("127.0.0.1", port), LIMIT_S) as stranger:
        with contextlib.closing(TcpPipe(Mode.ACTIVE, port, SECRET)) as trainer:
            trainer.open("task")
            assert trainer.send(Message("hello"), 2 * meeting.HANDSHAKE_S) is False
            assert listening.receive(LIMIT_S) is not None
        nonce = stranger.recv(32)

        assert len(nonce) == 32
        assert stranger.recv(1) == b""


def test_second_trainer_is_refused(listening: TcpPipe, port: int) -> None:
    """A channel has one trainer; a second one that knows the secret hears that the place is taken."""
    with contextlib.closing(TcpPipe(Mode.ACTIVE, port, SECRET)) as trainer:
        trainer.open("task")

        with pytest.raises(UsageError, match="another live end has channel 'task'"):
            TcpPipe(Mode.ACTIVE, port, SECRET).open("task")

        trainer.send(Message("hello"), 0.0)
        assert listening.receive(LIMIT_S) is not None


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(struct.pack("<HII", 60_000, 0, 0), id="head"),
        pytest.param(struct.pack("<HII", 100, 1 << 31, 0), id="body"),
        pytest.param(struct.pack("<HII", 100, 0, 1 << 31), id="buffers"),
        pytest.param(struct.pack("<HIIQ", 100, 0, 1, 1 << 60), id="bytes"),
    ],
)
def test_claims_are_checked_before_memory_is_made(listening: TcpPipe, port: int, frame: bytes) -> None:
    """A peer that announces more than any message holds breaks the pipe."""
    line = meeting.dial(port, SECRET, "task", (b"A", b"P"))
    connection = line.connection(b"A", None)
    assert connection is not None
    connection.sendall(frame)

    with pytest.raises(BrokenPipeError, match="it sent"):
        listening.receive(LIMIT_S)

    line.leave()


def test_what_cannot_work_is_refused() -> None:
    """A trainer needs port and secret; a client job's end has no port before it is open."""
    with pytest.raises(ConfigError, match="client job's end exports"):
        TcpPipe(Mode.ACTIVE)
    with pytest.raises(UsageError, match="open it first"):
        TcpPipe(Mode.PASSIVE).export(ExportMode.PEER)
