"""What authors of plug-ins test with. Needs no test framework; fits into any.

A pipe is checked against every promise of `flarebus.pipes.Pipe` by one call:

    from flarebus.testing import check_pipe

    check_pipe(lambda mode: MyPipe(mode, folder), leftovers=lambda: os.listdir(folder))

or, as tests of their own, with pytest:

    @pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in pipe_checks(MyPipe)])
    def test_my_pipe(check, tmp_path):
        with PipeTrial(lambda mode: MyPipe(mode, tmp_path), leftovers=lambda: os.listdir(tmp_path)) as trial:
            check(trial)

From a shell: ``python -m flarebus.testing my_package.my_pipe:MyPipe --arg folder=/tmp/there``.
"""

from __future__ import annotations

from flarebus.testing.conformance import ContractBroken, PipeCheck, check_pipe, pipe_checks
from flarebus.testing.trial import PipeTrial, PromiseBroken

__all__ = ["ContractBroken", "PipeCheck", "PipeTrial", "PromiseBroken", "check_pipe", "pipe_checks"]
