"""Owners: whether a process lives, as the process table tells."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from flarebus_pipes._owner import Owner, claim, is_dead, read_owner

from flarebus.errors import UsageError


def owner_of(pid: int) -> Owner:
    """A process of which only the number is known."""
    return replace(Owner.here(), pid=pid, started=0)


def test_this_process_lives() -> None:
    """It is here, it runs, and it says who it is."""
    here = Owner.here()
    assert here.is_local
    assert here.is_running
    assert str(os.getpid()) in str(here)


def test_a_zombie_does_not_live() -> None:
    """A process that has ended is dead before its parent has asked for its status, and after."""
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not owner_of(process.pid).is_running
    process.wait()
    assert not owner_of(process.pid).is_running


def test_a_number_that_was_used_again(tmp_path: Path) -> None:
    """A process with the number of the owner that started at another time is not the owner."""
    here = Owner.here()
    if not here.started:
        pytest.skip("only Linux tells when a process started")
    assert not replace(here, started=here.started - 1).is_running


def test_one_claim_at_a_time(tmp_path: Path) -> None:
    """The second is refused with the name of the first, each opening is told from every other."""
    record = tmp_path / "ACTIVE.owner"
    first = claim(record, "this end")
    assert read_owner(record) == first
    assert not is_dead(record)
    with pytest.raises(UsageError, match=f"this end is open already: {first}"):
        claim(record, "this end")
    record.unlink()
    assert claim(record, "this end").nonce != first.nonce


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": 1}', "\xff"])
def test_a_record_that_says_nothing(tmp_path: Path, text: str) -> None:
    """It names nobody; while it is young it may be half written, so it is not taken for a dead one's."""
    record = tmp_path / "ACTIVE.owner"
    record.write_bytes(text.encode("latin-1"))
    assert read_owner(record) is None
    assert not is_dead(record)
    os.utime(record, (1, 1))
    assert is_dead(record)
    assert list(tmp_path.iterdir()) == [record]
