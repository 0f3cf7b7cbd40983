"""FilePipe: what happens when files are not what they should be, processes die, folders vanish and disks are full."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flarebus_pipes import _folder, file_pipe
from flarebus_pipes._inotify import file_system_of
from flarebus_pipes._record import MAX_RECORD_BYTES, pack
from flarebus_pipes._watch import Watch
from flarebus_pipes.file_pipe import FilePipe

from flarebus.errors import DecodeError
from flarebus.pipes import ExportMode, Message
from tests.pipes.file_ends import BIG, Ends, big, channel_of, files_below, make
from tests.pipes.links import LIMIT_S, InThread, Peer, mount_small, wait_until


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


# -- hostile and broken files --

HEAD = Message("train").head()
SEGMENT = f"PASSIVE-{'0' * 16}-1-1"


def tampered() -> dict[str, bytes]:
    """Files that are no messages, by what is wrong with them."""
    good = pack(b"body", [memoryview(b"12345")])
    far = pack(b"body", [memoryview(bytes(BIG))], SEGMENT)
    lengths_at = 16 + len(SEGMENT)
    return {
        "empty": b"",
        "cut in the head": good[:10],
        "cut in the body": good[:26],
        "cut in the buffers": good[:-1],
        "too long": good + b"x",
        "another magic": b"nope" + good[4:],
        "too many buffers": good[:12] + b"\xff\xff\xff\x7f" + good[16:],
        "a body of 4 GB": good[:8] + b"\xff\xff\xff\xff" + good[12:],
        "a buffer of 2^63 bytes": good[:16] + (1 << 63).to_bytes(8, "little") + good[24:],
        "longer than its file": far[:lengths_at] + (1 << 40).to_bytes(8, "little") + far[lengths_at + 8 :],
        "a file elsewhere": pack(b"", [memoryview(b"1")], "../../../../etc/passwd"),
        "a file of the reader's": pack(b"", [memoryview(b"1")], SEGMENT.replace("PASSIVE", "ACTIVE")),
        "a file that is not there": pack(b"", [memoryview(b"1")], SEGMENT.replace("-1-1", "-2-1")),
        "huge": bytes(MAX_RECORD_BYTES + 1),
    }


@pytest.mark.parametrize("what", sorted(tampered()))
def test_a_file_that_is_no_message(ends: Ends, what: str) -> None:
    """It is a DecodeError, once, and the next message comes through."""
    passive, active = ends
    folder = active._open_end().folder
    (folder.temporary / SEGMENT).write_bytes(bytes(BIG))
    (folder.inbox / f"{0:016d}.{HEAD}").write_bytes(tampered()[what])

    with pytest.raises(DecodeError):
        active.receive(0)
    assert active.receive(0) is None
    sending = InThread(passive.send, Message("train", b"", [big()]), LIMIT_S)
    assert active.receive(LIMIT_S)
    assert sending.result()
    for path in folder.temporary.glob(f"{SEGMENT}*"):
        path.unlink()


@pytest.mark.parametrize("name", ["readme", f"{0:016d}.nonsense", f"{0:016d}.REQ.a.b.", f"{0:016d}.REP.t.{'0' * 32}."])
def test_a_name_that_is_none(ends: Ends, name: str) -> None:
    """A file whose name says nothing sensible is dropped with a DecodeError."""
    _, active = ends
    (active._open_end().folder.inbox / name).write_bytes(pack(b"", []))
    with pytest.raises(DecodeError):
        active.receive(0)
    assert active.receive(0) is None


def test_things_that_are_no_files(ends: Ends, tmp_path: Path) -> None:
    """A link, a fifo and a folder in the place of a message neither hang nor lead anywhere."""
    _, active = ends
    inbox = active._open_end().folder.inbox
    (tmp_path / "secret").write_bytes(pack(b"secret", []))
    (inbox / f"{0:016d}.{HEAD}").symlink_to(tmp_path / "secret")
    os.mkfifo(inbox / f"{1:016d}.{HEAD}")
    (inbox / f"{2:016d}.{HEAD}").mkdir()
    (inbox / ".nfs0000").write_bytes(b"")

    for _ in range(3):
        with pytest.raises(DecodeError):
            active.receive(0)

    assert active.receive(0) is None
    assert (tmp_path / "secret").exists()
    (inbox / ".nfs0000").unlink()


def test_a_folder_that_vanishes(root: Path) -> None:
    """Whoever waits hears it at once, by its name."""
    passive, active = make(root, "PASSIVE"), make(root, "ACTIVE")
    passive.open("task")
    active.open("task")
    calls = [InThread(passive.receive), InThread(passive.send, Message("train")), InThread(passive.receive)]
    wait_until(lambda: any(passive._open_end().folder.outbox.iterdir()), "the message waits")

    # Whoever waits may still be moving a file when it goes.
    wait_until(lambda: shutil.rmtree(root / "job", ignore_errors=True) or not (root / "job").exists(), "it is gone")

    for call in calls:
        with pytest.raises(BrokenPipeError, match=str(channel_of(root))):
            call.result()
    for end in (passive, active):
        with pytest.raises(BrokenPipeError, match=str(channel_of(root))):
            end.send(Message("train", b"", [big()]))
        end.close()
    assert files_below(root) == []


def test_a_message_in_a_folder_that_vanished_was_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That its file is gone is no receipt when everything is gone, also before the watch has noticed."""
    monkeypatch.setattr(Watch, "_look_at_records", lambda watch: None)
    passive = make(root, "PASSIVE")
    passive.open("task")
    sending = InThread(passive.send, Message("train"))
    wait_until(lambda: any(passive._open_end().folder.outbox.iterdir()), "the message waits")

    shutil.rmtree(root / "job")

    with pytest.raises(BrokenPipeError, match="is gone"):
        sending.result()
    passive.close()


@pytest.mark.parametrize("name", ["x", "y", "t"])
def test_a_subfolder_that_another_end_removed_is_made_again(ends: Ends, name: str) -> None:
    """An end that leaves while another one comes may remove what is empty; that breaks nothing."""
    (ends[0]._open_end().folder.path / name).rmdir()

    for sender, receiver in (ends, reversed(ends)):
        sending = InThread(sender.send, Message("train", b"", [big()]), LIMIT_S)
        assert receiver.receive(LIMIT_S) is not None
        assert sending.result()


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
        expected = np.frombuffer(buffers[0], np.float32) + 1
        assert np.array_equal(np.frombuffer(answer.buffers[0], np.float32), expected)
    passive.close()
    assert peer.process.wait(LIMIT_S) == 0
    peer.leave()
    assert files_below(root) == []


def test_a_peer_killed_while_it_waits_to_be_read(root: Path) -> None:
    """What it had sent whole is received, then it is gone; closing leaves nothing."""
    passive = make(root, "PASSIVE")
    passive.open("task")
    peer = Peer(passive, "send")
    peer.expect("sending")
    wait_until(lambda: list((channel_of(root) / "y").iterdir()), "the message waits")
    peer.kill()

    received = passive.receive(LIMIT_S)

    assert received is not None
    assert received.body == b"body"
    assert np.frombuffer(received.buffers[0], np.float32).sum() == len(received.buffers[0]) // 4
    with pytest.raises(BrokenPipeError, match=f"process {peer.process.pid} on .* has ended"):
        passive.receive()
    with pytest.raises(BrokenPipeError, match="has ended"):
        passive.send(Message("train"))
    passive.close()
    assert files_below(root) == []


def test_a_peer_killed_while_it_writes(root: Path) -> None:
    """Half a message is never received: whoever waits hears that the peer is gone, and closing leaves nothing."""
    passive = make(root, "PASSIVE")
    passive.open("task")
    receiving = InThread(passive.receive)
    peer = Peer(passive, "send")
    peer.expect("sending")
    wait_until(lambda: list((channel_of(root) / "t").glob("ACTIVE-*")), "it writes")
    os.kill(peer.process.pid, signal.SIGSTOP)
    peer.kill()

    try:
        received = receiving.result()
    except BrokenPipeError:
        received = None
    # Unless it was quicker than this test.
    assert received is None or np.frombuffer(received.buffers[0], np.float32).min() == 1
    del received
    with pytest.raises(BrokenPipeError, match="has ended"):
        passive.receive()
    passive.close()
    assert files_below(root) == []


def test_a_receiver_killed_with_buffers_in_its_hands(root: Path) -> None:
    """The sender hears it, and takes the receiver's files along when it closes."""
    passive = make(root, "PASSIVE")
    passive.open("task")
    peer = Peer(passive, "keep")
    assert passive.send(Message("train", b"", [big()]), LIMIT_S)
    peer.expect(f"received {BIG}")
    sending = InThread(passive.send, Message("train", b"", [big()]))
    assert len(list((channel_of(root) / "t").glob("*.lent"))) == 1

    peer.kill()

    with pytest.raises(BrokenPipeError, match="has ended"):
        sending.result()
    passive.close()
    assert files_below(root) == []


def test_a_new_trainer_in_the_place_of_a_killed_one(root: Path) -> None:
    """The next one takes the place over and sweeps up; the client job's end goes on without being opened again."""
    passive = make(root, "PASSIVE")
    passive.open("task")
    first = Peer(passive, "send")
    first.expect("sending")
    wait_until(lambda: list((channel_of(root) / "y").iterdir()), "the message waits")
    first.kill()
    second = Peer(passive, "echo")
    wait_until(lambda: passive.get_last_peer_active_time() > 0 and not passive._open_end().watch._lost, "it is noticed")

    assert passive.send(Message("train", b"", [bytes(BIG)]), LIMIT_S)
    answer = passive.receive(LIMIT_S)

    assert answer is not None
    assert answer.topic == "train"
    passive.close()
    second.leave()
    assert files_below(root) == []


@pytest.mark.parametrize("token", ["job", "another"])
def test_when_both_ends_were_killed_the_next_open_sweeps(root: Path, token: str) -> None:
    """Nothing of them is left once an end of the same job, or of another below the same root, has opened."""
    passive = make(root, "PASSIVE")
    sender = Peer(passive, "send_again_and_again")
    keeper = Peer(passive, "keep", side=ExportMode.SELF)
    keeper.expect("received")
    wait_until(lambda: list((channel_of(root) / "y").iterdir()), "a second message waits")
    sender.kill()
    keeper.kill()
    assert len(files_below(channel_of(root))) > 5

    end = FilePipe("ACTIVE", str(root), token=token, site_name="site-1")
    end.open("task")

    here = end._open_end().folder
    assert sorted(path for path in root.rglob("*") if path.is_file()) == [here.record]
    end.close()
    assert files_below(root) == []


def test_what_a_live_peer_holds_is_left_to_it(root: Path) -> None:
    """An end that takes over from a dead one does not touch what the peer has mapped."""
    active = make(root, "ACTIVE")
    active.open("task")
    first = Peer(active, "send_again_and_again")
    received = active.receive(LIMIT_S)
    assert received is not None
    first.kill()
    second = make(root, "PASSIVE")

    second.open("task")
    record = second._open_end().folder.record.read_text()
    wait_until(lambda: (peer := active._open_end().watch._peer) and peer.nonce in record, "it is noticed")

    assert np.frombuffer(received.buffers[0], np.float32).min() == 1
    assert len(list((channel_of(root) / "t").glob("*.lent"))) == 1
    del received
    gc.collect()
    assert list((channel_of(root) / "t").glob("PASSIVE-*")) == []
    second.close()
    active.close()
    assert files_below(root) == []


def test_a_process_that_ends_without_closing(root: Path) -> None:
    """An open pipe is closed at the end of the process, and a forked child does not do that for its parent."""
    code = (
        "import os, sys; from flarebus_pipes.file_pipe import FilePipe\n"
        f"end = FilePipe('ACTIVE', {str(root)!r}, token='job', site_name='site-1'); end.open('task')\n"
        "child = os.fork()\n"
        "if not child: sys.exit()\n"
        "os.waitpid(child, 0)\n"
        "print(os.listdir(end._open_end().folder.path), flush=True)\n"
    )
    # From Python 3.12 on a fork of a process with threads is warned about.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, ("pipes", ".")))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert "ACTIVE.owner" in done.stdout
    assert files_below(root) == []


# -- full disks --


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    if not mount_small(folder, 2):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_without_room_for_the_buffers(small_disk: Path) -> None:
    """It is an OSError that says how much was wanted and where; what fits is sent after it, over spare files if so."""
    passive, active = make(small_disk, "PASSIVE"), make(small_disk, "ACTIVE")
    passive.open("task")
    active.open("task")
    for nbytes in (BIG, 3 * BIG):
        sending = InThread(passive.send, Message("train", b"", [big(1, nbytes)]), LIMIT_S)
        assert active.receive(LIMIT_S) is not None
        assert sending.result()

    with pytest.raises(OSError, match=r"no room for 5046272 bytes.*/t/PASSIVE-") as caught:
        passive.send(Message("train", b"", [bytes(5_000_000)]))

    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in (channel_of(small_disk) / "t").iterdir()] == []
    sending = InThread(passive.send, Message("train", b"", [big(2, 4 * BIG)]), LIMIT_S)
    assert active.receive(LIMIT_S) is not None
    assert sending.result()
    passive.close()
    active.close()
    assert files_below(small_disk) == []


def test_a_disk_without_room_for_the_message(small_disk: Path) -> None:
    """A message file that does not fit is an OSError too, and no half of it stays."""
    passive = make(small_disk, "PASSIVE")
    passive.open("task")
    (small_disk / "ballast").write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))

    with pytest.raises(OSError, match=r"a message of \d+ bytes"):
        passive.send(Message("train", bytes(100_000)))

    (small_disk / "ballast").unlink()
    assert list((channel_of(small_disk) / "t").iterdir()) == []
    assert list((channel_of(small_disk) / "x").iterdir()) == []
    passive.close()
    assert files_below(small_disk) == []


def test_a_network_quota_is_found_when_writing(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where space is not reserved first, the write itself is the OSError."""
    monkeypatch.setattr(file_pipe, "file_system_of", lambda path: "nfs4")
    passive = make(small_disk, "PASSIVE")
    passive.open("task")
    with pytest.raises(OSError, match="no room for 5046272 bytes"):
        passive.send(Message("train", b"", [bytes(5_000_000)]))
    assert list((channel_of(small_disk) / "t").iterdir()) == []
    passive.close()


def test_file_systems_are_known_by_their_mounts(tmp_path: Path) -> None:
    """The innermost mount above a path says what it is on; of two at one place the later one."""
    mounts = tmp_path / "mountinfo"
    shared = tmp_path / "a b"
    shared.mkdir()
    escaped = str(shared).replace(" ", r"\040")
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/root rw\n"
        f"2 1 0:2 / {escaped} rw shared:1 - nfs server:/a rw\n"
        f"3 1 0:3 / {escaped} rw shared:2 master:1 - nfs4 server:/b rw\n"
    )
    assert file_system_of(shared / "x", str(mounts)) == "nfs4"
    assert file_system_of(tmp_path, str(mounts)) == "ext4"
    assert file_system_of(tmp_path, str(tmp_path / "none")) == ""


def test_a_rename_that_was_done_twice(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a file server has moved a file but its answer was lost, the message is not lost with it."""
    passive, active = ends
    real = os.rename

    def twice(source: Path, target: Path) -> None:
        real(source, target)
        if source.parent in (active._open_end().folder.inbox, passive._open_end().folder.outbox):
            raise FileNotFoundError(errno.ENOENT, "moved before", str(source))

    sending = InThread(passive.send, Message("train"), LIMIT_S)
    wait_until(active._open_end().folder.waiting, "it waits")
    monkeypatch.setattr(_folder.os, "rename", twice)

    assert active.receive(0) is not None
    assert sending.result()
    assert passive.send(Message("train"), 0) is False
