"""A connection that breaks, stalls or comes back, and what becomes of what was on its way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import pytest

import flarebus.dial
import flarebus.router
from flarebus.cell import Cell
from flarebus.delivery import Delivery
from flarebus.errors import Closed, ConfigError, LinkError, NoRoute
from flarebus.link import Verb
from flarebus.loop import Loop
from flarebus.message import Buffer
from flarebus.router import Router
from flarebus.security.keys import DialKeys, KeyPair
from flarebus.wire import PULL
from tests.core.bus import WAIT_S, Bus, Cable, error_of, value_of, wait_for

MIB = 1024 * 1024


class Once:
    """A handler that is entered, waits until it may leave, and counts."""

    def __init__(self) -> None:
        self.entered, self.leave = threading.Event(), threading.Event()
        self.count = 0

    def __call__(self, delivery: Delivery) -> int:
        self.count += 1
        self.entered.set()
        wait_for(self.leave)
        return self.count


def next_time_up(cell: Cell) -> threading.Event:
    """An event that happens when `cell` is known to a router again."""
    event = threading.Event()
    tell = cell.link_up

    def link_up() -> None:
        tell()
        event.set()

    cell.link_up = link_up  # type: ignore[method-assign]
    return event


def lost(cell: Cell) -> tuple[threading.Event, list[LinkError]]:
    """An event that happens when `cell` loses its router, and why."""
    event = threading.Event()
    errors: list[LinkError] = []
    cell.on_link_lost(lambda error: (errors.append(error), event.set())[0])
    return event, errors


def crash(loop: Loop, router: Router) -> None:
    """End a router as a killed process does: without a word."""
    router._say = lambda *_: None  # type: ignore[method-assign]
    loop.stop()


@pytest.mark.parametrize("whose", ["asker", "answerer", "answerer above"])
def test_an_answer_that_was_lost_is_asked_for_again(whose: str) -> None:
    """When either end's connection breaks under a request, it is answered all the same, and was handled once."""
    with Bus("tcp") as bus, closing(Cable(bus.endpoint)) as cable:
        below = bus.endpoint
        if whose == "answerer above":
            _, lower, below = bus.add_router()
            lower.connect(bus.endpoint)
        asker = bus.connect("asker", cable.endpoint if whose == "asker" else below)
        answerer = bus.connect("answerer", cable.endpoint if whose != "asker" else bus.endpoint)
        once = Once()
        answerer.on("test", "once", once)
        up = next_time_up(asker if whose == "asker" else answerer)
        pending = asker.request("answerer", "test", "once")
        wait_for(once.entered)

        cable.cut()
        # The answer goes out while nothing can come through.
        once.leave.set()

        assert value_of(pending) == 1
        wait_for(up)
        assert once.count == 1


@pytest.mark.parametrize("whose", ["holder", "puller"])
def test_a_broken_transfer_goes_on(whose: str) -> None:
    """A transfer whose connection breaks in the middle is finished over the next one, with every byte in its place."""
    data = np.random.default_rng(1).integers(0, 255, 24 * MIB, np.uint8)
    with Bus("tcp") as bus:
        # What comes down to the puller are chunks; to the holder, only requests for them.
        cable = bus.close_later(Cable(bus.endpoint, cut_after=5 * MIB if whose == "puller" else 300))
        holder = bus.connect("holder", cable.endpoint if whose == "holder" else bus.endpoint)
        puller = bus.connect("puller", cable.endpoint if whose == "puller" else bus.endpoint)
        holder.on("test", "get", lambda _: data)

        assert np.array_equal(value_of(puller.request("holder", "test", "get")), data)
        assert cable.was_cut.is_set()


def test_what_waits_for_a_router_is_sent_when_it_comes() -> None:
    """Requests made before there is a router are answered as soon as one listens."""
    with Bus("inproc") as bus:
        endpoint = f"ipc://{bus.folder}/late"
        cell = bus.close_later(Cell.dial("site", endpoint))
        pendings = [cell.request("server", "test", "echo", number) for number in range(3)]
        assert cell.statistics().requests_waiting == 3

        bus.attach("server").on("test", "echo", lambda delivery: delivery.value())
        bus.router.bind(endpoint)

        assert [value_of(pending) for pending in pendings] == [0, 1, 2]


def test_a_router_that_leaves_is_lost_at_once() -> None:
    """Its goodbye fails what waits, and the next one at the same place is found without being asked to."""
    with Bus() as bus:
        cell, answerer = bus.connect("site"), bus.attach("server")
        once = Once()
        answerer.on("test", "wait", once)
        event, errors = lost(cell)
        pending = cell.request("server", "test", "wait")
        wait_for(once.entered)
        up = next_time_up(cell)

        bus.router.close()

        wait_for(event)
        assert "has left" in str(errors[0])
        assert isinstance(error_of(pending), NoRoute)
        assert isinstance(error_of(cell.request("server", "test", "wait")), LinkError)
        once.leave.set()
        _, router, _ = bus.add_router()
        bus.attach("server", router).on("test", "echo", lambda delivery: delivery.value())
        router.bind(bus.endpoint)
        wait_for(up)
        assert value_of(cell.request("server", "test", "echo", 7)) == 7


@pytest.mark.parametrize("first", ["asker", "answerer"])
def test_a_router_that_crashes_loses_no_request(first: str) -> None:
    """After a crash both ends find the next router, in any order, and the request is answered and was handled once."""
    with Bus() as bus:
        asker, answerer = bus.connect("asker"), bus.connect("answerer")
        once = Once()
        answerer.on("test", "once", once)
        pending = asker.request("answerer", "test", "once")
        wait_for(once.entered)
        release = hold_hello(answerer if first == "asker" else asker)
        up = next_time_up(asker if first == "asker" else answerer)

        crash(bus.loop, bus.router)
        _, router, _ = bus.add_router()
        router.bind(bus.endpoint)
        wait_for(up)
        # Only what was under way before is waited for.
        if first == "asker":
            assert isinstance(error_of(asker.request("answerer", "test", "once")), NoRoute)
        release()
        once.leave.set()

        assert value_of(pending) == 1
        assert once.count == 1


def test_a_request_that_found_no_router_finds_its_target() -> None:
    """What was asked while there was no router reaches a cell that finds the next one after the asker did."""
    with Bus() as bus:
        asker, answerer = bus.connect("asker"), bus.connect("answerer")
        answerer.on("test", "echo", lambda delivery: delivery.value())
        release, up, down = hold_hello(answerer), next_time_up(asker), threading.Event()
        assert asker._dial is not None
        hear = asker._dial._read_monitor
        monitor = asker._dial._monitor
        asker._loop.run(asker._loop._monitors.__setitem__, monitor, lambda: (hear(), down.set())[0])

        crash(bus.loop, bus.router)
        wait_for(down)
        pending = asker.request("answerer", "test", "echo", 6)
        _, router, _ = bus.add_router()
        router.bind(bus.endpoint)
        wait_for(up)
        assert isinstance(error_of(asker.request("answerer", "test", "echo")), NoRoute)
        assert not pending.is_done
        release()

        assert value_of(pending) == 6


def test_a_holder_whose_connection_is_down_is_waited_for() -> None:
    """What a puller asks a holder for that has no connection just then is asked again when it has one."""
    with Bus("tcp") as bus:
        holder, puller = bus.connect("holder"), bus.connect("puller")
        holder.on("test", "get", lambda _: bytes(4 * MIB))
        send, is_down = bus.router.send_to, threading.Event()

        def fail_first(connection: Any, frames: Any) -> None:
            if frames[2] == PULL and not is_down.is_set():
                is_down.set()
                raise NoRoute("holder", flarebus.router._DOWN)
            send(connection, frames)

        bus.router.send_to = fail_first  # type: ignore[method-assign]
        pending = puller.request("holder", "test", "get")
        wait_for(is_down)
        assert not pending.is_done

        assert holder._dial is not None
        holder._loop.run(holder._dial._hello)

        assert len(value_of(pending)) == 4 * MIB


def test_what_was_given_up_is_not_sent_later() -> None:
    """A request that failed because there was no router does not reach its target when there is one after all."""
    with Bus("inproc") as bus:
        endpoint = f"ipc://{bus.folder}/late"
        cell = bus.close_later(Cell.dial("site", endpoint, silence_s=0.2))
        up = next_time_up(cell)
        seen: list[Any] = []
        bus.attach("server").on("test", "note", lambda delivery: seen.append(delivery.value()))
        assert isinstance(error_of(cell.request("server", "test", "note", "too early")), NoRoute)

        bus.router.bind(endpoint)
        wait_for(up)
        value_of(cell.request("server", "test", "note", "in time"))

        assert seen == ["in time"]


def test_a_router_that_crashes_breaks_no_transfer() -> None:
    """A pull waits for its holder to find the next router as well, and goes on from there."""
    data = np.random.default_rng(2).integers(0, 255, 12 * MIB, np.uint8)
    with Bus() as bus:
        holder, puller = bus.connect("holder"), bus.connect("puller")
        came, served = threading.Event(), threading.Event()
        serve = holder._carrier._serve

        def serve_once(target: bytes, source: bytes, body: bytes) -> None:
            if not served.is_set():
                serve(target, source, body)
            served.set()

        holder._carrier._serve = serve_once  # type: ignore[method-assign, assignment]
        deliveries: list[Delivery] = []
        puller.inbox("test", "take", lambda delivery: (deliveries.append(delivery), came.set())[0])
        holder.request("puller", "test", "take", data)
        wait_for(came)
        pull = deliveries[0].pull()
        wait_for(served)
        release, up = hold_hello(holder), next_time_up(puller)

        crash(bus.loop, bus.router)
        _, router, _ = bus.add_router()
        router.bind(bus.endpoint)
        wait_for(up)
        # The holder is not there: asked for in vain, and not given up.
        assert puller.statistics().pulls_running == 1
        holder._carrier._serve = serve  # type: ignore[method-assign]
        release()

        pull.result(WAIT_S)
        assert np.array_equal(deliveries[0].value(WAIT_S), data)


def test_whoever_does_not_come_back_is_given_up() -> None:
    """After a crash, a request for a cell that finds no way to the next router fails when it would have been silent."""
    with Bus(silence_s=0.4) as bus:
        asker, answerer = bus.connect("asker"), bus.connect("answerer")
        once = Once()
        answerer.on("test", "once", once)
        pending = asker.request("answerer", "test", "once")
        wait_for(once.entered)
        hold_hello(answerer)

        crash(bus.loop, bus.router)
        _, router, _ = bus.add_router()
        router.bind(bus.endpoint)

        error = error_of(pending)
        assert isinstance(error, NoRoute)
        assert error.target == "answerer"
        once.leave.set()


def hold_hello(cell: Cell) -> Callable[[], None]:
    """Let `cell` find no words for its next router until the returned function is called."""
    dial = cell._dial
    assert dial is not None
    hello = dial._hello
    dial._hello = lambda: None  # type: ignore[method-assign]

    def release() -> None:
        dial._hello = hello  # type: ignore[method-assign]
        # It may not have found the way there yet; it says it by itself then.
        cell._loop.run(hello)

    return release


def test_silence_is_a_loss_and_a_word_ends_it() -> None:
    """A peer that stops without a word is given up on both sides; when it goes on, it is known again."""
    with Bus("tcp", silence_s=0.4) as bus, closing(Cable(bus.endpoint)) as cable:
        cell, watcher = bus.connect("site", cable.endpoint), bus.attach("server")
        watcher.on("test", "echo", lambda delivery: delivery.value())
        event, errors = lost(cell)
        up, gone = next_time_up(cell), threading.Event()
        watcher.on_gone(lambda _: gone.set())

        cable.hold()
        pending = cell.request("server", "test", "echo")

        wait_for(event)
        assert "nothing heard for 0.4 s" in str(errors[0])
        assert isinstance(error_of(pending), NoRoute)
        assert isinstance(error_of(cell.request("server", "test", "echo")), LinkError)
        wait_for(gone)
        assert isinstance(error_of(watcher.request("site", "test", "echo")), NoRoute)
        cable.release()
        wait_for(up)
        assert value_of(cell.request("server", "test", "echo", 1)) == 1


def test_a_quiet_connection_lives() -> None:
    """Two ends with nothing to say stay in touch for longer than silence would be taken for death."""
    with Bus(silence_s=0.3) as bus:
        cell = bus.connect("site")
        event, _ = lost(cell)

        assert not event.wait(1.0)

        cell.on("test", "echo", lambda delivery: delivery.value())
        assert value_of(bus.attach("server").request("site", "test", "echo", 2)) == 2


def test_a_lower_router_finds_its_way_up_again() -> None:
    """Requests under way through a broken link between routers are asked again from both sides, and handled once."""
    with Bus("tcp") as bus, closing(Cable(bus.endpoint)) as cable:
        _, lower, _ = bus.add_router()
        lower.connect(cable.endpoint)
        low, high = bus.attach("low", lower), bus.attach("high")
        onces = {cell: Once() for cell in (low, high)}
        for cell, once in onces.items():
            cell.on("test", "once", once)
            cell.on("test", "echo", lambda delivery: delivery.value())
        assert value_of(low.request("high", "test", "echo", 1)) == 1
        up, down = low.request("high", "test", "once"), high.request("low", "test", "once")
        for once in onces.values():
            wait_for(once.entered)

        cable.cut()
        for once in onces.values():
            once.leave.set()

        assert value_of(up) == value_of(down) == 1
        assert [once.count for once in onces.values()] == [1, 1]


def test_what_happened_below_a_broken_link_is_learned_later() -> None:
    """A cell that left while its router had no way up is forgotten above, and one that came is known."""
    with Bus("tcp") as bus, closing(Cable(bus.endpoint)) as cable:
        _, lower, _ = bus.add_router()
        leaver, high = bus.attach("leaver", lower), bus.attach("high")
        high.on("test", "echo", lambda delivery: delivery.value())
        lower.connect(cable.endpoint)
        assert value_of(leaver.request("high", "test", "echo", 1)) == 1
        gone = threading.Event()
        high.on_gone(lambda names: gone.set() if names == ["leaver"] else None)

        cable.cut()
        leaver.close()
        comer = bus.attach("comer", lower)
        comer.on("test", "echo", lambda delivery: delivery.value())

        assert value_of(comer.request("high", "test", "echo", 2)) == 2
        wait_for(gone)
        assert value_of(high.request("comer", "test", "echo", 3)) == 3
        assert isinstance(error_of(high.request("leaver", "test", "echo")), NoRoute)


def test_a_lost_way_up_fails_what_waits_above() -> None:
    """When a router gives up the one above it, the cells below hear that nobody there will answer."""
    with Bus("tcp", silence_s=0.4) as bus, closing(Cable(bus.endpoint)) as cable:
        _, lower, _ = bus.add_router()
        lower.connect(cable.endpoint)
        low, high = bus.attach("low", lower), bus.attach("high")
        once = Once()
        high.on("test", "once", once)
        high.on("test", "echo", lambda delivery: delivery.value())
        pending = low.request("high", "test", "once")
        wait_for(once.entered)

        cable.hold()

        assert isinstance(error_of(pending), NoRoute)
        assert isinstance(error_of(low.request("high", "test", "echo")), NoRoute)
        once.leave.set()


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell without a connection keeps no more than its limit, and says so to whoever asks for more."""
    monkeypatch.setattr(flarebus.dial, "BACKLOG_BYTES", 10_000)
    with Bus("inproc") as bus:
        cell = bus.close_later(Cell.dial("site", f"ipc://{bus.folder}/nobody"))

        kept = cell.request("server", "test", "echo", b"x" * 6000)
        refused = error_of(cell.request("server", "test", "echo", b"x" * 6000))

        assert isinstance(refused, LinkError)
        assert "wait already" in str(refused)
        assert not kept.is_done
        assert cell._dial is not None
        assert 6000 < cell._dial.queued_bytes < 10_000


def test_a_key_that_is_not_admitted_is_told() -> None:
    """A cell whose key the router does not know hears that, and need not wait for silence."""
    with Bus("curve") as bus:
        assert bus.dial is not None
        stranger = DialKeys(KeyPair.generate(), bus.dial.server)
        cell = bus.close_later(Cell.dial("site", bus.endpoint, stranger))

        with pytest.raises(LinkError, match="refused our key"):
            cell.wait_until_up(WAIT_S)


class Owner:
    """A lower end that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def names(self) -> list[str]:
        return ["owner"]

    def read(self, head: object, socket: object) -> None:
        self.told.append(head)

    def link_up(self) -> None:
        self.told.append("up")

    def link_lost(self, error: LinkError) -> None:
        self.told.append(str(error))

    def peers_gone(self, names: object) -> None:
        self.told.append(("gone", names))

    def peers_back(self, names: object) -> None:
        self.told.append(("back", names))


def test_words_of_a_router_are_understood() -> None:
    """Each verb has its effect; nonsense has none, and a closed end says nothing more."""
    loop, owner = Loop("test"), Owner()
    said: list[tuple[bytes, Buffer]] = []
    try:
        dial = loop.run(flarebus.dial.Dial, loop, "ipc:///nowhere/at/all", None, owner)
        dial._say = lambda verb, body=b"": said.append((verb, body)) or True

        def hear() -> None:
            for verb, body in (
                (Verb.WELCOME, b""),
                (Verb.PING, b""),
                (Verb.GONE, b"site-1 site-2"),
                (Verb.JOIN, b"site-3"),
                (Verb.GONE, b"\xff"),
                (Verb.HELLO, b""),
                (b"\x00nonsense", b"\x01"),
                (Verb.WHO, b""),
                # Asked before its answer came: once is enough.
                (Verb.WHO, b""),
                (Verb.PING, b""),
                (Verb.WELCOME, b""),
                (Verb.BYE, b""),
                (Verb.PING, b""),
                (Verb.PING, b""),
            ):
                dial._hear(verb, body)

        loop.run(dial._hear, Verb.WELCOME, b"")
        # A sign of life is due when nothing was said for a third of the silence that is taken for death.
        said.clear()
        loop.run(dial.tick, loop.clock() + 4)
        assert said == []
        loop.run(dial.tick, loop.clock() + 6)
        assert said == [(Verb.PING, b"")]
        said.clear()
        owner.told.clear()
        loop.run(hear)
        loop.run(dial.close)
        loop.run(dial.close)
        with pytest.raises(LinkError, match="no connection"):
            loop.run(dial.send, (b"a", b"b", b"c", b"d"))
    finally:
        loop.stop()

    left = "ipc:///nowhere/at/all: the router has left"
    assert owner.told == ["up", ("gone", ["site-1", "site-2"]), ("back", ["site-3"]), "up", left]
    hello = (Verb.HELLO, b"owner")
    assert said == [(Verb.PONG, b""), hello, hello]


def test_a_dial_that_cannot_be_is_refused() -> None:
    """An endpoint that ZeroMQ does not take is named, and nothing of the attempt stays on the loop."""
    loop = Loop("test")
    try:
        with pytest.raises(ConfigError, match="endpoint='tcp://localhost"):
            loop.run(flarebus.dial.Dial, loop, "tcp://localhost:1:2", None, Owner())
        assert loop._actors == []
        assert loop._readers == loop._monitors == loop._sockets == {}
    finally:
        loop.stop()
    with pytest.raises(Closed):
        loop.run(Owner().names)
