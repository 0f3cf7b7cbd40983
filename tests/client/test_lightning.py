"""Lightning's trainer as a site's script patches it, with the real library, against an engine in memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from flarebus.client.algorithms import SCAFFOLD_CONTROL
from flarebus.errors import ClientApiError, ConfigError
from flarebus.model import FLModel
from tests.client.fake_engine import FakeEngine

pytest.importorskip("lightning")

import lightning.pytorch as pl

import flarebus.client.lightning as flare

pytestmark = [
    pytest.mark.slow,
    # Advice of Lightning to its users.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
]

Sit = Callable[..., FakeEngine]
N_BATCHES = 4


class Line(pl.LightningModule):
    """y = w x, pulled towards y = 3 x by the square of the distance; one batch is x = 1."""

    def __init__(self, momentum: float = 0.0, n_optimizers: int = 1) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.momentum = momentum
        self.automatic_optimization = n_optimizers == 1
        self.rates: list[float] = []

    def training_step(self, batch: Any, _: int) -> Any:
        if self.automatic_optimization:
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return (self.w - 3).square().sum() / 2

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("w_seen", self.w.detach())

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.SGD(self.parameters(), lr=0.1, momentum=self.momentum)
            for _ in range(1 if self.automatic_optimization else 2)
        ]
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in optimizers]
        return optimizers, schedulers


def make(**changes: Any) -> pl.Trainer:
    """A trainer that writes nothing."""
    return pl.Trainer(
        **{
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 1,
            **changes,
        }
    )


def batches() -> Any:
    return torch.utils.data.DataLoader(torch.ones(N_BATCHES))


def give(engine: FakeEngine, w: float = 0.0, round: int = 0, name: str = "train", **fields: Any) -> None:
    """Hand out a task with this weight."""
    engine.give(FLModel(params={"w": torch.tensor(w)}, **fields), name, round, 3)


@pytest.fixture
def job(sit_down: Sit) -> FakeEngine:
    """A job of a PyTorch recipe that asks for no metrics."""
    return sit_down(exchange_format="pytorch", train_with_eval=False)


def sent(engine: FakeEngine) -> tuple[float, FLModel]:
    """What came back: the weight, and all of it."""
    answer = engine.next_answer()
    assert answer.params is not None
    return float(answer.params["w"]), answer


# --- rounds


def test_a_round_is_received_trained_and_sent(job: FakeEngine) -> None:
    """The module begins with what was received, and what it has become is the answer, with its number of steps."""
    trainer, module = make(max_epochs=2), Line()
    flare.patch(trainer)
    give(job, 1.0)
    assert flare.is_running()
    trainer.fit(module, batches())

    w, answer = sent(job)
    expected = 1.0
    for rate in [0.1] * N_BATCHES + [0.05] * N_BATCHES:
        expected -= rate * (expected - 3)
    assert w == pytest.approx(expected)
    assert answer.meta == {"NUM_STEPS_CURRENT_ROUND": 2 * N_BATCHES}
    assert answer.metrics is None
    assert answer.params_type is flare.ParamsType.FULL


def test_state_lives_on_from_round_to_round(job: FakeEngine) -> None:
    """Three rounds in which the server sends back what it got are one training of three times the length: momentum,
    learning rate, epochs and steps go on."""
    trainer, module, w = make(), Line(momentum=0.9), 0.0
    flare.patch(trainer)
    for number in range(3):
        give(job, w, number)
        trainer.fit(module, batches())
        w, answer = sent(job)
        assert answer.meta["NUM_STEPS_CURRENT_ROUND"] == N_BATCHES
        assert (trainer.current_epoch, trainer.global_step) == (number + 1, N_BATCHES * (number + 1))

    alone = Line(momentum=0.9)
    make(max_epochs=3).fit(alone, batches())
    assert w == pytest.approx(alone.w.item())
    assert module.rates == alone.rates


def test_without_restoring_each_round_has_a_fresh_optimizer(job: FakeEngine) -> None:
    """The same model received twice becomes the same model twice, while epochs and steps are still counted on."""
    trainer, module, found = make(), Line(momentum=0.9), []
    flare.patch(trainer, restore_state=False)
    for number in range(2):
        give(job, 1.0, number)
        trainer.fit(module, batches())
        found.append(sent(job)[0])

    assert found[0] == found[1]
    assert trainer.global_step == 2 * N_BATCHES


def test_a_limit_of_steps_is_one_for_each_round(job: FakeEngine) -> None:
    """`max_steps` in the middle of an epoch ends every round there, not only the first one."""
    trainer, module = make(max_epochs=-1, max_steps=3), Line()
    flare.patch(trainer)
    for number in range(3):
        give(job, 0.0, number)
        trainer.fit(module, batches())
        assert sent(job)[1].meta["NUM_STEPS_CURRENT_ROUND"] == 3


def test_limits_can_be_left_to_the_script(job: FakeEngine) -> None:
    """With `update_fit_loop=False` the trainer's limits are for all rounds: here the second one has nothing to do."""
    trainer, module, steps = make(), Line(), []
    flare.patch(trainer, update_fit_loop=False)
    for number in range(2):
        give(job, 0.0, number)
        trainer.fit(module, batches())
        steps.append(sent(job)[1].meta["NUM_STEPS_CURRENT_ROUND"])

    assert steps == [N_BATCHES, 0]


def test_what_stopped_a_round_early_does_not_stop_the_next(job: FakeEngine) -> None:
    """After a round that ended by itself the next one may be as long as the trainer says."""

    class StopAtOnce(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 0

    trainer, module, steps = make(max_epochs=3, callbacks=[StopAtOnce()]), Line(), []
    flare.patch(trainer)
    for number in range(2):
        give(job, 0.0, number)
        trainer.fit(module, batches())
        steps.append(sent(job)[1].meta["NUM_STEPS_CURRENT_ROUND"])

    assert steps == [N_BATCHES, 3 * N_BATCHES]


def test_differences_are_sent_where_the_job_wants_them(sit_down: Sit) -> None:
    """With transfer type DIFF the received model is subtracted."""
    job = sit_down(exchange_format="pytorch", train_with_eval=False, transfer_type="DIFF")
    trainer = make(max_steps=1)
    flare.patch(trainer)
    give(job, 1.0)
    trainer.fit(Line(), batches())

    w, answer = sent(job)
    assert answer.params_type is flare.ParamsType.DIFF
    assert w == pytest.approx(0.2)


def test_patching_again_changes_nothing(job: FakeEngine) -> None:
    """A second `patch` adds no second callback; other settings are an error."""
    trainer = make()
    for _ in range(2):
        flare.patch(trainer)
    give(job)
    trainer.fit(Line(), batches())
    sent(job)
    assert job.answers.empty()

    with pytest.raises(ClientApiError, match="other settings"):
        flare.patch(trainer, restore_state=False)


def test_meta_of_the_module_goes_along(job: FakeEngine) -> None:
    """`__fl_meta__` is merged into the meta and counts before what is there; something else than a dict is an error."""
    trainer, module = make(), Line()
    flare.patch(trainer)
    module.__fl_meta__ = {"NUM_STEPS_CURRENT_ROUND": 7, "hospital": "north"}
    give(job)
    trainer.fit(module, batches())
    assert sent(job)[1].meta == {"NUM_STEPS_CURRENT_ROUND": 7, "hospital": "north"}

    module.__fl_meta__ = ["north"]
    give(job, round=1)
    with pytest.raises(ClientApiError, match="__fl_meta__ of the module must be a dict, not list"):
        trainer.fit(module, batches())


def test_one_task_in_each_process_has_nothing_to_restore(sit_down: Sit, caplog: pytest.LogCaptureFixture) -> None:
    """With `launch_once=False` state cannot live on; that is said, and nobody is kept from it."""
    sit_down(launch_once=False)
    flare.patch(make(), restore_state=False)
    assert "launch_once" not in caplog.text
    flare.patch(make())
    assert "launch_once=False: each task has a process of its own" in caplog.text


# --- evaluation


def test_validate_first_measures_the_received_model(sit_down: Sit) -> None:
    """Metrics of an explicit `validate` go out with the train result, though the module has changed since."""
    job = sit_down(exchange_format="pytorch", train_with_eval=True)
    trainer, module = make(), Line()
    flare.patch(trainer)
    for number in range(2):
        give(job, number + 1.5, number)
        assert flare.is_running()
        trainer.validate(module, batches(), verbose=False)
        trainer.fit(module, batches(), batches())
        w, answer = sent(job)
        assert answer.metrics == {"w_seen": number + 1.5}
        assert w != number + 1.5


def test_a_job_that_asks_for_metrics_gets_no_result_without(sit_down: Sit) -> None:
    """Where evaluation is expected, `fit` alone is an error before it trains, in each round; it says what to call."""
    job = sit_down(exchange_format="pytorch", train_with_eval=True)
    trainer, module = make(), Line()
    flare.patch(trainer)
    give(job)
    trainer.validate(module, batches(), verbose=False)
    trainer.fit(module, batches())
    sent(job)

    give(job, round=1)
    with pytest.raises(ClientApiError, match=r"call trainer\.validate\(\.\.\.\) before"):
        trainer.fit(module, batches())
    assert trainer.global_step == N_BATCHES


def test_validating_after_training_is_the_scripts_own(job: FakeEngine) -> None:
    """Once the result is sent, `validate` looks at the trained module and waits for no task."""
    trainer, module = make(), Line()
    flare.patch(trainer)
    give(job, 1.0)
    trainer.fit(module, batches())
    w, _ = sent(job)

    assert trainer.validate(module, batches(), verbose=False)[0]["w_seen"] == pytest.approx(w)
    assert job.waiting.empty()


def test_an_evaluate_task_is_answered_with_metrics(job: FakeEngine) -> None:
    """The loop of a training script serves evaluation: `validate` answers, and `fit` trains nothing."""
    trainer, module = make(), Line()
    flare.patch(trainer)
    give(job, 2.5, name="validate")
    give(job, 1.0, 1)
    for expected in (None, N_BATCHES):
        assert flare.is_running()
        trainer.validate(module, batches(), verbose=False)
        trainer.fit(module, batches())
        answer = job.next_answer()
        assert (answer.metrics, answer.meta.get("NUM_STEPS_CURRENT_ROUND")) == (
            ({"w_seen": 2.5}, None) if expected is None else ({"w_seen": 1.0}, expected)
        )


def test_fit_alone_cannot_answer_an_evaluate_task(job: FakeEngine) -> None:
    """It says which call can."""
    trainer = make()
    flare.patch(trainer)
    give(job, name="validate")
    with pytest.raises(ClientApiError, match=r"evaluate the received model: call trainer\.validate"):
        trainer.fit(Line(), batches())


def test_the_own_model_is_submitted_untrained(job: FakeEngine) -> None:
    """Where the server asks for the site's model, `fit` sends the module as the last round left it."""
    trainer, module = make(), Line()
    flare.patch(trainer)
    give(job, 1.0)
    trainer.fit(module, batches())
    trained, _ = sent(job)
    job.give(FLModel(), "submit_model")
    assert flare.is_running()
    trainer.validate(module, batches(), verbose=False)
    trainer.fit(module, batches())

    w, answer = sent(job)
    assert w == trained
    assert answer.metrics is None


def test_nothing_is_trained_once_the_job_has_ended(job: FakeEngine) -> None:
    """`validate` and `fit` come back, and nothing is sent."""
    trainer, module = make(), Line()
    flare.patch(trainer)
    job.end()
    trainer.validate(module, batches(), verbose=False)
    trainer.fit(module, batches())

    assert trainer.global_step == 0
    assert job.answers.empty()


# --- what does not fit


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"v": torch.zeros(())}, r"the server's model lacks 'w'; the module has no 'v'"),
        ({"w": torch.zeros(2)}, r"'w' is \(2,\) there and \(\) here"),
        ({"net.w": torch.zeros(())}, r"The server's names have 'net\.' in front"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(job: FakeEngine, params: dict[str, Any], expected: str) -> None:
    """Other names or shapes are an error that shows them, and a prefix that would explain it."""
    trainer, module = make(), Line()
    flare.patch(trainer)
    job.give(FLModel(params=params))
    with pytest.raises(ClientApiError, match=expected):
        trainer.fit(module, batches())
    assert module.w.item() == 0


def test_names_that_one_side_has_can_be_left_alone(job: FakeEngine) -> None:
    """Without strictness the module's own names stay at the site, and the server's own go back as they came."""
    trainer, module = make(max_steps=1), Line()
    module.head = nn.Linear(1, 1)
    flare.patch(trainer, load_state_dict_strict=False)
    job.give(FLModel(params={"w": torch.tensor(1.0), "of_others": torch.full((2,), 5.0)}))
    trainer.fit(module, batches())

    answer = job.next_answer()
    assert answer.params is not None
    assert {name: value.tolist() for name, value in answer.params.items()} == {
        "w": pytest.approx(1.2),
        "of_others": [5.0, 5.0],
    }


def test_what_cannot_be_patched_is_refused(job: FakeEngine) -> None:
    """No trainer, or one that would start processes that the client job does not know."""
    with pytest.raises(ConfigError, match="a Trainer of lightning"):
        flare.patch(Line())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="torchrun"):
        flare.patch(make(devices=2, strategy="ddp"))
    with pytest.raises(ConfigError, match="torchrun"):
        flare.patch(make(strategy="ddp_spawn"))


# --- algorithms


def test_fedprox_holds_the_module_back(job: FakeEngine) -> None:
    """mu in the meta adds mu (w - w_received) to the gradient of every step; without it nothing is added."""
    trainer, module = make(), Line()
    flare.patch(trainer, restore_state=False)
    give(job, 1.0, meta={"fedprox_mu": 2.0})
    give(job, 1.0, 1)
    expected = {0.0: 1.0, 2.0: 1.0}
    for mu in expected:
        for _ in range(N_BATCHES):
            expected[mu] -= 0.1 * (expected[mu] - 3 + mu * (expected[mu] - 1))
    for mu in (2.0, 0.0):
        trainer.fit(module, batches())
        assert sent(job)[0] == pytest.approx(expected[mu])


def test_scaffold_corrects_gradients_and_sends_what_changed(job: FakeEngine) -> None:
    """Every gradient is corrected by c - c_i, and the new c_i is the mean of those that were not."""
    trainer, module, own = make(), Line(), 0.0
    flare.patch(trainer, restore_state=False)
    for number in range(2):
        give(job, 1.0, number, optimizer_params={SCAFFOLD_CONTROL: {"w": torch.tensor(0.5)}})
        trainer.fit(module, batches())
        w, answer = sent(job)
        expected, gradients = 1.0, []
        for _ in range(N_BATCHES):
            gradients.append(expected - 3)
            expected -= 0.1 * (gradients[-1] + 0.5 - own)
        mean = sum(gradients) / N_BATCHES
        assert w == pytest.approx(expected)
        assert answer.optimizer_params is not None
        assert float(answer.optimizer_params[SCAFFOLD_CONTROL]["w"]) == pytest.approx(mean - own)
        own = mean


def test_scaffold_needs_one_optimizer(job: FakeEngine) -> None:
    """With several there is no count of steps that would be right for all."""
    trainer = make()
    flare.patch(trainer)
    give(job, optimizer_params={SCAFFOLD_CONTROL: {}})
    with pytest.raises(ClientApiError, match="one optimizer, and the module has 2"):
        trainer.fit(Line(n_optimizers=2), batches())


# --- importing


def test_without_lightning_the_error_names_the_extra() -> None:
    """And `pytorch_lightning` alone, or a trainer made with it, will do."""
    code = (
        "import sys\n"
        "sys.modules['lightning'] = sys.modules['lightning.pytorch'] = None\n"
        "sys.modules['pytorch_lightning'] = None\n"
        "try:\n    import flarebus.client.lightning\n"
        "except ImportError as error:\n    print(error)\n"
        "del sys.modules['pytorch_lightning']\n"
        "import pytorch_lightning as pl\n"
        "import flarebus.client.lightning as flare\n"
        "assert issubclass(flare.Callback, pl.Callback)\n"
    )
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    assert "pip install 'flarebus[lightning]'" in found.stdout


def test_trainers_of_both_packages_are_taken(job: FakeEngine) -> None:
    """A trainer of `pytorch_lightning` works though `lightning` is what was found first."""
    import pytorch_lightning

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        training_step = Line.training_step
        automatic_optimization = True
        rates: list[float]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    module.rates = []
    trainer = pytorch_lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    flare.patch(trainer)
    give(job, 1.0)
    trainer.fit(module, batches())
    assert sent(job)[0] == pytest.approx(1.2)
