"""Where printed text and log records go."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from flarebus.client.engine import Seat, sit
from flarebus.client.log_config import LogConfig
from flarebus.errors import ConfigError
from flarebus.site.output import SiteLogs
from tests.client.fake_engine import LIMIT_S, FakeEngine

PLAIN = LogConfig.parse("msg_only")
MakeLogs = Callable[..., SiteLogs]


@pytest.fixture
def make_logs() -> Iterator[MakeLogs]:
    """Logs that are installed, and undone after the test."""
    with ExitStack() as stack:
        yield lambda config=PLAIN, **kwargs: stack.enter_context(SiteLogs(config, **kwargs))


def as_site(name: str) -> Any:
    return sit(Seat(FakeEngine(name)), {})


def test_print_goes_to_the_log_of_the_site(
    make_logs: MakeLogs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each site has its own file; what belongs to no site goes where it always went."""
    logs = make_logs()
    for name in ("a", "b"):
        logs.add(name, tmp_path / name / "log.txt")
    with as_site("a"):
        print("one")
        with as_site("b"):
            print("two", file=sys.stderr)
        print("three\nfour")
    print("host")

    assert (tmp_path / "a" / "log.txt").read_text() == "one\nthree\nfour\n"
    assert (tmp_path / "b" / "log.txt").read_text() == "two\n"
    assert capsys.readouterr().out == "host\n"


def test_lines_have_time_and_level(make_logs: MakeLogs, tmp_path: Path) -> None:
    """Standard output is INFO, standard error says so."""
    logs = make_logs(LogConfig(), now=lambda: 0.0)
    logs.add("a", tmp_path / "log.txt")
    with as_site("a"):
        print("one")
        print("two", file=sys.stderr)
    lines = (tmp_path / "log.txt").read_text().splitlines()

    assert [line[9:] for line in lines] == ["INFO    one", "STDERR  two"]
    assert lines[0][2] == lines[0][5] == ":"


def test_line_is_written_when_it_is_complete(make_logs: MakeLogs, tmp_path: Path) -> None:
    """Parts wait for the end of their line; finish ends it."""
    logs = make_logs()
    logs.add("a", tmp_path / "log.txt")
    with as_site("a"):
        print("a", end=" ")
        assert not (tmp_path / "log.txt").exists()
        print("b")
        assert (tmp_path / "log.txt").read_text() == "a b\n"
        print("c", end="")
    logs.finish("a")

    assert (tmp_path / "log.txt").read_text() == "a b\nc\n"


def test_progress_bar_leaves_its_last_state(make_logs: MakeLogs, tmp_path: Path) -> None:
    """A carriage return starts the line anew and keeps nothing in memory."""
    logs = make_logs()
    logs.add("a", tmp_path / "log.txt")
    with as_site("a"):
        for percent in range(0, 101, 10):
            print(f"{percent:3}%", end="\r")
        assert len(next(iter(logs._pending.values()))) == 5
        print("\ndone\r\n\r 50%\r100%")

    assert (tmp_path / "log.txt").read_text() == "100%\ndone\n100%\n"


def test_endless_line_is_cut(make_logs: MakeLogs, tmp_path: Path) -> None:
    """Text without a line end does not pile up in memory."""
    logs = make_logs()
    logs.add("a", tmp_path / "log.txt")
    with as_site("a"):
        for _ in range(70):
            sys.stdout.write("x" * 1000)

    assert len((tmp_path / "log.txt").read_text()) > 65536


def test_control_characters_are_escaped(make_logs: MakeLogs, tmp_path: Path) -> None:
    """A log cannot colour a terminal, and a record cannot pretend to be two."""
    logs = make_logs()
    logs.add("a", tmp_path / "log.txt")
    with as_site("a"):
        print("\x1b[31mred \ud800")
        logging.getLogger("x\ny").warning("one\n12:00:00 INFO two %s", "\x1b")

    assert (tmp_path / "log.txt").read_text() == "\\x1b[31mred \\ud800\none\\n12:00:00 INFO two \\x1b\n"


def test_log_records_reach_the_site(make_logs: MakeLogs, tmp_path: Path) -> None:
    """Records from INFO on, with their tracebacks indented; basicConfig of a script changes nothing."""
    logs = make_logs(LogConfig.parse("full"))
    logs.add("a", tmp_path / "log.txt")
    with as_site("a"):
        logging.basicConfig(level=logging.CRITICAL)
        logging.debug("not this")
        logging.getLogger("net").info("loss %.1f", 0.5)
        try:
            raise ValueError("bad\x1b")
        except ValueError:
            logging.exception("failed", stack_info=True)
    lines = (tmp_path / "log.txt").read_text().splitlines()

    assert lines[0].endswith("INFO    net loss 0.5")
    assert lines[1].endswith("ERROR   root failed")
    assert all(line.startswith("  | ") for line in lines[2:])
    assert "  | ValueError: bad\\x1b" in lines
    assert any("test_log_records_reach_the_site" in line and "Stack" not in line for line in lines[-6:])


def test_wrong_record_does_not_raise(make_logs: MakeLogs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that does not fit its arguments is reported in the log, as by every handler."""
    logs = make_logs()
    logs.add("a", tmp_path / "log.txt")
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", root.handlers[-1:])  # not those of the test runner, which raise
    with as_site("a"):
        logging.info("%d", "x")

    assert "Logging error" in (tmp_path / "log.txt").read_text()


def test_level_is_kept(make_logs: MakeLogs, tmp_path: Path) -> None:
    """Below the level nothing is logged, also when a logger lets it through; prints always are."""
    logs = make_logs(LogConfig.parse("error"))
    logs.add("a", tmp_path / "log.txt")
    loud = logging.getLogger("loud")
    loud.setLevel(logging.DEBUG)
    with as_site("a"):
        loud.warning("no")
        loud.error("yes")
        print("printed")

    assert [line[9:] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["ERROR   yes", "INFO    printed"]


def test_handlers_of_the_host_get_only_its_own(make_logs: MakeLogs, tmp_path: Path) -> None:
    """What a site logs does not show up in the host's log, and the host's level stays as it was."""
    seen: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    root = logging.getLogger()
    root.addHandler(collect := Collect())
    try:
        logs = make_logs()
        logs.add("a", tmp_path / "log.txt")
        with as_site("a"):
            logging.error("of the site")
        logging.info("host, too low")
        logging.error("host")
        logs.close()
        logging.error("after")
    finally:
        root.removeHandler(collect)

    assert seen == ["host", "after"]


def test_dict_config_lays_out_records(make_logs: MakeLogs, tmp_path: Path) -> None:
    """Handlers of a configuration file that write to standard output write to the site's log."""
    config = {
        "version": 1,
        "formatters": {"f": {"format": "<%(levelname)s> %(message)s"}},
        "handlers": {"h": {"class": "logging.StreamHandler", "formatter": "f", "stream": "ext://sys.stdout"}},
        "root": {"level": "DEBUG", "handlers": ["h"]},
    }
    path = tmp_path / "log.json"
    path.write_text(json.dumps(config))
    logs = make_logs(LogConfig.parse(path))
    logs.add("a", tmp_path / "log.txt")
    with as_site("a"):
        logging.debug("deep")
        print("printed")

    assert (tmp_path / "log.txt").read_text() == "<DEBUG> deep\nprinted\n"


def test_refused_dict_config_changes_nothing(tmp_path: Path) -> None:
    """The error names the parameter and the file, and the streams are as they were."""
    path = tmp_path / "log.json"
    path.write_text(json.dumps({"version": 1, "handlers": {"h": {"class": "no.such.Handler"}}}))
    before = (sys.stdout, sys.stderr, threading.excepthook, logging.getLogger().handlers[:])
    with pytest.raises(ConfigError, match=r"log_config=.*log\.json"):
        SiteLogs(LogConfig.parse(path)).install()

    assert (sys.stdout, sys.stderr, threading.excepthook, logging.getLogger().handlers[:]) == before


def test_few_files_are_open_at_a_time(make_logs: MakeLogs, tmp_path: Path) -> None:
    """Any number of sites share a handful of descriptors, and no line is lost."""
    logs = make_logs(max_open=3)
    for number in range(20):
        logs.add(f"s{number}", tmp_path / f"{number}.txt")
    before = len(os.listdir("/proc/self/fd"))
    for turn in range(3):
        for number in range(20):
            logs.print(f"s{number}", "INFO", f"{turn}\n")

    assert len(os.listdir("/proc/self/fd")) - before == 3
    assert {(tmp_path / f"{number}.txt").read_text() for number in range(20)} == {"0\n1\n2\n"}
    logs.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_file_that_is_in_use_stays_open(make_logs: MakeLogs, tmp_path: Path) -> None:
    """The file unused for longest is closed, not the one that was opened first."""
    logs = make_logs(max_open=2)
    for site in "abac":
        logs.add(site, tmp_path / site)
        logs.print(site, "INFO", "x\n")

    assert sorted(logs._files) == ["a", "c"]


def test_log_that_cannot_be_written_stops_nobody(
    make_logs: MakeLogs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines that do not fit are counted, and the next one that does says how many there were."""
    logs = make_logs()
    logs.add("a", tmp_path / "log.txt")
    write = os.write

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with as_site("a"):
        print("one")
        monkeypatch.setattr(os, "write", full)
        print("two\nthree")
        print("four")
        monkeypatch.setattr(os, "write", write)
        print("five")

    assert (tmp_path / "log.txt").read_text() == (
        "one\n(3 lines could not be written here: No space left on device)\nfive\n"
    )


def test_threads_do_not_mix_their_lines(make_logs: MakeLogs, tmp_path: Path) -> None:
    """Two threads of one site that print parts of lines do not interleave them."""
    logs = make_logs()
    logs.add("a", tmp_path / "log.txt")
    between = threading.Barrier(2, timeout=LIMIT_S)

    def work(word: str) -> None:
        print(word, end="")
        between.wait()
        print(word)

    space: dict[str, Any] = {"work": work}
    with sit(Seat(FakeEngine("a")), space):
        code = "def run(word): work(word)"
        exec(code, space)
        threads = [threading.Thread(target=space["run"], args=(word,)) for word in ("x", "y")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)

    assert sorted((tmp_path / "log.txt").read_text().split()) == ["xx", "yy"]


def test_failed_thread_of_a_script_is_in_its_log(make_logs: MakeLogs, tmp_path: Path) -> None:
    """The traceback of a thread that the script started goes to the site, not to the console."""
    logs = make_logs()
    logs.add("a", tmp_path / "log.txt")
    space: dict[str, Any] = {}
    with sit(Seat(FakeEngine("a")), space):
        exec("def run(): raise ValueError('in thread')", space)
        thread = threading.Thread(target=space["run"], name="feeder")
        thread.start()
        thread.join(LIMIT_S)
    text = (tmp_path / "log.txt").read_text()

    assert text.startswith("thread feeder of the script failed\n")
    assert "  | ValueError: in thread" in text


def test_console_shows_everything_as_it_comes(
    make_logs: MakeLogs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For debugging, output is on the console too, parts of lines at once."""
    logs = make_logs(console=True)
    logs.add("a", tmp_path / "log.txt")
    with as_site("a"):
        print("(Pdb) ", end="")
        assert capsys.readouterr().out == "(Pdb) "
        logs.note("a", "ERROR", "it failed", "why")
        logging.info("recorded")
    assert capsys.readouterr().err == "it failed\n  | why\nrecorded\n"


def test_streams_serve_what_scripts_ask_of_them(make_logs: MakeLogs, tmp_path: Path) -> None:
    """Bytes, reconfigure, flush, encoding and a close that closes nothing."""
    logs = make_logs()
    logs.add("a", tmp_path / "log.txt")
    with as_site("a"):
        sys.stdout.buffer.write("ü\n".encode())
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        sys.stdout.flush()
        sys.stdout.close()
        assert not sys.stdout.isatty()
        assert sys.stdout.writable()
        assert sys.stdout.encoding == "utf-8"
        with pytest.raises(TypeError):
            sys.stdout.write(b"x")  # type: ignore[arg-type]
        print("still there")

    assert (tmp_path / "log.txt").read_text() == "ü\nstill there\n"


def test_uninstall_puts_everything_back(tmp_path: Path) -> None:
    """Streams, handlers, level and hook are as before, and closing twice does no harm."""
    root = logging.getLogger()
    before = (sys.stdout, sys.stderr, threading.excepthook, root.handlers[:], root.level)
    with SiteLogs(PLAIN) as logs:
        logs.install()
        assert sys.stdout is not before[0]
    logs.close()

    assert (sys.stdout, sys.stderr, threading.excepthook, root.handlers[:], root.level) == before


def test_forked_child_prints_into_the_same_log(make_logs: MakeLogs, tmp_path: Path) -> None:
    """A process that a script forks while another thread writes is not stuck on that thread's lock."""
    logs = make_logs()
    logs.add("a", tmp_path / "log.txt")
    with as_site("a"):
        print("parent")
        locked, release = threading.Event(), threading.Event()

        def hold() -> None:
            with logs._lock:
                locked.set()
                release.wait(LIMIT_S)

        thread = threading.Thread(target=hold)
        thread.start()
        locked.wait(LIMIT_S)
        child = os.fork()
        if child == 0:
            print("child")
            os._exit(0)
        release.set()
        thread.join(LIMIT_S)
        assert os.waitpid(child, 0)[1] == 0

    assert (tmp_path / "log.txt").read_text() == "parent\nchild\n"


def test_streams_are_text_streams(make_logs: MakeLogs) -> None:
    """Libraries that check for a text stream find one."""
    make_logs()

    assert isinstance(sys.stdout, io.TextIOBase)
    assert isinstance(sys.stdout.fileno(), int)
