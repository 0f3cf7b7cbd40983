"""A script under torchrun, as docs/external-trainers.md shows it: all ranks work on every task, rank 0 answers."""

from __future__ import annotations

import re

import pytest

from flarebus.recipe import FrameworkType
from tests.docs.pages import blocks
from tests.system.observed import ObservedRun

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.slow
# Three processes that import PyTorch, on a machine that does other things too.
TORCHRUN_S = 240.0

(SCRIPT,) = (block for block in blocks("external-trainers.md", "python") if "DistributedDataParallel" in block)
# In the first round all ranks send, as on the page; in the second one only rank 0 does.
SENDS = "if rank == 0 or received.current_round == 0:"

# Each rank has one batch; the gradients of 1 and 3 have the mean 2, and a step of 0.1 goes down by 0.2.
MINE = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(4))

    def forward(self, inputs):
        return inputs * self.w


def batches(rank, world_size):
    assert world_size == 2
    return [(torch.full((4,), float(1 + 2 * rank)), None)]


def loss(outputs, targets):
    return outputs.sum()
"""


@pytest.mark.timeout(2 * TORCHRUN_S)
def test_two_ranks_train_together_and_leave(observed: ObservedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds: both ranks see both tasks, the model is what both made of it, and the trainer leaves by itself."""
    (observed.folder / "mine.py").write_text(MINE)
    # Torchrun leaves folders there, which are none of ours.
    monkeypatch.setenv("TMPDIR", str(observed.folder))

    run = observed.start(
        SCRIPT.replace("    flare.send(", f"    {SENDS}\n        flare.send("),
        ["site-1"],
        framework=FrameworkType.PYTORCH,
        model={"w": torch.zeros(4)},
        launch_external_process=True,
        command="torchrun --standalone --nproc_per_node=2",
    )
    assert run.get_result(TORCHRUN_S) is not None

    assert observed.end() == "completed", observed.reason
    assert observed.model() == pytest.approx([-0.4] * 4)
    log = observed.log("site-1")
    finished = re.findall(r"rank (\d) has finished round (\d)", log)
    assert sorted(finished) == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert "its trainer process ended with exit code 0" in log
    assert "ERROR" not in log
