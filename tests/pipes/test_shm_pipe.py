"""ShmPipe: messages through shared memory without a name, whoever dies, sends nonsense or takes too long."""

from __future__ import annotations

import gc
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flarebus_pipes import _socket_place
from flarebus_pipes.shm_pipe import ShmPipe

from flarebus.errors import ConfigError, UsageError
from flarebus.message import Manifest
from flarebus.pipes import ExportMode, Message, Mode
from tests.pipes.links import LIMIT_S, InThread, Peer, wait_until
from tests.pipes.shm_ends import BIG, Ends, big, exchange, make, short_folder


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


@pytest.mark.usefixtures("_memory")
@pytest.mark.parametrize("sizes", [(), (5, 0, 70), (100_000,) * 2, (BIG, 0, 7, 64, BIG + 1), (3,) * 5000])
def test_a_message_arrives_as_it_was_sent(ends: Ends, sizes: tuple[int, ...]) -> None:
    """Head, body and buffers of any sizes come through, in both directions; buffers are aligned and writable."""
    for sender, receiver in (ends, reversed(ends)):
        buffers = [bytes([index % 251]) * size for index, size in enumerate(sizes)]
        message = Message("train", b"body", buffers)
        received = exchange(sender, receiver, message)

        assert received.head() == message.head()
        assert received.body == b"body"
        assert [bytes(buffer) for buffer in received.buffers] == buffers
        for buffer in received.buffers:
            array = np.frombuffer(buffer, np.uint8)
            assert not array.size or array.ctypes.data % 64 == 0
            assert array.flags.writeable


@pytest.mark.parametrize("first", ["ACTIVE", "PASSIVE"])
def test_the_other_end_may_come_later(root: Path, first: str) -> None:
    """A send that began before the other end was there succeeds when it comes, whichever came first."""
    early = make(root, first)
    early.open("task")
    sending = InThread(early.send, Message("train", b"x", [big()]), LIMIT_S)
    late = make(root, "PASSIVE" if first == "ACTIVE" else "ACTIVE")
    wait_until(lambda: early._open_end().link._outbox, "it waits to go out")
    late.open("task")

    received = late.receive(LIMIT_S)

    assert received is not None
    assert bytes(received.buffers[0]) == big()
    assert sending.result()
    early.close()
    late.close()


def test_messages_come_in_the_order_of_sending(ends: Ends) -> None:
    """Several that wait are received one after the other."""
    passive, active = ends
    messages = [Message(f"m{index}") for index in range(12)]
    sends = []
    for count, message in enumerate(messages, 1):
        sends.append(InThread(passive.send, message, LIMIT_S))
        wait_until(lambda expected=count: len(active._open_end().link._waiting) == expected, "it is there")

    assert [found.msg_id for _ in messages if (found := active.receive(LIMIT_S))] == [m.msg_id for m in messages]
    assert all(each.result() for each in sends)


@pytest.mark.parametrize("is_connected", [True, False])
def test_a_message_that_nobody_reads_is_withdrawn(root: Path, is_connected: bool) -> None:
    """A send that took too long is False, and the peer does not see the message; its segment is used again."""
    passive, active = make(root, "PASSIVE"), make(root, "ACTIVE")
    passive.open("task")
    if is_connected:
        active.open("task")
        wait_until(lambda: passive.get_last_peer_active_time() > 0, "they are connected")
    message = Message("train", buffers=[big()])

    assert passive.send(message, 0.05) is False

    if not is_connected:
        active.open("task")
    assert active.receive(0.05) is None
    wait_until(lambda: passive._open_end().pool._spare, "the segment is back")
    moved = passive.moved_bytes()
    assert exchange(passive, active, message).msg_id == message.msg_id
    assert passive.moved_bytes() == moved, "it was copied again"
    assert passive.can_resend()
    passive.close()
    active.close()


def test_what_the_receiver_may_have_changed_is_copied_again(ends: Ends) -> None:
    """A message that is sent again after it was received is what its sender says, not what the receiver left."""
    passive, active = ends
    message = Message("train", buffers=[big(1)])
    received = exchange(passive, active, message)
    np.frombuffer(received.buffers[0], np.uint8)[:] = 9
    del received
    wait_until(lambda: passive._open_end().pool._spare, "the segment is back")

    assert bytes(exchange(passive, active, message).buffers[0]) == big(1)


def test_a_released_message_gives_its_segment_to_others(ends: Ends) -> None:
    """After `release_send_cache` another message of the size is copied over it, and so is the same one again."""
    passive, active = ends
    message = Message("train", buffers=[big(1)])
    assert not passive.send(message, 0)
    wait_until(lambda: passive._open_end().pool._spare, "the segment is back")
    passive.release_send_cache(message)
    moved = passive.moved_bytes()
    assert bytes(exchange(passive, active, message).buffers[0]) == big(1)
    assert passive.moved_bytes() == moved + BIG
    assert passive._open_end().pool._made == 1


@pytest.mark.usefixtures("_memory")
def test_segments_are_used_again_once_they_are_dropped(ends: Ends) -> None:
    """Round after round alternates between as many segments as the receiver holds, and one more; no view changes."""
    passive, active = ends
    held = None
    for value in range(1, 9):
        received = exchange(passive, active, Message("train", buffers=[big(value)]))
        assert held is None or bytes(held.buffers[0]) == big(value - 1)
        held = received
        assert bytes(held.buffers[0]) == big(value)
        del received
        if value > 1:
            wait_until(lambda: passive._open_end().pool._spare, "the one before is back")

    assert passive._open_end().pool._made == 2
    assert len(active._open_end().link._mappings._mapped) == 2


def test_segments_of_other_sizes_are_let_go(ends: Ends) -> None:
    """Sizes that do not come again do not pile up, at either end."""
    passive, active = ends
    for factor in range(1, 9):
        exchange(passive, active, Message("train", buffers=[big(1, factor * BIG)]))
        wait_until(lambda: not passive._open_end().pool._out, "it is back")

    exchange(passive, active, Message("train"))
    assert len(passive._open_end().pool._spare) <= 3
    assert len(active._open_end().link._mappings._mapped) <= 3


def test_one_view_keeps_its_segment(ends: Ends) -> None:
    """A segment is not written again while any array on it is left."""
    passive, active = ends
    received = exchange(passive, active, Message("train", buffers=[big(1), big(2)]))
    view = np.frombuffer(received.buffers[1], np.uint8)[7:9]
    del received
    gc.collect()
    exchange(passive, active, Message("train", buffers=[big(3), big(4)]))

    assert view.tolist() == [2, 2]
    assert passive._open_end().pool._made == 2


def test_the_receiver_may_write_and_the_sender_keeps_its_own(ends: Ends) -> None:
    """Writing to a received buffer does not change the sender's array."""
    passive, active = ends
    array = np.ones(BIG, np.uint8)
    for _ in range(3):
        received = exchange(passive, active, Message("train", buffers=[array.data]))
        mine = np.frombuffer(received.buffers[0], np.uint8)
        assert mine.min() == mine.max() == 1
        mine[:] = 9
        del mine, received
    assert array.max() == 1


def test_buffers_outlive_their_pipe(ends: Ends) -> None:
    """What was received stays valid after both ends are closed."""
    passive, active = ends
    received = exchange(passive, active, Message("train", buffers=[big(3)]))
    passive.close()
    active.close()
    assert bytes(received.buffers[0]) == big(3)


def test_clear_drops_what_waits(ends: Ends) -> None:
    """After `clear` nothing waits, and segments come back."""
    passive, active = ends
    sends = [InThread(passive.send, Message("train", buffers=[big(value)]), LIMIT_S) for value in (1, 2)]
    wait_until(lambda: len(active._open_end().link._waiting) == 2, "both are there")

    active.clear()

    assert active.receive(0) is None
    assert [each.result() for each in sends] == [True, True]
    wait_until(lambda: not passive._open_end().pool._out, "they are back")


def test_closing_wakes_whoever_waits(ends: Ends) -> None:
    """A receive and a send that wait for ever return with BrokenPipeError when a third thread closes their end."""
    passive, active = ends
    calls = [InThread(passive.receive), InThread(passive.send, Message("train", buffers=[big()]))]
    wait_until(lambda: active._open_end().link._waiting, "the message waits")
    assert all(call.is_running for call in calls)

    passive.close()

    for call in calls:
        with pytest.raises(BrokenPipeError, match="closed"):
            call.result()
    with pytest.raises(BrokenPipeError, match="closed"):
        passive.send(Message("train"))
    with pytest.raises(BrokenPipeError, match="closed"):
        passive.receive(0)


def test_an_end_that_was_never_opened(root: Path) -> None:
    """It neither sends nor receives, and may be closed and cleared; its constructor touched nothing."""
    end = make(root / "new", "ACTIVE")
    with pytest.raises(BrokenPipeError, match="never opened"):
        end.send(Message("train"))
    with pytest.raises(BrokenPipeError, match="never opened"):
        end.receive(0)
    end.clear()
    end.close()
    assert (end.get_last_peer_active_time(), end.moved_bytes()) == (0.0, 0)
    end.open("task")
    end.close()
    end.close()


@pytest.mark.parametrize("which", [0, 1])
def test_when_the_peer_closes_its_end(ends: Ends, which: int) -> None:
    """Waiting ends with BrokenPipeError at once, and goes on when the peer is back; segments are made known anew."""
    leaving, staying = ends[which], ends[1 - which]
    exchange(staying, leaving, Message("train", buffers=[big(1)]))
    receiving = InThread(staying.receive)

    leaving.close()

    with pytest.raises(BrokenPipeError, match="is gone"):
        receiving.result()
    with pytest.raises(BrokenPipeError, match="is gone"):
        staying.send(Message("train"))
    leaving.open("task")
    wait_until(lambda: not staying._open_end().link._lost, "it is noticed")
    for value in (2, 3):
        assert bytes(exchange(staying, leaving, Message("t", buffers=[big(value)])).buffers[0]) == big(value)


def test_the_last_words_of_an_end_that_closes(ends: Ends) -> None:
    """What was received just before closing counts as sent: the receipt still goes out."""
    passive, active = ends
    link = active._open_end().link
    exchange(passive, active, Message("train"))
    exchange_now, send_out = link._exchange, link._send_out
    # As if the end always came between two turns of its thread.
    link._exchange = lambda *args, **given: None if link._end else exchange_now(*args, **given)  # type: ignore[method-assign]
    link._send_out = lambda connection: send_out(connection) if link._end else None  # type: ignore[method-assign]
    sending = InThread(passive.send, Message("train"), LIMIT_S)
    assert active.receive(LIMIT_S)

    active.close()

    assert sending.result() is True


def test_a_sender_that_is_interrupted(ends: Ends) -> None:
    """A send that ends with an exception before its message went out does no harm to the pipe."""
    passive, active = ends
    exchange(passive, active, Message("train"))
    link = passive._open_end().link
    send_out, wait_for = link._send_out, link._settling.wait_for

    def interrupted(is_true: Callable[[], object], timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    link._send_out = lambda connection: None  # type: ignore[method-assign]
    link._settling.wait_for = interrupted  # type: ignore[assignment,method-assign]
    with pytest.raises(KeyboardInterrupt):
        passive.send(Message("train"))
    link._send_out, link._settling.wait_for = send_out, wait_for  # type: ignore[method-assign]

    assert exchange(passive, active, Message("next")).topic == "next"


def test_an_end_that_nobody_refers_to_is_closed(root: Path) -> None:
    """A pipe that is dropped without being closed leaves its place."""
    end = make(root, "ACTIVE")
    end.open("task")
    del end
    gc.collect()
    assert list(root.iterdir()) == []


def test_only_this_user_may_enter(ends: Ends, root: Path) -> None:
    """The folder is 0700; a folder of that name that others may enter is refused, not used."""
    (folder,) = root.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    other = make(root, "ACTIVE", token="other")
    place = _socket_place.SocketPlace(root, ("", "other", "site-1"), "task", Mode.ACTIVE)
    place.path.mkdir(mode=0o755)
    with pytest.raises(PermissionError, match="only this user"):
        other.open("task")
    place.path.rmdir()


def test_a_second_end_of_the_same_mode(ends: Ends) -> None:
    """It is refused, naming the process that was first, and disturbs nobody."""
    passive, active = ends
    for mode in ("ACTIVE", "PASSIVE"):
        with pytest.raises(UsageError, match=rf"is open already: process {os.getpid()} on "):
            make(Path(passive.root_path), mode).open("task")
    with pytest.raises(UsageError, match="open already"):
        active.open("task")
    second = Peer(active, "hold", side=ExportMode.SELF, ready="refused")
    second.leave()
    exchange(passive, active, Message("train"))


def test_a_connection_too_many_is_closed(ends: Ends) -> None:
    """Whoever connects besides the peer is not heard, and the peer goes on."""
    passive, active = ends
    exchange(passive, active, Message("train"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as intruder:
        intruder.settimeout(LIMIT_S)
        intruder.connect(str(passive._open_end().place.socket))
        assert intruder.recv(1) == b""
    exchange(active, passive, Message("train"))


def test_a_process_of_another_user_is_not_heard(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says whose process connected; another user's is hung up on."""
    passive = make(root, "PASSIVE")
    passive.open("task")
    user = os.geteuid()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as intruder:
        intruder.settimeout(LIMIT_S)
        with monkeypatch.context() as patch:
            patch.setattr("flarebus_pipes._shm_link.os.geteuid", lambda: user + 1)
            intruder.connect(str(passive._open_end().place.socket))
            assert intruder.recv(1) == b""
    assert passive.receive(0) is None
    passive.close()


def test_channels_and_jobs_do_not_meet(root: Path) -> None:
    """Ends of another channel, site, job or workspace have places of their own."""
    variants = [{}, {"token": "other"}, {"site_name": "site-2"}, {"workspace_dir": "/w"}]
    ends = [make(root, "PASSIVE", **given) for given in variants]
    for end in ends:
        end.open("task")
    active = make(root, "ACTIVE")
    active.open("metric")
    assert active.send(Message("loss"), 0.05) is False
    for end in ends:
        assert end.receive(0) is None
    assert len(list(root.iterdir())) == len(ends) + 1
    for end in (*ends, active):
        end.close()


# -- arguments --


@pytest.mark.parametrize(
    ("given", "parameter"),
    [
        ({"mode": "BOTH"}, "mode"),
        ({"mode": "ACTIVE", "root_path": "/" + "x" * 90}, "root_path"),
        ({"mode": "ACTIVE", "token": "../up"}, "token"),
        ({"mode": "ACTIVE", "site_name": "a/b"}, "site_name"),
    ],
)
def test_wrong_arguments(given: dict[str, str], parameter: str) -> None:
    """They are refused by name before anything is touched."""
    with pytest.raises(ConfigError) as caught:
        ShmPipe(**given)
    assert caught.value.parameter == parameter


@pytest.mark.parametrize("name", ["", "..", "a/b", "x y"])
def test_a_channel_without_a_proper_name(root: Path, name: str) -> None:
    """Names of channels follow the grammar of names."""
    with pytest.raises(ConfigError):
        make(root, "ACTIVE").open(name)


def test_export_makes_both_ends(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments are JSON values that make the ends, from any folder, whatever the environment."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(root))
    first = ShmPipe(Mode.PASSIVE, token="job", site_name="site-1", workspace_dir="site")
    path, arguments = first.export(ExportMode.PEER)
    assert path == "flarebus_pipes.shm_pipe.ShmPipe"
    assert first.export(ExportMode.SELF)[1] == {**arguments, "mode": "PASSIVE"}
    assert arguments["mode"] == "ACTIVE"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.chdir("/")
    second = ShmPipe(**json.loads(json.dumps(arguments)))

    first.open("task")
    second.open("task")

    exchange(first, second, Message("train"))
    assert len(list(root.iterdir())) == 1
    first.close()
    second.close()


def test_a_long_folder_for_temporary_things_is_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest root that is accepted can hold a socket; a longer one is not chosen."""
    long = root / ("x" * 80)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    assert not _socket_place.short_root("").startswith(str(long))
    long.rmdir()
    longest = root / ("x" * (_socket_place._LONGEST_ROOT - len(os.fsencode(root)) - 1))
    end = make(longest, "PASSIVE")
    end.open("task")
    end.close()
    assert list(root.iterdir()) == []


def test_what_does_not_fit_is_refused(ends: Ends) -> None:
    """A manifest, a body above its limit and too many buffers are errors of the caller; the pipe stays usable."""
    passive, active = ends
    with pytest.raises(UsageError, match="no manifests"):
        passive.send(Message("train", manifest=Manifest(bytes(16), "server", (1,))))
    with pytest.raises(ConfigError, match="body"):
        passive.send(Message("train", bytes(1024 * 1024 + 1), [big()]))
    with pytest.raises(ConfigError, match="buffers"):
        passive.send(Message("train", b"", [b""] * (256 * 1024 + 1)))
    received = exchange(passive, active, Message("train", bytes(1024 * 1024), [big()]))
    assert len(received.body) == 1024 * 1024
