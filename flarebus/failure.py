"""Failure: an exception as the body of an ERROR message, and back. The only place where the two meet.

Only a few kinds come back as what they were; anything else that a handler raised becomes a `RemoteError` that names it.
No class is looked up by a name from the wire.
"""

from __future__ import annotations

import msgpack

from flarebus.errors import DeadlineExceeded, DecodeError, FlarebusError, NoRoute, RemoteError, SourceLost

__all__ = ["decode_failure", "encode_failure"]

MAX_TEXT = 4000


def encode_failure(error: BaseException) -> bytes:
    """The body of an ERROR message for `error`: its kind and its text, never its traceback."""
    fields: tuple[str, ...]
    match error:
        case NoRoute():
            fields = ("NoRoute", error.target, error.reason)
        case SourceLost():
            fields = ("SourceLost", error.holder, error.reason)
        case RemoteError():
            fields = ("RemoteError", error.kind, error.text)
        case _:
            fields = (type(error).__name__, _text(error))
    # Replaced: a file name that is no text must not turn the report of an error into another error.
    packed: bytes = msgpack.packb([field[:MAX_TEXT] for field in fields], unicode_errors="replace")
    return packed


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a class of the user's own: whatever it does, its kind still travels
        return ""


def decode_failure(body: bytes, address: str) -> FlarebusError:
    """The error that `address` answered with."""
    try:
        kind, *texts = msgpack.unpackb(body, max_array_len=4, max_str_len=4 * MAX_TEXT)
        if not all(type(text) is str for text in (kind, *texts)):
            raise TypeError("not text")
    except Exception as error:  # a body that cannot be read is an answer too: that it failed
        return DecodeError(f"{address} answered with an error that cannot be read ({type(error).__name__})")
    match kind, texts:
        case "NoRoute", [target, reason]:
            return NoRoute(target, reason)
        case "SourceLost", [holder, reason]:
            return SourceLost(holder, reason)
        case "DeadlineExceeded", [text]:
            return DeadlineExceeded(f"{address}: {text}")
        case "RemoteError", [inner, text]:
            return RemoteError(address, inner, text)
        case _:
            return RemoteError(address, kind, " ".join(texts))
