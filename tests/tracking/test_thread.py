"""TrackerThread: whatever a tracker does, nobody waits for it, and what is lost by that is counted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest

from flarebus.tracking import Tracker, thread
from flarebus.tracking.thread import TrackerThread
from tests.system.observed import wait_until
from tests.tracking.fake_tracker import FakeTracker, MadeTrackers

LIMIT_S = 60.0


class Threads:
    """Starts threads; at the end of a test all of them come to their end."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.reached = threading.Event()
        self.started: list[TrackerThread] = []

    def start(self, make: Callable[[], Tracker] | None = None, retry_s: float = LIMIT_S) -> TrackerThread:
        made = TrackerThread("fake", make or (lambda: FakeTracker({})), lambda error: f"hidden {error}", "a", retry_s)
        self.started.append(made)
        return made

    def hang(self) -> None:
        self.reached.set()
        assert self.go_on.wait(LIMIT_S)


@pytest.fixture
def threads(made: MadeTrackers) -> Iterator[Threads]:
    found = Threads()
    yield found
    found.go_on.set()
    for each in found.started:
        each.end("completed", LIMIT_S)
    assert not [each for each in threading.enumerate() if each.name == "flarebus tracking fake" and _stays(each)]


def _stays(each: threading.Thread) -> bool:
    each.join(LIMIT_S)
    return each.is_alive()


def text(value: str) -> Callable[[Tracker], int]:
    """Writes one text."""

    def write(tracker: Tracker) -> int:
        tracker.text("", "key", value, 0, "")
        return 0

    return write


def texts(made: MadeTrackers) -> list[str]:
    return [call[2] for tracker in made.all for call in tracker.of("text")]


def test_all_is_written_in_order_before_it_is_closed(threads: Threads, made: MadeTrackers) -> None:
    """What was put before the end is delivered, and then the tracker is closed with how the job ended."""
    tracking = threads.start()
    for number in range(100):
        assert tracking.put(text(str(number)))
    tracking.end("aborted", LIMIT_S)

    assert tracking.wait(LIMIT_S)
    assert texts(made) == [str(number) for number in range(100)]
    assert made.all[0].calls[-1] == ("close", "aborted")
    assert not tracking.put(text("late"))


@pytest.mark.parametrize("error", [ValueError("secret"), SystemExit("secret")])
def test_a_record_that_is_refused_costs_only_itself(
    threads: Threads, made: MadeTrackers, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    """The others are written; the log has the first reasons, without what they hide, and at the end the number."""

    def refuse(tracker: Tracker) -> int:
        raise error

    tracking = threads.start()
    for _ in range(10):
        tracking.put(refuse, 7)
    tracking.put(text("good"))
    tracking.end("completed", LIMIT_S)

    assert not tracking.wait(LIMIT_S)
    assert texts(made) == ["good"]
    assert made.all[0].of("close") == [("completed",)]
    assert caplog.messages == [
        *3 * ["tracking with fake: hidden secret"],
        "tracking with fake: records lost: 70 not taken",
    ]


def test_a_tracker_that_cannot_be_opened_is_said_once(
    threads: Threads, made: MadeTrackers, caplog: pytest.LogCaptureFixture
) -> None:
    """However often it is tried: one line with the reason, and one with what was lost."""
    attempts = threading.Semaphore(0)

    def fail() -> Tracker:
        attempts.release()
        raise OSError("nobody there")

    tracking = threads.start(fail, retry_s=0.001)
    tracking.put(text("lost"))
    for _ in range(5):
        assert attempts.acquire(timeout=LIMIT_S)
    tracking.end("completed", LIMIT_S)

    assert not tracking.wait(LIMIT_S)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "tracking with fake is not possible, the job goes on: hidden nobody there",
        "tracking with fake: records lost: 1 not delivered",
    ]


def test_a_tracker_that_comes_up_later_gets_what_waited(threads: Threads, made: MadeTrackers) -> None:
    """A server that is started after the job has all of the job."""
    answers = iter([OSError("not yet"), OSError("not yet")])

    def make() -> Tracker:
        for error in answers:
            raise error
        return FakeTracker({})

    tracking = threads.start(make, retry_s=0.001)
    tracking.put(text("early"))
    wait_until(lambda: texts(made) == ["early"], "the text that waited")
    tracking.end("completed", LIMIT_S)

    assert tracking.wait(LIMIT_S)


def test_a_tracker_that_hangs_is_given_up(
    threads: Threads, made: MadeTrackers, caplog: pytest.LogCaptureFixture
) -> None:
    """Puts return, the end waits no longer than it is told to, and the log says what was not delivered."""
    made.faults["text"] = threads.hang
    tracking = threads.start()
    tracking.put(text("hangs"), 3)
    assert threads.reached.wait(LIMIT_S)
    tracking.put(text("waits"), 4)
    tracking.end("completed", LIMIT_S)

    assert not tracking.wait(0.01)
    assert caplog.messages == [
        "tracking with fake: given up, it did not finish in time",
        "tracking with fake: records lost: 7 not delivered",
    ]
    threads.go_on.set()
    assert made.closed.wait(LIMIT_S)
    assert texts(made) == ["hangs"]


def test_a_tracker_that_hangs_while_it_is_opened_is_given_up(threads: Threads, made: MadeTrackers) -> None:
    """As when it hangs later; it is closed if it ever opens."""
    made.faults["open"] = threads.hang

    def make() -> Tracker:
        made.at("open")
        return FakeTracker({})

    tracking = threads.start(make)
    assert threads.reached.wait(LIMIT_S)
    tracking.end("completed", LIMIT_S)

    assert not tracking.wait(0.01)
    threads.go_on.set()
    assert made.closed.wait(LIMIT_S)


@pytest.mark.parametrize("in_bytes", [False, True])
def test_what_waits_is_bounded_and_the_rest_is_counted(
    threads: Threads, made: MadeTrackers, caplog: pytest.LogCaptureFixture, in_bytes: bool
) -> None:
    """A full queue takes no more records; what is needed still finds room; the tracker hears how many were lost."""
    size = {"nbytes": thread.MAX_WAITING_BYTES // 2} if in_bytes else {"n_records": thread.MAX_WAITING_RECORDS // 2}
    n_lost = 1 if in_bytes else thread.MAX_WAITING_RECORDS // 2
    made.faults["open"] = threads.hang

    def make() -> Tracker:
        made.at("open")
        return FakeTracker({})

    tracking = threads.start(make)
    assert [tracking.put(text(name), **size) for name in "abc"] == [True, True, False]
    assert tracking.put(text("needed"), is_needed=True, **size)
    threads.go_on.set()
    tracking.end("completed", LIMIT_S)

    assert not tracking.wait(LIMIT_S)
    assert texts(made) == ["a", "b", "needed"]
    assert made.all[0].of("tags") == [("a", {"flarebus.records_dropped": n_lost})]
    assert f"records lost: {n_lost} dropped, for they came faster than it took them" in caplog.text


def test_at_the_end_what_matters_comes_before_many_records(
    threads: Threads, made: MadeTrackers, caplog: pytest.LogCaptureFixture
) -> None:
    """When records would take all the time there is, the rest of them is left out; models and the end are told."""
    made.faults["text"] = threads.hang
    tracking = threads.start()
    tracking.put(text("slow"))
    assert threads.reached.wait(LIMIT_S)
    for _ in range(3):
        tracking.put(text("more"), 5)
    tracking.put(text("needed"), is_needed=True)
    tracking.end("completed", 0.0)
    threads.go_on.set()

    assert not tracking.wait(LIMIT_S)
    assert texts(made) == ["slow", "needed"]
    assert made.all[0].of("close") == [("completed",)]
    assert "records lost: 15 not delivered" in caplog.text
