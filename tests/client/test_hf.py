"""The Trainer of Transformers as a site's script patches it, with the real library, against an engine in memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flarebus.client.algorithms import SCAFFOLD_CONTROL
from flarebus.errors import ClientApiError, ConfigError
from flarebus.model import FLModel
from tests.client.fake_engine import FakeEngine

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import flarebus.client.hf as flare
from flarebus.client.hf import _check_version

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*'pin_memory' argument is set as true but no accelerator:UserWarning"),
]

Sit = Callable[..., FakeEngine]
N_STEPS = 4
ROUNDS = 3


class Line(nn.Module):
    """y = w x, pulled towards y = 3 x by the square of the distance."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x: Any, labels: Any = None) -> dict[str, Any]:
        return {"loss": (self.w - 3).square() / 2, "logits": self.w * x}


class Recorder(TrainerCallback):
    """Notes the rate of every step, and what it begins with."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.begun: list[tuple[int, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun.append((state.global_step, state.epoch or 0.0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


DATA = [{"x": torch.ones(()), "labels": torch.ones(())} for _ in range(N_STEPS)]


def make(folder: Path, model: nn.Module | None = None, more: dict[str, Any] | None = None, **changes: Any) -> Trainer:
    """A trainer whose steps are plain gradient descent unless `optim_args` say otherwise."""
    args = TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "per_device_train_batch_size": 1,
            "num_train_epochs": 1,
            "learning_rate": 0.1,
            "lr_scheduler_type": "linear",
            "max_grad_norm": 0.0,
            "optim": "sgd",
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "dataloader_pin_memory": False,
            **changes,
        }
    )
    return Trainer(model or Line(), args, train_dataset=DATA, eval_dataset=DATA, **(more or {}))


def give(engine: FakeEngine, w: float = 0.0, round: int = 0, name: str = "train", **fields: Any) -> None:
    """Hand out a task with this weight."""
    engine.give(FLModel(params={"w": torch.tensor(w)}, **fields), name, round, ROUNDS)


@pytest.fixture
def job(sit_down: Sit) -> FakeEngine:
    """A job of a PyTorch recipe that asks for no metrics."""
    return sit_down(exchange_format="pytorch", train_with_eval=False)


def sent(engine: FakeEngine) -> tuple[float, FLModel]:
    """What came back: the weight, and all of it."""
    answer = engine.next_answer()
    assert answer.params is not None
    return float(answer.params["w"]), answer


def descent(w: float, rates: list[float], extra: Callable[[float], float] = lambda _: 0.0) -> float:
    """What gradient descent makes of it, with something added to each gradient."""
    for rate in rates:
        w -= rate * (w - 3 + extra(w))
    return w


# --- rounds


@pytest.mark.parametrize("length", [{"num_train_epochs": 2}, {"max_steps": 3}], ids=str)
def test_rounds_are_one_long_training(job: FakeEngine, tmp_path: Path, length: dict[str, Any]) -> None:
    """Three rounds in which the server sends back what it got are one training of three times the length: the state of
    the optimizer (momentum), the schedule of the learning rate, epochs and steps go on."""
    settings: dict[str, Any] = {"optim": "adamw_torch", "adam_beta1": 0.9, **length}
    noted, w = Recorder(), 0.0
    trainer = make(tmp_path / "rounds", more={"callbacks": [noted]}, **settings)
    flare.patch(trainer)
    per_round = 3 if "max_steps" in length else 2 * N_STEPS
    for number in range(ROUNDS):
        give(job, w, number)
        trainer.train()
        w, answer = sent(job)
        assert answer.meta == {"NUM_STEPS_CURRENT_ROUND": per_round}

    alone, model = Recorder(), Line()
    settings |= {name: value * ROUNDS for name, value in length.items()}
    make(tmp_path / "alone", model, {"callbacks": [alone]}, **settings).train()
    assert w == pytest.approx(model.w.item())
    assert noted.rates == pytest.approx(alone.rates)
    assert [step for step, _ in noted.begun] == [0, per_round, 2 * per_round]


def test_the_received_model_counts_not_the_one_in_the_checkpoint(job: FakeEngine, tmp_path: Path) -> None:
    """A round that is resumed begins with what the server sent."""
    trainer, noted = make(tmp_path), Recorder()
    trainer.add_callback(noted)
    flare.patch(trainer)
    for number, w in enumerate((0.0, 2.0)):
        noted.rates.clear()
        give(job, w, number)
        trainer.train()
        assert sent(job)[0] == pytest.approx(descent(w, noted.rates))


def test_without_restoring_rounds_know_nothing_of_each_other(job: FakeEngine, tmp_path: Path) -> None:
    """The same model received twice becomes the same model twice, and no checkpoint is written."""
    trainer, found = make(tmp_path, optim="adamw_torch"), []
    flare.patch(trainer, restore_state=False)
    for number in range(2):
        give(job, 1.0, number)
        trainer.train()
        found.append(sent(job)[0])

    assert found[0] == found[1]
    assert list(tmp_path.iterdir()) == []


def test_without_restoring_a_given_optimizer_begins_anew(job: FakeEngine, tmp_path: Path) -> None:
    """One that the script made is set back to what it was."""
    model, found = Line(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    trainer = make(tmp_path, model, {"optimizers": (optimizer, scheduler)})
    flare.patch(trainer, restore_state=False)
    for number in range(2):
        give(job, 1.0, number)
        trainer.train()
        found.append(sent(job)[0])

    assert found[0] == found[1]


@pytest.mark.parametrize(("length", "expected"), [({"local_epochs": 0.5}, 2), ({"local_steps": 3}, 3)], ids=str)
def test_a_round_is_as_long_as_patch_says(
    job: FakeEngine, tmp_path: Path, length: dict[str, Any], expected: int
) -> None:
    """`local_epochs` and `local_steps` count before the arguments of the trainer, which stay as they are."""
    trainer = make(tmp_path, num_train_epochs=5)
    flare.patch(trainer, **length)
    for number in range(2):
        give(job, 0.0, number)
        trainer.train()
        assert sent(job)[1].meta["NUM_STEPS_CURRENT_ROUND"] == expected
    assert (trainer.args.num_train_epochs, trainer.args.max_steps) == (5, -1)


@pytest.mark.parametrize(("strategy", "expected"), [("steps", [2, 3 * N_STEPS]), ("epoch", [2 * N_STEPS, 3 * N_STEPS])])
def test_a_round_that_was_stopped_early_is_gone_on_from(
    job: FakeEngine, tmp_path: Path, strategy: str, expected: list[int]
) -> None:
    """What another callback stops for is a whole result, and the next round has its full length."""
    trainer = make(
        tmp_path,
        more={"callbacks": [EarlyStoppingCallback(early_stopping_patience=1)]},
        num_train_epochs=3,
        eval_strategy=strategy,
        eval_steps=1,
        metric_for_best_model="loss",
        greater_is_better=True,  # it is not: every evaluation after the first is worse
    )
    flare.patch(trainer)
    steps = []
    for number in range(2):
        give(job, 0.0, number)
        trainer.train()
        steps.append(sent(job)[1].meta["NUM_STEPS_CURRENT_ROUND"])
        trainer.callback_handler.callbacks = [
            each for each in trainer.callback_handler.callbacks if not isinstance(each, EarlyStoppingCallback)
        ]
    assert steps == expected


@pytest.mark.parametrize(("said", "kept"), [(None, 2), (1, 1)])
def test_old_checkpoints_go(job: FakeEngine, tmp_path: Path, said: int | None, kept: int) -> None:
    """Two are kept, unless the script says otherwise."""
    trainer = make(tmp_path, save_total_limit=said)
    flare.patch(trainer)
    for number in range(ROUNDS):
        give(job, 0.0, number)
        trainer.train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == kept


def test_differences_are_sent_where_the_job_wants_them(sit_down: Sit, tmp_path: Path) -> None:
    """With transfer type DIFF the received model is subtracted."""
    job = sit_down(exchange_format="pytorch", train_with_eval=False, transfer_type="DIFF")
    trainer = make(tmp_path)
    flare.patch(trainer, restore_state=False, local_steps=1)
    give(job, 1.0)
    trainer.train()

    w, answer = sent(job)
    assert answer.params_type is flare.ParamsType.DIFF
    assert w == pytest.approx(0.2)


def test_meta_of_the_model_goes_along(job: FakeEngine, tmp_path: Path) -> None:
    """`__fl_meta__` is merged into the meta."""
    trainer = make(tmp_path)
    trainer.model.__fl_meta__ = {"hospital": "north"}
    flare.patch(trainer, restore_state=False)
    give(job)
    trainer.train()
    assert sent(job)[1].meta == {"NUM_STEPS_CURRENT_ROUND": N_STEPS, "hospital": "north"}


# --- evaluation


def test_evaluate_first_measures_the_received_model(sit_down: Sit, tmp_path: Path) -> None:
    """Metrics of an explicit `evaluate` go out with the train result, without what only tells how long it took;
    evaluation while training and afterwards is the trainer's own."""
    job = sit_down(exchange_format="pytorch", train_with_eval=True)
    trainer = make(tmp_path, eval_strategy="epoch")
    flare.patch(trainer)
    for number in range(2):
        give(job, number + 1.0, number)
        assert flare.is_running()
        trainer.evaluate({"near": DATA, "far": DATA[:1]})
        trainer.train()
        _, answer = sent(job)
        loss = (number - 2) ** 2 / 2
        assert answer.metrics == {"eval_near_loss": loss, "eval_far_loss": loss}
        assert trainer.evaluate()["eval_loss"] < loss
    assert job.waiting.empty()


def test_a_job_that_asks_for_metrics_gets_no_result_without(sit_down: Sit, tmp_path: Path) -> None:
    """Where evaluation is expected, `train` alone is an error before it trains; it says what to call."""
    job = sit_down(exchange_format="pytorch", train_with_eval=True)
    trainer = make(tmp_path)
    flare.patch(trainer)
    give(job)
    with pytest.raises(ClientApiError, match=r"call trainer\.evaluate\(\.\.\.\) before"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_other_tasks(job: FakeEngine, tmp_path: Path) -> None:
    """The loop of a training script answers evaluation with metrics, and gives the site's own model where asked."""
    trainer = make(tmp_path)
    flare.patch(trainer)
    give(job, 2.0, name="validate")
    job.give(FLModel(), "submit_model")
    answers = []
    for _ in range(2):
        assert flare.is_running()
        trainer.evaluate()
        assert trainer.train().global_step == 0
        answers.append(job.next_answer())

    assert (answers[0].params, answers[0].metrics) == (None, {"eval_loss": 0.5})
    assert answers[1].params is not None
    assert (float(answers[1].params["w"]), answers[1].metrics) == (2.0, None)
    job.end()
    assert not flare.is_running()
    assert trainer.train().global_step == 0


@pytest.mark.parametrize("restore", [True, False])
def test_what_the_trainer_logs_is_streamed(job: FakeEngine, tmp_path: Path, restore: bool) -> None:
    """With `stream_metrics` the server sees the loss of every step, and steps go on from round to round; without it,
    nothing."""
    trainer = make(tmp_path / "streaming", logging_strategy="steps", logging_steps=1)
    flare.patch(trainer, stream_metrics=True, restore_state=restore)
    for number in range(2):
        give(job, 1.0, number)
        trainer.train()

    losses = [(fields["global_step"], value) for name, value, _, fields in job.logged if name == "loss"]
    assert [step for step, _ in losses] == list(range(1, 2 * N_STEPS + 1))
    assert losses[0][1] == losses[N_STEPS][1] == 2.0


def test_nothing_is_streamed_unasked(job: FakeEngine, tmp_path: Path) -> None:
    """By default the server hears of nothing but the result."""
    trainer = make(tmp_path, logging_strategy="steps", logging_steps=1)
    flare.patch(trainer)
    give(job)
    trainer.train()
    assert job.logged == []


# --- what does not fit


@pytest.mark.parametrize(
    ("changes", "settings", "expected"),
    [
        ({"save_only_model": True}, {}, "save_only_model"),
        ({}, {"local_epochs": 1, "local_steps": 1}, "a round has one length"),
        ({}, {"local_epochs": 0}, "local_epochs=0"),
        ({}, {"local_steps": 1.5}, r"local_steps=1\.5"),
        ({}, {"params_scope": "all"}, "one of auto, model, adapter"),
        ({}, {"params_scope": "adapter"}, "a PEFT model"),
        ({}, {"server_key_prefix": 3}, "server_key_prefix=3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    job: FakeEngine, tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any], expected: str
) -> None:
    """Each is an error of `patch`, which names the setting."""
    with pytest.raises(ConfigError, match=expected):
        flare.patch(make(tmp_path, **changes), **settings)


@pytest.mark.parametrize(
    ("name", "value"), [("deepspeed", "zero.json"), ("fsdp", "full_shard"), ("load_best_model_at_end", True)]
)
def test_trainers_that_do_not_fit_are_refused(job: FakeEngine, tmp_path: Path, name: str, value: Any) -> None:
    """Where no rank has the whole model, or the trainer would put another model in place of the trained one."""
    trainer = make(tmp_path)
    setattr(trainer.args, name, value)  # made so from the start, a trainer would ask for GPUs or other packages
    with pytest.raises(ConfigError, match=name):
        flare.patch(trainer)
    with pytest.raises(ConfigError, match=r"a transformers\.Trainer"):
        flare.patch(trainer.model)


def test_one_task_in_each_process_has_nothing_to_restore(sit_down: Sit, tmp_path: Path) -> None:
    """`launch_once=False` together with `restore_state` is a RuntimeError; without it both are fine."""
    sit_down(launch_once=False)
    trainer = make(tmp_path)
    with pytest.raises(RuntimeError, match="launch_once"):
        flare.patch(trainer)
    flare.patch(trainer, restore_state=False)


def test_a_script_patches_one_trainer(job: FakeEngine, tmp_path: Path) -> None:
    """Again is fine with the same settings; other ones, or another trainer, are an error."""
    trainer = make(tmp_path)
    for _ in range(2):
        flare.patch(trainer)
    with pytest.raises(ClientApiError, match="other settings"):
        flare.patch(trainer, restore_state=False)
    with pytest.raises(ClientApiError, match="another trainer"):
        flare.patch(make(tmp_path))

    give(job)
    trainer.train()
    sent(job)
    assert job.answers.empty()


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE"])
def test_ranks_that_cannot_talk_are_refused(
    job: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """A process that was started as one of several, without torch.distributed, would train for itself."""
    trainer = make(tmp_path)
    monkeypatch.setenv(variable, "2")
    with pytest.raises(ClientApiError, match="start them with torchrun"):
        flare.patch(trainer)


def test_a_prefix_of_the_server_is_suggested_and_used(job: FakeEngine, tmp_path: Path) -> None:
    """Names with something in front are an error that says what to patch with; then the answer has them, too."""
    trainer = make(tmp_path)
    params = {"net.w": torch.tensor(1.0)}
    flare.patch(trainer, restore_state=False)
    job.give(FLModel(params=params))
    with pytest.raises(ClientApiError, match=r"patch with server_key_prefix='net\.'"):
        trainer.train()


def test_a_prefix_goes_to_the_server_again(job: FakeEngine, tmp_path: Path) -> None:
    """Model and control variate have the server's names on their way back."""
    trainer = make(tmp_path)
    flare.patch(trainer, restore_state=False, local_steps=1, server_key_prefix="net.")
    control = {SCAFFOLD_CONTROL: {"net.w": torch.tensor(0.5)}}
    job.give(FLModel(params={"net.w": torch.tensor(1.0)}, optimizer_params=control))
    trainer.train()

    answer = job.next_answer()
    assert answer.params is not None
    assert answer.optimizer_params is not None
    assert {name: float(value) for name, value in answer.params.items()} == {"net.w": pytest.approx(1.15)}
    assert {name: float(value) for name, value in answer.optimizer_params[SCAFFOLD_CONTROL].items()} == {"net.w": -2.0}


@pytest.mark.parametrize(("version", "fits"), [("4.39.3", False), ("4.40.0", True), ("5.24.0", True), ("6.0.0", False)])
def test_only_known_versions_of_transformers(version: str, fits: bool) -> None:
    """What is untried is an error, not a guess."""
    if fits:
        _check_version(version)
    else:
        with pytest.raises(ConfigError, match=r"from 4\.40, below 6"):
            _check_version(version)


def test_of_a_peft_model_the_adapter_travels(job: FakeEngine, tmp_path: Path) -> None:
    """What is frozen stays here; the names are those of an adapter in a file."""
    import peft

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(1, 1)

        def forward(self, x: Any, labels: Any = None) -> dict[str, Any]:
            return {"loss": (self.line(x.reshape(-1, 1)) - 3).square().mean(), "logits": x}

    model = peft.get_peft_model(Net(), peft.LoraConfig(r=1, target_modules=["line"]))
    start = {name: value.clone() + 1 for name, value in peft.get_peft_model_state_dict(model).items()}
    trainer = make(tmp_path, model, learning_rate=1e-4)
    flare.patch(trainer, restore_state=False)
    job.give(FLModel(params=start))
    trainer.train()

    answer = job.next_answer()
    assert answer.params is not None
    assert answer.params.keys() == start.keys()
    assert any(not np.array_equal(answer.params[name], start[name]) for name in start)
    assert all(np.isfinite(answer.params[name]).all() for name in start)


# --- algorithms


def test_fedprox_and_scaffold(job: FakeEngine, tmp_path: Path) -> None:
    """The server's algorithm is in every step: mu (w - w_received), or c - c_i."""
    noted = Recorder()
    trainer = make(tmp_path, more={"callbacks": [noted]})
    flare.patch(trainer, restore_state=False)
    own = 0.0
    give(job, 1.0, meta={"fedprox_mu": 2.0})
    trainer.train()
    assert sent(job)[0] == pytest.approx(descent(1.0, noted.rates, lambda w: 2.0 * (w - 1.0)))
    for number in (1, 2):
        noted.rates.clear()
        give(job, 1.0, number, optimizer_params={SCAFFOLD_CONTROL: {"w": torch.tensor(0.5)}})
        trainer.train()
        w, answer = sent(job)
        assert w == pytest.approx(descent(1.0, noted.rates, lambda _, own=own: 0.5 - own))  # type: ignore[misc]
        assert answer.optimizer_params is not None
        own += float(answer.optimizer_params[SCAFFOLD_CONTROL]["w"])


def test_no_algorithm_where_gradients_are_out_of_reach(
    job: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older versions call nobody before a step: with them plain averaging is all there is, and that is said."""
    monkeypatch.setattr(f"{flare.__name__}.TrainerCallback", object)  # one without the call, as theirs
    trainer = make(tmp_path)
    flare.patch(trainer)
    give(job)
    trainer.train()
    sent(job)
    give(job, round=1, meta={"fedprox_mu": 0.1})
    with pytest.raises(ClientApiError, match="too old"):
        trainer.train()


# --- importing


@pytest.mark.parametrize("missing", ["transformers", "accelerate"])
def test_without_transformers_the_error_names_the_extra(missing: str) -> None:
    """Whichever of the two is missing."""
    code = (
        f"import sys\nsys.modules[{missing!r}] = None\n"
        "try:\n    import flarebus.client.hf\nexcept ImportError as error:\n    print(error)\n"
    )
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    assert "pip install 'flarebus[transformers]'" in found.stdout
