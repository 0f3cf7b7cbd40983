"""What a cell does, the same over every arrangement of routers and links."""

from __future__ import annotations

import gc
import logging
import os
import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from flarebus.cell import Cell, Payload
from flarebus.codec import encode
from flarebus.delivery import Delivery
from flarebus.errors import (
    Closed,
    ConfigError,
    DeadlineExceeded,
    EncodeError,
    LinkError,
    NoRoute,
    RemoteError,
    SourceLost,
    UsageError,
)
from flarebus.loop import Loop
from flarebus.message import Kind, Manifest, Message
from flarebus.pending import Pending
from flarebus.transfer import CHUNK_BYTES
from flarebus.wire import CHUNK, PLACE, encode_message
from tests.core.bus import ARRANGEMENTS, WAIT_S, Bus, collector, error_of, value_of, wait_for

MIB = 1024 * 1024


@pytest.fixture(params=ARRANGEMENTS)
def bus(request: pytest.FixtureRequest) -> Iterator[Bus]:
    """A bus of each arrangement."""
    with Bus(request.param) as bus:
        yield bus


@pytest.fixture
def one_bus() -> Iterator[Bus]:
    """For what has nothing to do with the way between the cells."""
    with Bus() as bus:
        yield bus


def echo(delivery: Delivery) -> Any:
    return delivery.value()


def many_arrays() -> list[np.ndarray[Any, Any]]:
    """More than rides in a message, in pieces so small that a chunk holds hundreds, some of them empty."""
    return [np.full(n % 7 * 500, n, np.int32) for n in range(900)]


def too_many_arrays() -> list[np.ndarray[Any, Any]]:
    """So many that their lengths do not fit into a header."""
    return list(np.zeros((25_000, 300), np.uint8))


SMALL = {
    "nothing": None,
    "numbers": [0, -1, 1 << 80, 1.5, -0.0, True],
    "text": {"name": "ü", 3: b"\x00\xff", None: ("a", {"b"})},
    "array": np.arange(12.0).reshape(3, 4).T,
    "strided": np.arange(100, dtype=np.int16)[::7],
}


@pytest.mark.parametrize("value", SMALL.values(), ids=SMALL)
def test_a_value_comes_back_as_it_went(bus: Bus, value: Any) -> None:
    """A request carries any value there, and the reply carries it back."""
    asker, answerer = bus.near(), bus.far()
    answerer.on("test", "echo", echo)

    reply = asker.request("answerer", "test", "echo", value).result(WAIT_S)

    assert reply.source == "answerer"
    np.testing.assert_equal(reply.value(), value)


def test_large_arrays_travel_beside_the_message(bus: Bus) -> None:
    """Arrays of several MiB, strided ones and many small ones come back equal, writable and nobody else's."""
    asker, answerer = bus.near(), bus.far()
    answerer.on("test", "echo", echo)
    sent = {
        "large": np.arange(5 * MIB // 4 + 1, dtype=np.float32),
        "strided": np.arange(1_000_000, dtype=np.int32)[::-3],
        "fortran": np.asfortranarray(np.arange(300_000.0).reshape(600, 500)),
        "many": many_arrays(),
        "bytes": bytes(range(256)) * 2000,
    }

    came = value_of(asker.request("answerer", "test", "echo", sent))

    np.testing.assert_equal(came, sent)
    came["large"][:] = 0
    assert sent["large"][-1] > 0
    statistics = asker.statistics()
    assert statistics.bytes_pulled == statistics.bytes_served > 8 * MIB
    assert statistics.offers_held == statistics.pulls_running == statistics.requests_waiting == 0


def test_small_arrays_are_copied_when_they_are_sent(bus: Bus) -> None:
    """Whoever sends a small array may change it at once."""
    asker, answerer = bus.near(), bus.far()
    blocked = threading.Event()
    answerer.on("test", "echo", lambda delivery: (blocked.wait(WAIT_S), delivery.value())[1])
    array = np.ones(100)

    pending = asker.request("answerer", "test", "echo", array)
    array[:] = 2
    blocked.set()

    assert value_of(pending).sum() == 100


def test_a_channel_keeps_order(bus: Bus) -> None:
    """Events and requests of one channel are handled one at a time, as they were sent, whether large or small."""
    asker, answerer = bus.near(), bus.far()
    seen, handle, done = collector(60)
    answerer.on("test", "a", handle)
    answerer.on("test", "b", handle)

    for number in range(60):
        value = np.full(100_000 if number % 10 == 5 else 1, number)
        if number % 3:
            asker.notify("answerer", "test", "a", value)
        else:
            asker.request("answerer", "test", "b", value)
    wait_for(done)

    assert [int(value[0]) for value in seen] == list(range(60))


def test_a_slow_handler_holds_up_its_own_channel_only(bus: Bus) -> None:
    """While one channel's handler works, another's answers, and what waits is counted."""
    asker, answerer = bus.near(), bus.far()
    begun, go_on = threading.Event(), threading.Event()

    def wait(_: Delivery) -> bool:
        begun.set()
        return go_on.wait(WAIT_S)

    answerer.on("slow", "wait", wait)
    answerer.on("quick", "echo", echo)

    slow = [asker.request("answerer", "slow", "wait") for _ in range(3)]
    assert value_of(asker.request("answerer", "quick", "echo", 1)) == 1
    assert begun.wait(WAIT_S)
    assert answerer.statistics().queued == {"slow": 2, "quick": 0}
    assert asker.statistics().requests_waiting == 3
    go_on.set()

    assert [value_of(pending) for pending in slow] == [True] * 3


@pytest.mark.parametrize("error", [ValueError("no such layer"), SystemExit("enough"), KeyboardInterrupt()])
def test_the_asker_gets_what_a_handler_raises(bus: Bus, error: BaseException) -> None:
    """Whatever a handler raises comes back with its kind and text, and the handler goes on with the next request."""
    asker, answerer = bus.near(), bus.far()

    def handle(_: Delivery) -> None:
        raise error

    answerer.on("test", "fail", handle)
    answerer.on("test", "echo", echo)

    came = error_of(asker.request("answerer", "test", "fail"))

    assert isinstance(came, RemoteError)
    assert (came.address, came.kind, came.text) == ("answerer", type(error).__name__, str(error))
    assert value_of(asker.request("answerer", "test", "echo", 5)) == 5


def test_an_answer_that_cannot_travel_is_an_error(bus: Bus) -> None:
    """A handler's value that is refused fails the request and says so."""
    asker, answerer = bus.near(), bus.far()
    answerer.on("test", "type", lambda _: object())

    assert "EncodeError" in str(error_of(asker.request("answerer", "test", "type")))


def test_an_answer_given_elsewhere_is_refused_alike(one_bus: Bus) -> None:
    """`reply` on a thread of one's own never raises for a value: the asker is told instead."""
    asker, answerer = one_bus.near(), one_bus.far()
    deliveries: list[Delivery] = []
    came = threading.Event()
    answerer.inbox("test", "take", lambda delivery: (deliveries.append(delivery), came.set())[0])

    pending = asker.request("answerer", "test", "take", np.ones(MIB))
    wait_for(came)
    assert answerer.statistics().pulls_running == 0
    assert deliveries[0].nbytes == 8 * MIB
    deliveries[0].reply(too_many_arrays())

    error = error_of(pending)
    assert isinstance(error, RemoteError)
    assert "too many" in error.text


def test_a_failed_event_is_logged(one_bus: Bus, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody waits for the answer to an event, so that what its handler raises goes to the log."""
    asker, answerer = one_bus.near(), one_bus.far()
    answerer.on("test", "fail", lambda _: 1 // 0)
    answerer.on("test", "echo", echo)

    with caplog.at_level(logging.WARNING):
        asker.notify("answerer", "test", "fail")
        value_of(asker.request("answerer", "test", "echo"))

    assert "test/fail from asker failed: integer division" in caplog.text


def test_nobody_there_is_answered_at_once(bus: Bus) -> None:
    """A request without a deadline to a cell that is not there, or does not know the topic, fails by itself."""
    asker, answerer = bus.near(), bus.far()
    answerer.on("test", "echo", echo)

    for size in (0, 1000, MIB):
        unknown = error_of(asker.request("nobody", "test", "echo", np.ones(size)))
        assert isinstance(unknown, NoRoute)
        assert unknown.target == "nobody"
    topic = error_of(asker.request("answerer", "test", "sing"))
    assert isinstance(topic, NoRoute)
    assert topic.reason == "no handler for test/sing"
    asker.notify("nobody", "test", "echo")
    assert value_of(asker.request("answerer", "test", "echo", 1)) == 1
    assert asker.statistics().offers_held == 0


def test_a_dead_target_fails_what_waits_for_it(bus: Bus) -> None:
    """When the answering cell goes away, the asker hears it at once, and is told so again for the next request."""
    asker, answerer = bus.near(), bus.far()
    entered, leave, gone = threading.Event(), threading.Event(), threading.Event()
    names: list[str] = []
    asker.on_gone(lambda more: (names.extend(more), gone.set())[0])
    answerer.on("test", "wait", lambda _: (entered.set(), leave.wait(WAIT_S))[0])
    pending = asker.request("answerer", "test", "wait")
    wait_for(entered)

    answerer.close()

    assert isinstance(error_of(pending), NoRoute)
    wait_for(gone)
    assert names == ["answerer"]
    assert isinstance(error_of(asker.request("answerer", "test", "wait")), NoRoute)
    leave.set()


def test_what_was_said_is_heard_before_the_end_of_who_said_it(one_bus: Bus) -> None:
    """An answer, and a message for an inbox, are handed over before it is told that their sender is gone, also when all
    of it comes in at once."""
    asker, answerer = one_bus.near(), one_bus.far()
    asked: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    answerer.inbox("test", "wait", asked.put)
    heard: list[str] = []
    asker.on_gone(lambda _: heard.append("gone"))
    asker.inbox("test", "tell", lambda _: heard.append("told"))
    pending = asker.request("answerer", "test", "wait")
    pending.on_done(lambda _: heard.append("answered"))
    message = asked.get(timeout=WAIT_S).message
    event = Message("asker", "answerer", Kind.EVENT, 1, channel="test", topic="tell", body=encode(None).body)
    reply = Message("asker", "answerer", Kind.REPLY, 2, answers=message.id, body=encode(None).body)

    def come() -> None:
        asker.accept(encode_message(event))
        asker.accept(encode_message(reply))
        asker.peers_gone(["answerer"])

    asker._loop.run(come)

    assert heard == ["told", "answered", "gone"]
    assert value_of(pending) is None


def test_what_was_said_is_heard_before_the_end_of_a_pull(one_bus: Bus) -> None:
    """A message is handed over before the bytes that came after it, also when all of it comes in at once."""
    asker, _ = one_bus.near(), one_bus.far()
    heard: list[str] = []
    asker.inbox("test", "tell", lambda _: heard.append("told"))
    event = Message("asker", "answerer", Kind.EVENT, 1, channel="test", topic="tell", body=encode(None).body)
    manifest = Manifest(bytes(16), "answerer", (4,))

    def come() -> None:
        asker.pull(manifest, "asker").on_done(lambda _: heard.append("pulled"))
        asker.accept(encode_message(event))
        asker.accept((b"asker", b"answerer", CHUNK, PLACE.pack(manifest.transfer, 0), b"1234"))

    asker._loop.run(come)

    assert heard == ["told", "pulled"]


def test_a_deadline_ends_a_request(bus: Bus) -> None:
    """No answer in time is an error of its own; the late answer is dropped and does no harm."""
    asker, answerer = bus.near(), bus.far()
    late = threading.Event()
    answerer.on("test", "wait", lambda _: late.wait(WAIT_S))
    answerer.on("test", "echo", echo)

    error = error_of(asker.request("answerer", "test", "wait", timeout=0.01))
    late.set()

    assert isinstance(error, DeadlineExceeded)
    assert value_of(asker.request("answerer", "test", "echo", 1)) == 1
    assert asker.statistics().requests_waiting == 0


def test_a_payload_is_shared(bus: Bus) -> None:
    """One encoded value goes to many cells, each pulls it, and it is held until it is withdrawn."""
    asker = bus.near()
    names = ["a", "b", "c"]
    for name in names:
        bus.far(name).on("test", "sum", lambda delivery: float(delivery.pull().result(WAIT_S)[0].nbytes))
    model = np.ones(2 * MIB, np.uint8)

    payload = asker.share(model, names)
    pendings = [asker.request(name, "test", "sum", {"model": payload.body}, payload=payload) for name in names]

    assert [value_of(pending) for pending in pendings] == [2.0 * MIB] * 3
    assert asker.statistics().offers_held == 1
    asker.withdraw(payload)
    assert asker.statistics().offers_held == 0
    asker.withdraw(payload)


def test_a_small_payload_rides_along(bus: Bus) -> None:
    """A payload that fits into the message needs no transfer and no withdrawal."""
    asker, answerer = bus.near(), bus.far()
    answerer.on("test", "size", lambda delivery: delivery.nbytes)

    payload = asker.share(np.ones(1000), ["answerer"])
    asker.admit(payload, "anybody")

    assert value_of(asker.request("answerer", "test", "size", payload.body, payload=payload)) == 8000
    assert asker.statistics().offers_held == 0
    asker.withdraw(payload)


def test_only_those_who_are_named_may_pull(bus: Bus) -> None:
    """A cell that a payload was not made for gets nothing until it is admitted, and nobody gets any once it is over."""
    asker, answerer = bus.near(), bus.far()
    answerer.on("test", "size", lambda delivery: delivery.nbytes)
    payload = asker.share(np.ones(MIB), ["somebody"])

    def ask() -> Any:
        return asker.request("answerer", "test", "size", payload.body, payload=payload)

    refused = error_of(ask())
    assert isinstance(refused, SourceLost)
    assert refused.holder == "asker"
    asker.admit(payload, "answerer")
    assert value_of(ask()) == 8 * MIB
    asker.withdraw(payload)
    assert isinstance(error_of(ask()), SourceLost)


def test_a_withdrawal_is_heard_by_whoever_pulls(bus: Bus) -> None:
    """A delivery that was kept without pulling it cannot be pulled once its source has taken it back."""
    asker, answerer = bus.near(), bus.far()
    deliveries: list[Delivery] = []
    came = threading.Event()
    answerer.inbox("test", "take", lambda delivery: (deliveries.append(delivery), came.set())[0])
    payload = asker.share(np.ones(MIB), ["answerer"])
    asker.request("answerer", "test", "take", payload.body, payload=payload)
    wait_for(came)

    asker.withdraw(payload)

    assert isinstance(error_of(deliveries[0].pull()), SourceLost)


def test_a_shared_payload_is_all_the_bulk_of_its_message(one_bus: Bus) -> None:
    """Arrays of its own in the value beside a payload are refused where they are written."""
    asker = one_bus.near()
    payload = asker.share(np.ones(MIB), ["answerer"])

    with pytest.raises(UsageError, match="no arrays of its own"):
        asker.request("answerer", "test", "take", np.ones(MIB), payload=payload)


def test_a_holder_that_dies_ends_the_pull(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the holder goes away in the middle of a transfer, the puller hears `SourceLost` and not silence."""
    asker, answerer = bus.near(), bus.far()
    served = threading.Event()
    serve = asker._carrier._serve

    def serve_once(*request: Any) -> None:
        if not served.is_set():
            serve(*request)
        served.set()

    monkeypatch.setattr(asker._carrier, "_serve", serve_once)
    deliveries: list[Delivery] = []
    came = threading.Event()
    answerer.inbox("test", "take", lambda delivery: (deliveries.append(delivery), came.set())[0])
    asker.request("answerer", "test", "take", np.ones(32 * CHUNK_BYTES, np.uint8))
    wait_for(came)
    pull = deliveries[0].pull()
    wait_for(served)
    assert answerer.statistics().pulls_running == 1

    asker.close()

    error = error_of(pull)
    assert isinstance(error, SourceLost)
    # Told so, not found out by asking for more.
    assert (error.holder, error.reason) == ("asker", "gone")
    assert answerer.statistics().pulls_running == 0


def test_a_cell_answers_to_its_aliases(bus: Bus) -> None:
    """A message to any of a cell's names reaches it, is answered in that name, and may bring large arrays."""
    asker, answerer = bus.near(), bus.far(aliases=["site-1.job", "site-2.job"])
    answerer.on("test", "echo", lambda delivery: [delivery.message.target, delivery.value()])
    array = np.arange(MIB)

    for name in ("site-1.job", "answerer", "site-2.job"):
        reply = asker.request(name, "test", "echo", array).result(WAIT_S)
        assert reply.source == name
        np.testing.assert_equal(reply.value(), [name, array])


def test_cells_of_one_place_reach_each_other_and_themselves(bus: Bus) -> None:
    """Neighbours need no detour, and a cell may talk to itself."""
    one, other = bus.near("one"), bus.near("other")
    for cell in (one, other):
        cell.on("test", "echo", echo)
    array = np.arange(MIB)

    for asker, target in ((one, "other"), (other, "one"), (one, "one")):
        np.testing.assert_equal(value_of(asker.request(target, "test", "echo", array)), array)


def test_requests_from_many_threads(bus: Bus) -> None:
    """Any thread may ask, and each gets its own answer."""
    asker, answerer = bus.near(), bus.far()
    answerer.on("test", "echo", echo)
    wrong: list[Any] = []

    def ask(base: int) -> None:
        for number in range(base, base + 40):
            value = value_of(asker.request("answerer", "test", "echo", number))
            if value != number:
                wrong.append((value, number))

    threads = [threading.Thread(target=ask, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)

    assert wrong == []
    assert asker.statistics().messages_sent >= 160
    assert answerer.statistics().messages_received >= 160


def test_a_delivery_is_pulled_once(bus: Bus) -> None:
    """Asking twice for the buffers of a message brings them once; each decoding is an array of its own."""
    asker, answerer = bus.near(), bus.far()

    def handle(delivery: Delivery) -> bool:
        first, again = delivery.pull(), delivery.pull()
        return first is again and delivery.nbytes == 8 * MIB and delivery.plain.__self__ is delivery

    answerer.on("test", "pull", handle)

    assert value_of(asker.request("answerer", "test", "pull", np.ones(MIB)))
    assert answerer.statistics().bytes_pulled == 8 * MIB


def test_memory_goes_with_the_delivery(one_bus: Bus) -> None:
    """Once a handler has returned, the cell keeps nothing of a large message."""
    asker, answerer = one_bus.near(), one_bus.far()
    kept: list[weakref.ref[Any]] = []
    answerer.on("test", "keep", lambda delivery: kept.append(weakref.ref(delivery.value())))
    answerer.on("test", "echo", echo)

    value_of(asker.request("answerer", "test", "keep", np.ones(MIB)))
    value_of(asker.request("answerer", "test", "echo"))
    gc.collect()

    assert kept[0]() is None


def test_close_fails_what_waits(bus: Bus) -> None:
    """A closed cell's waiting requests fail, its threads wake, and it may be closed again."""
    asker, answerer = bus.near(), bus.far()
    entered, leave = threading.Event(), threading.Event()
    answerer.on("test", "wait", lambda _: (entered.set(), leave.wait(WAIT_S))[0])
    pending = asker.request("answerer", "test", "wait")
    errors: list[BaseException] = []
    waiter = threading.Thread(target=lambda: errors.append(error_of(pending)))
    waiter.start()
    wait_for(entered)

    asker.close()
    asker.close()

    waiter.join(WAIT_S)
    assert isinstance(errors[0], Closed)
    with pytest.raises(Closed):
        asker.request("answerer", "test", "wait")
    with pytest.raises(Closed):
        asker.notify("answerer", "test", "wait")
    leave.set()


def test_close_ends_what_is_pulled(bus: Bus) -> None:
    """A pull that runs, and one that begins after its cell was closed, end with an error."""
    asker, answerer = bus.near(), bus.far()
    deliveries: list[Delivery] = []
    came = threading.Event()

    def put(delivery: Delivery) -> None:
        deliveries.append(delivery)
        if len(deliveries) == 2:
            came.set()

    answerer.inbox("test", "take", put)
    payload = asker.share(np.ones(MIB), ["somebody else", "answerer"])
    for _ in range(2):
        asker.request("answerer", "test", "take", payload.body, payload=payload)
    wait_for(came)
    asker._carrier._serve = lambda *_: None  # type: ignore[method-assign]
    running = deliveries[0].pull()
    assert answerer.statistics().pulls_running == 1

    answerer.close()

    assert isinstance(error_of(running), Closed)
    assert isinstance(error_of(deliveries[1].pull()), Closed)
    asker.withdraw(payload)


def test_a_cell_can_be_closed_by_what_it_is_told(bus: Bus) -> None:
    """`close` from a handler or from the bus's own thread neither hangs nor harms the others."""
    asker, answerer, other = bus.near(), bus.far(), bus.far("other")
    closed = threading.Event()
    other.on_gone(lambda _: (other.close(), closed.set())[0])
    answerer.on("test", "end", lambda _: answerer.close())

    assert isinstance(error_of(asker.request("answerer", "test", "end")), LinkError)
    wait_for(closed)
    assert isinstance(error_of(asker.request("other", "test", "echo")), NoRoute)


def test_a_loop_that_stops_ends_its_cells(one_bus: Bus) -> None:
    """Who stops the loop and forgets the cells on it leaves nobody waiting."""
    loop, router, endpoint = one_bus.add_router()
    cell = one_bus.attach("server", router)
    site = one_bus.connect("site", endpoint)
    blocked = threading.Event()
    site.on("test", "block", lambda _: blocked.wait(WAIT_S))
    pending = cell.request("site", "test", "block")

    loop.stop()

    assert isinstance(error_of(pending), LinkError)
    with pytest.raises(Closed):
        cell.request("site", "test", "block")
    cell.close()
    router.close()
    blocked.set()


def test_what_cannot_be_sent_is_refused_where_it_is_written(one_bus: Bus) -> None:
    """A value of an unknown type or a body over the limit raises in `request`, and nothing waits for it."""
    asker = one_bus.near()

    with pytest.raises(EncodeError):
        asker.request("answerer", "test", "echo", object())
    with pytest.raises(UsageError, match="too many"):
        asker.request("answerer", "test", "echo", too_many_arrays())

    assert asker.statistics().requests_waiting == 0


@pytest.mark.parametrize(
    ("address", "endpoint"),
    [("not an address", "ipc:///tmp/x"), ("site", "nonsense"), ("site", "tcp://10.0.0.1:1"), ("site", "ipc://@x")],
)
def test_a_cell_that_cannot_be_leaves_no_thread(address: str, endpoint: str) -> None:
    """A wrong address or endpoint is refused by name, and the thread that was started for it ends."""
    before = set(threading.enumerate())

    with pytest.raises(ConfigError):
        Cell.dial(address, endpoint)

    assert set(threading.enumerate()) <= before


def test_a_forked_child_is_told(one_bus: Bus) -> None:
    """A cell in a forked child refuses to work instead of losing messages, and can be closed; the parent's goes on."""
    asker, answerer = one_bus.near(), one_bus.far()
    answerer.on("test", "echo", echo)
    outcome, report = os.pipe()

    child = os.fork()
    if child == 0:
        said = b"nothing"
        try:
            asker.request("answerer", "test", "echo")
        except UsageError as error:
            said = b"refused" if "fork" in str(error) else b"other words"
        finally:
            asker.close()
            answerer.close()
            os.write(report, said)
            os._exit(0)
    os.close(report)
    with open(outcome, "rb") as pipe:
        assert pipe.read() == b"refused"
    os.waitpid(child, 0)

    assert value_of(asker.request("answerer", "test", "echo", 1)) == 1


def test_up_is_known(one_bus: Bus) -> None:
    """`wait_until_up` ends with an error when nobody answers in time, and when the cell is closed meanwhile."""
    cell = one_bus.close_later(Cell.dial("site", f"ipc://{one_bus.folder}/nobody"))

    with pytest.raises(DeadlineExceeded):
        cell.wait_until_up(0.01)
    waiting = cell.request("server", "test", "echo")
    cell.close()

    with pytest.raises(Closed):
        cell.wait_until_up(WAIT_S)
    assert isinstance(error_of(waiting), Closed)


def test_loops_may_be_shared(one_bus: Bus) -> None:
    """Closing one of two cells of one loop leaves the other at work."""
    loop = Loop("shared")
    _, router, _ = one_bus.add_router()
    one, other = one_bus.attach("one", router), one_bus.attach("other", router)
    other.on("test", "echo", echo)
    third = one_bus.attach("third", router)

    one.close()

    assert value_of(third.request("other", "test", "echo", 3)) == 3
    loop.stop()


# --- in the name of somebody, and on behalf of somebody


def test_a_cell_asks_as_one_of_its_aliases(bus: Bus) -> None:
    """Who is asked sees the alias, and its answer finds the way back, large arrays included."""
    asker, answerer = bus.near(aliases=["site-1.job"]), bus.far()
    answerer.on("test", "who", lambda delivery: {"who": delivery.source, "back": delivery.value()})
    sent = np.arange(MIB, dtype=np.float32)

    answer = value_of(asker.request("answerer", "test", "who", sent, source="site-1.job"))

    assert answer["who"] == "site-1.job"
    np.testing.assert_array_equal(answer["back"], sent)
    assert asker.statistics().offers_held == 0


def test_a_cell_asks_as_nobody_else(bus: Bus) -> None:
    """A name that does not lead here would be dropped by a router: it is an error at once."""
    asker = bus.near(aliases=["site-1.job"])

    for name in ("site-2.job", "site-1", "answerer"):
        with pytest.raises(UsageError, match="cannot speak as"):
            asker.request("answerer", "test", "who", source=name)


def test_what_is_encoded_already_is_shared_as_it_is(bus: Bus) -> None:
    """Buffers travel without another encode: small ones in the message, large ones from where they lie."""
    asker, answerer = bus.near(), bus.far()
    answerer.on("test", "lengths", lambda delivery: [bytes(buffer) for buffer in delivery.pull().result(WAIT_S)])
    for size in (10, MIB):
        buffers = [bytes([number]) * size for number in range(3)]
        payload = asker.share_encoded(b"body", buffers, ["answerer"])

        came = value_of(asker.request("answerer", "test", "lengths", payload.body, payload=payload))

        assert came == buffers
        assert (payload.body, payload.nbytes) == (b"body", 3 * size)
        assert asker.statistics().offers_held == (size == MIB)
        asker.withdraw(payload)
        assert asker.statistics().offers_held == 0


def test_a_manifest_is_passed_on_and_the_bytes_go_round_the_one_between(bus: Bus) -> None:
    """A third cell hands a message on: its target pulls from the holder, and nothing goes through the third."""
    holder, target = bus.far("holder"), bus.near("target.job.0")
    between = bus.near("between")
    target.on("test", "sum", lambda delivery: sum(memoryview(each)[0] for each in delivery.pull().result(WAIT_S)))

    def pass_on(delivery: Delivery) -> None:
        def answered(done: Pending[Delivery]) -> None:
            error = done.error()
            delivery.reply(done.result().value()) if error is None else delivery.fail(error)

        payload = Payload(b"", None, delivery.message.manifest)
        between.request("target.job.0", "test", "sum", payload=payload).on_done(answered)

    between.inbox("test", "pass", pass_on)
    payload = holder.share_encoded(b"", [bytes([n]) * MIB for n in (1, 2, 3)], ["target.job"])

    assert value_of(holder.request("between", "test", "pass", payload=payload)) == 6
    passed, took = between.statistics(), target.statistics()
    assert (passed.bytes_pulled, passed.bytes_served) == (0, 0)
    assert (took.bytes_pulled, holder.statistics().bytes_served) == (3 * MIB, 3 * MIB)
    assert holder.moved_bytes == took.bytes_pulled
    holder.withdraw(payload)
    assert isinstance(error_of(holder.request("between", "test", "pass", payload=payload)), SourceLost)
