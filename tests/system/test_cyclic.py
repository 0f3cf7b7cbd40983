"""Cyclic weight transfer over the real bus: the known answer, and sites that are lost in their turns."""

from __future__ import annotations

from typing import Any

import pytest

from flarebus.recipe import CyclicRecipe
from tests.system.observed import ONE, ObservedRun

SITES = ("site-1", "site-2", "site-3")
# What site-2 does in round 1, before it answers.
FAULT = """
    if flare.get_site_name() == "site-2" and model.current_round == 1:
        {fault}
"""
KILL = 'import os; open("here", "a").write("x"); os.kill(os.getpid(), 9)'
KILL_ONCE = f'import os; os.path.exists("here") or exec({KILL!r})'
HANG = "import os, time; exec('while not os.path.exists(\"go\"): time.sleep(0.01)')"


def run(observed: ObservedRun, body: str = "", rounds: int = 2, **given: Any) -> str:
    settings = {"min_clients": 2, "num_rounds": rounds, "kind": CyclicRecipe, "env": {"num_threads": 3}}
    observed.start(ONE.format(body=body), SITES, **{**settings, **given})
    return observed.end()


def accepted(observed: ObservedRun) -> list[list[str]]:
    found: list[list[str]] = [line["accepted"] for line in observed.rounds()]
    return found


@pytest.mark.parametrize("order", ["FIXED", "RANDOM", ["site-3", "site-1", "site-2"]], ids=str)
def test_three_sites_add_one_for_two_rounds(observed: ObservedRun, order: Any) -> None:
    """The model ends six higher, whatever the order; every site is in the record of every round."""
    assert run(observed, order=order) == "completed", observed.reason

    assert observed.model() == [6.0] * 4
    assert accepted(observed) == [list(SITES)] * 2
    assert observed.journal() == ([0, 1], "completed")


def test_a_site_whose_worker_is_killed_in_its_turn_has_it_again(observed: ObservedRun) -> None:
    """A worker that comes back within the turn finds the model waiting."""
    assert run(observed, FAULT.format(fault=KILL_ONCE)) == "completed", observed.reason

    assert observed.model() == [6.0] * 4
    assert "was killed by SIGKILL" in observed.log("server")


def test_a_site_that_dies_in_its_turn_is_passed_over(observed: ObservedRun) -> None:
    """Once it is known to be dead the next site has what the one before it made; later rounds go on without it."""
    assert run(observed, FAULT.format(fault=KILL), rounds=3) == "completed", observed.reason

    assert observed.model() == [7.0] * 4
    assert accepted(observed) == [list(SITES), ["site-1", "site-3"], ["site-1", "site-3"]]
    lost = observed.wait_for("turn_lost", site="site-2")
    assert (lost["round"], "SIGKILL" in lost["reason"]) == (1, True)
    assert observed.run_dir.joinpath("site-2", "here").read_text() == "xxx"


def test_a_site_that_hangs_is_passed_over_after_its_deadline(observed: ObservedRun) -> None:
    """A turn has an end, and the site may have the next one."""
    observed.on("turn_lost", lambda _: observed.run_dir.joinpath("site-2", "go").touch())
    assert run(observed, FAULT.format(fault=HANG), task_result_timeout=1.0) == "completed", observed.reason

    assert observed.model() == [5.0] * 4
    assert observed.wait_for("turn_lost", site="site-2")["reason"] == "no answer within 1 s"
