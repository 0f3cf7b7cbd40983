"""SiteHost: real scripts of several sites in this process, against a real server job over a bus."""

from __future__ import annotations

import logging
import os
import queue
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flarebus.cell import Cell
from flarebus.client import engine as client_engine
from flarebus.client import metrics
from flarebus.errors import FlarebusError, QuorumNotReached
from flarebus.job.kinds import ExchangeFormat, FrameworkType, TransferType
from flarebus.job.site_config import SiteConfig
from flarebus.site.host import HostedSite, SiteHost
from flarebus.site.job import JobFacts
from tests.server.played import BIG, LIMIT_S, task, update
from tests.site.hosted import SCRIPT, Hosted, until


class Gate(ModuleType):
    """A module that the scripts import: tells the test where they are, and lets it stop them there."""

    def __init__(self) -> None:
        super().__init__("gate")
        self.seen: queue.SimpleQueue[tuple[str, int, list[float]]] = queue.SimpleQueue()
        self.open = threading.Event()
        self.open.set()
        self.faults: dict[str, str] = {}

    def passed(self, name: str, model: Any) -> None:
        self.seen.put((name, model.current_round, model.params["w"][:2].tolist()))
        assert self.open.wait(LIMIT_S)
        self.fault("before", name)

    def answered(self, name: str) -> None:
        self.fault("after", name)

    def fault(self, where: str, name: str) -> None:
        if self.faults.pop(name, "") == where:
            raise ValueError(f"{name} fails")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    made = Gate()
    monkeypatch.setitem(sys.modules, "gate", made)
    return made


@pytest.fixture
def hosted(tmp_path: Path, gate: Gate) -> Iterator[Hosted]:
    """A host; everything process-wide is as before when it has ended."""
    before = (sys.argv, os.getcwd(), sys.path, sys.modules["__main__"], sys.stdout, sys.stderr)
    made = Hosted(tmp_path)
    yield made
    gate.open.set()
    made.close()
    assert (sys.argv, os.getcwd(), sys.path, sys.modules["__main__"], sys.stdout, sys.stderr) == before
    assert client_engine._fallback is None


@pytest.mark.parametrize("size", [4, BIG], ids=["inline", "transfer"])
def test_each_site_trains_on_its_own_copy_of_one_model(hosted: Hosted, gate: Gate, size: int) -> None:
    """The model comes to the host once; every script gets it whole and writes into a copy of its own."""
    hosted.start("a", "b", "c")
    found = {}

    def run() -> None:
        for result in hosted.bus.job.broadcast(task(5, size)):
            assert result.model.params is not None
            found[result.site] = result.model.params["w"].tolist()

    hosted.bus.start(run).result(LIMIT_S)

    assert found == {site: [6.0] * size for site in "abc"}
    assert sorted(gate.seen.get_nowait() for _ in range(3)) == [(site, 0, [5.0, 5.0]) for site in "abc"]
    pulled = 4 * size if size == BIG else 0
    assert hosted.cell.statistics().bytes_pulled == pulled


def test_a_round_of_small_models_pulls_nothing(hosted: Hosted, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and results of up to a chunk ride along with their messages, by the credit that both ends grant."""
    host = hosted.start("a", "b", "c")
    pulls: list[int] = []
    for cell in (hosted.cell, hosted.bus.cell):
        monkeypatch.setattr(cell._carrier, "pull", lambda manifest, *_: pulls.append(manifest.nbytes))
    for number in range(3):
        given = task(number, BIG)
        running = hosted.bus.start(lambda given=given: [result.site for result in hosted.bus.job.broadcast(given)])
        assert sorted(running.result(LIMIT_S)) == ["a", "b", "c"]

    assert pulls == []
    assert hosted.cell.statistics().bytes_pulled == 3 * 4 * BIG
    assert hosted.bus.cell.statistics().bytes_pulled == 9 * 4 * BIG
    hosted.end()
    assert hosted.cell.statistics().offers_held == 0
    assert host._results.credit._taken == 0


def test_scripts_come_to_their_end_with_the_job(hosted: Hosted) -> None:
    """When the job ends every script leaves its loop and goes on to its last line; then the host returns."""
    hosted.start("a", "b")
    for _ in range(3):
        assert sorted(hosted.bus.collect().result(LIMIT_S)) == ["a", "b"]
    hosted.end()

    for site in "ab":
        assert f"{site} says goodbye" in hosted.log(site)
        assert "no more tasks: completed" in hosted.log(site)


def test_a_host_serves_its_own_sites_only(hosted: Hosted, gate: Gate) -> None:
    """Names of sites that are not the host's are passed over, in tasks and in cancellations."""
    hosted.start("a")
    payload = hosted.bus.cell.share(task().model, ("worker-1",))
    fields = {"number": 1, "owner": "", "task": "train", "round": 0, "total_rounds": 1, "sites": ["x", "a"]}
    fields["model"] = payload.body
    hosted.bus.cell.request("worker-1", "task", "assign", fields, payload=payload).result(LIMIT_S)
    cancelled = hosted.bus.cell.request("worker-1", "task", "cancel", {"number": 1, "owner": "", "sites": ["x"]})

    assert cancelled.result(LIMIT_S).value() is None
    assert gate.seen.get(timeout=LIMIT_S) == ("a", 0, [0.0, 0.0])


def test_a_task_that_was_cancelled_is_not_begun(hosted: Hosted, gate: Gate) -> None:
    """A site that waited for its turn while the round was closed does not train for it, but for the next."""
    host = hosted.start("a", "b")
    assert len(hosted.bus.collect().result(LIMIT_S)) == len([gate.seen.get() for _ in range(2)])
    other = hosted.bus.host("worker-2", "z")
    gate.open.clear()
    running = hosted.bus.collect(min_responses=1, timeout=10)
    first, _, _ = gate.seen.get(timeout=LIMIT_S)
    until(lambda: [engine.has_task for engine in host._engines.values()].count(True) == 1)
    other.answer("z", other.take().number, update(1))
    hosted.bus.pass_time(10)
    assert running.result(LIMIT_S) == ["z"]
    hosted.bus.cell.request("worker-1", "task", "cancel", {"number": 0, "owner": "", "sites": []}).result(LIMIT_S)
    assert hosted.cell.statistics().queued["task"] == 0

    gate.open.set()
    running = hosted.bus.start(
        lambda: [result.site for result in hosted.bus.job.broadcast(task(round=1), sites=["a", "b"])]
    )
    assert sorted(running.result(LIMIT_S)) == ["a", "b"]
    assert sorted(gate.seen.get_nowait()[:2] for _ in range(2)) == [("a", 1), ("b", 1)]
    hosted.end()
    assert "the server did not use the result: the round is closed" in hosted.log(first)


def test_a_script_that_raises_fails_its_task_and_is_run_again(hosted: Hosted, gate: Gate) -> None:
    """The cause reaches the server, the traceback its log; the others go on, and so does it in the next round."""
    hosted.start("a", "b")
    gate.faults["a"] = "before"
    assert hosted.bus.collect(min_responses=1).result(LIMIT_S) == ["b"]
    cause = hosted.bus.wait_for("site_failed", site="a")["reason"]
    assert cause == "ValueError: a fails (client.py:9)"
    assert sorted(hosted.bus.collect().result(LIMIT_S)) == ["a", "b"]

    hosted.end()
    assert "Traceback" in hosted.log("a")
    assert "Traceback" not in hosted.log("b")


def test_a_script_that_raises_after_its_answer_fails_nothing(hosted: Hosted, gate: Gate) -> None:
    """What a script does after its answer is its own affair: the result counts, and so does the next round's."""
    hosted.start("a")
    for _ in range(20):
        gate.faults["a"] = "after"
        assert hosted.bus.collect().result(LIMIT_S) == ["a"]
    assert not [fields for event, fields in hosted.bus.events if event == "site_failed"]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("def broken(:\n", r"SyntaxError: .* \(client.py:1\)"),
        ("import no_such_module\n", r"ModuleNotFoundError: No module named 'no_such_module' \(client.py:1\)"),
        ("import sys\nsys.exit(3)\n", r"client.py called sys.exit\(3\)"),
        ("print('hello')\n", "client.py ended without asking for its task"),
        (SCRIPT.replace("flare.send(", "flare.clear(); str("), "asked for its next task without answering"),
        (SCRIPT.replace("flare.send(", "exit(); str("), "client.py ended without answering its task"),
    ],
    ids=["syntax", "import", "exit", "no client", "no answer", "exit without answer"],
)
def test_scripts_that_cannot_work_fail_each_round_with_the_cause(hosted: Hosted, text: str, cause: str) -> None:
    """A script that does not do its part fails the round at once, with words that help, and again in the next."""
    hosted.start("a", text=text)
    for _ in range(2):
        with pytest.raises(QuorumNotReached, match=cause):
            hosted.bus.collect().result(LIMIT_S)


def test_models_nobody_fetches_do_not_pile_up(hosted: Hosted, gate: Gate) -> None:
    """A site that fails before it takes its model leaves no memory behind, round after round."""
    hosted.start("a", "b", text="import gate\nif gate.failing: raise ValueError\n" + SCRIPT)
    gate.failing = True
    pool = hosted.cell._carrier._pool
    for _ in range(4):
        with pytest.raises(QuorumNotReached):
            hosted.bus.start(lambda: list(hosted.bus.job.broadcast(task(size=BIG)))).result(LIMIT_S)

    # The bus thread may hold the last one until its next message.
    hosted.bus.cell.request("worker-1", "task", "cancel", {"number": 0, "owner": "", "sites": []}).result(LIMIT_S)
    assert pool.leased_bytes <= 4 * BIG


def test_metrics_reach_the_server_before_the_host_returns(hosted: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a script logged, to its last line, is at the server when its host is done and its cell is closed."""
    monkeypatch.setattr(metrics, "BATCH_RECORDS", 1)
    close, closed = metrics.MetricOutbox.close, []

    def noted(outbox: metrics.MetricOutbox, timeout: float) -> bool:
        assert hosted.host is not None
        closed.append([script.is_running for script in hosted.host._scripts.values()])
        return close(outbox, timeout)

    monkeypatch.setattr(metrics.MetricOutbox, "close", noted)
    text = SCRIPT + 'for _ in range(9):\n    flare.log("last", 1.0, flare.AnalyticsDataType.SCALAR)\n'
    text = text.replace("    flare.send", '    flare.log("lr", 0.1, flare.AnalyticsDataType.SCALAR)\n    flare.send')
    hosted.start("a", "b", text=text)
    hosted.bus.collect().result(LIMIT_S)
    hosted.end()

    assert closed == [[False, False]]
    records = hosted.bus.archive.records  # type: ignore[union-attr]
    assert sorted((record["site"], record["key"], record["round"]) for record in records) == [
        *[("a", "last", None)] * 9,
        ("a", "lr", 0),
        *[("b", "last", None)] * 9,
        ("b", "lr", 0),
    ]


def test_scripts_see_their_configuration(hosted: Hosted) -> None:
    """`get_config()` has the words that scripts know, for this site, and no more."""
    text = "import gate, flarebus.client as flare\nflare.init()\ngate.config = flare.get_config()\n" + SCRIPT
    hosted.start(
        "a",
        text=text,
        framework=FrameworkType.PYTORCH,
        server_expected_format=ExchangeFormat.NUMPY,
        params_transfer_type=TransferType.DIFF,
        memory_gc_rounds=2,
    )
    hosted.bus.collect().result(LIMIT_S)

    assert sys.modules["gate"].config == {
        "SITE_NAME": "a",
        "JOB_ID": "job-1",
        "TASK_EXCHANGE": {
            "train_with_eval": True,
            "exchange_format": "pytorch",
            "server_expected_format": "numpy",
            "transfer_type": "DIFF",
            "train_task_name": "train",
            "eval_task_name": "validate",
            "submit_model_task_name": "submit_model",
            "memory_gc_rounds": 2,
            "cuda_empty_cache": False,
        },
    }


def test_a_server_that_is_not_there_is_an_error(hosted: Hosted, tmp_path: Path) -> None:
    """A host that cannot join says so, and leaves the process as it was."""
    site = HostedSite("a", tmp_path / "a", SiteConfig(__file__))
    host = SiteHost(hosted.cell, JobFacts("job", "job-1", "server.other", "best", "numpy", ""), [site])

    with pytest.raises(FlarebusError, match="no such cell"):
        host.run()
    assert client_engine._fallback is None


def test_scripts_end_when_the_server_is_gone(tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    """A host that loses its server for good ends its scripts with the reason."""
    hosted = Hosted(tmp_path)
    folder = tempfile.mkdtemp(prefix="fb-")
    endpoint = hosted.bus.router.bind(f"ipc://{folder}/bus")
    cell = Cell.dial("worker-9", endpoint)
    caplog.set_level(logging.CRITICAL)
    try:
        cell.wait_until_up(LIMIT_S)
        hosted.start("a", cell=cell)
        hosted.bus.collect().result(LIMIT_S)
        hosted.bus.router.close()
        hosted.over.result(LIMIT_S)
    finally:
        hosted.close()
        cell.close()
        shutil.rmtree(folder)

    assert "no more tasks: the server cannot be reached" in hosted.log("a")
