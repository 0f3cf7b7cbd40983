"""The logs of the sites of one process: what a script prints or logs goes to the log of its own site.

``sys.stdout`` and ``sys.stderr`` are replaced once, by streams that look up whose code is writing (see
`flarebus.client.engine.seat_of_caller`); what is nobody's goes where it always went. Rules for the files:

- A line is written when it is complete, in one piece, with time and level in front (printed lines have level INFO,
  lines to standard error STDERR); a process that is killed loses at most a line without an end.
- A carriage return starts the line anew, so that of a progress bar its last state is kept. Other control characters are
  escaped. A printed text may have many lines; a log record has one, and what belongs to it (a traceback) is indented.
- A log that cannot be written to stops nobody: the lines are counted, and the next line that fits says how many.
- At most `max_open` files are open at a time.
"""

from __future__ import annotations

import io
import logging
import logging.config
import os
import sys
import threading
import time
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from flarebus.client.engine import seat_of_caller, seat_of_traceback
from flarebus.client.log_config import MARK, LogConfig, continued, escape, without_mark
from flarebus.errors import ConfigError

__all__ = ["SiteLogs"]

# Of a line without an end no more than this is kept waiting; then it is written as a line.
_MAX_PENDING_CHARS = 65536


class SiteLogs:
    """The log files of the sites in this process. Any thread may call.

    Args:
        config: layout and level.
        console: copy everything to the real streams as well, as it comes (for debugging).
        max_open: how many files may be open at a time; the one unused for longest is closed first.
        now: seconds since the epoch.
    """

    def __init__(
        self,
        config: LogConfig | None = None,
        *,
        console: bool = False,
        max_open: int = 64,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.config = LogConfig() if config is None else config
        self.now = now
        self._console = console
        self._max_open = max_open
        self._lock = threading.RLock()
        self._paths: dict[str, Path] = {}
        self._files: OrderedDict[str, int] = OrderedDict()
        self._pending: dict[tuple[str, str, int], str] = {}
        self._lost: dict[str, tuple[int, str]] = {}
        self._installed: _Installed | None = None
        # A child of fork has one thread: whoever held the lock is not there to open it.
        renew = weakref.WeakMethod(self._renew_lock)
        os.register_at_fork(after_in_child=lambda: (method := renew()) and method())

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()

    def add(self, site: str, path: Path) -> None:
        """Give `site` a log file; its folder is made when the first line comes."""
        with self._lock:
            self._paths[site] = path

    def print(self, site: str, level: str, text: str) -> None:
        """Take text as a stream gets it; whole lines are written, the rest waits for its end."""
        key = (site, level, threading.get_ident())
        with self._lock:
            text = self._pending.pop(key, "") + text
            *lines, rest = text.split("\n")
            if lines:
                self._write(site, [self._printed(level, line) for line in lines])
            kept = rest.rstrip("\r")
            rest = kept.rpartition("\r")[2] + rest[len(kept) :][:1]
            if len(rest) > _MAX_PENDING_CHARS:
                self._write(site, [self._printed(level, rest)])
            elif rest:
                self._pending[key] = rest

    def _printed(self, level: str, line: str) -> str:
        # What stands before the last carriage return was overwritten on a terminal.
        message = escape(line.rstrip("\r").rpartition("\r")[2])
        return self.config.line(self.now(), level, "print", threading.current_thread().name, message)

    def record(self, site: str, record: logging.LogRecord) -> None:
        """Write one log record, with its traceback if it has one."""
        if record.levelno < self.config.level:
            return
        self._emit(site, self.config.record(record))

    def line(self, site: str, stream: str, text: str) -> None:
        """Write a line that a process of the site has written: a log record as it stands, others like printed ones.

        Args:
            site: whose it is.
            stream: ``stdout`` or ``stderr``.
            text: without its end.
        """
        if text.startswith(MARK):
            line = escape(without_mark(text))
        else:
            line = self._printed("STDERR" if stream == "stderr" else "INFO", text)
        self._emit(site, [line])

    def note(self, site: str, level: str, message: str, details: str = "") -> None:
        """Write a line of the host about the site, and `details` indented below it."""
        line = self.config.line(self.now(), level, "flarebus.site", threading.current_thread().name, escape(message))
        self._emit(site, [line, *continued(details)])

    def _emit(self, site: str, lines: list[str]) -> None:
        with self._lock:
            self._write(site, lines)
        if self._console and self._installed is not None:
            self._installed.show("\n".join([*lines, ""]))

    def finish(self, site: str) -> None:
        """End the lines of `site` that have no end yet."""
        with self._lock:
            for key in [key for key in self._pending if key[0] == site]:
                rest = self._pending.pop(key)
                self._write(site, [self._printed(key[1], rest)])

    def close(self) -> None:
        """Undo `install`, end all lines and close all files."""
        self.uninstall()
        with self._lock:
            for site in {key[0] for key in self._pending}:
                self.finish(site)
            while self._files:
                os.close(self._files.popitem()[1])

    def _write(self, site: str, lines: list[str]) -> None:
        lost, why = self._lost.get(site, (0, ""))
        if lost:
            lines = [f"({lost} lines could not be written here: {why})", *lines]
        data = ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")
        try:
            file = self._open(site)
            while data:
                data = data[os.write(file, data) :]
        except OSError as error:
            self._lost[site] = (lost + len(lines) - bool(lost), error.strerror or str(error))
        else:
            if lost:
                del self._lost[site]

    def _open(self, site: str) -> int:
        file = self._files.get(site)
        if file is not None:
            self._files.move_to_end(site)
            return file
        while len(self._files) >= self._max_open:
            os.close(self._files.popitem(last=False)[1])
        path = self._paths[site]
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._files[site] = file
        return file

    # --- the process's streams

    def install(self) -> None:
        """Replace the process's output streams and collect its log records, until `uninstall` or `close`.

        Raises:
            ConfigError: `logging.config.dictConfig` refuses the configuration; nothing is replaced then.
        """
        if self._installed is None:
            self._installed = _Installed(self, self._console)

    def uninstall(self) -> None:
        """Put the streams and the handlers of the root logger back."""
        if self._installed is not None:
            self._installed.undo()
            self._installed = None

    def __enter__(self) -> SiteLogs:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Installed:
    """What was replaced in the process, and what it was."""

    def __init__(self, logs: SiteLogs, console: bool) -> None:
        root = logging.getLogger()
        self._streams = (sys.stdout, sys.stderr)
        self._excepthook = threading.excepthook
        self._handlers, self._level = root.handlers[:], root.level
        self._logs = logs
        self._host_only = _HostOnly(self._level)
        sys.stdout = _SiteStream(logs, "INFO", self._streams[0], console)
        sys.stderr = _SiteStream(logs, "STDERR", self._streams[1], console)
        threading.excepthook = self._thread_failed
        try:
            self._set_up_logging(root, logs.config)
        except BaseException:
            self.undo()
            raise

    def _set_up_logging(self, root: logging.Logger, config: LogConfig) -> None:
        for handler in self._handlers:
            handler.addFilter(self._host_only)
        root.setLevel(config.level)
        if config.tables is not None:
            try:
                logging.config.dictConfig(config.tables)
            except (ValueError, TypeError, AttributeError, ImportError, OSError) as error:
                cause = error.__cause__ or error
                raise ConfigError("log_config", config.source, f"accepted by dictConfig ({error}: {cause})") from error
        if config.tables is None or not root.handlers:
            root.addHandler(_SiteHandler(self._logs))

    def _thread_failed(self, args: threading.ExceptHookArgs) -> None:
        """A thread that a script started has raised: that script's log says so."""
        seat = seat_of_traceback(args.exc_traceback) or seat_of_caller()
        if seat is None or args.exc_type is SystemExit:
            self._excepthook(args)
            return
        name = "?" if args.thread is None else args.thread.name
        details = "".join(traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback))
        self._logs.note(seat.engine.site_name, "ERROR", f"thread {name} of the script failed", details)

    def show(self, text: str) -> None:
        """Write to the real standard error."""
        self._streams[1].write(text)
        self._streams[1].flush()

    def undo(self) -> None:
        root = logging.getLogger()
        sys.stdout, sys.stderr = self._streams
        threading.excepthook = self._excepthook
        for handler in [handler for handler in root.handlers if handler not in self._handlers]:
            root.removeHandler(handler)
            handler.close()
        root.handlers[:] = self._handlers
        for handler in self._handlers:
            handler.removeFilter(self._host_only)
        root.setLevel(self._level)


class _HostOnly(logging.Filter):
    """Keeps the records of sites, and those below the host's own level, from the handlers that were there before."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self._level and seat_of_caller() is None


class _SiteHandler(logging.Handler):
    def __init__(self, logs: SiteLogs) -> None:
        super().__init__()
        self._logs = logs

    def emit(self, record: logging.LogRecord) -> None:
        seat = seat_of_caller()
        if seat is None:
            return
        try:
            self._logs.record(seat.engine.site_name, record)
        except Exception:  # what every handler does with a message that does not fit its arguments
            self.handleError(record)


class _SiteStream(io.TextIOBase):
    """A standard stream that writes to the log of the site whose code is writing."""

    def __init__(self, logs: SiteLogs, level: str, real: TextIO, console: bool) -> None:
        self._logs = logs
        self._level = level
        self._real = real
        self._console = console
        self.buffer = _Bytes(self)

    encoding = "utf-8"
    errors = "backslashreplace"
    line_buffering = True

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        seat = seat_of_caller()
        if seat is not None:
            self._logs.print(seat.engine.site_name, self._level, text)
        if seat is None or self._console:
            self._real.write(text)
            if self._console:
                self._real.flush()
        return len(text)

    def flush(self) -> None:
        self._real.flush()

    def close(self) -> None:
        """Do nothing: the stream is everybody's."""

    def fileno(self) -> int:
        return self._real.fileno()

    def isatty(self) -> bool:
        return seat_of_caller() is None and self._real.isatty()

    def reconfigure(self, **_: Any) -> None:
        """Accept what scripts ask of a standard stream; lines are written at once in any case."""


class _Bytes(io.RawIOBase):
    def __init__(self, stream: _SiteStream) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        text = bytes(data).decode("utf-8", "replace")
        self._stream.write(text)
        return len(data)
