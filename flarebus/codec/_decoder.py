"""The way in: a body and buffers that anybody may have made become a value, or a `DecodeError`.

Nothing is allocated on the word of a number: what is built is bounded by the bytes that came. msgpack reads lists and
scalars only; maps and extension types are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgpack
import numpy as np

from flarebus.codec._encoder import path_of
from flarebus.codec._ids import FOLD_LENGTH, MAX_BODY, MAX_CONTAINERS
from flarebus.codec._registry import Malformed, Registry, Source
from flarebus.errors import DecodeError
from flarebus.message import Buffer

__all__ = ["Decoder", "check_keys", "decode_with", "read_body"]

# How often the bytes of all buffers may be read by checks of their content: many arrays may name one buffer.
_MAX_SCANS = 16
# Below this many keys, even keys made to collide cost nothing that can be felt.
_FLOOD_FROM = 1000


class _Again(Exception):
    """Arrays on one buffer need different alignments: decode again, from aligned copies."""


class Decoder(Source):
    """The state of one `decode`. Handlers call `value` for what they contain."""

    __slots__ = (
        "_copy",
        "_owned",
        "_scanned",
        "_scans_left",
        "_texts",
        "arena",
        "decoders",
        "trail",
        "used",
        "views",
    )

    def __init__(self, registry: Registry, views: list[memoryview], arena: bytes, *, copy: bool) -> None:
        self.decoders = registry.decoders
        self.views = views
        self.arena = memoryview(bytearray(arena))
        self.used = bytearray(len(views))
        self.trail: list[str] = []
        self._copy = copy
        self._owned: set[int] = set()
        self._texts: dict[tuple[int, bool], str | bytes] = {}
        self._scanned: set[tuple[int, int, int]] = set()
        self._scans_left = _MAX_SCANS * (len(arena) + sum(view.nbytes for view in views))

    def value(self, node: Any, depth: int) -> Any:
        """Return the value that `node` of the tree stands for."""
        if type(node) is not list:
            return node
        tag = node[0] if node else None
        if type(tag) is not int:
            raise Malformed("a list without a type id")
        handler = self.decoders.get(tag)
        if handler is None:
            raise Malformed(f"unknown type id {tag}: its decomposer is not registered here")
        return handler(node, self, depth)

    def get(self, reference: int) -> memoryview:
        return self._writable(reference, self._take(reference))

    def whole(self, reference: Any, n_bytes: Any) -> memoryview:
        """Return buffer `reference`, as it came, if it has `n_bytes`."""
        view = self._take(reference)
        if type(n_bytes) is not int or view.nbytes != n_bytes:
            raise Malformed(f"buffer {reference} has {view.nbytes} bytes, and other than this is claimed")
        return view

    def text(self, reference: Any, n_bytes: Any, *, as_str: bool) -> str | bytes:
        """Return the bytes or the string in buffer `reference`; one object however often it is named."""
        view = self.whole(reference, n_bytes)
        key = (reference, as_str)
        if key not in self._texts:
            self._texts[key] = str(view, "utf-8") if as_str else bytes(view)
        return self._texts[key]

    def is_used(self, reference: Any) -> bool:
        """Whether anything named this buffer before."""
        self._view(reference)
        return bool(self.used[reference])

    def array(self, reference: Any, shape: Sequence[int], dtype: np.dtype[Any], n_bytes: int) -> np.ndarray[Any, Any]:
        """Return a writable, aligned array in C order on all of a buffer, or on some of the body's own bytes."""
        if type(reference) is not int or not -self.arena.nbytes <= reference < len(self.views):
            raise Malformed(f"a reference to none of the {len(self.views)} buffers")
        if reference < 0:
            found = np.ndarray(shape, dtype, self.arena, ~reference)  # checks that it fits
        else:
            view = self.views[reference]
            if view.nbytes != n_bytes:
                raise Malformed(f"an array of {n_bytes} bytes on the {view.nbytes} bytes of buffer {reference}")
            if self._copy or view.readonly:
                view = self._own(reference, view)
            if self.used[reference] < 2:
                self.used[reference] += 1
            found = np.ndarray(shape, dtype, view)
        return found if found.flags.aligned else self._aligned(found, reference, 0)

    def array_view(
        self,
        reference: Any,
        shape: Sequence[int],
        dtype: np.dtype[Any],
        n_bytes: int,
        offset: int,
        strides: Sequence[int],
    ) -> np.ndarray[Any, Any]:
        """Return a writable, aligned array with strides on a part of a buffer or of the body's own bytes.

        `shape`, `strides` and `offset` are integers from 0, and there is at least one item.
        """
        inside = type(reference) is int and reference < 0
        view = self.arena if inside else self._take(reference)
        start = offset + ~reference if inside else offset
        reach = sum((dim - 1) * stride for dim, stride in zip(shape, strides, strict=True)) + dtype.itemsize
        # In Python's integers: NumPy's own check may overflow.
        if n_bytes > view.nbytes or start + reach > view.nbytes:
            raise Malformed(f"an array that leaves the {view.nbytes} bytes it lies in")
        found = np.ndarray(shape, dtype, view if inside else self._writable(reference, view), start, strides)
        return found if found.flags.aligned else self._aligned(found, reference, start)

    def may_scan(self, reference: int, offset: int, n_bytes: int) -> bool:
        """Whether these bytes have still to be looked at.

        Raises:
            Malformed: more reading is asked for than any honest value needs.
        """
        key = (reference, offset, n_bytes)
        if key in self._scanned:
            return False
        self._scanned.add(key)
        self._scans_left -= n_bytes
        if self._scans_left < 0:
            raise Malformed("too many arrays on the same bytes")
        return True

    def finish(self) -> None:
        """Check that every buffer was named.

        Raises:
            Malformed: one was not: its bytes would have come for nothing.
        """
        if 0 in self.used:
            raise Malformed(f"buffer {self.used.index(0)} belongs to nothing")

    def _view(self, reference: Any) -> memoryview:
        if type(reference) is not int or not 0 <= reference < len(self.views):
            raise Malformed(f"a reference to none of the {len(self.views)} buffers")
        return self.views[reference]

    def _take(self, reference: Any) -> memoryview:
        view = self._view(reference)
        if self.used[reference] < 2:
            self.used[reference] += 1
        return view

    def _own(self, reference: int, view: memoryview) -> memoryview:
        """Replace a buffer by a writable, aligned copy; all arrays on it share the copy."""
        if reference not in self._owned:
            copied = np.empty(view.nbytes, np.uint8)
            copied[:] = np.frombuffer(view, np.uint8) if view.nbytes else ()
            self.views[reference] = copied.data
            self._owned.add(reference)
        return self.views[reference]

    def _writable(self, reference: int, view: memoryview) -> memoryview:
        return self._own(reference, view) if self._copy or view.readonly else view

    def _aligned(self, found: np.ndarray[Any, Any], reference: int, start: int) -> np.ndarray[Any, Any]:
        if reference < 0 or reference in self._owned:
            return found.copy("K")  # starts at an odd place within its region; nothing else can help
        if self.used[reference] > 1:
            raise _Again
        view = self._own(reference, self.views[reference])
        again = np.ndarray(found.shape, found.dtype, view, start, found.strides)
        return again if again.flags.aligned else again.copy("K")


def decode_with(registry: Registry, body: Buffer, buffers: Iterable[Buffer], *, copy: bool) -> Any:
    """Decode with the types of `registry`; see `flarebus.codec.decode`."""
    views = [_as_view(buffer) for buffer in buffers]
    trail: list[str] = []
    try:
        root, n_buffers, arena = read_body(bytes(body) if type(body) is not bytes else body)
        if n_buffers != len(views):
            raise Malformed(f"{len(views)} buffers came, and other than this is claimed")
        decoder = Decoder(registry, views, arena, copy=copy)
        trail = decoder.trail
        try:
            found = decoder.value(root, 0)
        except _Again:
            trail.clear()
            decoder = Decoder(registry, views, arena, copy=True)
            trail = decoder.trail
            found = decoder.value(root, 0)
        decoder.finish()
    except Malformed as error:
        raise DecodeError(f"{path_of(trail)}: {error}") from error.__cause__
    except Exception as error:  # whatever a hostile body makes of msgpack, NumPy or a decomposer
        raise DecodeError(f"{path_of(trail)}: not readable ({type(error).__name__})") from error
    return found


def check_keys(keys: list[Any]) -> None:
    """Refuse keys of a dict or items of a set that were made to have equal hashes: building it would take minutes.

    Raises:
        Malformed: more than half of them collide.
        TypeError: one of them has no hash.
    """
    if len(keys) > _FLOOD_FROM and 2 * len(set(map(hash, keys))) < len(keys):
        raise Malformed("keys that collide")


def _as_view(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def read_body(body: bytes) -> tuple[Any, int, bytes]:
    """Return the tree in `body`, the number of buffers it claims, and the bytes of its small arrays.

    Raises:
        Malformed: it is no body.
    """
    if len(body) > MAX_BODY:
        raise Malformed(f"a body of {len(body)} bytes; at most {MAX_BODY} are read")
    try:
        top = msgpack.unpackb(
            body,
            strict_map_key=True,
            max_array_len=FOLD_LENGTH,
            max_map_len=0,
            object_hook=_refuse_map,  # an empty one has the length allowed
            max_ext_len=0,
            ext_hook=_refuse_extension,
            # Fewer bytes than the limit cannot hold more containers than the limit.
            list_hook=_counter() if len(body) > MAX_CONTAINERS else None,
        )
    except Malformed:
        raise
    except Exception as error:
        raise Malformed(f"a body that is no msgpack of lists and scalars ({type(error).__name__})") from error
    if type(top) is not list or len(top) != 3 or type(top[1]) is not int or type(top[2]) is not bytes:
        raise Malformed("a body without root, count and bytes")
    return top[0], top[1], top[2]


def _counter() -> Callable[[list[Any]], list[Any]]:
    left = MAX_CONTAINERS + 1  # the top-level list is none of the value

    def count(node: list[Any]) -> list[Any]:
        nonlocal left
        left -= 1
        if left < 0:
            raise Malformed(f"more than {MAX_CONTAINERS} containers")
        return node

    return count


def _refuse_map(found: dict[Any, Any]) -> None:
    raise Malformed("a msgpack map")


def _refuse_extension(code: int, data: bytes) -> None:
    raise Malformed("a msgpack extension type")
