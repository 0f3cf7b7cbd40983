"""Message: what goes through a pipe. Plain data in a body, the bytes of arrays beside it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from enum import Enum

from flarebus.errors import ConfigError, DecodeError
from flarebus.message import Buffer, Manifest

__all__ = ["ID_LENGTH", "Message", "MessageType", "Topic"]

ID_LENGTH = 32
_ID = re.compile(r"[0-9a-f]{32}")
_TOPIC = re.compile(r"[A-Za-z0-9_]{1,64}")


class MessageType(str, Enum):
    """Whether a message asks or answers."""

    REQUEST = "REQ"
    REPLY = "REP"


class Topic:
    """Topics that belong to the handler above a pipe; all others are free."""

    ABORT = "_ABORT_"
    END = "_END_"
    ERROR = "_ERROR_"
    """Of a reply: the request failed, and the body says how (`flarebus.failure`)."""
    HEARTBEAT = "_HEARTBEAT_"
    PEER_GONE = "_PEER_GONE_"


class Message:
    """One message on a pipe.

    Args:
        topic: letters, digits and underscores, at most 64.
        body: plain data as the codec encodes it, at most 1 MiB; a buffer stands in it as its index.
        buffers: bytes of the arrays, in order; kept by reference, so they must not change until the message was read
            or, for a request, answered. Those of a message that came in are writable and the receiver's own.
        manifest: the buffers while they are still with a holder elsewhere on the bus, instead of `buffers`. Only for a
            pipe with `passes_manifests`.
        readers: addresses of cells that may pull the buffers besides the peer, for a pipe with `passes_manifests`.
        type: REQUEST or REPLY.
        req_id: of a reply: the `msg_id` that it answers.
        msg_id: 32 hexadecimal digits, random; the same when the message is sent again.

    Raises:
        ConfigError: a field is not as above.
    """

    __slots__ = ("body", "buffers", "manifest", "msg_id", "readers", "req_id", "topic", "type")

    def __init__(
        self,
        topic: str,
        body: bytes = b"",
        buffers: Sequence[Buffer] = (),
        *,
        manifest: Manifest | None = None,
        readers: Sequence[str] = (),
        type: MessageType = MessageType.REQUEST,
        req_id: str = "",
        msg_id: str = "",
    ) -> None:
        if not _TOPIC.fullmatch(topic):
            raise ConfigError("topic", topic, "1 to 64 letters, digits and underscores")
        if (type is MessageType.REPLY) != bool(req_id):
            raise ConfigError("req_id", req_id, "the msg_id that a reply answers; requests have none")
        for name, value in (("msg_id", msg_id), ("req_id", req_id)):
            if value and not _ID.fullmatch(value):
                raise ConfigError(name, value, f"{ID_LENGTH} hexadecimal digits")
        if manifest is not None and buffers:
            raise ConfigError("manifest", manifest.holder, "buffers or a manifest of them, not both")
        self.topic = topic
        self.body = body
        self.buffers = buffers
        self.manifest = manifest
        self.readers = readers
        self.type = type
        self.req_id = req_id
        self.msg_id = msg_id or secrets.token_hex(ID_LENGTH // 2)

    @property
    def nbytes(self) -> int:
        """Bytes of the body and of all buffers, wherever they are."""
        held = self.manifest.nbytes if self.manifest is not None else sum(memoryview(b).nbytes for b in self.buffers)
        return len(self.body) + held

    def reply(self, body: bytes = b"", buffers: Sequence[Buffer] = ()) -> Message:
        """An answer to this request, of the same topic."""
        return Message(self.topic, body, buffers, type=MessageType.REPLY, req_id=self.msg_id)

    def head(self) -> str:
        """All but body and buffers as one word without blanks, for a pipe to write down: ``REQ.topic.id.``."""
        return ".".join((self.type.value, self.topic, self.msg_id, self.req_id))

    @classmethod
    def from_head(cls, head: str, body: bytes, buffers: Sequence[Buffer] = ()) -> Message:
        """The message whose `head` was written down.

        Raises:
            DecodeError: it is not one.
        """
        try:
            kind, topic, msg_id, req_id = head.split(".")
            if not _ID.fullmatch(msg_id):
                raise ValueError(msg_id)
            return cls(topic, body, buffers, type=MessageType(kind), req_id=req_id, msg_id=msg_id)
        except ValueError as error:  # ConfigError is one too
            raise DecodeError(f"not the head of a message: {head:.80}") from error

    def __repr__(self) -> str:
        return f"Message({self.head()}, {self.nbytes} bytes)"
