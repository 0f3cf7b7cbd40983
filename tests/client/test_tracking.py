"""tracking: the writers' calls, what they hand over, and on which ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import flarebus.client as flare
from flarebus.client.engine import Seat, sit
from flarebus.client.tracking import MLflowWriter, SummaryWriter, WandBWriter
from flarebus.errors import ClientApiError, ConfigError
from tests.client.fake_engine import LIMIT_S, FakeEngine

KIND = flare.AnalyticsDataType
IMAGE = np.zeros((1, 2, 2), np.uint8)
TB, ML, WB = {"writer": "tensorboard"}, {"writer": "mlflow"}, {"writer": "wandb"}

Write = Callable[[Any], None]

WRITES: list[tuple[type, Write, tuple[str, Any, KIND, dict[str, Any]]]] = [
    (SummaryWriter, lambda w: w.add_scalar("a", 0.5), ("a", 0.5, KIND.SCALAR, TB)),
    (SummaryWriter, lambda w: w.add_scalar("a", np.float32(0.5), 3), ("a", 0.5, KIND.SCALAR, {"global_step": 3, **TB})),
    (SummaryWriter, lambda w: w.add_scalar("a", 1, walltime=2.0), ("a", 1, KIND.SCALAR, {"walltime": 2.0, **TB})),
    (
        SummaryWriter,
        lambda w: w.add_scalar(tag="a", scalar=1, global_step=0),
        ("a", 1, KIND.SCALAR, {"global_step": 0, **TB}),
    ),
    (
        SummaryWriter,
        lambda w: w.add_scalars("a", {"b": np.int8(1)}, 3),
        ("a", {"b": 1}, KIND.SCALARS, {"global_step": 3, **TB}),
    ),
    (SummaryWriter, lambda w: w.add_text("a", "b", 3), ("a", "b", KIND.TEXT, {"global_step": 3, **TB})),
    (
        SummaryWriter,
        lambda w: w.add_image("a", IMAGE, 3),
        ("a", IMAGE, KIND.IMAGE, {"global_step": 3, "dataformats": "CHW", **TB}),
    ),
    (MLflowWriter, lambda w: w.log_param("a", [1]), ("a", "[1]", KIND.PARAMETER, ML)),
    (MLflowWriter, lambda w: w.log_params({"a": 1}), ("params", {"a": 1}, KIND.PARAMETERS, ML)),
    (MLflowWriter, lambda w: w.log_metric("a", 0.5), ("a", 0.5, KIND.METRIC, ML)),
    (MLflowWriter, lambda w: w.log_metric("a", 0.5, step=3), ("a", 0.5, KIND.METRIC, {"global_step": 3, **ML})),
    (
        MLflowWriter,
        lambda w: w.log_metrics({"a": 1.0}, 3),
        ("metrics", {"a": 1.0}, KIND.METRICS, {"global_step": 3, **ML}),
    ),
    (
        MLflowWriter,
        lambda w: w.log_text("words", "notes.txt"),
        ("text", "words", KIND.TEXT, {"path": "notes.txt", **ML}),
    ),
    (MLflowWriter, lambda w: w.set_tag("a", "b"), ("a", "b", KIND.TAG, ML)),
    (MLflowWriter, lambda w: w.set_tags({"a": "b"}), ("tags", {"a": "b"}, KIND.TAGS, ML)),
    (WandBWriter, lambda w: w.log({"a": 1.0}), ("metrics", {"a": 1.0}, KIND.METRICS, WB)),
    (
        WandBWriter,
        lambda w: w.log({"a": 1.0}, step=3),
        ("metrics", {"a": 1.0}, KIND.METRICS, {"global_step": 3, **WB}),
    ),
]


@pytest.mark.parametrize(("make", "write", "expected"), WRITES)
def test_what_a_call_hands_over(engine: FakeEngine, make: Any, write: Write, expected: Any) -> None:
    """Key, plain value, kind, step if one was given, and whose writer it was."""
    flare.init()
    write(make())

    ((key, value, kind, fields),) = engine.logged
    assert (key, kind, fields) == (expected[0], *expected[2:])
    assert type(value) is type(expected[1])
    assert np.array_equal(value, expected[1])


def test_hyper_parameters_are_parameters_and_metrics(engine: FakeEngine) -> None:
    """Two records: what was set, and what it led to."""
    flare.init()
    SummaryWriter().add_hparams({"lr": 0.1}, {"loss": 0.5}, 3)

    assert engine.logged == [
        ("hparams", {"lr": 0.1}, KIND.PARAMETERS, TB),
        ("hparams", {"loss": 0.5}, KIND.METRICS, {"global_step": 3, **TB}),
    ]


@pytest.mark.parametrize(("make", "write", "expected"), WRITES)
def test_on_other_ranks_writers_do_nothing(engine: FakeEngine, make: Any, write: Write, expected: Any) -> None:
    """A script that runs on all ranks may write without a condition; `log` says that it may not."""
    flare.init(rank=1)
    write(make())

    assert engine.logged == []
    with pytest.raises(ClientApiError, match="only rank 0"):
        flare.log("x", 1.0, KIND.SCALAR)


def test_a_summary_writer_is_a_context(engine: FakeEngine) -> None:
    """It can be left, flushed and closed, and written to again."""
    flare.init()
    with SummaryWriter() as writer:
        writer.add_scalar("a", 1)
        writer.flush()
    writer.close()
    writer.add_scalar("b", 2)

    assert [each[0] for each in engine.logged] == ["a", "b"]


def test_a_writer_may_be_made_before_init(engine: FakeEngine) -> None:
    """The context is looked for when something is written; without one that is an error."""
    writer = WandBWriter()
    with pytest.raises(ClientApiError, match=r"flare\.init\(\)"):
        writer.log({"a": 1})
    flare.init()
    writer.log({"a": 1})

    assert len(engine.logged) == 1


def test_a_writer_outlives_a_context(engine: FakeEngine) -> None:
    """After `shutdown` and another `init` the writer belongs to the new context; in between it is an error."""
    flare.init()
    writer = MLflowWriter()
    writer.set_tag("a", 1)
    flare.shutdown()
    with pytest.raises(ClientApiError, match="shutdown"):
        writer.set_tag("a", 2)
    flare.init()
    writer.set_tag("a", 3)

    assert [each[1] for each in engine.logged] == [1, 3]


def test_a_given_context_is_the_one_used() -> None:
    """A writer for one of several contexts keeps to it, also when it is closed."""
    engines = FakeEngine("one"), FakeEngine("two")
    with sit(Seat(engines[0]), {}):
        context = flare.init()
        with sit(Seat(engines[1]), {}):
            flare.init()
            writer = WandBWriter(ctx=context)
            writer.log({"a": 1})
            flare.shutdown(ctx=context)
            with pytest.raises(ClientApiError):
                writer.log({"a": 1})

    assert (len(engines[0].logged), len(engines[1].logged)) == (1, 0)


def test_any_thread_may_write(engine: FakeEngine) -> None:
    """Also one that runs no code of the script, once the writer has been used or was given a context."""
    context = flare.init()
    writer = SummaryWriter(ctx=context)
    threads = [threading.Thread(target=writer.add_scalar, args=("a", 1.0, step)) for step in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)

    assert sorted(each[3]["global_step"] for each in engine.logged) == list(range(8))


def test_wrong_arguments_are_errors(engine: FakeEngine) -> None:
    """As with `flare.log`."""
    flare.init()
    for wrong in (
        lambda: SummaryWriter().add_scalar("a", "high"),  # type: ignore[arg-type]
        lambda: MLflowWriter().log_metrics(3),  # type: ignore[arg-type]
        lambda: WandBWriter().log({"a": 1}, step=0.5),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError):
            wrong()
    assert engine.logged == []
