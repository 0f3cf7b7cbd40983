"""The router: whom it believes, what it refuses, and that nobody suffers for somebody else's nonsense."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

import flarebus.router
from flarebus.cell import Cell
from flarebus.codec import encode
from flarebus.delivery import Delivery
from flarebus.errors import Closed, ConfigError, LinkError, NoRoute, UsageError
from flarebus.link import Verb, decode_names, encode_names
from flarebus.message import Kind, Manifest, Message
from flarebus.router import Router
from flarebus.security.keys import KeyPair, ListenKeys
from flarebus.wire import CHUNK, DONE, MAX_FRAME_BYTES, PLACE, PULL, REQUEST, decode_message, encode_message
from tests.core.bus import WAIT_S, Bus, collector, error_of, value_of, wait_for

MIB = 1024 * 1024
NIL = encode(None).body
# Nothing here is found out by silence.
NEVER_S = 3600.0


class Raw:
    """A peer that says whatever it likes, over a bare ZeroMQ socket."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        # What it does not read must fill its sender's queues soon, not wait in its own.
        self.socket.rcvhwm = 4
        self.socket.sndtimeo = int(WAIT_S * 1000)
        self._deadline = time.monotonic() + WAIT_S
        self.socket.connect(endpoint)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self._context.term()

    def say(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def hear(self) -> list[bytes]:
        assert self.socket.poll(max(0, (self._deadline - time.monotonic()) * 1000)), "it was never said"
        return self.socket.recv_multipart()

    def hear_verb(self, verb: Verb) -> bytes:
        """The names in the next word of this kind; what comes before it is dropped."""
        while True:
            target, _, header, *body = self.hear()
            if not target and header == verb:
                return body[0]

    def hear_answer(self, number: int) -> Message:
        """The answer to a request; words of the link and of transfers before it are dropped."""
        while True:
            frames = self.hear()
            if frames[0] and frames[2] not in (PULL, CHUNK, DONE):
                message = decode_message(frames)
                if message.answers == number:
                    return message

    def hello(self, *names: str) -> None:
        """Introduce itself, and be welcome."""
        self.say(b"", b"", Verb.HELLO, encode_names(names))
        self.hear_verb(Verb.WELCOME)

    def settle(self) -> None:
        """Return when all that was said so far has been read."""
        self.say(b"", b"", Verb.PING, b"")
        self.hear_verb(Verb.PONG)


@pytest.fixture
def bus() -> Iterator[Bus]:
    """A router at a socket file, with a cell in its process that echoes."""
    with Bus(silence_s=NEVER_S) as bus:
        server = bus.attach("server")
        server.on("test", "echo", lambda delivery: delivery.value())
        server.on("test", "size", lambda delivery: delivery.nbytes)
        yield bus


def request(source: str, target: str, number: int = 1) -> list[Any]:
    """The frames of an honest request."""
    return encode_message(Message(target, source, Kind.REQUEST, number, channel="test", topic="echo", body=NIL))


def test_a_bare_socket_may_take_part(bus: Bus) -> None:
    """Whoever speaks the protocol is served: a hello, a request, its answer, a goodbye."""
    with Raw(bus.endpoint) as peer:
        peer.hello("raw")
        peer.say(*request("raw", "server", 9))
        answer = peer.hear_answer(9)

        assert (answer.kind, answer.source) == (Kind.REPLY, "server")
        gone = threading.Event()
        bus.attach("watcher").on_gone(lambda names: gone.set() if names == ["raw"] else None)
        peer.say(b"", b"", Verb.BYE, b"")
        wait_for(gone)


def test_a_stranger_is_asked_who_it_is(bus: Bus) -> None:
    """A message over a connection that has not said hello is dropped, and its sender is asked for one."""
    seen, handle, done = collector(1)
    bus.attach("target").on("test", "echo", handle)
    with Raw(bus.endpoint) as peer:
        peer.say(*request("raw", "target"))
        peer.hear_verb(Verb.WHO)
        peer.say(b"", b"", Verb.BYE, b"")
        peer.hello("raw")
        assert seen == []
        peer.say(*request("raw", "target"))
        wait_for(done)


@pytest.mark.parametrize("name", ["server", "site", "nobody", "", "\xff"])
def test_nobody_speaks_in_another_name(bus: Bus, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A message from a name that its connection did not claim reaches nobody, and is counted and logged."""
    bus.connect("site")
    seen, handle, _ = collector(1)
    bus.attach("target").on("test", "echo", handle)
    frames = [b"target", name.encode("latin-1"), *request("raw", "target")[2:]]

    with Raw(bus.endpoint) as peer, caplog.at_level(logging.WARNING):
        peer.hello("raw")
        peer.say(*frames)
        peer.say(*frames, b"more", b"frames")
        peer.settle()

    assert seen == []
    assert bus.router.statistics().refused == 2
    assert "may not speak as" in caplog.text


def test_a_spoofed_source_is_refused_below_as_well() -> None:
    """A router with another above it checks what its own cells say they are, and what comes down from there."""
    with Bus("chain") as bus:
        low, high = bus.near("low"), bus.far("high")
        seen, handle, _ = collector(1)
        high.on("test", "echo", handle)
        low.on("test", "echo", handle)

        forged = [b"high", b"probe", *request("x", "x")[2:]]
        low._loop.run(low._send, forged)
        low.request("probe", "probe", "reach").result(WAIT_S)
        assert bus.lower.statistics().refused == 1
        # From above somebody says to be `low`, who lives below.
        bus.loop.run(bus.router.dispatch, [b"low", b"low", *request("x", "x")[2:]])
        value_of_reach = bus._probe.request("low", "test", "nothing")
        assert isinstance(error_of(value_of_reach), NoRoute)
        assert bus.lower.statistics().refused == 2
        assert seen == []


NONSENSE: dict[str, Sequence[Sequence[bytes]]] = {
    "one frame": [[b""], [b"server"], [b"\xff" * 300]],
    "two frames": [[b"", b""], [b"server", b"raw"]],
    "three frames": [[b"server", b"raw", b"\x90"], [b"", b"", Verb.PING]],
    "no header": [[b"server", b"raw", b"", b""], [b"server", b"raw", b"\xc1", b""], [b"server", b"raw", b"\x90", b""]],
    "long header": [[b"server", b"raw", b"\xdd\xff\xff\xff\xff", b""], [b"server", b"raw", b"\x91" * 70_000, b""]],
    "many frames": [[b"server", b"raw", b"\x90", b"", *[b"x"] * 2000]],
    "long body": [[b"server", b"raw", request("raw", "server")[2], b"\xc0" * (2 * MIB)]],
    "odd target": [[b"\xff\x00\n", b"raw", b"\x90", b""], [b"s" * 100_000, b"raw", b"\x90", b""]],
    "nonsense to nobody": [[b"nobody", b"raw", b"\xc1", b"\xc1"], [b"nobody", b"raw", PULL, b"short"]],
    "other verbs": [[b"", b"", Verb.WELCOME, b"x"], [b"", b"", Verb.GONE, b"server"], [b"", b"", b"\x00", b""]],
    "spare frames": [[b"", b"", Verb.PING, b"", b"more", b"and more"]],
    "short pull": [[b"server", b"raw", PULL, b"\x00" * 27], [b"server", b"raw", PULL, b"\x00" * 28]],
    "odd pull": [[b"server", b"raw", PULL, REQUEST.pack(bytes(16), 1 << 60, 0xFFFFFFFF)]],
    "chunk of nothing": [
        [b"server", b"raw", CHUNK, b""],
        [b"server", b"raw", CHUNK, PLACE.pack(bytes(16), 0), b"x" * 100],
        [b"server", b"raw", CHUNK, PLACE.pack(bytes(16), 0), *[b"x"] * 50],
        [b"nobody", b"raw", CHUNK, PLACE.pack(bytes(16), 0), b"x"],
    ],
    "done with nothing": [[b"server", b"raw", DONE, b""], [b"server", b"raw", DONE, bytes(16), b"x"]],
    "an answer to nobody": [
        encode_message(Message("server", "raw", Kind.REPLY, 0, answers=5)),
        encode_message(Message("server", "raw", Kind.ERROR, 0, answers=5, body=b"\xc1")),
        encode_message(Message("nobody", "raw", Kind.REPLY, 0, answers=5)),
        encode_message(Message("nobody", "raw", Kind.EVENT, 1)),
    ],
    "an enormous offer": [
        encode_message(
            Message(
                "server",
                "raw",
                Kind.REQUEST,
                77,
                channel="test",
                topic="echo",
                manifest=Manifest(bytes(16), "raw", (1 << 47,)),
            )
        )
    ],
}


@pytest.mark.parametrize("messages", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_harms_nobody(bus: Bus, messages: Sequence[Sequence[bytes]]) -> None:
    """Whatever a peer sends, the others are served, the next message is read as what it is, and no thread dies."""
    cell = bus.connect("site")
    with Raw(bus.endpoint) as stranger, Raw(bus.endpoint) as peer:
        for frames in messages:
            stranger.say(*frames)
        peer.hello("raw")
        for frames in messages:
            peer.say(*frames)
        peer.settle()
        peer.say(*request("raw", "server", 123))
        assert peer.hear_answer(123).kind is Kind.REPLY

        array = np.arange(MIB)
        assert np.array_equal(value_of(cell.request("server", "test", "echo", array)), array)


@pytest.mark.parametrize("names", [b"\xff", b"a  b", b"a\nb", b"..", b"x" * 64, b"a/b", b"site-1.", b"1.2.3.4.5"])
def test_names_are_addresses(bus: Bus, names: bytes) -> None:
    """Who claims anything but addresses is not let in, and is put out if it was in before."""
    with Raw(bus.endpoint) as peer, Raw(bus.endpoint) as witness:
        peer.say(b"", b"", Verb.HELLO, names)
        peer.hello("raw")
        witness.hello("witness")
        peer.say(b"", b"", Verb.JOIN, names)

        assert decode_names(witness.hear_verb(Verb.GONE)) == ["raw"]
        assert bus.router.statistics().names == 2


def test_a_frame_over_the_limit_costs_only_its_sender(bus: Bus) -> None:
    """A frame larger than any of ours ends the connection that sent it before it is held, and no other."""
    cell = bus.connect("site")
    gone = threading.Event()
    bus.attach("watcher").on_gone(lambda names: gone.set() if names == ["raw"] else None)
    with Raw(bus.endpoint) as peer:
        peer.hello("raw")
        peer.say(b"server", b"raw", b"\x90", bytes(MAX_FRAME_BYTES + 1))
        wait_for(gone)

        assert value_of(cell.request("server", "test", "echo", 1)) == 1


@pytest.mark.parametrize("spoiled", ["nothing", "short", "long", "missing", "split", "spare"])
def test_a_chunk_of_a_wrong_length_ends_the_pull(bus: Bus, spoiled: str) -> None:
    """A holder whose chunk is not what it announced is given up; the next message is read as what it is."""
    with Raw(bus.endpoint) as peer:
        peer.hello("raw")
        manifest = Manifest(bytes(range(16)), "raw", (300_000, 40_000))
        message = Message("server", "raw", Kind.REQUEST, 5, channel="test", topic="size", manifest=manifest, body=NIL)
        peer.say(*encode_message(message))
        _, _, header, asked = peer.hear()
        assert header == PULL
        transfer, first, _ = REQUEST.unpack(asked)
        chunk = {
            "nothing": [bytes(300_000), bytes(40_000)],
            "short": [bytes(299_999), bytes(40_000)],
            "long": [bytes(300_001), bytes(40_000)],
            "missing": [bytes(300_000)],
            "split": [bytes(150_000), bytes(150_000), bytes(40_000)],
            "spare": [bytes(300_000), bytes(40_000), b"more"],
        }[spoiled]
        peer.say(b"server", b"raw", CHUNK, PLACE.pack(transfer, first), *chunk)
        answer = peer.hear_answer(5)
        assert answer.kind is (Kind.REPLY if spoiled == "nothing" else Kind.ERROR)
        assert (b"wrong length" in answer.body) is (spoiled != "nothing")
        peer.say(*request("raw", "server", 6))
        assert peer.hear_answer(6).kind is Kind.REPLY


def test_a_newer_claim_wins() -> None:
    """A process that comes back under its name is served at once; what waited for the former one is failed."""
    with Bus("tcp", NEVER_S) as bus:
        asker, former = bus.connect("asker"), bus.connect("site")
        entered, leave = threading.Event(), threading.Event()
        former.on("test", "wait", lambda _: (entered.set(), leave.wait(WAIT_S))[0])
        pending = asker.request("site", "test", "wait")
        wait_for(entered)

        newer = bus.connect("site")
        newer.on("test", "who", lambda _: "newer")

        assert isinstance(error_of(pending), NoRoute)
        assert value_of(asker.request("site", "test", "who")) == "newer"
        # The former one may no longer speak in its name.
        assert not former.request("asker", "test", "who").is_done
        leave.set()
        former.close()
        assert value_of(asker.request("site", "test", "who")) == "newer"


def test_routers_chain_in_depth() -> None:
    """Names are known all the way up, and a message finds its way through three routers in both directions."""
    with Bus() as bus:
        _, middle, middle_endpoint = bus.add_router()
        _, low, _ = bus.add_router()
        middle.connect(bus.endpoint)
        low.connect(middle_endpoint)
        top, bottom = bus.attach("top"), bus.attach("bottom", low)
        for cell in (top, bottom):
            cell.on("test", "echo", lambda delivery: delivery.value())
        array = np.arange(MIB)

        assert np.array_equal(value_of(bottom.request("top", "test", "echo", array)), array)
        assert np.array_equal(value_of(top.request("bottom", "test", "echo", array)), array)
        assert bus.router.statistics().names == 2
        assert isinstance(error_of(bottom.request("nobody", "test", "echo")), NoRoute)
        assert isinstance(error_of(top.request("nobody", "test", "echo")), NoRoute)
        gone = threading.Event()
        top.on_gone(lambda names: gone.set() if names == ["bottom"] else None)
        bottom.close()
        wait_for(gone)
        with pytest.raises(UsageError, match="one above it already"):
            low.connect(bus.endpoint)


def test_local_traffic_stays_local() -> None:
    """What two cells below one router say to each other never goes up."""
    with Bus("chain") as bus:
        one, other = bus.near("one"), bus.near("other")
        other.on("test", "echo", lambda delivery: delivery.value())
        before = bus.router.statistics()

        assert len(value_of(one.request("other", "test", "echo", bytes(5 * MIB)))) == 5 * MIB

        after = bus.router.statistics()
        assert (after.messages, after.bytes) == (before.messages, before.bytes)


def test_statistics_count(bus: Bus) -> None:
    """Messages, bytes, names, connections and refusals can be read at any time."""
    asker, answerer = bus.connect("asker", aliases=["a", "b"]), bus.connect("answerer")
    answerer.on("test", "echo", lambda delivery: delivery.value())
    value_of(asker.request("answerer", "test", "echo", bytes(4 * MIB)))
    error_of(asker.request("nobody", "test", "echo"))

    statistics = bus.router.statistics()

    assert (statistics.names, statistics.connections) == (5, 2)
    assert statistics.messages >= 4
    assert 8 * MIB < statistics.bytes < 9 * MIB
    assert (statistics.unroutable, statistics.refused, statistics.queued_bytes) == (1, 0, 0)


def test_a_peer_that_does_not_read_is_put_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a connection does not take is kept up to a limit; then its names are gone, and only they suffer."""
    monkeypatch.setattr("flarebus.sockets.HIGH_WATER_MARK", 4)
    monkeypatch.setattr(flarebus.router, "BACKLOG_BYTES", 3 * MIB)
    with Bus(silence_s=NEVER_S) as bus, Raw(bus.endpoint) as peer:
        sender, other = bus.attach("sender"), bus.connect("other")
        other.on("test", "echo", lambda delivery: delivery.value())
        peer.hello("deaf")
        gone = threading.Event()
        sender.on_gone(lambda names: gone.set() if names == ["deaf"] else None)

        for _ in range(1000):
            sender.notify("deaf", "test", "take", bytes(200_000))
            assert value_of(sender.request("other", "test", "echo", 1)) == 1
            if gone.is_set():
                break

        assert isinstance(error_of(sender.request("deaf", "test", "take")), NoRoute)
        assert bus.router.statistics().queued_bytes == 0


def test_a_slow_reader_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit into a connection's queue waits in the router, in order, and is counted."""
    monkeypatch.setattr("flarebus.sockets.HIGH_WATER_MARK", 4)
    with Bus() as bus, Raw(bus.endpoint) as peer:
        sender = bus.attach("sender")
        peer.hello("slow")
        for number in range(40):
            sender.notify("slow", "test", "take", bytes([number]) * 200_000)
        assert bus.router.statistics().queued_bytes > 0

        numbers = [decode_message(peer.hear()).bundle.data[0] for _ in range(40)]  # type: ignore[union-attr]

        assert numbers == list(range(40))
        sender.statistics()
        peer.settle()
        assert bus.router.statistics().queued_bytes == 0


def test_both_ends_give_signs_of_life() -> None:
    """A router says something at least every third of the time after which it takes silence for death."""
    with Bus(silence_s=0.6) as bus, Raw(bus.endpoint) as peer:
        gone = threading.Event()
        bus.attach("watcher").on_gone(lambda names: gone.set() if names == ["raw"] else None)
        peer.hello("raw")

        for _ in range(4):
            peer.hear_verb(Verb.PING)
            peer.say(b"", b"", Verb.PONG, b"")
        assert not gone.is_set()
        wait_for(gone)


def test_a_quick_return_is_no_loss(bus: Bus) -> None:
    """A cell that says hello again before the end of its former connection was settled is not taken for gone."""
    gone: list[str] = []
    bus.attach("watcher").on_gone(gone.extend)
    with Raw(bus.endpoint) as peer:
        peer.hello("raw")
        (connection,) = bus.router._connections.values()
        bus.loop.run(bus.router._closed.append, connection)

        peer.hello("raw")
        peer.settle()

        assert gone == []
        assert bus.router.statistics().names == 3


def test_names_come_and_go_below_a_connection(bus: Bus) -> None:
    """A peer may claim more names and give some back; both are true at once."""
    asker = bus.connect("asker")
    with Raw(bus.endpoint) as peer:
        peer.hello("one")
        peer.say(b"", b"", Verb.JOIN, encode_names(["two", "three"]))
        peer.say(b"", b"", Verb.LEAVE, encode_names(["one", "three", "server"]))
        peer.settle()

        assert isinstance(error_of(asker.request("three", "test", "echo")), NoRoute)
        assert value_of(asker.request("server", "test", "echo", 1)) == 1
        pending = asker.request("two", "test", "echo")
        while (message := peer.hear())[0] != b"two":
            continue
        asked = decode_message(message)
        peer.say(*encode_message(Message("asker", "two", Kind.REPLY, 0, answers=asked.id, body=encode(5).body)))
        assert value_of(pending) == 5


def test_a_second_hello_lists_all_names(bus: Bus) -> None:
    """A name that a connection no longer lists when it introduces itself again is gone."""
    gone: list[str] = []
    watcher = bus.attach("watcher")
    watcher.on_gone(gone.extend)
    with Raw(bus.endpoint) as peer:
        peer.hello("one", "two")
        peer.hello("two", "three")
        assert gone == ["one"]
        assert bus.router.statistics().names == 4


def test_an_embedded_router_serves_its_own_cells_after_close(bus: Bus) -> None:
    """A closed router has no sockets and no files; cells of its process still reach each other, others hear the end."""
    site, local = bus.connect("site"), bus.attach("local")
    site.on("test", "wait", lambda _: threading.Event().wait(0))
    lost = threading.Event()
    site.on_link_lost(lambda _: lost.set())

    bus.router.close()
    bus.router.close()

    assert list(Path(bus.folder).iterdir()) == []
    wait_for(lost)
    assert value_of(local.request("server", "test", "echo", 4)) == 4
    assert isinstance(error_of(local.request("site", "test", "wait")), NoRoute)
    assert bus.router.statistics().connections == 0


def test_a_place_is_taken_once(bus: Bus) -> None:
    """A second router cannot listen where one does; when the first has closed, it can."""
    _, second, _ = bus.add_router()
    with pytest.raises(UsageError, match="another live process listens here"):
        second.bind(bus.endpoint)
    tcp = bus.router.bind("tcp://127.0.0.1:*")
    with pytest.raises(UsageError, match="another process listens here"):
        second.bind(tcp)

    bus.router.close()

    assert second.bind(bus.endpoint) == bus.endpoint
    bus.attach("other", second).on("test", "echo", lambda delivery: delivery.value())
    assert value_of(bus.connect("late").request("other", "test", "echo", 3)) == 3


def test_one_router_may_listen_at_several_places(bus: Bus) -> None:
    """Cells that came in through different endpoints of a router reach each other."""
    one, other = bus.connect("one"), bus.connect("other", bus.router.bind("tcp://127.0.0.1:*"))
    other.on("test", "echo", lambda delivery: delivery.value())

    assert value_of(one.request("other", "test", "echo", 3)) == 3
    # Whoever may write to a socket file may connect.
    assert Path(bus.endpoint.removeprefix("ipc://")).stat().st_mode & 0o777 == 0o600


def test_keys_are_for_all_endpoints(bus: Bus) -> None:
    """A router that listens without keys never opens a second endpoint that seems to have some."""
    keys = ListenKeys(KeyPair.generate(), frozenset({KeyPair.generate().public}))

    with pytest.raises(UsageError, match="same keys"):
        bus.router.bind("tcp://0.0.0.0:*", keys)


@pytest.mark.parametrize(
    "endpoint", ["tcp://0.0.0.0:*", "tcp://*:*", "tcp://eth0:1", "tcp://192.0.2.1:80", "tcp://[::]:*", "tcp://x.org:1"]
)
def test_strangers_are_not_served_without_keys(bus: Bus, endpoint: str) -> None:
    """Beyond loopback a router listens only with keys."""
    with pytest.raises(ConfigError, match="beyond loopback only with keys"):
        bus.router.bind(endpoint)


def test_with_keys_it_listens_everywhere() -> None:
    """The same endpoint is fine with keys, and an address that is not this machine's is named."""
    with Bus("curve") as bus:
        assert bus.router.bind("tcp://0.0.0.0:*", bus.listen).startswith("tcp://0.0.0.0:")
        with pytest.raises(ConfigError, match=r"bind='tcp://192\.0\.2\.1:1'"):
            bus.router.bind("tcp://192.0.2.1:1", bus.listen)


def test_a_stopped_loop_has_no_router() -> None:
    """After the loop has ended, what a router would do says so, and closing it is still fine."""
    with Bus() as bus:
        loop, router, _ = bus.add_router()
        loop.stop()

        router.close()
        with pytest.raises(Closed):
            router.statistics()
        with pytest.raises(Closed):
            Router(loop)


def test_answers_carry_transfers_through_a_router(bus: Bus) -> None:
    """The router moves chunks between two dialled cells and keeps none of them."""
    asker, answerer = bus.connect("asker"), bus.connect("answerer")
    deliveries: list[Delivery] = []
    answerer.on("test", "size", lambda delivery: (deliveries.append(delivery), delivery.nbytes)[1])

    assert value_of(asker.request("answerer", "test", "size", bytes(9 * MIB))) == 9 * MIB
    assert bus.router.statistics().queued_bytes == 0


def test_a_cell_that_is_refused_is_lost(bus: Bus) -> None:
    """A dialling cell whose names the router takes away by dropping it joins again when it is asked who it is."""
    cell = bus.connect("site")
    cell.on("test", "echo", lambda delivery: delivery.value())
    server = bus.attach("asker")
    connection = next(iter(bus.router._connections.values()))

    bus.loop.run(bus.router._drop, connection, "for the test")

    assert isinstance(error_of(server.request("site", "test", "echo")), NoRoute)
    # Its next word is answered with a question, and what it asked is not lost.
    assert value_of(cell.request("server", "test", "echo", 1)) == 1
    assert value_of(server.request("site", "test", "echo", 2)) == 2


def test_nothing_is_said_to_closed_routers() -> None:
    """A cell attached to a router above which nothing is left gets an error, not silence."""
    with Bus("chain") as bus:
        cell = bus.attach("low", bus.lower)
        bus.far("answerer").on("test", "echo", lambda delivery: delivery.value())
        assert value_of(cell.request("answerer", "test", "echo", 1)) == 1

        bus.lower.close()

        error = error_of(cell.request("answerer", "test", "echo"))
        assert isinstance(error, LinkError)
        assert isinstance(cell, Cell)


def test_a_connection_that_is_down_is_not_tried_all_the_time() -> None:
    """Over a network a broken connection may come back until it was silent for too long: nobody spins until then."""
    with Bus("tcp") as bus:
        with Raw(bus.endpoint) as raw:
            raw.hello("site")
        wait_until_down(bus, "site")
        now = bus.loop.clock() + 6

        again = bus.loop.run(bus.router.tick, now)

        assert bus.router.statistics().connections == 1
        assert again is not None
        assert again > now


def wait_until_down(bus: Bus, name: str) -> None:
    """Wait until the router knows that the connection of `name` cannot be used."""
    asker = bus.attach("asker")
    deadline = time.monotonic() + WAIT_S
    while "its connection is down" not in str(error_of(asker.request(name, "test", "echo", timeout=1.0))):
        assert time.monotonic() < deadline
