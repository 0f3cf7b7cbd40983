"""A program's output as lines: taken from the bytes of its streams, and kept for whoever reads them at leisure.

No stream is read here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

__all__ = ["LineQueue", "LineSplitter", "Tail"]

# A line longer than this is cut: text without an end must not pile up in memory.
MAX_LINE_BYTES = 65536
# Lines that may wait for a slow log; what comes beyond that is counted and left out.
MAX_WAITING_CHARS = 16 << 20
# What a short line costs beside its text.
_LINE_CHARS = 64


class LineSplitter:
    """Bytes in, lines out, of one stream. UTF-8, with U+FFFD for what is none.

    A carriage return starts the line anew, so that of a progress bar its last state is kept.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Take bytes as they come, and return the lines that are complete with them, without their ends."""
        *whole, rest = (self._rest + data).split(b"\n")
        lines = [line for each in whole for line in _cut(_last_state(each), 0)]
        kept = rest.rstrip(b"\r")
        *more, self._rest = _cut(kept.rpartition(b"\r")[2] + rest[len(kept) :][:1], 1)
        return [line.decode("utf-8", "replace") for line in [*lines, *more]]

    def finish(self) -> list[str]:
        """Return the line that has no end, if there is one."""
        rest, self._rest = _last_state(self._rest), b""
        return [rest.decode("utf-8", "replace")] if rest else []


def _last_state(line: bytes) -> bytes:
    return line.rstrip(b"\r").rpartition(b"\r")[2]


def _cut(line: bytes, spare: int) -> list[bytes]:
    """Pieces of at most the greatest length, between characters; the last may be longer by `spare`."""
    pieces = []
    while len(line) > MAX_LINE_BYTES + spare:
        end = MAX_LINE_BYTES
        while end > MAX_LINE_BYTES - 4 and line[end] & 0xC0 == 0x80:
            end -= 1
        pieces.append(line[:end])
        line = line[end:]
    return [*pieces, line]


class Tail:
    """The last lines of a stream.

    Args:
        max_bytes: of their text in UTF-8, with one for each line end.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._n_bytes = 0
        self._lines: deque[bytes] = deque()

    def add(self, line: str) -> None:
        """Take one line; one without text is not kept."""
        if not line.strip():
            return
        data = line.encode("utf-8", "replace")[-self._max_bytes :]
        self._lines.append(data)
        self._n_bytes += len(data) + 1
        while self._n_bytes - 1 > self._max_bytes:
            self._n_bytes -= len(self._lines.popleft()) + 1

    @property
    def text(self) -> str:
        """The lines, with line ends between them; "" if there was none."""
        return b"\n".join(self._lines).decode("utf-8", "ignore")


class LineQueue:
    """Lines on their way from the thread that reads them to one that may be slow. Putting never waits."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[str, str]] = []
        self._n_chars = 0
        self._n_left_out = 0
        self._is_closed = False

    def put(self, stream: str, lines: Sequence[str]) -> None:
        """Add lines of a stream; those for which there is no room are left out and counted."""
        with self._changed:
            for line in lines:
                if self._n_chars > MAX_WAITING_CHARS:
                    self._n_left_out += 1
                    continue
                self._note_left_out()
                self._waiting.append((stream, line))
                self._n_chars += len(line) + _LINE_CHARS
            self._changed.notify()

    def close(self) -> None:
        """Say that no more lines come."""
        with self._changed:
            self._note_left_out()
            self._is_closed = True
            self._changed.notify()

    def _note_left_out(self) -> None:
        if self._n_left_out:
            self._waiting.append(("stderr", f"({self._n_left_out} lines were left out here: the log is too slow)"))
            self._n_left_out = 0

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Stream and line of each, as they come, until the queue is closed and empty."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                lines, self._waiting = self._waiting, []
                self._n_chars = 0
            if not lines:
                return
            yield from lines
