"""What a job carries by the path of its class, with arguments: filters, executors. Instances are described."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from flarebus.errors import ConfigError
from flarebus.job.class_ref import ClassRef

__all__ = ["check_filter", "code_folder", "code_in", "describe"]

_code_dir: ContextVar[Path | None] = ContextVar("code_dir", default=None)

_DESCRIBE = 'give {"class_path": "pkg.mod.Class", "args": {...}} instead'
# What no call by keyword can pass on.
_UNNAMED = {
    inspect.Parameter.POSITIONAL_ONLY: "positional only",
    inspect.Parameter.VAR_POSITIONAL: "of any number",
    inspect.Parameter.VAR_KEYWORD: "of any name",
}


@contextmanager
def code_in(folder: Path) -> Iterator[None]:
    """Let recipes that are made in the block have their code in `folder`: that of a job which is read back."""
    token = _code_dir.set(folder)
    try:
        yield
    finally:
        _code_dir.reset(token)


def code_folder() -> Path:
    """Where the code of a recipe without a script is: in the folder of the running script, or in the working directory
    where a module or an interpreter runs."""
    given = _code_dir.get()
    if given is not None:
        return given
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if file is None or getattr(main, "__spec__", None) is not None:
        return Path.cwd()
    return Path(file).absolute().parent


def check_filter(value: object, code_dir: Path) -> ClassRef:
    """A description of a filter, or an instance, which has to keep its constructor's arguments as attributes.

    Args:
        value: `{"class_path", "args"}`, or an object with a method `process`.
        code_dir: folder of the job's code.

    Raises:
        ConfigError: it is neither, or the instance cannot be made again from its class and attributes.
    """
    if not isinstance(value, Mapping | type) and not callable(getattr(value, "process", None)):
        allowed = f'a Filter, or {{"class_path": ..., "args": ...}}; {type(value).__name__} has no method process'
        raise ConfigError("filter", value, allowed)
    return describe(value, "filter", code_dir)


def describe(value: object, noun: str, code_dir: Path) -> ClassRef:
    """A description of an object from which it can be made again.

    Args:
        value: `{"class_path", "args"}`, or an object that keeps its constructor's arguments as attributes.
        noun: what it is, for errors.
        code_dir: folder of the job's code.

    Raises:
        ConfigError: it cannot be made again from its class and attributes.
    """
    if isinstance(value, Mapping):
        return ClassRef.parse(value, noun)
    if isinstance(value, type):
        raise ConfigError(noun, value, f"an instance, not the class: {value.__name__}(...)")
    path, args = _path_of(value, noun, code_dir), _arguments_of(value, noun)
    found = ClassRef.parse({"class_path": path, "args": args}, noun)
    for name, each in args.items():
        if _with_lists(each) != found.args[name]:
            raise ConfigError(f"{noun}.{name}", each, f"is not the same in JSON; {_DESCRIBE}")
    return found


def _path_of(value: object, noun: str, code_dir: Path) -> str:
    kind = type(value)
    module, name = kind.__module__, kind.__qualname__
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not kind:
        raise ConfigError(noun, value, f"{name} has no name in its module by which a site finds it; {_DESCRIBE}")
    if module == "__main__":
        main = _main_module(code_dir)
        if main is None:
            allowed = f"{name} is in the program itself, and that is no file in {code_dir}; {_DESCRIBE}"
            raise ConfigError(noun, value, allowed)
        module = main
    return f"{module}:{name}" if "." in name else f"{module}.{name}"


def _main_module(code_dir: Path) -> str | None:
    """The name by which a site can import what runs as `__main__` here."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:  # python -m
        return str(spec.name)
    path = Path(os.path.abspath(getattr(main, "__file__", None) or ""))
    if path.suffix != ".py" or not path.is_relative_to(code_dir):
        return None
    parts = path.relative_to(code_dir).with_suffix("").parts
    return ".".join(parts) if all(part.isidentifier() for part in parts) else None


def _arguments_of(value: object, noun: str) -> dict[str, Any]:
    """What the constructor was called with, as far as the instance still knows."""
    kind = type(value)
    args = {}
    try:
        parameters = inspect.signature(kind).parameters
    except ValueError:
        raise ConfigError(noun, value, f"{kind.__qualname__} does not say its arguments; {_DESCRIBE}") from None
    for name, parameter in parameters.items():
        if parameter.kind in _UNNAMED:
            allowed = f"{kind.__qualname__} takes arguments that are {_UNNAMED[parameter.kind]} ({name}); {_DESCRIBE}"
            raise ConfigError(noun, value, allowed)
        kept = [each for each in (name, f"_{name}") if hasattr(value, each)]
        if not kept:
            allowed = f"{kind.__qualname__} keeps its argument {name!r} neither as {name} nor as _{name}; {_DESCRIBE}"
            raise ConfigError(noun, value, allowed)
        args[name] = getattr(value, kept[0])
    return args


def _with_lists(value: Any) -> Any:
    """Tuples are lists in JSON; that much may change."""
    if isinstance(value, dict):
        return {key: _with_lists(each) for key, each in value.items()}
    return [_with_lists(each) for each in value] if isinstance(value, list | tuple) else value
