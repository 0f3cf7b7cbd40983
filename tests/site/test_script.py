"""Real scripts, run by turns: files on disk, threads, logs; only the engine is in memory."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flarebus.client.engine import set_fallback
from flarebus.client.log_config import LogConfig
from flarebus.errors import Closed, ConfigError
from flarebus.model import FLModel
from flarebus.site.output import SiteLogs
from flarebus.site.script import CodeCache, Outcome, SiteScript
from flarebus.site.turn import Turnstile
from tests.client.fake_engine import LIMIT_S, FakeEngine

LOOP = """
import flarebus.client as flare
flare.init()
while flare.is_running():
    model = flare.receive()
    BODY
    flare.send(flare.FLModel(params={"w": model.params["w"] + 1}, metrics={"a": 1}))
print("bye")
"""


class Host:
    """What a worker keeps for its sites."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.turnstile = Turnstile()
        self.codes = CodeCache()
        self.logs = SiteLogs(LogConfig.parse("msg_only"))
        self.outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self.engines: dict[str, FakeEngine] = {}
        self.scripts: dict[str, SiteScript] = {}

    def add(self, text: str, site: str = "site-1", args: str | list[str] = "", **section: Any) -> FakeEngine:
        """A site whose script is `text`."""
        return self.add_file(self.write("client.py", text), site, args, **section)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def add_file(self, path: Path, site: str = "site-1", args: str | list[str] = "", **section: Any) -> FakeEngine:
        self.logs.install()  # here and not before: the test runner exchanges the streams between set-up and test
        set_fallback(self.turnstile.holder_seat)
        engine = self.engines[site] = FakeEngine(site, {"TASK_EXCHANGE": section})
        self.logs.add(site, self.folder / site / "log.txt")

        def ended(outcome: Outcome) -> None:
            if outcome.cause and outcome.n_received == 0:  # as a host does: what waits has failed
                while not engine.tasks.empty():
                    engine.tasks.get()
            self.outcomes.put(outcome)

        self.scripts[site] = SiteScript(
            engine,
            path,
            args,
            self.folder / site,
            turnstile=self.turnstile,
            codes=self.codes,
            logs=self.logs,
            task_waiting=lambda: not engine.tasks.empty(),
            on_end=ended,
        )
        return engine

    def give(self, site: str = "site-1", value: float = 0.0, **kwargs: Any) -> None:
        """A task for a site."""
        self.engines[site].give(FLModel(params={"w": np.full(2, value)}), **kwargs)
        self.scripts[site].wake()

    def outcome(self) -> Outcome:
        return self.outcomes.get(timeout=LIMIT_S)

    def log(self, site: str = "site-1") -> str:
        """The log of a site without the line about the end of the job."""
        lines = (self.folder / site / "log.txt").read_text().splitlines(keepends=True)
        return "".join(line for line in lines if "no more tasks: completed" not in line)

    def close(self) -> None:
        for engine in self.engines.values():
            engine.end("test over")
        alive = [site for site, script in self.scripts.items() if not script.wait_ended(LIMIT_S)]
        set_fallback(None)
        self.logs.close()
        assert not alive


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host that is empty at the beginning and at the end."""
    before = (sys.argv, os.getcwd(), sys.path, sys.modules["__main__"])
    made = Host(tmp_path)
    yield made
    made.close()
    assert (sys.argv, os.getcwd(), sys.path, sys.modules["__main__"]) == before


def weight(model: FLModel) -> float:
    return float((model.params or {})["w"][0])


# --- the ways of a script


def test_canonical_loop_serves_every_round(host: Host) -> None:
    """One start serves all rounds; the end of the job ends the script well."""
    engine = host.add(LOOP.replace("BODY", "print(model.current_round)"))
    for number in range(3):
        host.give(value=number, round=number)
        assert weight(engine.next_answer()) == number + 1
    engine.end()

    assert host.outcome() == Outcome("site-1", "", 0, 3, 3, None)
    assert host.log() == "0\n1\n2\nbye\n"


def test_one_shot_script_is_started_for_every_round(host: Host) -> None:
    """A script that receives once and ends works in each round, with fresh globals."""
    engine = host.add(
        "import flarebus.client as flare\nassert 'seen' not in globals()\nseen = 1\nflare.init()\n"
        "model = flare.receive()\nflare.send(flare.FLModel(params={'w': model.params['w'] + 1}))\n"
    )
    for number in range(3):
        host.give(value=number)
        assert weight(engine.next_answer()) == number + 1

    assert [host.outcome().cause for _ in range(3)] == ["", "", ""]


def test_task_that_comes_while_a_script_ends_is_served(host: Host) -> None:
    """A task that finds the last run still ending starts the next one."""
    engine = host.add("import flarebus.client as flare\nflare.init()\nmodel = flare.receive()\nflare.send(model)\n")
    for number in range(5):
        host.give(value=number)

    assert [weight(engine.next_answer()) for _ in range(5)] == [0, 1, 2, 3, 4]


def test_exception_is_told_with_its_place(host: Host) -> None:
    """The traceback is in the site's log without the host's frames, the cause in the outcome; the next task retries."""
    engine = host.add(LOOP.replace("BODY", "raise ValueError('bad thing\\x1b')"))
    host.give()
    outcome = host.outcome()

    assert outcome.cause == "ValueError: bad thing\\x1b (client.py:6)"
    assert (outcome.exit_code, outcome.n_received, outcome.n_answered) == (1, 1, 0)
    assert outcome.open_task == "site-1/task-1"
    assert "client.py" in host.log()
    assert "bad thing\\x1b" in host.log()
    assert "flarebus/site/script.py" not in host.log()
    assert "raise ValueError" in host.log()
    host.give()
    assert host.outcome().open_task == "site-1/task-2"
    assert engine.answers.empty()


def test_failure_in_one_task_does_not_keep_the_next_one_waiting(host: Host) -> None:
    """A task that came while the script worked on the one before starts the script again."""
    body = "if model.current_round == 0: raise ValueError('bad')"
    engine = host.add(LOOP.replace("BODY", body))
    for number in range(2):
        engine.give(FLModel(params={"w": np.zeros(2)}), round=number)
    host.scripts["site-1"].wake()

    assert host.outcome().cause.startswith("ValueError")
    assert engine.next_answer().current_round == 1


@pytest.mark.parametrize(
    ("code", "exit_code", "cause"),
    [
        ("sys.exit(3)", 3, "client.py called sys.exit(3)"),
        ("sys.exit()", 0, "client.py ended without asking for its task"),
        ("sys.exit('no data')", 1, "sys.exit: no data (client.py:2)"),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt (client.py:2)"),
        ("pass", 0, "client.py ended without asking for its task"),
        ("def f(:", 1, "SyntaxError: invalid syntax (client.py:2)"),
        ("import no_such_module", 1, "ModuleNotFoundError: No module named 'no_such_module' (client.py:2)"),
    ],
)
def test_other_ends(host: Host, code: str, exit_code: int, cause: str) -> None:
    """Exit codes, missing calls and mistakes each have a cause that a person understands."""
    host.add(f"import sys\n{code}\n")
    host.give()
    outcome = host.outcome()

    assert outcome.exit_code == exit_code
    assert outcome.cause.startswith(cause)
    assert cause in host.log()
    assert host.outcomes.empty()


def test_last_line_needs_no_end(host: Host) -> None:
    """What a script printed without a line end is in its log when it has ended."""
    host.add("print('half', end='')\n")
    host.give()
    host.outcome()

    assert "half\n" in host.log()


def test_exit_after_the_work_is_a_normal_end(host: Host) -> None:
    """sys.exit(0) at the end of a script is no failure."""
    engine = host.add(LOOP.replace("BODY", "") + "import sys\nsys.exit(0)\n")
    host.give()
    engine.next_answer()
    engine.end()

    assert host.outcome().cause == ""


def test_task_without_an_answer_is_a_failure(host: Host) -> None:
    """A script that receives and ends without a send says so."""
    host.add("import flarebus.client as flare\nflare.init()\nflare.receive()\n")
    host.give()

    assert "without answering" in host.outcome().cause


def test_second_send_fails_the_script_and_not_the_answer(host: Host) -> None:
    """The first answer stands; the script ends with the reason."""
    engine = host.add(
        "import flarebus.client as flare\nflare.init()\nm = flare.receive()\n"
        "flare.send(m, clear_cache=False)\nflare.send(m)\n"
    )
    host.give(value=5)

    assert weight(engine.next_answer()) == 5
    assert host.outcome().cause.startswith("ClientApiError: this task is answered already")
    assert engine.answers.empty()


def test_send_that_fails_ends_the_script_with_the_reason(host: Host) -> None:
    """An answer that cannot be delivered is an exception in the script."""
    engine = host.add(LOOP.replace("BODY", ""))
    engine.refusal = Closed("the server is gone")
    host.give()

    assert host.outcome().cause == "Closed: the server is gone (client.py:7)"


def test_abort_ends_a_script_that_waits(host: Host) -> None:
    """is_running becomes False, the script runs to its end, and the outcome is no failure."""
    engine = host.add(LOOP.replace("BODY", ""))
    host.scripts["site-1"].wake()
    engine.waiting.get(timeout=LIMIT_S)
    engine.end("aborted by ada")

    assert host.outcome().cause == ""
    assert host.log().endswith("bye\n")
    assert "aborted by ada" in host.log()


def test_abort_reaches_scripts_behind_one_that_computes(host: Host) -> None:
    """One script that does not come back does not keep the others from their end, in their own folders."""
    release, computing = threading.Event(), threading.Event()
    stuck = host.write("stuck.py", LOOP.replace("BODY", "flare.hooks[0].set(); flare.hooks[1].wait(30)"))
    import flarebus.client as flare

    flare.hooks = (computing, release)  # type: ignore[attr-defined]
    waiting = host.write("waiting.py", LOOP.replace("BODY", "").replace('print("bye")', "open('bye', 'w').close()"))
    host.add_file(stuck, "stuck")
    for number in range(3):
        host.add_file(waiting, f"w{number}")
        host.scripts[f"w{number}"].wake()
        host.engines[f"w{number}"].waiting.get(timeout=LIMIT_S)
    host.give("stuck")
    assert computing.wait(LIMIT_S)
    for engine in host.engines.values():
        engine.end("aborted by ada")
    host.turnstile.abort()

    assert {host.outcome().site for _ in range(3)} == {"w0", "w1", "w2"}
    assert all((host.folder / f"w{number}" / "bye").exists() for number in range(3))
    release.set()
    assert host.outcome() == Outcome("stuck", "", 0, 1, 1, None)
    assert host.log("stuck").endswith("bye\n")
    del flare.hooks  # type: ignore[attr-defined]


# --- what belongs to each script


def test_twenty_sites_interleave_and_keep_to_themselves(host: Host) -> None:
    """Prints, arguments, working directory, files and globals are each site's own, round after round."""
    path = host.write(
        "client.py",
        "import os, sys\nimport flarebus.client as flare\nflare.init()\ncount = 0\n"
        "print(sys.argv[1:], flare.get_site_name())\n"
        "while flare.is_running():\n"
        "    model = flare.receive()\n    count += 1\n"
        "    print('round', model.current_round, os.path.basename(os.getcwd()), sys.argv[2], end=' ')\n"
        "    print('count', count, sys.modules['__main__'].count)\n"
        "    open(f'r{count}', 'w').close()\n"
        "    flare.send(flare.FLModel(metrics={'x': int(sys.argv[2])}))\n",
    )
    sites = [f"s{number}" for number in range(20)]
    for number, site in enumerate(sites):
        host.add_file(path, site, f"--name 'a b' {number}"[7:])
    for round in range(3):
        for site in sites:
            host.give(site, round=round)
        answers = {site: host.engines[site].next_answer().metrics for site in sites}
        assert answers == {site: {"x": number} for number, site in enumerate(sites)}
    for engine in host.engines.values():
        engine.end()
    assert [host.outcome().cause for _ in sites] == [""] * 20

    for number, site in enumerate(sites):
        assert host.log(site).splitlines() == [
            f"['a b', '{number}'] {site}",
            *[f"round {round} {site} {number} count {round + 1} {round + 1}" for round in range(3)],
        ]
        assert {"r1", "r2", "r3"} <= set(os.listdir(host.folder / site))


def test_script_is_main_with_its_own_file_and_siblings(host: Host) -> None:
    """Name, file, arguments, sibling modules and classes that are pickled by name are those of a program."""
    host.write("beside_client.py", "VALUE = 42\n")
    path = host.write(
        "client.py",
        "from __future__ import annotations\n"
        "import pickle, sys\nimport flarebus.client as flare\nimport beside_client\n"
        "class Net:\n    pass\n"
        "if __name__ == '__main__':\n"
        "    flare.init(); flare.receive()\n"
        "    net = pickle.loads(pickle.dumps(Net()))\n"
        "    print(__file__, sys.argv, beside_client.VALUE, type(net) is Net, __spec__)\n"
        "    flare.send(flare.FLModel(metrics={}))\n",
    )
    host.add_file(path, "site-1", ["--a", "b c"])
    host.give()

    assert host.outcome().cause == ""
    assert host.log() == f"{path} {[str(path), '--a', 'b c']} 42 True None\n"


def test_script_is_compiled_once(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """All sites share the code; each has its own globals."""
    path = host.write(
        "client.py",
        "import flarebus.client as flare\nflare.init()\nflare.receive()\nflare.send(flare.FLModel(metrics={}))\n",
    )
    read: list[Path] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(self) or read_bytes(self))
    for number in range(3):
        host.add_file(path, f"s{number}")
        host.give(f"s{number}")

    assert [host.outcome().cause for _ in range(3)] == ["", "", ""]
    assert read == [path]


def test_globals_are_freed_when_the_script_has_ended(host: Host) -> None:
    """What a script leaves behind in cycles does not wait for the garbage collector."""
    import flarebus.client as flare

    flare.gone = threading.Event()  # type: ignore[attr-defined]
    host.add(
        "import weakref\nimport flarebus.client as flare\n"
        "class Net: pass\n"
        "net = Net()\nweakref.finalize(net, flare.gone.set)\n"
        "def use(): return net\n"
        "flare.init(); flare.receive(); flare.send(flare.FLModel(metrics={}))\n"
    )
    host.give()
    assert host.outcome().cause == ""

    assert flare.gone.is_set()  # type: ignore[attr-defined]
    del flare.gone  # type: ignore[attr-defined]


def test_thread_of_the_script_may_log_and_print(host: Host) -> None:
    """A thread that the script started is known as the site's, also while another site has the turn."""
    path = host.write(
        "client.py",
        "import threading\nimport flarebus.client as flare\n"
        "flare.init()\n"
        "go = threading.Event()\n"
        "def watch():\n"
        "    go.wait(30)\n"
        "    flare.log('beat', 1, flare.AnalyticsDataType.SCALAR)\n"
        "    print('beat of', flare.get_site_name())\n"
        "thread = threading.Thread(target=watch)\nthread.start()\n"
        "while flare.is_running():\n"
        "    flare.receive()\n    go.set()\n    flare.send(flare.FLModel(metrics={}))\n"
        "thread.join()\n",
    )
    sites = ["a", "b", "c"]
    for site in sites:
        host.add_file(path, site)
        host.scripts[site].wake()
    for site in sites:
        host.give(site)
        host.engines[site].next_answer()
    for engine in host.engines.values():
        engine.end()

    assert [host.outcome().cause for _ in sites] == [""] * 3
    for site in sites:
        assert host.engines[site].logged == [("beat", 1, "SCALAR", {})]
        assert f"beat of {site}\n" in host.log(site)


def test_script_that_works_in_a_thread_of_its_own_stops_nobody(host: Host) -> None:
    """While the loop of a script waits in another thread, other sites get their turn."""
    threaded = host.write(
        "threaded.py",
        "import threading\nimport flarebus.client as flare\nflare.init()\n"
        "def loop():\n"
        "    while flare.is_running():\n        flare.send(flare.receive())\n"
        "thread = threading.Thread(target=loop)\nthread.start()\nthread.join()\n",
    )
    plain = host.write("plain.py", LOOP.replace("BODY", ""))
    host.add_file(threaded, "threaded")
    host.scripts["threaded"].wake()
    host.engines["threaded"].waiting.get(timeout=LIMIT_S)
    host.add_file(plain, "plain")
    for _ in range(3):
        for site in ("plain", "threaded"):
            host.give(site)
            host.engines[site].next_answer()
    for engine in host.engines.values():
        engine.end()

    assert [host.outcome().cause for _ in range(2)] == ["", ""]


def test_failed_thread_of_the_script_is_in_its_log(host: Host) -> None:
    """A thread of the script that raises is reported in the site's log and fails nothing else."""
    engine = host.add(
        "import threading\nimport flarebus.client as flare\nflare.init()\n"
        "def fail(): raise ValueError('in thread')\n"
        "t = threading.Thread(target=fail)\nt.start(); t.join()\n"
        "flare.send(flare.receive())\n"
    )
    host.give()
    engine.next_answer()

    assert host.outcome().cause == ""
    assert "ValueError: in thread" in host.log()


def test_difference_is_right_for_training_in_place(host: Host) -> None:
    """A script that changes what it received still sends what it changed."""
    engine = host.add(
        "import flarebus.client as flare\nflare.init()\n"
        "while flare.is_running():\n"
        "    model = flare.receive()\n    model.params['w'] += 2\n    flare.send(model)\n",
        transfer_type="DIFF",
    )
    for number in range(2):
        host.give(value=number)
        assert weight(engine.next_answer()) == 2


# --- arguments


@pytest.mark.parametrize("name", ["missing.py", "client.txt", ""])
def test_wrong_script_is_named(host: Host, name: str) -> None:
    """A script that is not there or no Python file is an error at once."""
    host.write("client.txt", "")

    with pytest.raises(ConfigError, match="train_script"):
        host.add_file(host.folder / "code" / name)


def test_badly_quoted_arguments_are_named(host: Host) -> None:
    """An open quote is an error at once."""
    with pytest.raises(ConfigError, match="train_args"):
        host.add("pass", args="--a 'b")


def test_folder_that_cannot_be_made_is_the_cause(host: Host) -> None:
    """A site folder that is a file fails the script with the reason."""
    host.add("pass")
    host.folder.joinpath("site-1").rmdir() if host.folder.joinpath("site-1").exists() else None
    host.folder.joinpath("site-1").write_text("in the way")
    host.give()

    assert host.outcome().cause.startswith("FileExistsError")


def test_no_thread_for_the_script_is_the_cause(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without room for another thread fails the script, not the host."""
    host.add("pass")

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        host.give()

    assert "can't start new thread" in host.outcome().cause
    assert not host.scripts["site-1"].is_running
