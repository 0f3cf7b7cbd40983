"""Scripts in processes of their own that go wrong: said with its cause in the site's log and at the server."""

from __future__ import annotations

import pytest

from flarebus.errors import ConfigError
from flarebus.recipe import FedAvgRecipe
from tests.system.observed import ObservedRun

# Each site goes wrong in the way of its name; the others add one.
SCRIPTS = """
import ctypes
import os
import resource
import sys
import numpy as np

site = os.path.basename(os.getcwd())
if site == "imports":
    import no_such_module
if site == "silent":
    sys.exit(0)
if site == "code":
    print("no licence", file=sys.stderr)
    sys.exit(17)

import flarebus.client as flare

flare.init()
assert flare.get_site_name() == site
if site == "leaves":
    sys.exit(0)
if site == "impatient":
    flare.send(flare.FLModel(params={"w": np.zeros(4, np.float32)}))
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    if site == "raises" and model.current_round == 1:
        raise ValueError("the data of this site are broken")
    if site == "exits":
        sys.exit(3)
    if site == "dies":
        os._exit(7)
    if site == "crashes":
        ctypes.string_at(0)
    if site == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        np.ones(8 << 30, np.uint8)
    if site == "quits":
        break
    if site == "skips":
        flare.clear()
        continue
    if site == "shuts-down":
        flare.shutdown()
        flare.receive()
    if site == "comes-again":
        flare.shutdown()
        flare.init()
    if site == "object":
        flare.send(flare.FLModel(params={"w": object()}))
    if site == "nan":
        model.params["w"][2] = np.nan
    flare.send(flare.FLModel(params={"w": model.params["w"] + 1}))
    if site == "twice":
        flare.send(flare.FLModel(params={"w": np.zeros(4, np.float32)}))
    if site == "late":
        raise ValueError("the data of this site are broken")
    if site == "once":
        break
"""

PROCESS = "its trainer process "
SAID = {
    "imports": PROCESS + "ended with exit code 1 (last output: ModuleNotFoundError: No module named 'no_such_module')",
    "silent": PROCESS + "ended with exit code 0",
    "code": PROCESS + "ended with exit code 17 (last output: no licence)",
    "leaves": PROCESS + "ended with exit code 0; it did not answer its task",
    "impatient": "ClientApiError: flare.send() needs a flare.receive() before it",
    "raises": "ValueError: the data of this site are broken)",
    "exits": PROCESS + "ended with exit code 3",
    "dies": PROCESS + "ended with exit code 7",
    "crashes": PROCESS + "was killed by SIGSEGV",
    "memory": PROCESS + "ended with exit code 1 (out of memory? It had ",
    "quits": PROCESS + "ended with exit code 0; it did not answer its task",
    "skips": "the script asked for its next task without answering this one",
    "shuts-down": "flare.receive() came after flare.shutdown(); call flare.init() again",
    "comes-again": "flare.init(): this process has said goodbye with flare.shutdown()",
    "object": "cannot encode value.params['w']: an object of type object",
    "syntax": PROCESS + "ended with exit code 1 (last output: SyntaxError: ",
    "not-found": PROCESS + "could not be started: no-such-program: not found; check command",
    "not-a-program": "client.py: not executable; check command",
}
NOTE_ONLY = ("skips",)
# Wrong only after the answer, or made for one task: nothing is lost by that.
STILL_GOOD = ("late", "once", "twice")


def test_scripts_that_go_wrong(observed: ObservedRun) -> None:
    """Each failure is reported with its cause, its traceback is in the log of its site alone, and the round goes on."""
    broken = observed.folder / "broken" / "client.py"
    broken.parent.mkdir()
    broken.write_text("def f(:\n")
    sites = ["good", *SAID, *STILL_GOOD, "nan"]
    own = {
        "syntax": {"train_script": str(broken)},
        "not-found": {"command": "no-such-program --fast"},
        "not-a-program": {"command": str(observed.folder / "client.py")},
    }
    observed.start(
        SCRIPTS,
        sites,
        min_clients=1 + len(STILL_GOOD),
        launch_external_process=True,
        per_site_config={site: own.get(site, {}) for site in sites},
    )

    assert observed.end() == "completed", observed.reason
    assert observed.model() == [2.0] * 4
    accepted = [line["accepted"] for line in observed.rounds()]
    assert accepted == [sorted(["good", "raises", *STILL_GOOD]), sorted(["good", *STILL_GOOD])]
    complaints = observed.complaints()
    assert complaints.keys() == SAID.keys()
    for site, said in SAID.items():
        assert said in complaints[site], site
        assert f"{site} failed: {complaints[site]}" in observed.log("server")
        if site not in NOTE_ONLY:
            assert complaints[site].removesuffix(", 2 times").partition("; it did")[0] in observed.log(site)
    assert "Traceback" in observed.log("raises")
    assert "Traceback" not in observed.log("server")
    assert observed.complaints("result_refused") == {"nan": "'w': NaN or Inf"}
    assert "the server did not use the result: 'w': NaN or Inf" in observed.log("nan")
    assert "this task is answered already" in observed.log("twice")
    assert observed.log("late").count("ValueError: the data of this site are broken") >= 2


def test_a_script_that_is_not_there(observed: ObservedRun) -> None:
    """A script that does not exist is refused by its name when the recipe is made."""
    with pytest.raises(ConfigError, match="train_script"):
        FedAvgRecipe(
            name="job",
            model={},
            min_clients=1,
            num_rounds=1,
            train_script=str(observed.folder / "nowhere.py"),
            launch_external_process=True,
        )


# Answers one task, and ends when the next one has come to it that it never looks at.
ONE_SHOT = """
import os, sys, time
import flarebus.client as flare

context = flare.init()
model = flare.receive()
open("trained", "a").write(str(model.current_round))
flare.send(flare.FLModel(params={{"w": model.params["w"] + 1}}))
while model.current_round < 2 and not context.seat.engine._waiting:
    time.sleep(0.01)
{end}
"""


@pytest.mark.parametrize("end", ["", "raise ValueError('no data left')", "os._exit(0)", "flare.shutdown()"])
def test_a_task_that_came_too_late_for_its_trainer(observed: ObservedRun, end: str) -> None:
    """A task that a trainer did not look at before it ended, however it ended, is done by the next one."""
    observed.start(ONE_SHOT.format(end=end), ["site-1"], num_rounds=3, launch_external_process=True)

    assert observed.end() == "completed", observed.reason
    assert observed.model() == [3.0] * 4
    assert observed.complaints() == {}
    assert (observed.run_dir / "site-1/trained").read_text() == "012"


# What a process that hangs looks like from outside.
HANGS = """
import ctypes, os, signal, threading

site = os.path.basename(os.getcwd())
if site == "never":
    threading.Event().wait()
import flarebus.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    if site == "busy":
        open("hangs", "w").close()
        ctypes.PyDLL(None).sleep(1000)
    if site == "stopped":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:  # it is woken to be told to end
            os.kill(os.getpid(), signal.SIGSTOP)
    if site == "shut-down" and model.current_round == 0:
        flare.shutdown()
        threading.Event().wait()
    flare.send(flare.FLModel(params={"w": model.params["w"] + 1}))
    if site == "lingers" and model.current_round == 0 and not os.path.exists("lingers"):
        open("lingers", "w").close()
        flare.shutdown()
        threading.Event().wait()
"""


def test_trainers_that_hang(observed: ObservedRun) -> None:
    """A trainer that gives no sign of life, never comes or never goes is ended, and its site says what was wrong."""
    said = {
        "busy": "its trainer process hangs: no sign of life for 2 s",
        "stopped": "its trainer process hangs: no sign of life for 2 s",
        "never": "its trainer did not call flare.init() within 2 s",
        "shut-down": "its trainer left without answering its task, and its process does not end",
    }
    sites = ["good", "lingers", *said]

    def impatient(recipe: FedAvgRecipe) -> None:
        recipe.add_client_config({"heartbeat_timeout": 2, "heartbeat_interval": 0.5}, clients=["busy", "stopped"])
        recipe.add_client_config({"launch_timeout": 2}, clients=["never"])

    own = {site: {"shutdown_timeout": 1.0} for site in ("shut-down", "lingers")}
    observed.start(
        HANGS,
        sites,
        min_clients=2,
        launch_external_process=True,
        per_site_config={site: own.get(site, {}) for site in sites},
        prepare=impatient,
    )

    assert observed.end() == "completed", observed.reason
    assert observed.model() == [2.0] * 4
    complaints = observed.complaints()
    assert complaints == said
    for site, cause in said.items():
        assert cause in observed.log(site)
        assert f"{site} failed: {cause}" in observed.log("server")
    assert "was killed by SIGTERM after it was told to end" in observed.log("busy")
    assert "was killed by SIGKILL after it was told to end" in observed.log("stopped")
    assert [line["accepted"] for line in observed.rounds()] == [["good", "lingers"], ["good", "lingers", "shut-down"]]


LOGS = """
import os
import sys
import flarebus.client as flare

flare.init()
site = flare.get_site_name()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    flare.log("before", 1.0, flare.AnalyticsDataType.SCALAR)
    if site == "exits":
        sys.exit(3)
    if site == "raises":
        raise ValueError("no")
    flare.send(flare.FLModel(params={"w": model.params["w"] + 1}))
    if site == "dies":
        os._exit(0)
"""


def test_metrics_of_a_script_that_ends_badly(observed: ObservedRun) -> None:
    """What was logged before an exception or `sys.exit` still arrives."""
    observed.start(LOGS, ["good", "exits", "raises", "dies"], min_clients=2, num_rounds=1, launch_external_process=True)

    assert observed.end() == "completed", observed.reason
    logged = {fields["site"] for name, fields in observed.events if name == "site_metrics"}
    assert {"good", "exits", "raises"} <= logged
