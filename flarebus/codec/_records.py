"""Decomposers made from a class: enums and dataclasses."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum, Flag
from typing import Any

from flarebus.codec._registry import Decomposer, Malformed, Sink, Source
from flarebus.errors import ConfigError

__all__ = ["DataclassDecomposer", "EnumDecomposer"]


class EnumDecomposer(Decomposer):
    """Members of one enum, by name; flags by value, because combinations of them have no name."""

    def __init__(self, cls: Any, type_id: int) -> None:
        if not (isinstance(cls, type) and issubclass(cls, Enum)):
            raise ConfigError("cls", cls, "a subclass of enum.Enum")
        self.type_id = type_id
        self.types = (cls,)
        self._cls = cls
        self._is_flag = issubclass(cls, Flag)

    def decompose(self, value: Any, sink: Sink) -> Any:
        return value.value if self._is_flag else value.name

    def recompose(self, plain: Any, source: Source) -> Any:
        if self._is_flag and type(plain) is int:
            return self._cls(plain)
        if not self._is_flag and type(plain) is str:
            return self._cls[plain]
        raise Malformed(f"no member of {self._cls.__qualname__}")


class DataclassDecomposer(Decomposer):
    """Instances of one dataclass, as a dict of their fields; built again by the class itself, with its checks."""

    def __init__(self, cls: type, type_id: int) -> None:
        if not (isinstance(cls, type) and is_dataclass(cls)):
            raise ConfigError("cls", cls, "a dataclass")
        hidden = [field.name for field in fields(cls) if not field.init]
        if hidden:
            raise ConfigError("cls", cls, f"fields with init=False need a decomposer of their own: {', '.join(hidden)}")
        self.type_id = type_id
        self.types = (cls,)
        self._cls = cls
        self._names = tuple(field.name for field in fields(cls))

    def decompose(self, value: Any, sink: Sink) -> Any:
        return {name: getattr(value, name) for name in self._names}

    def recompose(self, plain: Any, source: Source) -> Any:
        if type(plain) is not dict or plain.keys() != set(self._names):
            raise Malformed(f"other fields than those of {self._cls.__qualname__}")
        return self._cls(**plain)
