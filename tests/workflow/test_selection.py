"""Which model is the best, and when to stop."""

from __future__ import annotations

import math

import pytest

from flarebus.errors import ConfigError
from flarebus.workflow.selection import BestModelSelector, StopRule


def judged(selector: BestModelSelector, values: list[float | None]) -> list[bool]:
    return [selector.is_best({} if value is None else {selector.key_metric: value}) for value in values]


def test_higher_is_better_from_the_first_round_on() -> None:
    """The first value judges the initial model and is the best so far; equal values are not better."""
    selector = BestModelSelector("accuracy")

    assert judged(selector, [0.1, 0.3, 0.3, 0.2, 0.4]) == [True, True, False, False, True]
    assert selector.best == 0.4


@pytest.mark.parametrize("name", ["loss", "val_loss", "trainLoss", "mse", "RMSE", "mae", "error_rate", "perplexity"])
def test_less_is_better_for_losses(name: str) -> None:
    """A name that speaks of a loss or an error turns the comparison round."""
    assert judged(BestModelSelector(name), [0.5, 0.7, 0.2]) == [True, False, True]


@pytest.mark.parametrize("name", ["accuracy", "f1", "auc", "maestro", "terror_recall", "glossary"])
def test_a_mode_that_is_given_wins(name: str) -> None:
    """An explicit mode is obeyed, whatever the name."""
    assert judged(BestModelSelector(name, "min"), [0.5, 0.7, 0.2]) == [True, False, True]
    assert judged(BestModelSelector("loss", "max"), [0.5, 0.7, 0.2]) == [True, True, False]
    with pytest.raises(ConfigError, match="key_metric_mode"):
        BestModelSelector(name, "most")


@pytest.mark.parametrize("name", ["accuracy", "f1", "auc", "maestro", "terror_recall", "glossary"])
def test_only_whole_words_mean_a_loss(name: str) -> None:
    """A name that merely contains such a word inside another is not a loss."""
    assert BestModelSelector(name).mode == "max"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_values_that_are_none_never_win(value: float | None) -> None:
    """A missing or non-finite value is neither the best nor the one to beat."""
    assert judged(BestModelSelector("accuracy"), [value, 0.1, value, 0.2]) == [False, True, False, True]
    assert judged(BestModelSelector("loss"), [value, 0.2, value, 0.1]) == [False, True, False, True]


def test_without_a_metric_nothing_is_best() -> None:
    """No key metric, no best model."""
    assert not BestModelSelector("").is_best({"": 1.0, "accuracy": 1.0})


def test_stops_when_the_condition_is_met() -> None:
    """Rounds end with the first whose metrics meet the condition, however it is written."""
    rule = StopRule("accuracy>=0.8")

    assert [rule.is_met({"accuracy": value}) for value in (0.5, 0.79, 0.8)] == [False, False, True]
    assert not rule.is_met({})
    assert not StopRule(None).is_met({"accuracy": 1.0})


def test_patience_counts_rounds_without_improvement() -> None:
    """Equal, worse, missing and NaN values use up patience; a better one restores it."""
    rule = StopRule("accuracy >= 2", patience=2)
    values = [0.1, 0.1, 0.2, None, 0.3, math.nan, 0.3]

    assert [rule.is_met({} if v is None else {"accuracy": v}) for v in values] == [False] * 6 + [True]


def test_patience_watches_the_direction_of_the_condition() -> None:
    """With `<` less is better; with `=` the name of the metric tells."""
    for text in ("score < 0.1", "loss = 0"):
        rule = StopRule(text, patience=1)
        name = text.split()[0]
        assert [rule.is_met({name: value}) for value in (3.0, 2.0, 2.5)] == [False, False, True]


def test_patience_alone_is_an_error() -> None:
    """Patience without a condition has nothing to watch and says so."""
    with pytest.raises(ConfigError, match="patience"):
        StopRule(None, patience=3)
