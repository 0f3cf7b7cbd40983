"""FilePipe: messages through a folder, whoever dies, fills the disk or tampers with it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from flarebus_pipes import file_pipe
from flarebus_pipes._inotify import Inotify
from flarebus_pipes._owner import Owner
from flarebus_pipes.file_pipe import FilePipe

from flarebus.errors import ConfigError, UsageError
from flarebus.message import Manifest
from flarebus.pipes import ExportMode, Message, Mode
from tests.pipes.file_ends import BIG, Ends, big, channel_of, files_below, make
from tests.pipes.links import LIMIT_S, InThread, Peer, wait_until


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A shared folder, with a blank in its path."""
    made = tmp_path / "shared folder"
    made.mkdir()
    return made


@pytest.fixture
def ends(root: Path) -> Iterator[Ends]:
    """PASSIVE and ACTIVE, open; nothing may be left when both are closed."""
    passive, active = make(root, "PASSIVE"), make(root, "ACTIVE")
    passive.open("task")
    active.open("task")
    yield passive, active
    passive.close()
    active.close()
    assert files_below(root) == []


@pytest.mark.parametrize("sizes", [(), (5, 0, 70), (100_000,) * 2, (BIG, 0, 7, 64, BIG + 1), (3,) * 5000])
def test_a_message_arrives_as_it_was_sent(ends: Ends, sizes: tuple[int, ...]) -> None:
    """Head, body and buffers of any sizes come through, in both directions; buffers are aligned and writable."""
    for sender, receiver in (ends, reversed(ends)):
        buffers = [bytes([index % 251]) * size for index, size in enumerate(sizes)]
        message = Message("train", b"body", buffers)
        sending = InThread(sender.send, message, LIMIT_S)
        received = receiver.receive(LIMIT_S)

        assert sending.result() is True
        assert received is not None
        assert received.head() == message.head()
        assert received.body == b"body"
        assert [bytes(buffer) for buffer in received.buffers] == buffers
        for buffer in received.buffers:
            array = np.frombuffer(buffer, np.uint8)
            assert not array.size or array.ctypes.data % 64 == 0
            assert array.flags.writeable


def test_messages_come_in_the_order_of_sending(ends: Ends) -> None:
    """The sequence in the name decides, not the times of the files."""
    passive, active = ends
    messages = [Message(f"m{index}") for index in range(12)]
    sends = []
    for index, message in enumerate(messages):
        sends.append(InThread(passive.send, message, LIMIT_S))
        wait_until(lambda expected=index + 1: len(active._open_end().folder.waiting()) == expected, "it is there")
    for age, name in enumerate(active._open_end().folder.waiting()):
        os.utime(active._open_end().folder.inbox / name, (1000 - age, 1000 - age))

    assert [found.msg_id for _ in messages if (found := active.receive(LIMIT_S))] == [m.msg_id for m in messages]
    assert all(each.result() for each in sends)


def test_a_message_that_nobody_reads_is_withdrawn(ends: Ends) -> None:
    """A send that took too long is False, and the peer never sees the message, nor its file."""
    passive, active = ends

    assert passive.send(Message("train", buffers=[big()]), 0.05) is False
    assert active.receive(0) is None
    assert list(passive._open_end().folder.outbox.iterdir()) == []
    assert passive.can_resend()


def test_a_message_that_is_sent_again_is_not_written_again(ends: Ends) -> None:
    """The file of a withdrawn message serves the second try; once released it is used for other messages."""
    passive, active = ends
    message = Message("train", buffers=[big(1)])
    assert not passive.send(message, 0)
    moved = passive.moved_bytes()
    assert not passive.send(message, 0)
    assert passive.moved_bytes() == moved >= BIG

    sending = InThread(passive.send, message, LIMIT_S)
    received = active.receive(LIMIT_S)

    assert sending.result()
    assert received is not None
    assert bytes(received.buffers[0]) == big(1)
    assert passive.moved_bytes() == moved


def test_what_the_receiver_may_have_changed_is_written_again(ends: Ends) -> None:
    """A message that is sent again after it was received is what its sender says, not what the receiver left."""
    passive, active = ends
    message = Message("train", buffers=[big(1)])
    for _ in range(2):
        sending = InThread(passive.send, message, LIMIT_S)
        received = active.receive(LIMIT_S)
        assert sending.result()
        assert received is not None
        assert bytes(received.buffers[0]) == big(1)
        np.frombuffer(received.buffers[0], np.uint8)[:] = 9
        del received


def test_a_released_message_gives_its_file_to_others(ends: Ends) -> None:
    """After `release_send_cache` the same message is written again, over the file it had."""
    passive, active = ends
    message = Message("train", buffers=[big(1)])
    assert not passive.send(message, 0)
    passive.release_send_cache(message)
    moved = passive.moved_bytes()
    sending = InThread(passive.send, message, LIMIT_S)
    assert active.receive(LIMIT_S)
    assert sending.result()
    assert passive.moved_bytes() >= moved + BIG
    assert passive._open_end().spool._made == 1


def test_files_are_used_again_once_they_are_dropped(ends: Ends) -> None:
    """Sending round after round alternates between as many files as the receiver holds at once, and one more."""
    passive, active = ends
    held = None
    for value in range(1, 7):
        sending = InThread(passive.send, Message("train", buffers=[big(value)]), LIMIT_S)
        received = active.receive(LIMIT_S)
        assert sending.result()
        assert received is not None
        assert held is None or bytes(held.buffers[0]) == big(value - 1)
        held = received
        assert bytes(held.buffers[0]) == big(value)

    assert passive._open_end().spool._made == 2
    assert active.moved_bytes() >= 6 * BIG


def test_the_receiver_may_write_and_the_sender_keeps_its_own(ends: Ends) -> None:
    """Writing to a received buffer changes neither the sender's array nor what it sends next."""
    passive, active = ends
    array = np.ones(BIG, np.uint8)
    for _ in range(3):
        sending = InThread(passive.send, Message("train", buffers=[array.data]), LIMIT_S)
        received = active.receive(LIMIT_S)
        assert sending.result()
        assert received is not None
        mine = np.frombuffer(received.buffers[0], np.uint8)
        assert mine.min() == mine.max() == 1
        mine[:] = 9
        del mine, received
    assert array.max() == 1


def test_a_private_mapping_where_pages_must_not_be_shared(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a network file system what the receiver writes stays in its memory and does not reach the file."""
    monkeypatch.setattr(file_pipe, "file_system_of", lambda path: "nfs4")
    passive, active = make(root, "PASSIVE", file_check_interval=0.01), make(root, "ACTIVE", file_check_interval=0.01)
    passive.open("task")
    active.open("task")
    sending = InThread(passive.send, Message("train", buffers=[big(1)]), LIMIT_S)
    received = active.receive(LIMIT_S)
    assert sending.result()
    assert received is not None

    np.frombuffer(received.buffers[0], np.uint8)[:] = 9

    (lent,) = (channel_of(root) / "t").glob("*.lent")
    assert lent.read_bytes()[:BIG] == big(1)
    passive.close()
    active.close()
    assert files_below(root) == []


def test_buffers_outlive_their_pipe(ends: Ends) -> None:
    """What was received stays valid after both ends are closed, and no file is left for it."""
    passive, active = ends
    sending = InThread(passive.send, Message("train", buffers=[big(3)]), LIMIT_S)
    received = active.receive(LIMIT_S)
    assert sending.result()
    passive.close()
    active.close()

    assert received is not None
    assert bytes(received.buffers[0]) == big(3)
    assert files_below(passive._open_end().folder.root) == []


def test_without_inotify_the_interval_wakes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel tells nothing, messages come through all the same."""
    monkeypatch.setattr(Inotify, "start", classmethod(lambda cls: None))
    passive, active = make(root, "PASSIVE", file_check_interval=0.01), make(root, "ACTIVE", file_check_interval=0.01)
    passive.open("task")
    active.open("task")
    receiving = InThread(active.receive, LIMIT_S)

    assert passive.send(Message("train", b"x"), LIMIT_S)
    received = receiving.result()
    assert received is not None
    assert received.body == b"x"
    passive.close()
    active.close()


def test_clear_drops_what_waits(ends: Ends) -> None:
    """After `clear` nothing waits, not even what is no message, and big files may be used again."""
    passive, active = ends
    sends = [InThread(passive.send, Message("train", buffers=[big(value)]), LIMIT_S) for value in (1, 2)]
    wait_until(lambda: len(active._open_end().folder.waiting()) == 2, "both are there")
    (active._open_end().folder.inbox / "nonsense").write_bytes(b"x")

    active.clear()

    assert active.receive(0) is None
    assert [each.result() for each in sends] == [True, True]
    gc.collect()
    assert list((channel_of(passive._open_end().folder.root) / "t").glob("*.lent")) == []


def test_closing_wakes_whoever_waits(ends: Ends) -> None:
    """A receive and a send that wait for ever return with BrokenPipeError when a third thread closes their end."""
    passive, _ = ends
    calls = [InThread(passive.receive), InThread(passive.send, Message("train", buffers=[big()]))]
    wait_until(lambda: any(passive._open_end().folder.outbox.iterdir()), "the message waits")
    assert all(call.is_running for call in calls)

    passive.close()

    for call in calls:
        with pytest.raises(BrokenPipeError, match="closed"):
            call.result()
    with pytest.raises(BrokenPipeError, match="closed"):
        passive.send(Message("train"))


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
    assert files_below(root) == []


def test_when_the_peer_closes_its_end(ends: Ends) -> None:
    """Waiting ends with BrokenPipeError at once, and goes on when the peer is back."""
    passive, active = ends
    receiving = InThread(passive.receive)

    active.close()

    with pytest.raises(BrokenPipeError, match="was closed by process"):
        receiving.result()
    with pytest.raises(BrokenPipeError, match="was closed by process"):
        passive.send(Message("train"))
    active.open("task")
    wait_until(lambda: not passive._open_end().watch._lost, "it is noticed")
    sending = InThread(passive.send, Message("train"), LIMIT_S)
    assert active.receive(LIMIT_S) is not None
    assert sending.result()


def test_an_end_that_nobody_refers_to_is_closed(root: Path) -> None:
    """A pipe that is dropped without being closed leaves its place."""
    end = make(root, "ACTIVE")
    end.open("task")
    del end
    gc.collect()
    assert files_below(root) == []


def test_only_files_of_this_user(ends: Ends) -> None:
    """Folders are 0700 and files 0600."""
    passive, _ = ends
    sending = InThread(passive.send, Message("train", buffers=[big()]))
    folder = passive._open_end().folder
    wait_until(lambda: any(folder.outbox.iterdir()), "the message waits")

    found = {path: path.stat().st_mode & 0o777 for path in folder.root.rglob("*")}

    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in found.items())
    passive.close()
    with pytest.raises(BrokenPipeError):
        sending.result()


def test_signs_of_life(ends: Ends) -> None:
    """The time of the peer's last sign of life grows when it takes or sends a message."""
    passive, active = ends
    wait_until(lambda: passive.get_last_peer_active_time() > 0, "the peer is there")
    before = passive.get_last_peer_active_time()
    sending = InThread(passive.send, Message("train"), LIMIT_S)
    assert active.receive(LIMIT_S)
    assert sending.result()
    assert passive.get_last_peer_active_time() > before


def test_a_forked_process_gives_nothing_back(root: Path) -> None:
    """That a child drops its copies of the views says nothing about its parent's."""
    passive = make(root, "PASSIVE")
    passive.open("task")
    peer = Peer(passive, "keep_in_parent")
    assert passive.send(Message("train", b"", [big(1)]), LIMIT_S)
    peer.expect("dropped")

    assert passive.send(Message("again", b"", [big(2)]), 0) is False
    assert len(list((channel_of(root) / "t").glob("*.lent"))) == 1
    passive.close()
    peer.leave()
    assert files_below(root) == []


# -- places --


def test_a_second_end_of_the_same_mode(ends: Ends, root: Path) -> None:
    """It is refused, naming the process that was first, and disturbs nobody."""
    passive, active = ends
    with pytest.raises(UsageError, match=rf"is open already: process {os.getpid()} on "):
        make(root, "ACTIVE").open("task")
    with pytest.raises(UsageError, match="open already"):
        active.open("task")
    second = Peer(active, "hold", side=ExportMode.SELF, ready="refused")
    second.leave()

    sending = InThread(passive.send, Message("train"), LIMIT_S)
    assert active.receive(LIMIT_S)
    assert sending.result()


def test_channels_and_jobs_do_not_meet(root: Path) -> None:
    """Ends of another channel, site or job have places of their own below the same root."""
    ends = [
        FilePipe("ACTIVE", str(root), token=token, site_name=site)
        for token, site in (("job", "site-1"), ("job", "site-2"), ("other", "site-1"), ("", ""))
    ]
    for end in ends:
        end.open("task")
    metric = make(root, "ACTIVE")
    metric.open("metric")
    sending = InThread(metric.send, Message("loss"), 0)
    assert sending.result() is False
    for end in ends:
        assert end.receive(0) is None
    for end in (*ends, metric):
        end.close()
    assert files_below(root) == []


def a_record(**fields: object) -> str:
    """The record of this process with other fields."""
    return json.dumps(asdict(replace(Owner.here(), **fields)))  # type: ignore[arg-type]


def dead_pid() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize(("touched_before_s", "is_taken"), [(5.0, True), (100.0, False)])
def test_an_owner_on_another_machine(root: Path, touched_before_s: float, is_taken: bool) -> None:
    """Its record holds while it is touched now and then, by the clock of the file system."""
    record = channel_of(root) / "ACTIVE.owner"
    record.parent.mkdir(parents=True, mode=0o700)
    record.write_text(a_record(machine="elsewhere", host="node7", pid=4))
    now = record.stat().st_mtime
    os.utime(record, (now, now - touched_before_s))
    end = make(root, "ACTIVE")

    if is_taken:
        with pytest.raises(UsageError, match="process 4 on node7"):
            end.open("task")
        record.unlink()
    end.open("task")
    end.close()

    assert files_below(root) == []


@pytest.mark.parametrize("fields", [{"pid": -1}, {"started": 1}, {}], ids=["no process", "another start", "unreadable"])
def test_a_record_whose_owner_is_dead_is_taken_over(root: Path, fields: dict[str, int]) -> None:
    """Whether its process is gone or its number is somebody else's by now, or it cannot be read and is old."""
    record = channel_of(root) / "ACTIVE.owner"
    record.parent.mkdir(parents=True, mode=0o700)
    if fields.get("pid"):
        fields = {"pid": dead_pid()}
    record.write_text(a_record(**fields) if fields else "{")
    if not fields:
        with pytest.raises(UsageError, match="just starting"):
            make(root, "ACTIVE").open("task")
        os.utime(record, (1, 1))
    end = make(root, "ACTIVE")

    end.open("task")

    end.close()
    assert files_below(root) == []


def test_an_end_whose_place_was_taken_over(root: Path) -> None:
    """When another machine has taken the place, because nothing was heard of this one, this end is broken."""
    end = make(root, "ACTIVE")
    end.open("task")
    receiving = InThread(end.receive)
    record = channel_of(root) / "ACTIVE.owner"
    record.write_text(a_record(machine="elsewhere", host="node7", pid=4))

    with pytest.raises(BrokenPipeError, match="process 4 on node7 has taken over"):
        receiving.result()
    end.close()
    assert record.exists()


def test_a_peer_on_another_machine_that_falls_silent(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is gone when its record has not been touched for long enough, by the clock of this end."""
    monkeypatch.setattr("flarebus_pipes._watch.SILENCE_S", 0.5)
    end = make(root, "PASSIVE")
    end.open("task")
    (channel_of(root) / "ACTIVE.owner").write_text(a_record(machine="elsewhere", host="node7", pid=4))

    with pytest.raises(BrokenPipeError, match="is silent: process 4 on node7"):
        end.receive(LIMIT_S)
    end.close()


def test_the_record_is_touched(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open end touches its record again and again, so that others can see it live."""
    monkeypatch.setattr("flarebus_pipes._watch.BEAT_S", 0.01)
    end = make(root, "PASSIVE")
    end.open("task")
    record = channel_of(root) / "PASSIVE.owner"
    os.utime(record, (1, 1))
    wait_until(lambda: record.stat().st_mtime > 2, "it is touched")
    end.close()


def test_a_folder_of_somebody_else(root: Path) -> None:
    """A folder that others may enter is closed to them before anything is put there."""
    channel_of(root).mkdir(parents=True)
    channel_of(root).chmod(0o777)
    end = make(root, "ACTIVE")
    end.open("task")
    assert channel_of(root).stat().st_mode & 0o777 == 0o700
    end.close()


# -- arguments --


@pytest.mark.parametrize(
    ("given", "parameter"),
    [
        ({"mode": "BOTH", "root_path": "r"}, "mode"),
        ({"mode": "ACTIVE"}, "root_path"),
        ({"mode": "ACTIVE", "root_path": "r", "file_check_interval": 0}, "file_check_interval"),
        ({"mode": "ACTIVE", "root_path": "r", "token": "../up"}, "token"),
        ({"mode": "ACTIVE", "root_path": "r", "site_name": "a/b"}, "site_name"),
    ],
)
def test_wrong_arguments(given: dict[str, str], parameter: str) -> None:
    """They are refused by name before anything is touched."""
    with pytest.raises(ConfigError) as caught:
        FilePipe(**given)  # type: ignore[arg-type]
    assert caught.value.parameter == parameter


@pytest.mark.parametrize("name", ["", "..", "a/b", "x y"])
def test_a_channel_that_is_no_folder(root: Path, name: str) -> None:
    """Names of channels follow the grammar of names."""
    with pytest.raises(ConfigError):
        make(root, "ACTIVE").open(name)
    assert files_below(root) == []


def test_export_makes_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments are JSON values that make the ends, from any folder; the default root is below the workspace."""
    monkeypatch.chdir(tmp_path)
    first = FilePipe(Mode.PASSIVE, workspace_dir="site", token="job", site_name="site-1", file_check_interval=0.5)
    path, arguments = first.export(ExportMode.PEER)
    own = json.loads(json.dumps(first.export(ExportMode.SELF)[1]))
    assert path == "flarebus_pipes.file_pipe.FilePipe"
    assert own == {**arguments, "mode": "PASSIVE"}
    assert arguments["mode"] == "ACTIVE"
    monkeypatch.chdir("/")
    second = FilePipe(**json.loads(json.dumps(arguments)))

    first.open("task")
    second.open("task")

    assert second._open_end().folder.path == tmp_path / "site" / "pipe" / "job" / "site-1" / "task"
    first.close()
    second.close()
    assert files_below(tmp_path) in (["site"], [])


def test_what_does_not_fit_is_refused(ends: Ends) -> None:
    """A manifest, a body above its limit and too many buffers are errors of the caller; the pipe stays usable."""
    passive, active = ends
    with pytest.raises(UsageError, match="no manifests"):
        passive.send(Message("train", manifest=Manifest(bytes(16), "server", (1,))))
    with pytest.raises(ConfigError, match="body"):
        passive.send(Message("train", bytes(1024 * 1024 + 1), [big()]))
    with pytest.raises(ConfigError, match="buffers"):
        passive.send(Message("train", b"", [b""] * (256 * 1024 + 1)))
    sending = InThread(passive.send, Message("train", bytes(1024 * 1024), [big()]), LIMIT_S)
    assert active.receive(LIMIT_S)
    assert sending.result()
