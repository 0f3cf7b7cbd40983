"""Trainers of Lightning and Transformers with two ranks under torchrun: both work on every task, rank 0 answers."""

from __future__ import annotations

import re

import pytest

from flarebus.recipe import FrameworkType
from tests.system.observed import ObservedRun

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")
pytest.importorskip("transformers")

pytestmark = pytest.mark.slow
# Three processes that import all of it, on a machine that does other things too.
TORCHRUN_S = 240.0

# Each rank has one batch; the gradients of 1 and 3 have the mean 2. With momentum 0.5 a step goes down by 0.2, the next
# one by 0.3: if the optimizer knows of the first. Rounds are Lightning's and Transformers' by turns, to load all once.
SCRIPT = """
import lightning.pytorch as pl
import torch
from transformers import Trainer, TrainingArguments

import flarebus.client.hf as hf
import flarebus.client.lightning as flare


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(4))

    def forward(self, x, labels=None):
        loss = (x.reshape(-1, 1) * self.w).sum()
        return {"loss": loss, "logits": x.reshape(-1, 1) * self.w}

    def training_step(self, batch, _):
        return self(batch["x"])["loss"]

    def validation_step(self, batch, _):
        self.log("seen", self.w.mean() * batch["x"].mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


data = [{"x": torch.tensor([value]), "labels": torch.zeros(1)} for value in (1.0, 3.0)]
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
first = pl.Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", **quiet)
second = Trainer(
    Net(),
    TrainingArguments(
        "checkpoints", use_cpu=True, num_train_epochs=1, per_device_train_batch_size=1, per_device_eval_batch_size=1,
        learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, optim="sgd", optim_args="momentum=0.5",
        save_strategy="no", report_to="none", disable_tqdm=True,
    ),
    train_dataset=data,
    eval_dataset=data,
)
flare.patch(first)
hf.patch(second)
module = Net()
while flare.is_running():
    number = flare.receive().current_round
    if number % 2 == 0:
        first.validate(module, torch.utils.data.DataLoader(data), verbose=False)
        first.fit(module, torch.utils.data.DataLoader(data))
        module_now, steps = module, first.global_step
    else:
        second.evaluate()
        second.train()
        module_now, steps = second.model, second.state.global_step
    print(f"rank {first.global_rank} has {module_now.w.mean().item():.2f} after round {number}, step {steps}")
"""


@pytest.mark.timeout(2 * TORCHRUN_S)
def test_two_ranks_of_each_library(observed: ObservedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rounds, two of each: the ranks train together from the same model, state lives on over the other's rounds,
    and the server gets one result for each round, with the steps of both ranks as its weight."""
    # Torchrun leaves folders there, which are none of ours.
    monkeypatch.setenv("TMPDIR", str(observed.folder))

    run = observed.start(
        SCRIPT,
        ["site-1"],
        framework=FrameworkType.PYTORCH,
        model={"w": torch.zeros(4)},
        launch_external_process=True,
        command="torchrun --standalone --nproc_per_node=2",
        num_rounds=4,
    )
    assert run.get_result(TORCHRUN_S) is not None

    assert observed.end() == "completed", observed.reason
    log = observed.log("site-1")
    # Of each library the first step goes down by 0.2, the second one by 0.3.
    assert observed.model() == pytest.approx([-1.0] * 4)
    found = re.findall(r"rank (\d) has (-\d\.\d\d) after round (\d), step (\d)", log)
    assert sorted(found) == [
        (rank, w, number, step)
        for rank in "01"
        for w, number, step in (("-0.20", "0", "1"), ("-0.40", "1", "1"), ("-0.70", "2", "2"), ("-1.00", "3", "2"))
    ]
    seen = [line["metrics"].get("seen") for line in observed.rounds()]
    assert seen[0] == 0.0
    assert seen[2] == pytest.approx(-0.4 * 2)  # the mean of both ranks, of the model that came in
    assert "ERROR" not in log
