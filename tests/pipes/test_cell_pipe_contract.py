"""CellPipe keeps the promises of a pipe, however its client job is connected."""

from __future__ import annotations

import pytest
from flarebus_pipes.cell_pipe import CellPipe

from flarebus.testing import PipeCheck, PipeTrial, pipe_checks
from tests.pipes.cell_ends import ARRANGEMENTS, ENV_KEYS, Setting

# Over a network a closed connection is no dead process; silence decides, a quarter of a minute later.
SLOW_OVER_TCP = ("killed_", "dead_ends_")
BIG_BYTES = 8 * 1024 * 1024


CASES = [
    pytest.param(arrangement, check, id=f"{arrangement}-{name}")
    for arrangement in ARRANGEMENTS
    for name, check in pipe_checks(CellPipe)
    if arrangement not in ("tcp", "curve") or not name.startswith(SLOW_OVER_TCP)
]


@pytest.mark.parametrize(("arrangement", "check"), CASES)
def test_cell_pipe_keeps_the_contract(arrangement: str, check: PipeCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check of the conformance kit passes, and no listener, cell or offer is left."""
    with Setting(arrangement) as setting:
        if (keys := setting.keys()) is not None:
            monkeypatch.setenv(ENV_KEYS, keys)
        with PipeTrial(setting.make, leftovers=setting.leftovers, big_bytes=BIG_BYTES) as trial:
            check(trial)
        assert setting.leftovers() == []
