"""Find the class of a pipe by name or path, check that it is one, and make an end of it.

A plug-in that does not fit is a mistake of whoever wrote or named it: every error says which class, and what of it.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from flarebus.errors import ConfigError
from flarebus.pipes.message import Message, Topic
from flarebus.pipes.pipe import ExportMode, Mode, Pipe
from flarebus.plugins import PluginKind, origin_of

__all__ = ["PIPES", "PIPE_GROUP", "known_pipes", "load_pipe_class", "make_pipe"]

PIPE_GROUP = "flarebus.pipes"
PIPES = PluginKind("pipe", PIPE_GROUP)

# Configurations written for NVFlare name its classes.
_NVFLARE = {
    "nvflare.fuel.utils.pipe.cell_pipe.CellPipe": "cell",
    "nvflare.fuel.utils.pipe.file_pipe.FilePipe": "file",
    "nvflare.fuel.utils.pipe.memory_pipe.MemoryPipe": "memory",
}
# How the framework calls what a plug-in implements.
_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "open": (("task",), {}),
    "send": ((Message(Topic.HEARTBEAT), 1.0), {}),
    "receive": ((1.0,), {}),
    "clear": ((), {}),
    "close": ((), {}),
    "deliver": ((print,), {}),
    "export": ((ExportMode.PEER,), {}),
    "begin": ((Message(Topic.HEARTBEAT), 1.0), {}),
    "can_resend": ((), {}),
    "release_send_cache": ((Message(Topic.HEARTBEAT),), {}),
    "get_last_peer_active_time": ((), {}),
    "pull": ((Message(Topic.HEARTBEAT),), {}),
    "moved_bytes": ((), {}),
}


def known_pipes() -> dict[str, str]:
    """Name of each installed pipe, with where it comes from: `module:Class (distribution version)`."""
    return PIPES.known()


def load_pipe_class(name: str) -> type[Pipe]:
    """The class of pipe `name`.

    Args:
        name: an entry-point name such as `file`, a path such as `my_package.my_module:MyPipe` or
            `my_package.my_module.MyPipe`, or the path of one of NVFlare's pipes, which means the one of that kind here.

    Raises:
        ConfigError: it does not exist (the message lists what is installed), is no pipe, or leaves out a part of the
            contract; names the class and the method.
    """
    cls = PIPES.load(_NVFLARE.get(name, name) if isinstance(name, str) else name)
    path = origin_of(cls)
    if not issubclass(cls, Pipe):
        raise ConfigError("pipe", name, f"{path} is not a pipe: derive it from flarebus.pipes.Pipe")
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise ConfigError("pipe", name, f"{path} does not implement {_listed(missing)}")
    for method, (args, kwargs) in _CALLS.items():
        try:
            inspect.signature(getattr(cls, method)).bind(None, *args, **kwargs)
        except TypeError as error:
            wanted = inspect.signature(getattr(Pipe, method))
            raise ConfigError("pipe", name, f"{path}.{method} cannot be called as {method}{wanted}: {error}") from error
    return cls


def make_pipe(class_name: str, args: Mapping[str, Any], context: Mapping[str, Any], mode: Mode | str) -> Pipe:
    """Make one end of a pipe; it is not open yet.

    Args:
        class_name: as for `load_pipe_class`.
        args: the `ARG` of the configuration. A `mode` in it is passed over: whoever makes an end knows which.
        context: what the maker knows (`site_name`, `token`, `root_url`, ...). The constructor gets those that it asks
            for by name and that `args` does not give.
        mode: which end.

    Raises:
        ConfigError: as `load_pipe_class`; or the constructor does not take one of `args`, lacks one, or raised (the
            message names class and exception; chained).
    """
    cls = load_pipe_class(class_name)
    path = origin_of(cls)
    taken = inspect.signature(cls).parameters
    by_name = [name for name, parameter in taken.items() if parameter.kind in _NAMED]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    given = {name: context[name] for name in by_name if name in context}
    given |= {name: value for name, value in args.items() if name != "mode"}
    listed = ", ".join(name for name in by_name if name != "mode") or "no arguments"
    for name in given:
        if name not in by_name and not takes_any:
            near = difflib.get_close_matches(str(name), by_name, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError("ARG", name, f"{hint}{path} takes {listed}")
    lacking = [
        name
        for name in by_name
        if taken[name].default is inspect.Parameter.empty and name not in given and name != "mode"
    ]
    if lacking:
        raise ConfigError("ARG", sorted(args), f"{path} also needs {_listed(lacking)}")
    try:
        return cls(mode, **given) if "mode" not in by_name else cls(**given, mode=mode)
    except Exception as error:  # the constructor is somebody else's: whatever it raises is told with its name
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise ConfigError("pipe", class_name, f"the constructor of {path} raised {text}") from error


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
