"""What a handler remembers to do everything once: ids that came in, and answers that went out. Both are bounded."""

from __future__ import annotations

from collections import OrderedDict

from flarebus.pipes.message import Message

__all__ = ["Answers", "SeenIds"]

# A message comes again right after itself, not thousands of messages later: ends send in order.
MAX_IDS = 4096
# Answers are kept for the duplicate that crosses them on its way; after that nobody asks for them.
MAX_ANSWERS = 256
MAX_ANSWER_BYTES = 1024 * 1024


class SeenIds:
    """The last ids of messages that came in."""

    def __init__(self) -> None:
        self._ids: OrderedDict[str, None] = OrderedDict()

    def add(self, msg_id: str) -> bool:
        """Note an id; False if it was there already."""
        if msg_id in self._ids:
            return False
        self._ids[msg_id] = None
        if len(self._ids) > MAX_IDS:
            self._ids.popitem(last=False)
        return True


class Answers:
    """The last replies without buffers; those with buffers are the caller's again once they were read."""

    def __init__(self) -> None:
        self._replies: OrderedDict[str, Message] = OrderedDict()
        self._nbytes = 0

    def add(self, reply: Message) -> None:
        """Keep a reply, at the cost of the oldest."""
        if reply.buffers or len(reply.body) > MAX_ANSWER_BYTES or reply.req_id in self._replies:
            return
        self._replies[reply.req_id] = reply
        self._nbytes += len(reply.body)
        while len(self._replies) > MAX_ANSWERS or self._nbytes > MAX_ANSWER_BYTES:
            _, oldest = self._replies.popitem(last=False)
            self._nbytes -= len(oldest.body)

    def get(self, request_id: str) -> Message | None:
        """The reply to a request, if it is still known."""
        return self._replies.get(request_id)
