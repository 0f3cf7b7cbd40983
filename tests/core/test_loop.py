"""The loop: posts run in order on its thread, ticks come when they are due, and it ends whatever happens."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

import flarebus.loop
from flarebus.errors import Closed, UsageError
from flarebus.loop import HELD_UP_S, IDLE_S, Loop
from tests.core.bus import WAIT_S, wait_for


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A loop that is stopped at the end."""
    loop = Loop("test")
    yield loop
    loop.stop()


class Actor:
    """Writes down when it was told the time, and asks for what the test wants."""

    def __init__(self, wanted: Callable[[float], float | None] = lambda _: None) -> None:
        self.ticks: list[float] = []
        self.ended: list[int] = []
        self.ticked = threading.Event()
        self._wanted = wanted

    def tick(self, now: float) -> float | None:
        self.ticks.append(now)
        self.ticked.set()
        return self._wanted(now)

    def end(self) -> None:
        self.ended.append(len(self.ticks))


def test_posts_run_in_order_on_its_thread(loop: Loop) -> None:
    """What is posted from any thread runs on the loop's own, in the order of posting."""
    seen: list[tuple[int, bool]] = []
    for number in range(1000):
        loop.post(lambda n: seen.append((n, loop.is_current())), number)

    loop.run(lambda: None)

    assert seen == [(number, True) for number in range(1000)]
    assert not loop.is_current()


def test_posts_from_many_threads_are_all_run(loop: Loop) -> None:
    """No post is missed, whether the loop is asleep or awake when it comes."""
    seen: list[int] = []

    def post(base: int) -> None:
        for number in range(500):
            loop.post(seen.append, base + number)
            if number % 50 == 0:
                loop.run(lambda: None)

    threads = [threading.Thread(target=post, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    loop.run(lambda: None)

    assert sorted(seen) == [1000 * n + number for n in range(4) for number in range(500)]


def test_a_post_wakes_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop with nothing to do sleeps for as long as nobody needs it, and is woken by a post and by its end."""
    monkeypatch.setattr(flarebus.loop, "IDLE_S", 3600.0)
    loop = Loop("test")
    done: list[Any] = []

    def work() -> None:
        done.extend(loop.run(lambda n=n: n) for n in range(200))
        loop.stop()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(WAIT_S)

    assert done == list(range(200))
    assert not worker.is_alive()


def test_run_brings_the_outcome(loop: Loop) -> None:
    """`run` returns what the call returns and raises what it raises, also on the loop's own thread."""
    assert loop.run(lambda a, b: a + b, 1, 2) == 3
    assert loop.run(lambda: loop.run(lambda: 4)) == 4
    with pytest.raises(ZeroDivisionError):
        loop.run(lambda: 1 // 0)
    with pytest.raises(SystemExit):
        loop.run(sys.exit)
    assert loop.run(lambda: 5) == 5


def test_a_failing_call_is_logged_and_survived(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    """An error in a call, a reader or a tick goes to the log, and the thread goes on."""

    class Broken(Actor):
        def tick(self, now: float) -> float | None:
            super().tick(now)
            raise ValueError("tick")

    def broken() -> None:
        raise ValueError("post")

    actor = Broken()
    loop.post(broken)
    loop.run(loop.add_actor, actor)
    wait_for(actor.ticked)

    assert loop.run(lambda: 1) == 1
    assert "broken failed on the bus thread" in caplog.text
    assert "tick of" in caplog.text


def test_a_reader_is_called_when_there_is_something(loop: Loop) -> None:
    """A socket's reader runs on the loop's thread, until the socket is closed there."""
    came = threading.Event()
    heard: list[bytes] = []
    sender = loop.context.socket(zmq.PAIR)
    sender.bind("inproc://test")

    def listen() -> zmq.Socket[bytes]:
        socket = loop.context.socket(zmq.PAIR)
        socket.connect("inproc://test")

        def read() -> None:
            with contextlib.suppress(zmq.Again):
                heard.append(socket.recv(zmq.NOBLOCK))
                came.set()

        loop.add_reader(socket, read)
        return socket

    socket = loop.run(listen)
    sender.send(b"hello")
    wait_for(came)
    loop.run(loop.close_socket, socket)
    loop.run(loop.close_socket, socket)

    assert heard == [b"hello"]
    assert socket.closed
    assert loop._readers == {}
    sender.close()


def test_what_is_deferred_comes_last(loop: Loop) -> None:
    """It runs in order, after what was posted before the thread comes to it, and before that if it is flushed; an error
    in it is survived, and the end leaves nothing behind."""
    seen: list[str] = []
    held, go = threading.Event(), threading.Event()

    def defer() -> None:
        loop.defer(seen.append, "deferred")
        loop.defer(int, "no number")
        loop.defer(seen.append, "deferred too")

    loop.post(lambda: (held.set(), wait_for(go)))
    wait_for(held)
    loop.post(defer)
    loop.post(seen.append, "posted")
    go.set()
    loop.run(lambda: None)
    loop.run(lambda: None)
    assert seen == ["posted", "deferred", "deferred too"]

    loop.run(lambda: (loop.defer(seen.append, "flushed"), loop.flush(), seen.append("after")))
    assert seen[3:] == ["flushed", "after"]

    loop.run(lambda: (loop.defer(seen.append, "last"), loop.stop()))
    loop.stop()
    assert seen[5:] == ["last"]


def test_a_monitor_is_read_before_sockets(loop: Loop) -> None:
    """All that is on a monitor is read, what came before it was added as well, and before any socket is."""
    heard: list[bytes] = []
    done = threading.Event()
    senders = [loop.context.socket(zmq.PAIR) for _ in range(2)]
    for number, sender in enumerate(senders):
        sender.bind(f"inproc://{number}")

    def read(socket: zmq.Socket[bytes]) -> None:
        with contextlib.suppress(zmq.Again):
            heard.append(socket.recv(zmq.NOBLOCK))
            if heard[-1] == b"last":
                done.set()

    def listen() -> None:
        for number, add in enumerate((loop.add_reader, loop.add_monitor)):
            socket = loop.context.socket(zmq.PAIR)
            socket.connect(f"inproc://{number}")
            if number == 1:
                senders[number].send(b"early")
                assert socket.poll(WAIT_S * 1000)
            add(socket, functools.partial(read, socket))

    loop.run(listen)
    loop.run(lambda: None)
    assert heard == [b"early"]

    def say() -> None:
        senders[0].send(b"last")
        for number in range(3):
            senders[1].send(b"%d" % number)

    loop.run(say)
    wait_for(done)
    assert heard == [b"early", b"0", b"1", b"2", b"last"]
    for sender in senders:
        sender.close()


def test_ticks_come_when_they_are_wanted() -> None:
    """An actor is told the time when it is added, when it asked for it, and at least every `IDLE_S`."""
    now = [0.0]
    loop = Loop("test", lambda: now[0])
    actor = Actor(lambda now: now + 0.25)
    loop.run(loop.add_actor, actor)

    def at(seconds: float) -> list[float]:
        now[0] = seconds
        # Twice round: one that ends the sleep, and one after the tick.
        loop.run(lambda: None)
        loop.run(lambda: None)
        return actor.ticks

    assert at(0.1) == [0.0]
    assert at(0.3) == [0.0, 0.3]
    loop.run(loop.wake_by, 0.4)
    loop.run(loop.wake_by, 0.5)
    loop.run(loop.wake_by, None)
    assert at(0.45)[-1] == 0.45
    actor._wanted = lambda _: None
    at(0.9)
    assert at(0.9 + IDLE_S - 0.01)[-1] == 0.9
    assert at(0.9 + IDLE_S)[-1] == 0.9 + IDLE_S
    loop.run(loop.remove_actor, actor)
    loop.run(loop.remove_actor, actor)
    assert at(5.0)[-1] == 0.9 + IDLE_S
    loop.stop()


def test_a_held_up_loop_hears_before_it_judges() -> None:
    """After a stop of the whole process, what others said meanwhile is read before anybody is held to be silent."""
    now = [0.0]
    loop = Loop("test", lambda: now[0])
    actor = Actor()
    loop.run(loop.add_actor, actor)
    loop.run(lambda: None)
    late = IDLE_S + HELD_UP_S + 1

    now[0] = late
    loop.run(lambda: None)
    loop.run(lambda: None)
    assert actor.ticks == [0.0]
    now[0] = late + IDLE_S
    loop.run(lambda: None)
    loop.run(lambda: None)
    assert actor.ticks == [0.0, late + IDLE_S]
    # Even one that is late each time is told the time in the end.
    for step in range(1, 5):
        now[0] = late + IDLE_S + step * late
        loop.run(lambda: None)
        loop.run(lambda: None)
    assert len(actor.ticks) == 4
    loop.stop()


def test_what_came_during_a_sleep_is_read_before_anybody_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sleep that ends because a tick is due: what came while the thread waited to go on is read first."""
    now = [0.0]
    loop = Loop("test", lambda: now[0])
    told: list[str] = []
    done = threading.Event()
    actor = Actor(lambda _: (told.append("tick"), done.set())[1])
    sender = loop.context.socket(zmq.PAIR)
    sender.bind("inproc://test")

    def listen() -> None:
        socket = loop.context.socket(zmq.PAIR)
        socket.connect("inproc://test")

        def read() -> None:
            with contextlib.suppress(zmq.Again):
                told.append(socket.recv(zmq.NOBLOCK).decode())

        class Late:
            """The descriptor says nothing, and the message is there by the time that somebody looks."""

            def poll(self, _: int) -> list[tuple[int, int]]:
                monkeypatch.undo()
                sender.send(b"late")
                assert socket.poll(WAIT_S * 1000)
                now[0] += 2 * IDLE_S
                return []

        loop.add_reader(socket, read)
        monkeypatch.setattr(loop, "_poll", Late())

    loop.run(loop.add_actor, actor)
    wait_for(done)
    loop.run(told.clear)
    done.clear()
    loop.run(listen)
    wait_for(done)

    assert told == ["late", "tick"]
    sender.close()
    loop.stop()


def test_the_end_is_told_once(loop: Loop) -> None:
    """`stop` runs what was posted, tells every actor, closes every socket, and may be repeated from any thread."""
    actor, seen = Actor(), list[int]()
    loop.run(loop.add_actor, actor)
    socket = loop.run(loop.context.socket, zmq.DEALER)
    socket.connect("tcp://127.0.0.1:9")
    socket.send(b"never delivered")
    for number in range(100):
        loop.post(seen.append, number)

    stoppers = [threading.Thread(target=loop.stop) for _ in range(3)]
    for thread in stoppers:
        thread.start()
    for thread in stoppers:
        thread.join(WAIT_S)
    loop.stop()

    assert seen == list(range(100))
    assert len(actor.ended) == 1
    assert socket.closed
    assert loop.context.closed
    with pytest.raises(Closed):
        loop.post(seen.append, 0)
    with pytest.raises(Closed):
        loop.run(seen.append, 0)


def test_it_may_be_stopped_from_within(loop: Loop) -> None:
    """A call on the loop's thread may stop it; what it posts then is refused, and nobody hangs."""
    refused: list[bool] = []
    seen: list[int] = []

    def stop() -> None:
        loop.post(seen.append, 1)
        loop.stop()
        try:
            loop.post(lambda: None)
        except Closed:
            refused.append(True)

    loop.run(stop)
    loop._thread.join(WAIT_S)

    assert (refused, seen) == ([True], [1])
    assert not loop._thread.is_alive()


def test_a_post_that_comes_too_late_is_refused() -> None:
    """However a post and the end meet, it is either run or refused: nobody waits for what was lost."""
    for _ in range(100):
        loop = Loop("test")
        outcomes: list[Any] = []

        def run(loop: Loop = loop, outcomes: list[Any] = outcomes) -> None:
            try:
                while True:
                    outcomes.append(loop.run(lambda: 1))
            except Closed:
                outcomes.append(None)

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        loop.stop()
        for thread in threads:
            thread.join(WAIT_S)
        assert outcomes.count(None) == 2


def test_an_old_wake_up_is_nobody_elses(loop: Loop) -> None:
    """A thread that wakes a loop that has ended meanwhile writes into no descriptor that was opened since."""
    loop.stop()
    read, write = os.pipe()
    os.set_blocking(read, False)

    for _ in range(3):
        loop._waker.wake()

    with pytest.raises(BlockingIOError):
        os.read(read, 1)
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("has_eventfd", [True, False])
def test_a_waker_wakes(monkeypatch: pytest.MonkeyPatch, has_eventfd: bool) -> None:
    """With an event descriptor or without one (as on macOS), waking never blocks and is seen once."""
    if not has_eventfd:
        monkeypatch.delattr(os, "eventfd", raising=False)
    waker = flarebus.loop._Waker()
    poller = zmq.Poller()
    poller.register(waker.fileno(), zmq.POLLIN)

    assert poller.poll(0) == []
    for _ in range(100):
        waker.wake()
    assert poller.poll(0) != []
    waker.clear()
    waker.clear()
    assert poller.poll(0) == []
    for _ in range(100_000):
        waker.wake()
    waker.clear()
    waker.close()
    waker.wake()


def test_loops_work_without_event_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop woken through a socket pair runs what is posted."""
    monkeypatch.delattr(os, "eventfd", raising=False)
    loop = Loop("test")

    assert [loop.run(lambda n=n: n) for n in range(50)] == list(range(50))

    loop.stop()


def test_a_fork_is_refused(loop: Loop) -> None:
    """In a forked child a loop takes nothing, and stopping it neither hangs nor touches the parent's."""
    outcome, report = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            loop.post(print)
            said = b"taken"
        except UsageError:
            said = b"refused"
        loop.stop()
        os.write(report, said)
        os._exit(0)
    os.close(report)
    with open(outcome, "rb") as pipe:
        assert pipe.read() == b"refused"
    os.waitpid(child, 0)

    assert loop.run(lambda: 6) == 6


def test_a_process_may_end_without_a_word(tmp_path: Any) -> None:
    """A program that closes nothing ends at once and leaves no socket file."""
    code = (
        "from flarebus.loop import Loop; from flarebus.router import Router; from flarebus.cell import Cell\n"
        f"loop = Loop('r'); router = Router(loop); end = router.bind('ipc://{tmp_path}/bus')\n"
        "cell = Cell.dial('site', end); cell.wait_until_up(20); cell.request('nobody', 'a', 'b')\n"
        f"lost = Cell.dial('other', 'ipc://{tmp_path}/nowhere'); pending = lost.request('x', 'y', 'z')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=WAIT_S)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_log_names_what_failed(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    """A failing callable without a name of its own is shown as what it is."""

    class Nameless:
        def __call__(self) -> None:
            raise ValueError

        def __repr__(self) -> str:
            return "<nameless>"

    with caplog.at_level(logging.ERROR):
        loop.post(Nameless())
        loop.run(lambda: None)

    assert "<nameless> failed" in caplog.text
