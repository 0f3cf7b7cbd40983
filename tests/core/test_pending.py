"""Pending: one value or error, once, for any number of threads that wait."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest

from flarebus.errors import DeadlineExceeded, LinkError, NoRoute
from flarebus.pending import Pending

# Long enough for any machine; only a test that fails waits for it.
LIMIT_S = 3.0


def test_a_value_arrives_once() -> None:
    """The first value stands, whatever is set or failed later."""
    pending: Pending[int] = Pending()
    assert not pending.is_done
    pending.set(1)
    pending.set(2)
    pending.fail(ValueError("late"))

    assert pending.is_done
    assert pending.result() == pending.result(0) == 1
    assert pending.error() is None


def test_an_error_arrives_once() -> None:
    """The first error stands and is raised to everybody who asks."""
    pending: Pending[int] = Pending()
    error = NoRoute("site-1")
    pending.fail(error)
    pending.fail(NoRoute("site-2"))
    pending.set(1)

    assert pending.error() is error
    for _ in range(2):
        with pytest.raises(NoRoute) as caught:
            pending.result(0)
        assert caught.value is error


def test_none_is_a_value() -> None:
    """Done with nothing to tell is done."""
    pending: Pending[None] = Pending()
    pending.set(None)

    assert pending.is_done
    pending.result(0)


@pytest.mark.parametrize("timeout", [0, -1, 0.001])
def test_a_timeout_is_an_error_of_the_path(timeout: float) -> None:
    """Nothing within the time says so, and the answer may still come afterwards."""
    pending: Pending[int] = Pending()
    with pytest.raises(DeadlineExceeded, match=f"{timeout} s"):
        pending.result(timeout)
    with pytest.raises(TimeoutError):
        pending.result(timeout)
    pending.set(1)

    assert pending.result(timeout) == 1


class Doorbell:
    """The lock of a pending, which rings whenever somebody begins to wait."""

    def __init__(self, pending: Pending[int]) -> None:
        self._lock = pending._lock
        self.rung = threading.Semaphore(0)
        self.release = self._lock.release
        pending._lock = self  # type: ignore[assignment]

    def acquire(self, timeout: float) -> bool:
        self.rung.release()
        return self._lock.acquire(timeout=timeout)


@pytest.mark.parametrize("fails", [False, True])
def test_everybody_who_waits_is_let_through(fails: bool) -> None:
    """One answer wakes all waiting threads, with or without a time limit."""
    pending: Pending[int] = Pending()
    door = Doorbell(pending)
    found: list[object] = []

    def wait(timeout: float | None) -> None:
        try:
            found.append(pending.result(timeout))
        except LinkError as error:
            found.append(error)

    threads = [threading.Thread(target=wait, args=(60.0 if i % 2 else None,), daemon=True) for i in range(10)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert door.rung.acquire(timeout=LIMIT_S)
    error = NoRoute("site-1")
    pending.fail(error) if fails else pending.set(7)
    for thread in threads:
        thread.join(LIMIT_S)

    assert found == [error if fails else 7] * 10


def test_callbacks_run_in_order_on_the_thread_that_sets() -> None:
    """Those added before run when it is set, with the pending done; those added after run at once."""
    pending: Pending[int] = Pending()
    found: list[tuple[str, int, threading.Thread]] = []
    for name in "abc":
        pending.on_done(lambda done, name=name: found.append((name, done.result(0), threading.current_thread())))
    assert found == []
    thread = threading.Thread(target=pending.set, args=(7,))
    thread.start()
    thread.join()
    assert found == [(name, 7, thread) for name in "abc"]
    pending.on_done(lambda done: found.append(("d", done.result(0), threading.current_thread())))
    pending.set(8)

    assert found[3:] == [("d", 7, threading.current_thread())]


def test_a_callback_hears_of_errors() -> None:
    """A failure calls back as well, once."""
    pending: Pending[int] = Pending()
    found: list[BaseException | None] = []
    pending.on_done(lambda done: found.append(done.error()))
    error = NoRoute("site-1")
    pending.fail(error)
    pending.fail(error)

    assert found == [error]


def test_a_callback_may_use_its_pending() -> None:
    """Inside a callback it may be waited for, set again and given another callback, without blocking."""
    pending: Pending[int] = Pending()
    found: list[int] = []

    def again(done: Pending[int]) -> None:
        done.set(2)
        done.on_done(lambda inner: found.append(inner.result()))

    pending.on_done(again)
    pending.set(1)

    assert found == [1]


def test_a_callback_is_let_go() -> None:
    """What it holds on to, such as arrays on their way, is free once it has run."""

    class Held:
        pass

    pending: Pending[int] = Pending()
    held = Held()
    alive = weakref.ref(held)
    pending.on_done(lambda done, held=held: None)
    del held
    assert alive() is not None
    pending.set(1)

    assert alive() is None


class Interloper:
    """The guard of all pendings, before which somebody else is quicker, once."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = [act]
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        while self._act:
            self._act.pop()()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_setting_just_before_a_callback_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever adds one at the same moment has it called all the same."""
    pending: Pending[int] = Pending()
    found: list[int] = []
    monkeypatch.setattr(Pending, "_guard", Interloper(lambda: pending.set(7)))
    pending.on_done(lambda done: found.append(done.result(0)))

    assert found == [7]


def test_failing_just_before_a_value_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was quicker has settled it, and the other notices in time."""
    pending: Pending[int] = Pending()
    error = NoRoute("site-1")
    monkeypatch.setattr(Pending, "_guard", Interloper(lambda: pending.fail(error)))
    pending.set(7)

    assert pending.error() is error
    with pytest.raises(NoRoute):
        pending.result(0)


@pytest.fixture
def _restless() -> Iterator[None]:
    """Threads are switched as often as can be."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_restless")
def test_no_callback_is_missed_in_a_race() -> None:
    """However setting and adding fall together, every callback runs exactly once."""
    for _ in range(100):
        pending: Pending[int] = Pending()
        calls: list[int] = []
        start = threading.Barrier(3)

        def add(pending: Pending[int] = pending, calls: list[int] = calls, start: threading.Barrier = start) -> None:
            start.wait()
            for _ in range(5):
                pending.on_done(lambda done: calls.append(done.result(0)))

        def finish(pending: Pending[int] = pending, start: threading.Barrier = start) -> None:
            start.wait()
            pending.set(1)

        threads = [threading.Thread(target=target) for target in (add, finish, add)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert calls == [1] * 10


@pytest.mark.usefixtures("_restless")
def test_of_many_who_set_one_wins() -> None:
    """When threads set and fail at once, everybody sees the same outcome, and callbacks run once."""
    for turn in range(100):
        pending: Pending[int] = Pending()
        calls: list[object] = []
        pending.on_done(lambda done, calls=calls: calls.append(done.error() or done.result(0)))
        start = threading.Barrier(4)

        def finish(number: int, pending: Pending[int] = pending, start: threading.Barrier = start) -> None:
            start.wait()
            pending.set(number + 1) if number % 2 else pending.fail(NoRoute(str(number)))

        threads = [threading.Thread(target=finish, args=(turn + number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(calls) == 1
        assert calls == [pending.error() or pending.result(0)]
