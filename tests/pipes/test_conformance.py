"""The conformance kit: a pipe that keeps all promises passes, and each broken promise is named with its method."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flarebus_pipes.memory_pipe import MemoryPipe

from flarebus.pipes import Pipe
from flarebus.testing import ContractBroken, PipeCheck, PipeTrial, PromiseBroken, check_pipe, pipe_checks
from tests.pipes import bad_pipes
from tests.pipes.socket_pipe import SocketPipe

MEBIBYTE = 1024 * 1024
PATIENCE_S = 20.0
# For these a test waits until patience ends: what hangs, and what never comes.
SHORT_PATIENCE_S = 3.0
HANGING = frozenset(
    {
        "SleepsInReceive",
        "SleepsInSend",
        "SendWaitsForEver",
        "SendsOnlyOnce",
        "ExportsTooLittle",
        "ExportsAnotherSite",
        "LeavesTraces",
        "KeepsALockFile",
        "OneDirectionAtATime",
    }
)

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets exist on Linux only")

IN_PROCESS = [
    ("making_an_end_touches_nothing", "TouchesDisk", "__init__", "must not touch anything outside; made a file"),
    ("making_an_end_touches_nothing", "AnotherMode", "__init__", "made with mode PASSIVE has to be one of that mode"),
    ("use_before_open_is_refused", "WorksUnopened", "send", "has to raise BrokenPipeError on an end that was never"),
    ("use_after_close_is_refused", "WorksClosed", "receive", "has to raise BrokenPipeError on a closed end"),
    ("second_open_is_refused", "OpensTwice", "open", "has to raise UsageError on an end that is open already"),
    ("taken_place_is_refused", "SharesItsPlace", "open", "while another live end of mode .* has this place"),
    ("close_is_idempotent", "ClosesOnce", "close", "raised RuntimeError: not open"),
    ("close_wakes_receive", "SleepsInReceive", "receive", "does not return within .* when its end is closed while"),
    ("close_wakes_send", "SleepsInSend", "send", "does not return within .* when its end is closed while it waits"),
    ("closed_peer_reads_nothing", "TrueToNobody", "send", "is True, though nobody can have received the message"),
    ("closed_ends_can_be_reopened", "OpensOnce", "open", "raised OSError: used up"),
    (
        "closed_ends_can_be_reopened",
        "KeepsOldMessages",
        "receive",
        "another message than .* after both ends were closed",
    ),
    ("other_end_may_come_later", "NeedsItsPeer", "send", "before the other end was there; it has to wait"),
    ("receive_ends_in_time", "RaisesTimeout", "receive", "raised TimeoutError with nothing to receive"),
    ("receive_ends_in_time", "ReturnsEarly", "receive", "returned None long before its timeout"),
    ("send_ends_in_time", "SendRaisesTimeout", "send", "raised TimeoutError with nobody who receives"),
    ("send_ends_in_time", "SendWaitsForEver", "send", "does not return within .* with nobody who receives"),
    ("one_that_was_not_read_can_be_sent_again", "SendsOnlyOnce", "receive", "returned None.* when it is sent again"),
    ("clear_drops_what_waits", "ClearsNothing", "clear", "has to drop what waits to be received"),
    ("export_describes_both_ends", "ExportsObjects", "export", "are no JSON values: .* PosixPath"),
    ("export_describes_both_ends", "ExportsItself", "export", "for PEER have to say mode 'PASSIVE'"),
    ("export_describes_both_ends", "ExportsNoClass", "export", r"cannot load tests\.pipes\.bad_pipes\.Nothing"),
    ("export_describes_both_ends", "ExportsTooLittle", "receive", "returned None.* the peer that export describes"),
    ("what_it_tells_has_the_right_type", "CountsInWords", "moved_bytes", "has to return a count, not 'many'"),
    ("what_it_tells_has_the_right_type", "LivesInTheFuture", "get_last_peer_active_time", "monotonic seconds, not 1e"),
    ("closed_ends_leave_nothing", "LeavesTraces", "close", "nothing may be left .* ends are closed: a segment"),
    ("messages_keep_their_order", "Repeats", "receive", "returned message b'5' where b'6' was due"),
    ("burst_arrives_whole", "Loses", "receive", "returned message b'1000' where b'999' was due"),
    (
        "begun_messages_keep_their_order",
        "BeginsInTheDark",
        "begin",
        "what became of a message that nobody has received",
    ),
    ("delivered_messages_keep_their_order", "DeliversTwice", "deliver", "message b'0' came where b'1' was due"),
    ("fields_survive", "LowersTopics", "receive", "topic has to arrive as it was sent: 'Train_1' came as 'train_1'"),
    ("fields_survive", "ForgetsIds", "receive", "another message than the one that was sent"),
    ("every_size_arrives", "DropsEmptyBuffers", "receive", "1 buffers have to arrive"),
    ("many_buffers_arrive", "TakesAHundredBuffers", "receive", "1000 buffers have to arrive"),
    ("big_message_arrives", "ZerosTheEnd", "receive", "the bytes of buffer 0 have to arrive as they were sent"),
    ("both_ends_send_at_once", "OneDirectionAtATime", "receive", "(while it sends itself|msg_id has to arrive)"),
    ("send_is_true_only_after_receive", "TrueTooEarly", "send", "is over before the peer's receive has returned"),
    ("message_wakes_receive", "NoPatience", "receive", "has to wait for a message when it has no timeout"),
    ("channels_are_apart", "OneChannel", "open", "raised UsageError"),
    ("buffers_are_the_receivers_own", "ReadOnly", "receive", "have to be writable"),
    ("buffers_are_the_receivers_own", "Misaligned", "receive", "have to be aligned to 64 bytes"),
    ("buffers_are_the_receivers_own", "SharesMemory", "receive", "(aligned|changes the sender's memory)"),
    ("buffers_last_until_they_are_dropped", "UsesMemoryAgain", "receive", "still holds was used for something else"),
]
ACROSS_PROCESSES = [
    ("peer_works_in_another_process", "ExportsAnotherSite", "send", "has to be True .* in another process"),
    ("killed_sender_delivers_no_half_message", "TakesHalfForWhole", "receive", "returned half a message"),
    ("killed_peer_reads_nothing", "TrueOnceWritten", "send", "is True, though the peer was killed before"),
    ("killed_reader_ends_a_send", "RaisesWhatItGets", "send", r"raised Connection\w+Error: .*, not BrokenPipeError"),
    ("place_of_a_dead_end_is_free", "KeepsALockFile", "open", "raised UsageError: another end of this mode"),
    ("dead_ends_leave_nothing", "KeepsALockFile", "close", r"nothing may be left .* both ends are dead: check"),
]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """No trace of one bad pipe is held against the next; calls that hang are let go."""
    bad_pipes.TRACES.clear()
    bad_pipes.GIVE_UP.clear()
    yield
    bad_pipes.GIVE_UP.set()


def bad(name: str) -> Any:
    """The bad pipe of that name."""
    return getattr(bad_pipes, name)


def check_named(pipe: type[Pipe], name: str) -> PipeCheck:
    """One check of the kit."""
    return dict(pipe_checks(pipe))[name]


@pytest.mark.parametrize(("check", "pipe", "method", "said"), IN_PROCESS, ids=lambda value: str(value)[:40])
def test_broken_promise_is_named(check: str, pipe: str, method: str, said: str) -> None:
    """A pipe that breaks one promise is told which, with class and method; the pipe it was made from is not."""
    trial = PipeTrial(
        lambda mode: bad(pipe)(mode, check),
        leftovers=bad_pipes.leftovers,
        patience=SHORT_PATIENCE_S if pipe in HANGING else PATIENCE_S,
        big_bytes=4 * MEBIBYTE,
    )

    with pytest.raises(PromiseBroken, match=rf"tests\.pipes\.bad_pipes\.{pipe}\.{method}: .*({said})") as raised, trial:
        check_named(bad(pipe), check)(trial)

    assert raised.value.pipe is bad(pipe)


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize(("check", "pipe", "method", "said"), ACROSS_PROCESSES, ids=lambda value: str(value)[:40])
def test_promise_broken_across_processes_is_named(
    tmp_path: Path, check: str, pipe: str, method: str, said: str
) -> None:
    """What goes wrong only when the other end is a process, or was one, is told as well."""
    trial = PipeTrial(
        lambda mode: bad(pipe)(mode, str(tmp_path)),
        leftovers=lambda: os.listdir(tmp_path),
        # The other process takes its time to start.
        patience=2 * SHORT_PATIENCE_S if pipe in HANGING else PATIENCE_S,
        big_bytes=64 * MEBIBYTE,
    )

    with pytest.raises(PromiseBroken, match=rf"tests\.pipes\.bad_pipes\.{pipe}\.{method}: .*{said}"), trial:
        check_named(bad(pipe), check)(trial)


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in pipe_checks(SocketPipe)])
def test_pipe_of_an_outsider_keeps_the_contract(check: PipeCheck) -> None:
    """A pipe over sockets that was written after the contract alone passes every check, across processes too."""
    site = uuid.uuid4().hex

    def sockets() -> list[str]:
        return [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if site in line]

    with PipeTrial(
        lambda mode: SocketPipe(mode, site), leftovers=sockets, patience=PATIENCE_S, big_bytes=16 * MEBIBYTE
    ) as trial:
        check(trial)


def test_every_check_is_known_to_find_something() -> None:
    """No check of the kit is without a bad pipe that only it is there for."""
    named = [name for name, _ in pipe_checks(SocketPipe)]

    assert set(named) == {check for check, *_ in IN_PROCESS + ACROSS_PROCESSES}
    assert len(named) == len(set(named))


def test_pipe_for_one_process_is_not_asked_to_cross() -> None:
    """The checks with a second process are left out for a pipe that says it is for one."""
    left_out = {name for name, _ in pipe_checks(SocketPipe)} - {name for name, _ in pipe_checks(MemoryPipe)}

    assert left_out == {check for check, *_ in ACROSS_PROCESSES}


@pytest.mark.slow
def test_all_broken_promises_are_listed() -> None:
    """One run finds everything that is wrong, by the name of the check, and says what it is at."""
    seen: list[str] = []

    with pytest.raises(ContractBroken, match=r"LowersTopics breaks a promise of a pipe:\n  fields_survive: ") as raised:
        check_pipe(
            lambda mode: bad_pipes.LowersTopics(mode, "all"), patience=30, big_bytes=MEBIBYTE, on_check=seen.append
        )

    assert list(raised.value.broken) == ["fields_survive"]
    assert seen == [name for name, _ in pipe_checks(MemoryPipe)]


@pytest.mark.slow
def test_kit_runs_from_a_shell_without_pytest() -> None:
    """`python -m flarebus.testing` says what is wrong and ends with an error; pytest is not imported for it."""
    code = (
        "import runpy, sys; sys.argv = ['t', 'tests.pipes.bad_pipes:CountsInWords', '--big-mib', '1'];\n"
        "try: runpy.run_module('flarebus.testing', run_name='__main__')\n"
        "finally: assert 'pytest' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    ended = subprocess.run(
        [sys.executable, "-c", code], check=False, env=environment, capture_output=True, text=True, timeout=100
    )

    assert ended.returncode == 1, ended.stderr
    assert "bad_pipes.CountsInWords.moved_bytes: has to return a count, not 'many'" in ended.stderr
    assert "Traceback" not in ended.stderr
