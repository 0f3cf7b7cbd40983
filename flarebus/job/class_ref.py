"""ClassRef: a class named by its dotted path, with arguments, built where the job runs.

The path comes from the job's own description, never from a message. The class is looked for in the job's code folder
first, so that the `model.py` beside a training script is found, then on the ordinary Python path.
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from flarebus.errors import ConfigError

__all__ = ["ClassRef", "code_folder_first"]

_NAME = r"[A-Za-z_]\w*"
_CLASS_PATH = re.compile(rf"({_NAME}(?:\.{_NAME})*)(?:\.({_NAME})|:({_NAME}(?:\.{_NAME})*))")
_KEYS = ("class_path", "path", "args")
# sys.path and sys.modules belong to the process: one job at a time may rearrange them.
_import_lock = threading.RLock()


@dataclass(frozen=True, slots=True)
class ClassRef:
    """A class and the keyword arguments to build it with.

    Args:
        class_path: `pkg.mod.Class` or `pkg.mod:Class`.
        args: JSON values only, so that the description can be written and read back equal.
    """

    class_path: str
    args: Mapping[str, Any]

    @staticmethod
    def is_description(value: object) -> bool:
        """Whether a dict means a class rather than named arrays."""
        if not isinstance(value, dict):
            return False
        return "class_path" in value or isinstance(value.get("path"), str) or isinstance(value.get("args"), dict)

    @classmethod
    def parse(cls, value: Mapping[str, Any], parameter: str) -> ClassRef:
        """Read `{"class_path" or "path": "pkg.mod.Class", "args": {...}}`.

        Raises:
            ConfigError: a key is unknown, the path is missing or no path, or args are not JSON values.
        """
        for key in value:
            if key not in _KEYS:
                near = difflib.get_close_matches(str(key), _KEYS, 1)
                raise ConfigError(
                    f"{parameter}[{key!r}]", value[key], f"unknown key; did you mean {(near or _KEYS)[0]!r}?"
                )
        if "class_path" in value and "path" in value:
            raise ConfigError(parameter, dict(value), 'either "class_path" or "path", not both')
        key = "path" if "path" in value else "class_path"
        path = value.get(key)
        if not isinstance(path, str) or not _CLASS_PATH.fullmatch(path):
            raise ConfigError(f'{parameter}["{key}"]', path, 'a string such as "pkg.mod.Class"')
        args = value.get("args")
        return cls(path, _json_args({} if args is None else args, f'{parameter}["args"]'))

    def to_json(self) -> dict[str, Any]:
        """The description that `parse` reads."""
        return {"class_path": self.class_path, "args": dict(self.args)}

    def build(self, code_dir: Path, parameter: str) -> Any:
        """Import the class, `code_dir` first, and call it with the arguments.

        Raises:
            ConfigError: no such module or class, or one of them raised; the cause is chained.
        """
        with code_folder_first(code_dir):
            return self.make(parameter)

    def make(self, parameter: str) -> Any:
        """The same wherever imports look now: for a class whose description is an argument of one that is being built.

        Raises:
            ConfigError: see `build`.
        """
        made = self._find(parameter)
        try:
            return made(**self.args)
        except Exception as error:
            raise ConfigError(
                f'{parameter}["args"]', dict(self.args), f"{self.class_path} raised {type(error).__name__}: {error}"
            ) from error

    def _find(self, parameter: str) -> Any:
        parameter = f'{parameter}["class_path"]'
        match = _CLASS_PATH.fullmatch(self.class_path)
        if match is None:
            raise ConfigError(parameter, self.class_path, 'a string such as "pkg.mod.Class"')
        module = match[1]
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            where = f"looked in {sys.path[0]} and on the Python path"
            raise ConfigError(parameter, self.class_path, f"no module named {error.name}; {where}") from error
        except Exception as error:
            said = f"importing {module} raised {type(error).__name__}: {error}"
            raise ConfigError(parameter, self.class_path, said) from error
        for name in (match[2] or match[3]).split("."):
            if not hasattr(found, name):
                near = difflib.get_close_matches(name, dir(found), 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(parameter, self.class_path, f"{module} has no {name!r}{hint}")
            found = getattr(found, name)
        if not callable(found):
            raise ConfigError(parameter, self.class_path, f"is a {type(found).__name__}, not a class")
        return found


def _json_args(args: object, parameter: str) -> dict[str, Any]:
    """`args` as JSON gives them back: tuples become lists here and now, not only after an export."""
    if not isinstance(args, Mapping):
        raise ConfigError(parameter, args, "a dict of keyword arguments")
    for name, value in args.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(parameter, name, "keyword arguments have names")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            allowed = f"numbers, strings, booleans, None, lists and dicts of them ({error})"
            raise ConfigError(f"{parameter}[{name!r}]", value, allowed) from None
    loaded: dict[str, Any] = json.loads(json.dumps(dict(args)))
    return loaded


@contextmanager
def code_folder_first(folder: Path) -> Iterator[None]:
    """Let imports see `folder` before anything else, for as long as the block runs.

    A module of the same name that another job brought in earlier (everybody has a `model.py`) is put aside, and put
    back at the end. The standard library and flarebus itself are never put aside.
    """
    with _import_lock:
        aside = _shadowing(folder)
        for name in aside:
            del sys.modules[name]
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
        try:
            yield
        finally:
            if str(folder) in sys.path:
                sys.path.remove(str(folder))
            tops = {name.partition(".")[0] for name in aside}
            for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
                del sys.modules[name]
            sys.modules.update(aside)


def _shadowing(folder: Path) -> dict[str, ModuleType]:
    """Loaded modules, sub-modules included, that hide a module of `folder`."""
    local = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    local -= sys.stdlib_module_names | {__name__.partition(".")[0], "__main__"}
    hiding = set()
    for top in local:
        origin = getattr(sys.modules.get(top), "__file__", None)
        if origin is not None and not Path(origin).resolve().is_relative_to(folder.resolve()):
            hiding.add(top)
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in hiding}
