"""Errors: a tree by whose fault it is, with fields for programs and a sentence for people."""

from __future__ import annotations

import inspect

import pytest

from flarebus import errors
from flarebus.errors import (
    ClientApiError,
    Closed,
    ConfigError,
    DeadlineExceeded,
    DecodeError,
    EncodeError,
    FilterFailed,
    FlarebusError,
    JobAborted,
    JobError,
    JobFailed,
    LinkError,
    NoRoute,
    PeerError,
    QuorumNotReached,
    RemoteError,
    SourceLost,
    UpdateRefused,
    UsageError,
)


@pytest.mark.parametrize(
    ("kind", "fault", "builtin"),
    [
        (ConfigError, UsageError, ValueError),
        (ClientApiError, UsageError, RuntimeError),
        (EncodeError, UsageError, TypeError),
        (FilterFailed, UsageError, RuntimeError),
        (DecodeError, PeerError, FlarebusError),
        (RemoteError, PeerError, FlarebusError),
        (UpdateRefused, PeerError, FlarebusError),
        (NoRoute, LinkError, FlarebusError),
        (SourceLost, LinkError, FlarebusError),
        (DeadlineExceeded, LinkError, TimeoutError),
        (Closed, LinkError, FlarebusError),
        (QuorumNotReached, JobError, FlarebusError),
        (JobFailed, JobError, RuntimeError),
        (JobAborted, JobError, RuntimeError),
    ],
)
def test_every_error_says_whose_fault_it_is(kind: type, fault: type, builtin: type) -> None:
    """It has one branch of the tree, and is caught by the built-in class that people would try."""
    branches = [branch for branch in (UsageError, PeerError, LinkError, JobError) if issubclass(kind, branch)]

    assert branches == [fault]
    assert issubclass(kind, builtin)
    assert issubclass(fault, FlarebusError)


def test_the_tree_is_complete() -> None:
    """Every class of the module is exported, has a sentence of its own, and stands in the picture."""
    classes = {
        name: kind
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and kind.__module__ == errors.__name__
    }

    assert sorted(classes) == sorted(errors.__all__)
    assert all(issubclass(kind, FlarebusError) and kind.__doc__ for kind in classes.values())
    assert all(f" {name} " in f"{errors.__doc__} ".replace("\n", " ") for name in classes)


@pytest.mark.parametrize(
    ("error", "text", "fields"),
    [
        (
            ConfigError("rounds", -1, "from 1"),
            "rounds=-1: from 1",
            {"parameter": "rounds", "value": -1, "allowed": "from 1"},
        ),
        (
            EncodeError("params['w']", "a function", "send its result"),
            "cannot encode params['w']: a function; send its result",
            {"path": "params['w']", "found": "a function", "hint": "send its result"},
        ),
        (
            FilterFailed("mine.Noise", "raised ValueError: no"),
            "filter mine.Noise raised ValueError: no",
            {"filter": "mine.Noise", "reason": "raised ValueError: no"},
        ),
        (EncodeError("value", "a set"), "cannot encode value: a set", {"hint": ""}),
        (
            RemoteError("site-1", "ValueError", "wrong", "Traceback"),
            "site-1: ValueError: wrong",
            {"address": "site-1", "kind": "ValueError", "text": "wrong", "details": "Traceback"},
        ),
        (RemoteError("site-1", "MemoryError", ""), "site-1: MemoryError", {"text": "", "details": ""}),
        (UpdateRefused("NaN", "w", "site-1"), "site-1: 'w': NaN", {"reason": "NaN", "key": "w", "site": "site-1"}),
        (UpdateRefused("NaN", "w"), "'w': NaN", {"site": ""}),
        (UpdateRefused("no weight", site="site-1"), "site-1: no weight", {"key": ""}),
        (UpdateRefused("no weight"), "no weight", {"key": "", "site": ""}),
        (NoRoute("site-1"), "site-1: no such cell", {"target": "site-1", "reason": "no such cell"}),
        (SourceLost("server"), "source server lost: gone", {"holder": "server", "reason": "gone"}),
        (JobFailed("no model"), "no model", {"reason": "no model", "run_dir": ""}),
        (JobFailed("no model", "/runs/a"), "no model (run folder: /runs/a)", {"run_dir": "/runs/a"}),
        (JobAborted("the user"), "aborted by the user", {"by": "the user"}),
        (
            QuorumNotReached(3, 1, {"site-1": "NaN", "site-2": "gone"}),
            "1 usable result, 3 needed (site-1: NaN; site-2: gone)",
            {"needed": 3, "got": 1, "reasons": {"site-1": "NaN", "site-2": "gone"}},
        ),
        (QuorumNotReached(1, 0, {}), "0 usable results, 1 needed", {"reasons": {}}),
    ],
)
def test_fields_make_the_sentence(error: FlarebusError, text: str, fields: dict[str, object]) -> None:
    """A program reads the fields, and a person the sentence that is made of them."""
    assert str(error) == text
    assert {name: getattr(error, name) for name in fields} == fields


def test_a_long_value_is_shortened() -> None:
    """A parameter's value does not fill the screen, and is whole in the field."""
    error = ConfigError("model", "x" * 1000, "a name")

    assert str(error) == f"model='{'x' * 116}...: a name"
    assert error.value == "x" * 1000
    assert "..." not in str(ConfigError("model", "x" * 118, "a name"))


def test_many_reasons_are_counted() -> None:
    """Eight sites are named with their reasons, the others are a number; all of them are in the field."""
    error = QuorumNotReached(100, 0, {f"site-{i}": "gone" for i in range(10)})

    assert str(error).endswith("site-6: gone; site-7: gone; and 2 more)")
    assert len(error.reasons) == 10


def test_reasons_are_the_errors_own() -> None:
    """Whoever goes on with the mapping does not change what was raised."""
    reasons = {"site-1": "gone"}
    error = QuorumNotReached(1, 0, reasons)
    reasons.clear()

    assert error.reasons == {"site-1": "gone"}
