"""From the bytes of a stream to lines, and lines on their way to a slow reader."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flarebus.site import lines
from flarebus.site.lines import MAX_LINE_BYTES, LineQueue, LineSplitter, Tail

LIMIT_S = 60.0


def split(*parts: bytes) -> list[str]:
    """All lines of a stream that comes in these parts."""
    splitter = LineSplitter()
    return [line for part in parts for line in splitter.feed(part)] + splitter.finish()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\n\ntwo", ["one", "", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"10%\r50%\r100%\ndone", ["100%", "done"]),
        (b"10%\r50%\r", ["50%"]),
        (b"\xff\xc3\xbc\n", ["\ufffdü"]),
    ],
)
def test_lines_of_a_stream(data: bytes, expected: list[str]) -> None:
    """Line ends of all kinds; a carriage return starts the line anew; what is no text is replaced."""
    assert split(data) == expected


@given(st.lists(st.sampled_from([b"a", b"\xc3\xbc", b"\xc3", b"\r", b"\n", b"\r\n", b"x" * 9]), max_size=40), st.data())
def test_it_does_not_matter_how_the_bytes_come(pieces: list[bytes], data: st.DataObject) -> None:
    """A stream cut anywhere gives the same lines."""
    whole = b"".join(pieces)
    cut = data.draw(st.integers(0, len(whole)))

    assert split(whole[:cut], whole[cut:]) == split(whole)
    assert split(*(whole[n : n + 1] for n in range(len(whole)))) == split(whole)


def test_a_line_without_an_end_does_not_pile_up() -> None:
    """It is cut at the greatest length, between characters, and nothing of it is lost."""
    splitter = LineSplitter()
    data = "€".encode() * 100_000
    found = [line for n in range(0, len(data), 1000) for line in splitter.feed(data[n : n + 1000])]

    assert len(splitter._rest) <= MAX_LINE_BYTES + 1
    assert all(len(line.encode()) <= MAX_LINE_BYTES for line in found)
    assert "".join(found + splitter.finish()) == "€" * 100_000


def test_a_line_of_the_greatest_length_is_not_cut() -> None:
    """Whether it comes at once, with its end later, or with a carriage return first."""
    text = b"x" * MAX_LINE_BYTES

    assert [len(line) for line in split(text + b"\n")] == [MAX_LINE_BYTES]
    assert [len(line) for line in split(text, b"\r", b"\n")] == [MAX_LINE_BYTES]
    assert [len(line) for line in split(text + b"x\n")] == [MAX_LINE_BYTES, 1]


def test_an_endless_progress_bar_takes_no_room() -> None:
    """Only its last state is kept."""
    splitter = LineSplitter()
    for n in range(100_000):
        assert splitter.feed(b"\r%d%%" % n) == []

    assert splitter._rest == b"99999%"


def test_a_tail_keeps_whole_lines_within_its_size() -> None:
    """The oldest go first; lines without text are not kept."""
    tail = Tail(11)
    for line in ("first", "ünder", " ", "", "four"):
        tail.add(line)

    assert tail.text == "ünder\nfour"
    assert len(tail.text.encode()) == 11


def test_a_tail_keeps_the_end_of_a_line_that_is_too_long() -> None:
    """Between characters, so that it stays text."""
    tail = Tail(5)
    tail.add("one")
    tail.add("€€€")

    assert tail.text == "€"


def test_lines_come_out_as_they_went_in() -> None:
    """In order, to a thread that waits, until the queue is closed."""
    queue = LineQueue()
    found: list[tuple[str, str]] = []
    reader = threading.Thread(target=lambda: found.extend(queue))
    reader.start()
    queue.put("stdout", ["a", "b"])
    queue.put("stderr", ["c"])
    queue.close()
    reader.join(LIMIT_S)

    assert found == [("stdout", "a"), ("stdout", "b"), ("stderr", "c")]


def test_lines_that_a_slow_reader_has_no_room_for_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are missing, a line says how many there were; afterwards it goes on."""
    monkeypatch.setattr(lines, "MAX_WAITING_CHARS", 150)
    queue = LineQueue()
    queue.put("stdout", [str(n) for n in range(10)])
    reader = iter(queue)
    first = [next(reader) for _ in range(3)]
    queue.put("stdout", ["again"])
    queue.put("stdout", [str(n) for n in range(9)])
    queue.close()

    assert first == [("stdout", "0"), ("stdout", "1"), ("stdout", "2")]
    assert list(reader) == [
        ("stderr", "(7 lines were left out here: the log is too slow)"),
        ("stdout", "again"),
        ("stdout", "0"),
        ("stdout", "1"),
        ("stderr", "(7 lines were left out here: the log is too slow)"),
    ]
