"""The registry of the codec: which type travels under which number, and how.

It is closed: what is not registered does not travel, and the wire carries numbers only, never the name of a class.
Additions are checked when they are made; nothing registered can be replaced or removed.
"""

from __future__ import annotations

import re
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from flarebus.codec._ids import FIRST_PUBLIC_ID, LAST_PUBLIC_ID, MAX_DEPTH
from flarebus.errors import ConfigError
from flarebus.message import Buffer

if TYPE_CHECKING:
    from flarebus.codec._decoder import Decoder
    from flarebus.codec._encoder import Encoder

__all__ = ["DEFAULT", "Decomposer", "Malformed", "Refused", "Registry", "Sink", "Source"]

_LAZY_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")

# `Any` stands for "whatever may travel": the codec is the one place where values have no static type.
EncodeHandler = Callable[[Any, "Encoder", int], Any]
DecodeHandler = Callable[[list[Any], "Decoder", int], Any]


class Refused(Exception):
    """A value cannot travel; becomes an `EncodeError` once the path to it is known."""

    def __init__(self, found: str, hint: str = "") -> None:
        self.found = found
        self.hint = hint
        super().__init__(found)


class Malformed(Exception):
    """What came cannot be read; becomes a `DecodeError` once the place is known. Its text never holds content."""


class Sink(ABC):
    """Where a decomposer puts bytes that are better not copied."""

    @abstractmethod
    def add(self, buffer: Buffer) -> int:
        """Let `buffer` travel outside the body, without a copy.

        Args:
            buffer: any C-contiguous bytes-like object; referenced, and not to be changed, until the message is gone.

        Returns:
            A reference to put, as it is, into what `decompose` returns.
        """


class Source(ABC):
    """Where a decomposer finds again what it added."""

    @abstractmethod
    def get(self, reference: int) -> memoryview:
        """Return the bytes added as `reference`: format 'B', one dimension, writable; they may be kept and changed."""


class Decomposer(ABC):
    """Turns one type into values that travel already, and back.

    `decompose` and `recompose` run on the thread that encodes or decodes, possibly on several at once: they
    keep no state. Instances of subclasses do not match: `types` lists exact types.

    Attributes:
        type_id: the number on the wire, 100 to 32767; the same in every process, for ever.
        types: the classes it handles. A string ``"package.module:Class"`` stands for a class whose module need not
            be imported now: it matches once that module is loaded by somebody else. `recompose` may import it.
    """

    type_id: int
    types: tuple[type | str, ...]

    @abstractmethod
    def decompose(self, value: Any, sink: Sink) -> Any:
        """Return what stands for `value`: any value that travels, arrays and other registered types included.

        An exception raised here reaches the caller as an `EncodeError` with the path to `value`.
        """

    @abstractmethod
    def recompose(self, plain: Any, source: Source) -> Any:
        """Return the value that `plain` stands for; `plain` is the caller's own.

        What came may have been made by anybody: check it before use, build nothing by a name found in it.
        Each reference in it must be taken from `source`. Any exception becomes a `DecodeError`.
        """


class Registry:
    """Types, their ids and their handlers. Reading is lock-free; adding is safe from any thread."""

    def __init__(self) -> None:
        self.encoders: dict[type, EncodeHandler] = {}
        self.decoders: dict[int, DecodeHandler] = {}
        self._lazy: dict[tuple[str, str], EncodeHandler] = {}
        self._lock = threading.Lock()

    def add(self, decomposer: Decomposer, *, reserved: bool = False) -> None:
        """Register `decomposer`; `reserved` allows the ids of flarebus itself.

        Raises:
            ConfigError: it is no decomposer, or its id or one of its types is wrong or taken.
        """
        if not isinstance(decomposer, Decomposer):
            raise ConfigError("decomposer", decomposer, "an instance of flarebus.codec.Decomposer")
        type_id = getattr(decomposer, "type_id", None)
        first = 1 if reserved else FIRST_PUBLIC_ID
        if type(type_id) is not int or not first <= type_id <= LAST_PUBLIC_ID:
            raise ConfigError("type_id", type_id, f"a whole number from {first} to {LAST_PUBLIC_ID}")
        types = getattr(decomposer, "types", None)
        if not isinstance(types, tuple) or not types:
            raise ConfigError("types", types, "a tuple of classes or 'package.module:Class' strings, not empty")
        self.add_handlers(type_id, types, _encoder_of(decomposer), _decoder_of(decomposer))

    def add_handlers(
        self, type_id: int, types: Iterable[type | str], encode: EncodeHandler | None, decode: DecodeHandler
    ) -> None:
        """Register the bare handlers of `type_id`; what `add` does after its checks.

        Raises:
            ConfigError: the id or a type is taken, or a type is neither a class nor a well-formed name.
        """
        with self._lock:
            if type_id in self.decoders:
                raise ConfigError("type_id", type_id, "this id is registered already; take another one")
            classes: list[type] = []
            names: list[tuple[str, str]] = []
            for entry in types:
                if isinstance(entry, str):
                    names.append(self._checked_name(entry))
                else:
                    classes.append(self._checked_class(entry))
            if encode is not None:
                self.encoders.update(dict.fromkeys(classes, encode))
                self._lazy.update(dict.fromkeys(names, encode))
            self.decoders[type_id] = decode

    def _checked_class(self, entry: object) -> type:
        if not isinstance(entry, type):
            raise ConfigError("types", entry, "classes or 'package.module:Class' strings")
        if entry in self.encoders or (entry.__module__, entry.__qualname__) in self._lazy:
            raise ConfigError("types", entry, "this type is registered already")
        return entry

    def _checked_name(self, entry: str) -> tuple[str, str]:
        if not _LAZY_NAME.fullmatch(entry):
            raise ConfigError("types", entry, "a class by name is written 'package.module:Class'")
        module, _, name = entry.partition(":")
        if (module, name) in self._lazy or any(
            (known.__module__, known.__qualname__) == (module, name) for known in self.encoders
        ):
            raise ConfigError("types", entry, "this type is registered already")
        return module, name

    def find(self, kind: type) -> EncodeHandler | None:
        """Return the handler of a type that is not in `encoders` yet, or None; remembers what it finds.

        A name alone proves nothing: the class must be the one that stands under this name in the loaded module.
        """
        handler = self._lazy.get((kind.__module__, kind.__qualname__))
        if handler is None:
            return None
        found: object = sys.modules.get(kind.__module__)
        for part in kind.__qualname__.split("."):
            found = getattr(found, part, None)
        if found is not kind:
            return None
        with self._lock:
            self.encoders[kind] = handler
        return handler


def _encoder_of(decomposer: Decomposer) -> EncodeHandler:
    type_id = decomposer.type_id

    def encode(value: Any, sink: Encoder, depth: int) -> Any:
        sink.charge(1, depth)
        try:
            plain = decomposer.decompose(value, sink)
        except Refused:
            raise
        except Exception as error:
            who = type(decomposer).__qualname__
            raise Refused(f"{who}.decompose failed: {type(error).__name__}: {error}") from error
        return [type_id, sink.plain(plain, depth + 1)]

    return encode


def _decoder_of(decomposer: Decomposer) -> DecodeHandler:
    def decode(node: list[Any], source: Decoder, depth: int) -> Any:
        if len(node) != 2:
            raise Malformed(f"type id {decomposer.type_id} with {len(node) - 1} items instead of one")
        if depth > MAX_DEPTH:
            raise Malformed(f"nested deeper than {MAX_DEPTH} levels")
        return decomposer.recompose(source.value(node[1], depth + 1), source)

    return decode


DEFAULT = Registry()
