"""What a client job and its trainer say to each other over their pipes: topics, and the fields of each.

The body of a message is a dict as the codec encodes it; buffers beside it belong to the encoded model in it.

| topic | from | fields | answer |
|---|---|---|---|
| `hello` | trainer | protocol, job_id, site, rank, world_size, pid, host, token | accepted, reason |
| `task` | client job | number, name, round, total_rounds, model, readers | |
| `cancel` | client job | number | |
| `result` | trainer | number, error, model | accepted, reason |
| `left` | trainer, before it says goodbye | number of the task that it took and did not answer, or -1 | |
| `records` (metric channel) | trainer | as `flarebus.client.metrics` makes them | |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flarebus.codec import decode, encode
from flarebus.errors import DecodeError
from flarebus.wire import MAX_BODY_BYTES

__all__ = ["CANCEL", "HELLO", "LEFT", "PROTOCOL", "RECORDS", "RESULT", "TASK", "channel_of", "pack", "unpack"]

PROTOCOL = 1

HELLO = "hello"
TASK = "task"
CANCEL = "cancel"
RESULT = "result"
LEFT = "left"
RECORDS = "records"


def channel_of(channel: str, rank: int) -> str:
    """The channel of a rank: each has a pipe of its own."""
    return channel if rank == 0 else f"{channel}-{rank}"


def pack(**fields: Any) -> bytes:
    """The body of a message; arrays in `fields` are encoded already.

    Raises:
        EncodeError: a field may not travel.
    """
    # Whatever it holds stays in the body: the buffers beside it are the model's.
    return encode(fields, externalise_from=MAX_BODY_BYTES).body


def unpack(body: bytes, **types: type | tuple[type, ...]) -> dict[str, Any]:
    """The fields of a message, each of the type given for its name.

    Raises:
        DecodeError: it is not made of these.
    """
    fields = decode(body, ())
    if not isinstance(fields, Mapping):
        raise DecodeError(f"a message of a pipe holds a dict, not {type(fields).__name__}")
    for name, kind in types.items():
        if not isinstance(fields.get(name), kind):
            raise DecodeError(f"a message of a pipe: field {name!r} is missing or of a wrong type")
    return {name: fields[name] for name in types}
