"""ResultOutbox: small results share messages, and none waits for anything but a message that is on its way."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import numpy as np
import pytest

from flarebus.cell import Cell
from flarebus.codec import decode
from flarebus.delivery import Delivery
from flarebus.errors import DecodeError
from flarebus.loop import Loop
from flarebus.model import FLModel
from flarebus.router import Router
from flarebus.site import outbox
from flarebus.site.outbox import Credit, ResultOutbox
from flarebus.site.ticket import Ticket
from flarebus.wire import MAX_CARRIED_BYTES

LIMIT_S = 30.0


class Ends:
    """An outbox, and the server that it sends to."""

    def __init__(self) -> None:
        self.loop = Loop("test bus")
        self.router = Router(self.loop)
        self.server = Cell.attach("server", self.router, self.loop)
        self.host = Cell.attach("host", self.router, self.loop)
        self.came: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.server.inbox("task", "results", self.came.put)
        self.outbox = ResultOutbox(self.host, "server")
        self.notes: list[str] = []

    def put(self, site: str, size: int = 400) -> None:
        """Put the result of `site`, whose weights are as many as its name says."""
        payload = self.host.share(FLModel(params={"w": np.full(size, len(site), np.float32)}), ("server",))
        assert self.outbox.takes(payload, Ticket("server", 7))
        self.outbox.put(site, 7, payload, self.notes.append)

    def batch(self) -> Delivery:
        """The next message, not answered."""
        return self.came.get(timeout=LIMIT_S)

    def close(self) -> None:
        for end in (self.host, self.server, self.router):
            end.close()
        self.loop.stop()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def sites(delivery: Delivery) -> list[str]:
    return [entry["site"] for entry in delivery.plain()["results"]]


def test_the_first_result_leaves_at_once_and_the_next_message_takes_all_that_came_up(ends: Ends) -> None:
    """Nothing waits but for a message on its way; what came up meanwhile leaves together, in order, whole."""
    for site in ("a", "bb", "ccc", "dddd"):
        ends.put(site, size=4 if site == "ccc" else 400)
    first = ends.batch()
    assert sites(first) == ["a"]
    assert ends.came.empty()

    first.reply()
    second = ends.batch()
    buffers = second.pull().result(LIMIT_S)
    at = 0
    for entry in second.plain()["results"]:
        model = decode(entry["model"], buffers[at : at + entry["buffers"]])
        at += entry["buffers"]
        assert entry["number"] == 7
        assert set(model.params["w"].tolist()) == {len(entry["site"])}
    assert sites(second) == ["bb", "ccc", "dddd"]
    assert at == len(buffers) == 2


@pytest.mark.parametrize("limit", ["MOST_RESULTS", "MOST_BUFFERS", "MAX_INLINE_BYTES"])
def test_a_message_is_bounded(ends: Ends, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """What does not fit goes into the message after."""
    monkeypatch.setattr(outbox, limit, 3 * 1600 if limit == "MAX_INLINE_BYTES" else 3)
    found = []
    for number in range(8):
        ends.put(f"s{number}")
    for _ in range(4):
        delivery = ends.batch()
        found.append(sites(delivery))
        delivery.reply()

    assert found == [["s0"], ["s1", "s2", "s3"], ["s4", "s5", "s6"], ["s7"]]


def test_a_result_that_is_too_big_is_not_taken(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has to be fetched, or has a large body, goes its own way."""
    assert not ends.outbox.takes(ends.host.share(np.zeros(100_000), ("server",)), Ticket("server", 7))
    monkeypatch.setattr(outbox, "MOST_BODY_BYTES", 100)
    assert not ends.outbox.takes(ends.host.share("x" * 101, ("server",)), Ticket("server", 7))


def test_what_could_not_be_delivered_is_noted_and_the_rest_goes_on(ends: Ends) -> None:
    """A message that is answered with an error concerns its own results only."""
    for site in ("a", "b", "c"):
        ends.put(site)
    ends.batch().fail(DecodeError("no"))
    second = ends.batch()

    assert sites(second) == ["b", "c"]
    second.reply()
    ends.loop.run(lambda: None)
    assert ends.notes == ["result not delivered: server: DecodeError: no"]


def test_nothing_is_sent_after_the_end(ends: Ends) -> None:
    """Results that come up when the cell is closed are noted, one by one, and nobody hangs."""
    ends.put("a")
    ends.put("b")
    payload = ends.host.share(FLModel(params={}), ("server",))
    ends.host.close()
    ends.outbox.put("c", 7, payload, ends.notes.append)
    assert sites(ends.batch()) == ["a"]

    assert ends.notes == ["result not delivered: host was closed"] * 3


def test_credit_is_what_was_granted_and_not_yet_given_back() -> None:
    """Without a grant there is none; a result takes all of its bytes or nothing; one chunk is the most."""
    credit = Credit()
    assert not credit.take(1)
    credit.grant(3 * MAX_CARRIED_BYTES)
    assert not credit.take(MAX_CARRIED_BYTES + 1)
    assert [credit.take(MAX_CARRIED_BYTES) for _ in range(4)] == [True, True, True, False]
    credit.give_back(MAX_CARRIED_BYTES)
    assert [credit.take(MAX_CARRIED_BYTES - 1), credit.take(2), credit.take(1)] == [True, False, True]

    credit.grant(0)
    credit.give_back(MAX_CARRIED_BYTES)
    assert not credit.take(1)
