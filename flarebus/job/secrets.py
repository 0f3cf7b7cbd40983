"""Keep passwords and keys out of what is written down: refused in settings, taken from the environment, hidden in text.

A setting may name a variable of the environment, `${NAME}`; its value is put in by the process that uses the setting
and stands in no job folder, message or log.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from flarebus.errors import ConfigError

__all__ = ["HIDDEN", "check_no_secrets", "expand", "hide_arguments", "hide_secrets"]

HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"(^|[_-])(api[_-]?key|access[_-]?key|token|secret|password|passwd|pwd|credentials?)([_-]|$)", re.I
)
_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)\}")
# The whole part before the host is hidden: a token may stand in the place of the user.
_LOGIN = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*://)(?P<login>[^/\s'\"?#]*)@")
_QUERY = re.compile(r"(?P<name>[?&;][\w.-]+)=(?P<value>[^&;\s'\"]+)")
# Shorter values are words that may stand anywhere.
_MIN_LENGTH = 6


def check_no_secrets(parameter: str, value: Any) -> None:
    """See that settings, plain JSON values, hold no password or key in clear.

    Raises:
        ConfigError: one does, by the look of its name or as part of a URL. The message does not show it.
    """
    for place, name, text in _texts(parameter, value):
        bare = _VARIABLE.sub("", text)
        if _SECRET_NAME.search(name) and bare:
            raise ConfigError(place, HIDDEN, "not in clear, for a job is written down: ${NAME} takes a variable")
        login = _LOGIN.search(bare)
        named = [each["name"] for each in _QUERY.finditer(bare) if _SECRET_NAME.search(each["name"][1:])]
        if named or (login is not None and login["login"].partition(":")[2]):
            allowed = "a URL without a password, for a job is written down: ${NAME} in its place takes a variable"
            raise ConfigError(place, hide_secrets(text), allowed)


def expand(value: Any, environ: Mapping[str, str] | None = None) -> Any:
    """The same settings with the values of the variables that they name.

    Raises:
        ConfigError: there is no such variable.
    """
    known = os.environ if environ is None else environ

    def found(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise ConfigError(match[0], "not set", "a variable in the environment of the process that needs it")
        return known[match[1]]

    if isinstance(value, str):
        return _VARIABLE.sub(found, value)
    if isinstance(value, Mapping):
        return {key: expand(each, environ) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [expand(each, environ) for each in value]
    return value


def hide_secrets(text: str, settings: Any = None, environ: Mapping[str, str] | None = None) -> str:
    """`text` without logins in URLs, without what variables of secret names hold, and without what `settings` name."""
    known = os.environ if environ is None else environ
    named = {name for _, _, each in _texts("", settings) for name in _VARIABLE.findall(each)}
    secrets = [value for name, value in known.items() if name in named or _SECRET_NAME.search(name)]
    for secret in sorted((each for each in secrets if len(each) >= _MIN_LENGTH), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _LOGIN.sub(lambda found: f"{found['scheme']}{HIDDEN}@", text)
    return _QUERY.sub(_hidden, text)


def hide_arguments(arguments: str) -> str:
    """Arguments of a script without the values of options of secret names."""
    words, hides_next = [], False
    for word in shlex.split(arguments):
        name, equals, _ = word.partition("=")
        is_secret = word.startswith("-") and _SECRET_NAME.search(name.lstrip("-")) is not None
        words.append(HIDDEN if hides_next else f"{name}={HIDDEN}" if is_secret and equals else hide_secrets(word))
        hides_next = is_secret and not equals
    return shlex.join(words)


def _texts(place: str, value: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Every string in `value`, with where it is and the name it goes by."""
    if isinstance(value, str):
        yield place, name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _texts(f"{place}[{key!r}]", each, str(key))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _texts(f"{place}[{index}]", each, name)


def _hidden(query: re.Match[str]) -> str:
    return f"{query['name']}={HIDDEN}" if _SECRET_NAME.search(query["name"][1:]) else query[0]
