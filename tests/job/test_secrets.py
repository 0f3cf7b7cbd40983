"""Secrets: refused in settings, taken from the environment, hidden in text."""

from __future__ import annotations

from typing import Any

import pytest

from flarebus.errors import ConfigError
from flarebus.job.secrets import check_no_secrets, expand, hide_arguments, hide_secrets


@pytest.mark.parametrize(
    "config",
    [
        {"api_key": "hunter22"},
        {"args": {"wandb-token": "hunter22"}},
        {"list": [{"Password": "hunter22"}]},
        {"secrets": {"secret": "pre${FINE}hunter22"}},
        {"uri": "postgresql://ada:hunter22@host/db"},
        {"uri": "https://ada:${FINE}hunter22@host"},
        {"uri": "https://host/path?user=ada&api_key=hunter22"},
        {"uri": "mssql://host;password=hunter22"},
    ],
)
def test_secrets_in_clear_are_refused_and_not_shown(config: dict[str, Any]) -> None:
    """By the name of a setting, or by what a URL looks like; the message says how it is done."""
    with pytest.raises(ConfigError) as caught:
        check_no_secrets("tracking_config", config)

    assert "hunter22" not in str(caught.value)
    assert "${NAME}" in str(caught.value)
    assert str(caught.value).startswith("tracking_config['")


@pytest.mark.parametrize(
    "config",
    [
        {"api_key": "${MY_KEY}"},
        {"uri": "postgresql://ada:${PASSWORD}@host/db"},
        {"uri": "https://ada@host:80/x?user=ada"},
        {"uri": "https://host/?token=${TOKEN}"},
        {"tokenizer": "words", "num_tokens": "5", "nothing": None, "number": 5},
    ],
)
def test_settings_without_secrets_pass(config: dict[str, Any]) -> None:
    """A variable is no secret, and a name that only resembles one is none."""
    check_no_secrets("tracking_config", config)


def test_variables_are_put_in_wherever_they_stand() -> None:
    """In strings of dicts and lists; other values stay as they are, and so do the settings themselves."""
    config = {"a": "x${ONE}y${TWO}", "b": ["${ONE}", 5], "c": {"d": "$ONE ${ ONE }"}}

    assert expand(config, {"ONE": "1", "TWO": "${ONE}"}) == {
        "a": "x1y${ONE}",
        "b": ["1", 5],
        "c": {"d": "$ONE ${ ONE }"},
    }
    assert config["a"] == "x${ONE}y${TWO}"


def test_a_variable_that_is_not_there_is_named() -> None:
    """It would stand in a URL as it is, and lead to a riddle."""
    with pytest.raises(ConfigError, match=r"\$\{NOT_THERE\}"):
        expand({"a": "${NOT_THERE}"}, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at https://ada:pass@host/x", "at https://***@host/x"),
        ("'postgresql+psycopg://a:b%40c@h/d'", "'postgresql+psycopg://***@h/d'"),
        ("https://host/a@b", "https://host/a@b"),
        ("https://h/?a=1&access_key=xyz&b=2", "https://h/?a=1&access_key=***&b=2"),
        ("the key is topsecret1 and hunter22, not short", "the key is *** and ***, not short"),
    ],
)
def test_secrets_in_text_are_hidden(text: str, expected: str) -> None:
    """Logins, parameters of URLs, values of variables with such names, and of those that the settings name."""
    environ = {"MY_API_KEY": "topsecret1", "PLAIN": "hunter22", "OTHER": "the key", "PASSWORD": "short"}

    assert hide_secrets(text, {"uri": "${PLAIN}"}, environ) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--lr 0.1 --api-key abc --epochs 2", "--lr 0.1 --api-key '***' --epochs 2"),
        ("--password=abc data", "'--password=***' data"),
        ("--tokenizer words 'two words'", "--tokenizer words 'two words'"),
        ("--url https://a:b@host", "--url 'https://***@host'"),
        ("", ""),
    ],
)
def test_secrets_in_arguments_are_hidden(arguments: str, expected: str) -> None:
    """Arguments of a script are shown among the parameters of a job."""
    assert hide_arguments(arguments) == expected
