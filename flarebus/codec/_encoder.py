"""The way out: a value becomes a msgpack body and a list of buffers.

The walk builds a tree in which every container is a list that begins with a type id; msgpack sees nothing but lists
and scalars. It does not know any type itself: the handlers of the registry do.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from ctypes import addressof, c_char
from operator import itemgetter
from typing import Any, NamedTuple

import msgpack
import numpy as np

from flarebus.codec._hints import hint_for
from flarebus.codec._ids import (
    BIG_INT,
    FOLD_LENGTH,
    FOLDED,
    INLINE_BELOW,
    INLINE_ROOM,
    MAX_BODY,
    MAX_CONTAINERS,
    MAX_DEPTH,
)
from flarebus.codec._registry import Refused, Registry, Sink
from flarebus.errors import ConfigError, EncodeError
from flarebus.message import Buffer

__all__ = ["NATIVE", "Encoded", "Encoder", "Region", "encode_with", "step"]

# What msgpack carries exactly by itself, whatever the value; strings too, unless they are long.
NATIVE: frozenset[type] = frozenset({type(None), bool, int, float})

_PATH_PARTS = 12
_first = itemgetter(0)


class Encoded(NamedTuple):
    """One encoded value.

    Attributes:
        body: msgpack, at most `MAX_BODY` bytes.
        buffers: what stays outside the body: format 'B', one dimension. Each is a view on the memory of the value that
            was encoded and keeps it alive: changing that memory changes what is sent.
    """

    body: bytes
    buffers: list[memoryview]


class Region:
    """A range of memory that several different arrays of one value lie in; it travels once, as one buffer."""

    __slots__ = ("end", "reference", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.reference: int | None = None


def step(key: object) -> str:
    """Return how a key is written in a path, shortened."""
    shown = repr(key) if isinstance(key, (str, int, float, bytes, type(None))) else f"<{type(key).__name__} key>"
    return f"[{shown if len(shown) <= 60 else shown[:57] + '...'}]"


def path_of(trail: list[str]) -> str:
    """Return the path that `trail` collected from the inside out."""
    parts = trail[::-1]
    if len(parts) > _PATH_PARTS:
        parts = [*parts[: _PATH_PARTS - 4], "[...]", *parts[-3:]]
    return "value" + "".join(parts)


class Encoder(Sink):
    """The state of one `encode`. Handlers call `plain` for what they contain and `charge` for each container."""

    __slots__ = (
        "arena",
        "budget",
        "buffers",
        "count",
        "devices",
        "encoders",
        "foreign",
        "inline_below",
        "kept",
        "long",
        "placed",
        "regions",
        "registry",
        "texts",
        "trail",
    )

    def __init__(self, registry: Registry, long: int, regions: list[Region] | None = None) -> None:
        self.registry = registry
        self.encoders = registry.encoders
        self.long = long
        self.inline_below = min(INLINE_BELOW, long)
        self.regions = regions
        self.buffers: list[memoryview] = []
        self.arena = bytearray()
        self.count = 0
        self.budget = MAX_BODY
        self.trail: list[str] = []
        # (address, extent, ...) -> reference: what lies in the same memory travels once.
        self.placed: dict[tuple[Any, ...], int] = {}
        self.texts: dict[int, int] = {}
        # The same for memory of other devices: -> what was copied from there.
        self.foreign: dict[tuple[Any, ...], np.ndarray[Any, Any]] = {}
        self.devices: list[str] = []
        # Keeps what `placed` and `texts` know alive: an address or id must not be given to something else meanwhile.
        self.kept: list[Any] = []

    def plain(self, value: Any, depth: int) -> Any:
        """Return what stands for `value` in the tree."""
        kind = type(value)
        if kind in NATIVE:
            return value
        self.count += 1
        handler = self.encoders.get(kind) or self.registry.find(kind)
        if handler is None:
            raise Refused(f"an object of type {_full_name(kind)}", hint_for(value))
        return handler(value, self, depth)

    def charge(self, n_items: int, depth: int) -> None:
        """Account for a container of `n_items`, before they are walked.

        An item takes at least one byte of the body, so that what cannot fit is refused before it is built; this ends
        containers that hold each other, too.
        """
        if depth > MAX_DEPTH:
            raise Refused(f"nested deeper than {MAX_DEPTH} levels", "or a container contains itself")
        self.budget -= n_items + 1
        if self.budget < 0 or self.count > MAX_CONTAINERS:
            raise self._too_large()

    def fold(self, node: list[Any]) -> list[Any]:
        """Return `node`, cut into parts when it is too long for one list on the wire."""
        if len(node) <= FOLD_LENGTH:
            return node
        parts = [node[at : at + FOLD_LENGTH] for at in range(0, len(node), FOLD_LENGTH)]
        if len(parts) >= FOLD_LENGTH:
            raise Refused(f"a container of {len(node) - 1} items", "send many numbers as an array")
        self.count += len(parts)
        return [FOLDED, *parts]

    def add(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        if not view.c_contiguous:
            raise Refused("a buffer that is not C-contiguous", "copy it first")
        self.buffers.append(view if view.format == "B" and view.ndim == 1 else _as_bytes(view))
        return len(self.buffers) - 1

    def add_text(self, owner: str | bytes, data: bytes) -> int:
        """Add the bytes of a long immutable; the same object travels once."""
        reference = self.texts.get(id(owner))
        if reference is None:
            reference = self.texts[id(owner)] = self.add(data)
            self.kept.append(owner)
        return reference

    def place(self, view: memoryview, n_bytes: int) -> int:
        """Place the memory of an array, `view` (n_bytes > 0, format 'B'); the same memory gets the same reference."""
        try:
            start = addressof(c_char.from_buffer(view))
        except TypeError:  # read-only memory has no faster way
            start = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
        key = (start, n_bytes)
        reference = self.placed.get(key)
        if reference is None:
            reference = self.placed[key] = self.put(view, n_bytes)
        return reference

    def put(self, view: memoryview, n_bytes: int) -> int:
        """Put bytes into a buffer or, if they are few, into the body; the reference of the latter is negative."""
        if n_bytes < self.inline_below and len(self.arena) < INLINE_ROOM:
            offset = len(self.arena)
            self.arena += view
            self.arena += bytes(-n_bytes % 16)  # the next one begins aligned for every dtype
            self.kept.append(view)
            return ~offset
        self.buffers.append(view)
        return len(self.buffers) - 1

    def device_number(self, device: str) -> int:
        """Return a number for `device`, within this value."""
        if device not in self.devices:
            self.devices.append(device)
        return self.devices.index(device)

    def place_copy(self, key: tuple[Any, ...], owner: object, make: Callable[[], memoryview]) -> int:
        """Place bytes that stand for `owner`, which lies at ``key = (address, extent, n_bytes, ...)`` with gaps."""
        if key not in self.placed:
            self.placed[key] = self.put(make(), key[2])
            self.kept.append(owner)
        return self.placed[key]

    def fetched(
        self, key: tuple[Any, ...], owner: object, fetch: Callable[[], np.ndarray[Any, Any]]
    ) -> np.ndarray[Any, Any]:
        """Return the host's copy of `owner`, which lies in the memory of a device at `key`, as in `place_copy`."""
        if key not in self.foreign:
            self.foreign[key] = fetch()
            self.kept.append(owner)
        return self.foreign[key]

    def region_of(self, start: int, extent: int) -> Region | None:
        """Return the region that holds `extent` bytes from `start`, if there is one."""
        if not self.regions:
            return None
        at = bisect_right(self.regions, start, key=lambda region: region.start) - 1
        if at < 0 or start + extent > self.regions[at].end:
            return None
        return self.regions[at]

    def place_region(self, region: Region, read: Callable[[], memoryview]) -> int:
        """Return the reference of `region`; `read` gives its bytes and is called once."""
        if region.reference is None:
            region.reference = self.put(read(), region.end - region.start)
        return region.reference

    def find_regions(self) -> list[Region]:
        """Return the regions of memory shared by arrays that are not the same array.

        Shared means that together they cover no more memory than they have: columns of one matrix interleave without
        sharing anything, and the matrix around them must not travel for them.
        """
        keys = sorted([*self.placed, *self.foreign], key=_first)
        starts = [key[0] for key in keys]
        ends = [key[0] + key[1] for key in keys]
        if all(map(int.__le__, ends, starts[1:])):
            return []
        regions = []
        at = 0
        while at < len(keys):
            begin, end, n_bytes = at, ends[at], 0
            while at < len(keys) and starts[at] < end:
                end = max(end, ends[at])
                n_bytes += min(keys[at][1:3])
                at += 1
            if at - begin > 1 and end - starts[begin] <= n_bytes:
                regions.append(Region(starts[begin], end))
        return regions

    def pack(self, root: Any, n_elsewhere: int = 0) -> bytes:
        """Return the body of the tree `root`, parts of which may name `n_elsewhere` buffers that are not here."""
        packer = msgpack.Packer(default=self._big_int, strict_types=True, buf_size=4096)
        body: bytes = packer.pack([root, n_elsewhere + len(self.buffers), bytes(self.arena)])
        if len(body) > MAX_BODY or self.count > MAX_CONTAINERS:
            raise self._too_large()
        return body

    def _big_int(self, value: Any) -> list[Any]:
        # msgpack asks about nothing but integers beyond 64 bits: the tree holds only lists and scalars.
        if type(value) is not int:
            raise Refused(f"an object of type {_full_name(type(value))} from a decomposer")
        self.count += 1
        return [BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)]

    def _too_large(self) -> Refused:
        return Refused(
            f"more than fits into a body of {MAX_BODY} bytes and {MAX_CONTAINERS} containers",
            "arrays and long strings travel outside of it: send many numbers as one array",
        )


def encode_with(registry: Registry, value: Any, externalise_from: int) -> Encoded:
    """Encode `value` with the types of `registry`; see `flarebus.codec.encode`."""
    if type(externalise_from) is not int or externalise_from < 1:
        raise ConfigError("externalise_from", externalise_from, "a number of bytes from 1")
    encoder = Encoder(registry, externalise_from)
    try:
        root = encoder.plain(value, 0)
        if len(encoder.placed) + len(encoder.foreign) > 1 and (regions := encoder.find_regions()):
            # The first one stays until the end: it holds memory that decomposers made, and a region of which must not
            # be given to something else before its bytes are read.
            first, encoder = encoder, Encoder(registry, externalise_from, regions)
            encoder.kept.append(first)
            root = encoder.plain(value, 0)
        return Encoded(encoder.pack(root), encoder.buffers)
    except Refused as error:
        raise EncodeError(path_of(encoder.trail), error.found, error.hint) from error.__cause__
    except UnicodeEncodeError as error:
        raise _bad_text(registry, value) from error
    except MemoryError:
        raise
    except Exception as error:  # such as a dict that another thread changes meanwhile
        raise EncodeError(path_of(encoder.trail), f"{type(error).__name__}: {error}") from error


def _bad_text(registry: Registry, value: Any) -> EncodeError:
    """Return the error for a string that is no Unicode text, with its path: a walk that looks at each string."""
    encoder = Encoder(registry, 1)
    encoder.long = 0
    try:
        encoder.plain(value, 0)
    except Refused as error:
        return EncodeError(path_of(encoder.trail), error.found, error.hint)
    return EncodeError("value", "a string with a lone surrogate")


def _as_bytes(view: memoryview) -> memoryview:
    # A cast refuses empty shapes and formats of other byte orders; NumPy reads any contiguous bytes.
    return np.frombuffer(view, np.uint8).data if view.nbytes else memoryview(b"")


def _full_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
