"""MetricOutbox: batches in order, bounds and what is lost beyond them, and a server that answers as the test says."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from flarebus.client import metrics
from flarebus.client.metric_batch import decode_batch
from flarebus.client.metrics import MetricOutbox
from flarebus.errors import Closed, NoRoute
from flarebus.metric import AnalyticsDataType
from flarebus.pending import Pending

LIMIT_S = 30.0
SCALAR, METRICS, IMAGE = AnalyticsDataType.SCALAR, AnalyticsDataType.METRICS, AnalyticsDataType.IMAGE


class Server:
    """The other end of an outbox."""

    def __init__(self) -> None:
        self.sent: queue.SimpleQueue[tuple[dict[str, Any], Pending[Any]]] = queue.SimpleQueue()
        self.outbox = MetricOutbox(self._send)
        self.refusal: Exception | None = None

    def _send(self, fields: dict[str, Any]) -> Pending[Any]:
        if self.refusal is not None:
            raise self.refusal
        pending: Pending[Any] = Pending()
        self.sent.put((fields, pending))
        return pending

    def put(self, *values: Any, site: str = "a", kind: AnalyticsDataType = SCALAR, **fields: Any) -> None:
        for value in values:
            self.outbox.put(site, 0, "x", value, kind, dict(fields))

    def next(self) -> tuple[dict[str, Any], Pending[Any]]:
        return self.sent.get(timeout=LIMIT_S)

    def batch(self) -> tuple[list[Any], dict[str, int]]:
        """The next batch, answered: values, and what was dropped before."""
        fields, pending = self.next()
        records, dropped = decode_batch(fields)
        pending.set(None)
        return [record["value"] for record in records], dropped


def on_thread(work: Any) -> Pending[Any]:
    """Run `work` on a thread; its outcome."""
    outcome: Pending[Any] = Pending()

    def run() -> None:
        try:
            outcome.set(work())
        except BaseException as error:
            outcome.fail(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.outbox.close(0)


@pytest.fixture
def no_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches leave one right after the other."""
    monkeypatch.setattr(metrics, "PACE_S", 0.0)


# --- on the way


def test_the_first_record_leaves_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a quiet time nothing is waited for."""
    monkeypatch.setattr(metrics, "PACE_S", 3600.0)
    server.put(1)

    assert server.batch() == ([1], {})


def test_what_comes_up_meanwhile_goes_together(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next batch leaves some time after the one before, with all that was put until then."""
    monkeypatch.setattr(metrics, "PACE_S", 3600.0)
    server.put(1)
    assert server.batch() == ([1], {})
    server.put(*range(100))
    assert server.sent.empty()
    flushing = on_thread(lambda: server.outbox.flush(LIMIT_S))

    assert server.batch() == (list(range(100)), {})
    assert flushing.result(LIMIT_S)


def test_full_batches_do_not_wait(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """More records than a batch holds go out in batches that follow each other at once, in order."""
    monkeypatch.setattr(metrics, "BATCH_RECORDS", 4)
    server.put(0)
    fields, pending = server.next()
    monkeypatch.setattr(metrics, "PACE_S", 3600.0)
    server.put(*range(1, 13))
    assert server.sent.empty()  # one at a time is on its way
    pending.set(None)

    assert [record["value"] for record in decode_batch(fields)[0]] == [0]
    assert [server.batch()[0] for _ in range(3)] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


@pytest.mark.usefixtures("no_pace")
def test_records_of_a_thread_keep_their_order(server: Server) -> None:
    """However many threads log, light values and packed ones, each thread's records arrive once and in order."""
    n_threads, n_records = 8, 2000

    def work(number: int) -> None:
        for step in range(n_records):
            value: Any = {"v": step} if step % 7 == 0 else step
            server.outbox.put(f"site-{number}", 0, "x", value, SCALAR, {"global_step": step})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(n_threads)]
    found: dict[str, list[Any]] = {f"site-{number}": [] for number in range(n_threads)}
    for thread in threads:
        thread.start()
    n_found = 0
    while n_found < n_threads * n_records:
        fields, pending = server.next()
        pending.set(None)
        records, dropped = decode_batch(fields)
        assert dropped == {}
        n_found += len(records)
        for record in records:
            found[record["site"]].append(record["step"])
            assert record["value"] in (record["step"], {"v": record["step"]})
    for thread in threads:
        thread.join(LIMIT_S)

    assert all(steps == list(range(n_records)) for steps in found.values())


def test_a_record_has_what_was_given_with_it(server: Server) -> None:
    """Step and writer are fields of their own; the rest is kept as extra; the time is now."""
    server.put(1, global_step=3, writer="mlflow", path="a.txt")
    records, _ = decode_batch(server.next()[0])

    assert records[0].pop("time") > 1.7e9
    assert records == [
        {
            "site": "a",
            "round": 0,
            "key": "x",
            "value": 1,
            "type": "SCALAR",
            "step": 3,
            "writer": "mlflow",
            "extra": {"path": "a.txt"},
        }
    ]


def test_values_are_taken_as_they_are_now(server: Server) -> None:
    """A script may write into an array that it has logged."""
    array = np.zeros(4)
    server.put({"a": array}, kind=METRICS)
    array[:] = 1

    ((found,), _) = server.batch()
    assert found["a"].tolist() == [0.0] * 4


# --- bounds


def test_records_beyond_the_limit_are_dropped_and_counted(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest stay; the server learns with the next batch how many each site has lost, once."""
    monkeypatch.setattr(metrics, "MAX_WAITING_RECORDS", 3)
    server.put(0)
    _, pending = server.next()
    server.put(1, 2, 3, 4, 5)
    server.put(6, {"packed": 1}, site="b")
    pending.set(None)

    assert server.batch() == ([1, 2, 3], {"a": 2, "b": 2})
    server.put(7)
    assert server.batch() == ([7], {})


def test_bytes_beyond_the_limit_are_dropped_and_counted(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays may be few and too much all the same; a number still gets through, and room comes back."""
    monkeypatch.setattr(metrics, "MAX_WAITING_BYTES", 100_000)
    image = np.zeros(40_000, np.uint8)
    server.put(0)
    _, pending = server.next()
    server.put(image, image, image, 1, image, kind=IMAGE)
    pending.set(None)

    values, dropped = server.batch()
    assert [np.size(value) for value in values] == [40_000, 40_000, 1]
    assert dropped == {"a": 2}
    for _ in range(5):
        server.put(image, kind=IMAGE)
        assert server.batch()[1] == {}


def test_batches_are_bounded_in_bytes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Big records are spread over batches, in order; one that is bigger than a batch goes alone."""
    monkeypatch.setattr(metrics, "BATCH_BYTES", 100_000)
    server.put(0)
    _, pending = server.next()
    for number, size in enumerate((40_000, 40_000, 40_000, 300_000, 10)):
        server.put(np.full(size, number, np.uint8), number, kind=IMAGE)
    pending.set(None)
    batches = [server.batch() for _ in range(4)]

    assert [[int(np.max(value)) for value in values] for values, _ in batches] == [
        [0, 0, 1, 1],
        [2, 2],
        [3],
        [3, 4, 4],
    ]
    assert [dropped for _, dropped in batches] == [{}] * 4
    assert server.outbox.flush(LIMIT_S)


def test_a_record_that_is_far_too_big_is_dropped(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says which and why; those beside it arrive."""
    monkeypatch.setattr(metrics, "MAX_RECORD_BYTES", 1000)
    server.put(0)
    _, pending = server.next()
    server.put(1, np.zeros(1001, np.uint8), 2, kind=IMAGE)
    pending.set(None)

    assert server.batch() == ([1, 2], {"a": 1})
    assert "a: metric 'x' dropped: 1" in caplog.text


def test_a_record_that_may_not_travel_takes_no_other_with_it(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """A value that cannot be sent is left out and counted, and nothing is raised; the log says it a few times."""
    server.put(0)
    _, pending = server.next()
    server.put(1, *[object()] * 100, "\ud800", 2)
    server.put(3, odd=object())
    pending.set(None)

    assert server.batch() == ([1, 2], {"a": 102})
    assert 0 < len(caplog.messages) < 50
    assert "may not travel" in caplog.text or "object" in caplog.text


def test_losses_are_told_even_if_nothing_comes_after_them(server: Server) -> None:
    """A batch without records tells how many are missing."""
    server.put(object())

    assert server.batch() == ([], {"a": 1})


# --- a server that does not answer


def test_a_server_that_does_not_answer_stops_nobody(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logging goes on and so does the script; what is kept is bounded; flushing and closing give up in time."""
    monkeypatch.setattr(metrics, "MAX_WAITING_RECORDS", 1000)
    server.put(0)
    server.next()
    done = on_thread(lambda: server.put(*range(5000)))

    done.result(LIMIT_S)
    assert len(server.outbox._waiting) == 1000
    assert not server.outbox.flush(0.01)
    assert not server.outbox.close(0.01)
    assert server.sent.empty()


def test_what_could_not_be_delivered_is_counted(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """If a batch fails, its records are told as lost with the next one that gets through; the log says it once."""
    server.put(0)
    server.next()[1].fail(NoRoute("nobody is there"))
    assert not server.outbox.flush(LIMIT_S)
    server.refusal = OSError("the pipe is broken")
    server.put(1)
    assert not server.outbox.flush(LIMIT_S)
    server.refusal = None
    server.put(2)

    assert server.batch() == ([2], {"a": 2})
    assert server.outbox.flush(LIMIT_S)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("raised", [True, False])
def test_an_end_that_is_closed_ends_the_outbox(server: Server, raised: bool, caplog: pytest.LogCaptureFixture) -> None:
    """When nothing will ever leave again, what waits is let go at once, and later records are no matter."""
    if raised:
        server.refusal = Closed("this end was closed")
    server.put(0)
    if not raised:
        _, pending = server.next()
        server.put(*range(5000))
        pending.fail(Closed("this end was closed"))
    assert not server.outbox.flush(LIMIT_S)
    assert server.outbox._thread is not None
    server.outbox._thread.join(LIMIT_S)
    server.put(1, {"a": 1}, object())

    assert not server.outbox._thread.is_alive()
    assert len(server.outbox._waiting) == 0
    assert server.sent.empty()
    assert "records were not delivered" in caplog.text


# --- the end


@pytest.mark.usefixtures("no_pace")
def test_flush_waits_for_all_that_was_put(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """When `flush` returns the server has had every record, also those that were not on their way yet."""
    monkeypatch.setattr(metrics, "BATCH_RECORDS", 2)
    assert server.outbox.flush(0)
    for round in range(30):
        server.put(*range(7))
        flushing = on_thread(lambda: server.outbox.flush(LIMIT_S))
        found: list[Any] = []
        while len(found) < 7:
            assert not flushing.is_done, round
            found += server.batch()[0]
        assert flushing.result(LIMIT_S)
        assert found == list(range(7))


def test_closing_delivers_what_waits(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last records do not wait for their time; then the thread is gone."""
    server.put(0)
    server.batch()
    monkeypatch.setattr(metrics, "PACE_S", 3600.0)
    server.put(1, 2)
    closing = on_thread(lambda: server.outbox.close(LIMIT_S))

    assert server.batch() == ([1, 2], {})
    assert closing.result(LIMIT_S)
    assert server.outbox._thread is not None
    server.outbox._thread.join(LIMIT_S)
    assert not server.outbox._thread.is_alive()


def test_an_outbox_without_records_has_no_thread(server: Server) -> None:
    """A script that logs nothing pays nothing."""
    assert server.outbox._thread is None
    assert server.outbox.close(LIMIT_S)
    server.put(1)
    assert server.outbox._thread is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_sends_nothing_and_hangs_nowhere(server: Server) -> None:
    """A data loader's process may log into the void, even if the lock was held when it was made."""
    server.put(0)
    server.next()
    with server.outbox._changed:
        pid = os.fork()
        if pid == 0:  # pragma: no cover
            server.put(1, {"a": 1}, object())
            os._exit(0 if len(server.outbox._waiting) == 0 else 1)

    _, status = os.waitpid(pid, 0)
    assert status == 0
