"""CellPipe: who may be whose trainer, manifests that go on, ends that vanish, and what is left of them."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from flarebus_pipes import _bus, cell_pipe
from flarebus_pipes.cell_pipe import CellPipe

from flarebus.cell import Cell
from flarebus.errors import ConfigError, DecodeError, EncodeError, LinkError, RemoteError, SourceLost
from flarebus.message import Manifest
from flarebus.pipes import ExportMode, Message, Mode
from flarebus.wire import MAX_BODY_BYTES
from tests.core.bus import WAIT_S, Bus, error_of, value_of
from tests.pipes.cell_ends import ENV_KEYS, Setting
from tests.pipes.links import LIMIT_S, InThread, wait_until

BIG = 1_000_000


@pytest.fixture(params=["attached", "ipc", "curve"])
def setting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    """A bus; nothing may be left on it when the test has closed its ends."""
    with Setting(request.param) as setting:
        if (keys := setting.keys()) is not None:
            monkeypatch.setenv(ENV_KEYS, keys)
        yield setting
        wait_until(lambda: not setting.leftovers(), f"nothing is left: {setting.leftovers()}")


@pytest.fixture
def one() -> Iterator[Setting]:
    """For what has nothing to do with the way between the ends."""
    with Setting() as setting:
        yield setting
        wait_until(lambda: not setting.leftovers(), f"nothing is left: {setting.leftovers()}")


def big(value: int = 1, nbytes: int = BIG) -> bytes:
    return bytes([value]) * nbytes


def closed(*ends: CellPipe) -> None:
    for end in ends:
        end.close()


def exchange(sender: CellPipe, receiver: CellPipe, message: Message) -> Message:
    sending = InThread(sender.send, message, LIMIT_S)
    received = receiver.receive(LIMIT_S)
    assert sending.result() is True
    assert received is not None
    return received


def content(end: CellPipe, message: Message) -> list[bytes]:
    return [bytes(buffer) for buffer in end.pull(message).result(LIMIT_S)]


def offers(cell: Cell) -> int:
    return cell.statistics().offers_held


# --- whose trainer is who


def test_a_second_trainer_is_refused_and_the_first_goes_on(setting: Setting) -> None:
    """Two processes with one configuration have different addresses; the one that came first stays."""
    job, first = setting.pair()
    exchange(first, job, Message("hello"))
    second = other_process(setting)

    found = InThread(second.send, Message("hello"), LIMIT_S)

    with pytest.raises(BrokenPipeError, match=re.escape(f"has a trainer already ({first._cell.address})")):
        found.result()
    exchange(first, job, Message("again"))
    exchange(job, first, Message("task"))
    closed(job, first, second)


def other_process(setting: Setting, channel: str = "task") -> CellPipe:
    """A trainer's end that shares no cell with others of this process."""
    known, _bus.dialled._cells = _bus.dialled._cells, {}
    try:
        end = setting.make("ACTIVE")
        end.open(channel)
    finally:
        fresh, _bus.dialled._cells = _bus.dialled._cells, known
    # Found again under a key of its own when it is closed.
    ((endpoint, entry),) = fresh.items()
    mine = (endpoint[0], f"{endpoint[1]}/other", *endpoint[2:])
    known[mine] = entry
    end._endpoint = lambda: mine  # type: ignore[method-assign]
    return end


def test_nobody_else_is_taken_for_the_trainer(one: Setting) -> None:
    """A cell that does not live under the site's address is no trainer, though it came first; the trainer then is."""
    job = one.make("PASSIVE")
    job.open("task")
    stranger = one.bus.connect("site-2.job.0.x")
    said = stranger.request("site-1.job", "pipe", "message", ["task", Message("hello").head(), b""])

    assert "waits for its own trainer" in str(error_of(said))
    trainer = one.make("ACTIVE")
    trainer.open("task")
    exchange(trainer, job, Message("hello"))
    closed(job, trainer)


def test_two_trainers_of_one_process_have_one_cell_and_a_name_each_time_anew(one: Setting) -> None:
    """Task and metric channel share a connection; who comes back has another nonce, so nobody mistakes one for one
    before."""
    job = one.make("PASSIVE"), one.make("PASSIVE")
    trainer = one.make("ACTIVE"), one.make("ACTIVE")
    for ends in (job, trainer):
        ends[0].open("task")
        ends[1].open("metric")
    cell = trainer[0]._cell
    assert trainer[1]._cell is cell
    assert cell is not None
    first = str(cell.address)

    closed(trainer[0])
    exchange(trainer[1], job[1], Message("record"))
    closed(trainer[1], *job)
    assert re.fullmatch(r"site-1\.job\.0\.[0-9a-f]{16}", first)
    trainer[0].open("task")
    assert trainer[0]._cell is not None
    assert str(trainer[0]._cell.address) != first
    closed(trainer[0])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (None, "not a message"),
        (["task"], "not a message"),
        (["task", "head", "text"], "not a message"),
        (["task", 1, b""], "not a message"),
        (["task", "head", None], "not a message"),
        ({"task": 1}, "not a message"),
    ],
)
def test_what_is_no_message_is_refused_and_told(one: Setting, fields: Any, expected: str) -> None:
    """Whatever a cell sends, the end goes on and the sender hears what was wrong."""
    job, trainer = one.pair()
    sent = trainer._cell.request("site-1.job", "pipe", "message", fields)  # type: ignore[union-attr]

    error = error_of(sent)
    assert isinstance(error, RemoteError)
    assert (error.kind, expected in error.text) == ("DecodeError", True)
    exchange(trainer, job, Message("hello"))
    closed(job, trainer)


def test_a_head_that_is_none_costs_only_its_message(one: Setting) -> None:
    """A message with a broken head is answered with that, and the one after it comes."""
    job, trainer = one.pair()
    sent = trainer._cell.request("site-1.job", "pipe", "message", ["task", "no.head", b""])  # type: ignore[union-attr]

    with pytest.raises(DecodeError, match="not the head of a message"):
        job.receive(LIMIT_S)
    assert "not the head of a message" in str(error_of(sent))
    exchange(trainer, job, Message("hello"))
    closed(job, trainer)


# --- channels that are not open yet


def test_words_for_a_rank_that_is_not_expected_yet_wait(one: Setting) -> None:
    """Ranks may come before rank 0 has said how many there are: what they say is heard when their channel is opened."""
    job, trainer = one.pair()
    others = [one.make("ACTIVE", rank=rank) for rank in (1, 2)]
    sending = []
    for rank, other in enumerate(others, start=1):
        other.open(f"task-{rank}")
        sending.append(InThread(other.send, Message(f"hello_{rank}"), LIMIT_S))
    exchange(trainer, job, Message("hello"))
    assert [each.is_running for each in sending] == [True, True]

    ends = []
    for rank in (2, 1):
        ends.append(one.make("PASSIVE"))
        ends[-1].open(f"task-{rank}")
        received = ends[-1].receive(LIMIT_S)
        assert received is not None
        assert received.topic == f"hello_{rank}"
    assert [each.result() for each in sending] == [True, True]
    closed(job, trainer, *others, *ends)


def test_early_words_are_refused_when_the_client_job_stops_listening(one: Setting) -> None:
    """Nobody waits for a channel that will never be opened."""
    job, trainer = one.pair()
    other = one.make("ACTIVE", rank=1)
    other.open("task-1")
    sending = InThread(other.send, Message("hello"), LIMIT_S)
    hub = _bus.hub_of(one.cell)
    wait_until(lambda: hub._early, "its greeting is there")

    job.close()

    wait_until(lambda: not hub._early, "it is refused")
    other.close()
    with pytest.raises(BrokenPipeError):
        sending.result()
    trainer.close()


def test_early_words_of_who_is_gone_are_forgotten(one: Setting) -> None:
    """A rank that came and went leaves its place to the one that comes next."""
    job, trainer = one.pair()
    gone, hub = other_process_rank(one), _bus.hub_of(one.cell)
    wait_until(lambda: hub._early, "its greeting is there")
    gone.close()
    wait_until(lambda: not hub._early, "it is forgotten")

    there, end = one.make("ACTIVE", rank=1), one.make("PASSIVE")
    there.open("task-1")
    end.open("task-1")
    exchange(there, end, Message("hello"))
    closed(job, trainer, there, end)


def other_process_rank(setting: Setting) -> CellPipe:
    end = setting.make("ACTIVE", rank=1)
    end.open("task-1")
    return end


def test_the_client_job_may_come_later(one: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer greets until somebody listens; when nobody does for too long, it says so."""
    monkeypatch.setattr(cell_pipe, "PAUSES_S", (0.001, 0.01))
    trainer = one.make("ACTIVE")
    trainer.open("task")
    assert trainer.send(Message("early"), 0.05) is False
    job = one.make("PASSIVE")
    job.open("task")

    exchange(job, trainer, Message("task"))
    closed(job, trainer)

    monkeypatch.setattr(cell_pipe, "GREET_S", 0.1)
    trainer.open("task")
    with pytest.raises(BrokenPipeError, match=r"site-1\.job"):
        trainer.receive(LIMIT_S)
    trainer.close()


# --- manifests


@pytest.mark.parametrize("size", [100, BIG], ids=["inline", "transfer"])
def test_readers_may_pull_and_nobody_else(setting: Setting, size: int) -> None:
    """A result names the server as a reader: it pulls straight from the trainer; a cell that is not named gets
    nothing, and the client job moves no byte of it."""
    server, stranger = setting.bus.connect("server.job"), setting.bus.connect("site-2.job.0.y")
    job, trainer = setting.pair()
    message = Message("result", b"body", [big(7, size), big(8, size)], readers=["server.job"])
    received = exchange(trainer, job, message)

    if size == BIG:
        assert received.manifest is not None
        assert received.manifest.holder == str(trainer._cell.address)  # type: ignore[union-attr]
        assert pulled(server, received.manifest) == [big(7), big(8)]
        assert isinstance(error_of(stranger.pull(received.manifest, str(stranger.address))), SourceLost)
        assert setting.cell.statistics().bytes_pulled == 0
    assert content(job, received) == [big(7, size), big(8, size)]
    trainer.release_send_cache(message)
    wait_until(lambda: offers(trainer._cell) == 0, "the offer is withdrawn")  # type: ignore[arg-type]
    closed(job, trainer)


def pulled(cell: Cell, manifest: Manifest) -> list[bytes]:
    return [bytes(buffer) for buffer in cell.pull(manifest, str(cell.address)).result(WAIT_S)]


def test_a_manifest_goes_on_to_the_trainer_and_the_bytes_do_not_follow_it(setting: Setting) -> None:
    """What the server offers to the site's address its trainer pulls itself, whichever its nonce; no one else can."""
    server = setting.bus.attach("server.job")
    stranger = setting.bus.connect("site-2.job.0.z")
    payload = server.share_encoded(b"", [big(3)], ["site-1.job"])
    assert payload.manifest is not None
    job, trainer = setting.pair()
    received = exchange(job, trainer, Message("task", b"model", manifest=payload.manifest))

    assert received.manifest == payload.manifest
    assert received.buffers == ()
    assert content(trainer, received) == [big(3)]
    assert trainer.moved_bytes() == BIG
    assert isinstance(error_of(stranger.pull(payload.manifest, str(stranger.address))), SourceLost)
    statistics = setting.cell.statistics()
    assert (statistics.bytes_pulled, statistics.bytes_served, job.moved_bytes()) == (0, 0, 0)
    closed(job, trainer)
    server.withdraw(payload)
    assert offers(server) == 0


def test_a_body_as_big_as_a_message_may_be_travels_beside_it(one: Setting) -> None:
    """The pipe's own words cost a body no room; with a manifest, where there is none, its sender is told."""
    job, trainer = one.pair()
    body = big(5, MAX_BODY_BYTES)
    received = exchange(trainer, job, Message("result", body, [big(6, 10)]))

    assert received.body == body
    assert content(job, received) == [big(6, 10)]
    with pytest.raises(EncodeError, match="with a manifest"):
        trainer.send(Message("result", body, manifest=Manifest(bytes(16), "server.job", (1,))), LIMIT_S)
    exchange(trainer, job, Message("after"))
    closed(job, trainer)


def test_a_message_that_was_sent_in_vain_is_offered_once(one: Setting) -> None:
    """Sending again uses the same offer; closing withdraws it, also at an end whose cell lives on."""
    job, trainer = one.pair()
    exchange(trainer, job, Message("hello"))
    for sender, cell in ((trainer, trainer._cell), (job, one.cell)):
        assert cell is not None
        message = Message("unread", b"", [big()])
        for _ in range(3):
            assert sender.send(message, 0.02) is False
        assert offers(cell) == 1

    job.close()

    wait_until(lambda: offers(one.cell) == 0, "the client job's offer is withdrawn")
    trainer.close()


# --- ends that vanish


def test_an_end_hears_at_once_that_its_trainer_is_gone(setting: Setting) -> None:
    """Who waits for a word, and who waits for a word of his to be read, hears it; and what came before is read."""
    job, trainer = setting.pair()
    exchange(trainer, job, Message("hello"))
    last = InThread(trainer.send, Message("goodbye"), LIMIT_S)
    hub = _bus.hub_of(setting.cell)
    wait_until(lambda: job._waiting, "its last word is there")
    unread = InThread(job.send, Message("task"), LIMIT_S)
    wait_until(lambda: job._sending, "the task is on its way")

    trainer.close()

    with pytest.raises(BrokenPipeError):
        last.result()
    with pytest.raises(BrokenPipeError):
        unread.result()
    received = job.receive(LIMIT_S)
    assert received is not None
    assert received.topic == "goodbye"
    with pytest.raises(BrokenPipeError, match="is gone"):
        job.receive(None)
    with pytest.raises(BrokenPipeError, match="is gone"):
        job.send(Message("task"), None)
    assert hub._ends
    job.close()


def test_closing_one_channel_refuses_what_waits_there_though_the_cell_lives_on(one: Setting) -> None:
    """A sender whose reader closes its end is told, though the other channels between the two go on."""
    tasks = one.pair()
    metrics = one.pair("metric")
    exchange(tasks[1], tasks[0], Message("hello"))
    exchange(metrics[1], metrics[0], Message("record"))
    for here, there in (tasks, tasks[::-1]):
        unread = InThread(here.send, Message("unread", b"", [big()]), None)
        wait_until(lambda there=there: there._waiting, "it is there")
        there.close()
        with pytest.raises(BrokenPipeError, match="closed"):
            unread.result()
        here.close()
        for end in tasks:
            end.open("task")
        exchange(tasks[1], tasks[0], Message("hello"))

    exchange(metrics[1], metrics[0], Message("record"))
    closed(*tasks, *metrics)


@pytest.mark.parametrize("mode", list(Mode))
def test_close_wakes_whoever_waits_at_its_own_end(one: Setting, mode: Mode) -> None:
    """Receivers and senders return, also a client job that never met its trainer."""
    ends = one.pair()
    metrics = one.pair("metric")  # keeps the trainer's cell open
    end = ends[0] if mode is Mode.PASSIVE else ends[1]
    waiting = [InThread(end.receive, None), InThread(end.send, Message("unread"), None)]
    lonely = one.make("PASSIVE")
    lonely.open("nobody")
    waiting.append(InThread(lonely.send, Message("unread"), None))

    end.close()
    lonely.close()

    for each in waiting:
        with pytest.raises(BrokenPipeError, match="closed"):
            each.result()
    closed(*ends, *metrics)


def test_a_router_that_goes_ends_both_ends() -> None:
    """When the bus is gone everybody who waits is told so, and closing takes no time."""
    with Setting() as setting:
        job, trainer = setting.pair()
        exchange(trainer, job, Message("hello"))
        waiting = [InThread(end.receive, None) for end in (job, trainer)]

        setting.bus.router.close()

        for each in waiting:
            with pytest.raises(BrokenPipeError, match="gone"):
                each.result()
        closed(job, trainer)
        assert _bus.dialled._cells == {}


def test_a_router_that_is_not_there_is_an_error_of_open(one: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer whose client job is gone hears which endpoint it tried."""
    monkeypatch.setattr(_bus, "CONNECT_S", 0.1)
    trainer = one.make("ACTIVE", root_url=f"ipc://{one.bus.folder}/nobody")

    with pytest.raises(LinkError, match="nobody: the router of the client job cannot be reached"):
        trainer.open("task")
    with pytest.raises(BrokenPipeError, match="not open"):
        trainer.receive(0)


def test_fifty_trainers_one_after_the_other_leave_nothing(one: Setting) -> None:
    """No thread, no listener, no cell is left of any of them."""
    before = set(threading.enumerate())
    for number in range(50):
        job, trainer = one.pair()
        received = exchange(trainer, job, Message("hello", b"", [big(number % 256, 300_000)]))
        assert received.manifest is not None
        closed(job, trainer) if number % 2 else closed(trainer, job)

    assert {thread for thread in set(threading.enumerate()) - before if thread.is_alive()} <= bus_threads(one.bus)


def bus_threads(bus: Bus) -> set[threading.Thread]:
    """The threads of cells that stay."""
    return {thread for thread in threading.enumerate() if "worker-1" in thread.name}


# --- configuration


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"site_name": "a b"}, "site_name"),
        ({"token": ""}, "token"),
        ({"root_url": ""}, "root_url"),
        ({"root_url": "tcp://127.0.0.1:1"}, "keys"),
        ({"mode": "BOTH"}, "mode"),
    ],
)
def test_wrong_arguments_are_named(given: dict[str, Any], expected: str) -> None:
    """A constructor says which argument is wrong; nothing is dialled for that."""
    basic = {"mode": "ACTIVE", "site_name": "site-1", "token": "job", "root_url": "ipc:///tmp/nobody"}

    with pytest.raises(ConfigError) as caught:
        CellPipe(**{**basic, **given})

    assert caught.value.parameter == expected


def test_an_export_holds_no_keys(one: Setting) -> None:
    """What a trainer needs stands in its configuration, but no secret and nothing of this process."""
    keys = {"public": "p", "secret": "s3cret", "server": "s"}
    pipe = one.make("PASSIVE", keys=keys)

    path, args = pipe.export(ExportMode.PEER)

    assert path == "flarebus_pipes.cell_pipe.CellPipe"
    assert args == {
        "mode": "ACTIVE",
        "site_name": "site-1",
        "token": "job",
        "root_url": one.bus.endpoint,
        "secure_mode": False,
        "workspace_dir": "",
        "link": "",
    }


def test_other_requests_of_the_cell_are_not_touched(one: Setting) -> None:
    """Pipes use one channel of a cell that serves others as well."""
    job, trainer = one.pair()
    one.cell.on("test", "echo", lambda delivery: delivery.value())

    asker = one.bus.connect("asker")

    assert value_of(asker.request("worker-1.job", "test", "echo", 5)) == 5
    closed(job, trainer)
