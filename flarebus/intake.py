"""Intake: messages as they come in at a cell, with the arrays that they bring along if there is room for them.

On the loop's thread. Who brings arrays along has credit for that; whether there is room now is asked of whoever handles
the message. What is not taken in is dropped: it can be pulled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import zmq

from flarebus.carrier import Carrier
from flarebus.errors import DecodeError
from flarebus.message import Buffer, Message
from flarebus.slab import SlabPool
from flarebus.sockets import Head, frame_bytes, receive_rest
from flarebus.wire import decode_message, is_carrying

__all__ = ["Intake", "Room"]

log = logging.getLogger(__name__)

Room = Callable[[int], SlabPool | None]
"""Where to put so many bytes of arrays that came along; None: nowhere."""

Came = tuple[Message, Sequence[Buffer] | None]


class Intake:
    """The intake of one cell.

    Args:
        address: of the cell.
        carrier: its transfers.
        hand_over: hands over what came before, which may need the room that is asked for.
    """

    def __init__(self, address: str, carrier: Carrier, hand_over: Callable[[], None]) -> None:
        self._address = address
        self._hand_over = hand_over
        self._carrier = carrier
        self._rooms: dict[tuple[str, str], Room] = {}

    def set_room(self, channel: str, topic: str, room: Room) -> None:
        """Ask `room` about what comes along with messages of `topic`."""
        self._rooms[channel, topic] = room

    def whole(self, frames: Sequence[Buffer | zmq.Frame]) -> Came | None:
        """The message in `frames`, and its arrays if they came along; None (and logged) if it cannot be read."""
        carries = is_carrying(frame_bytes(frames[2]))
        message = self._decode([frame_bytes(frame) for frame in (frames[:4] if carries else frames)])
        if message is None:
            return None
        pool = self._room_for(message) if carries else None
        if pool is None or message.manifest is None:
            return message, None
        return message, self._carrier.take_carried(message.manifest, pool, frames[4:])

    def from_socket(self, head: Head, socket: zmq.Socket[bytes]) -> Came | None:
        """The same for a message whose rest is still on `socket`; its arrays go straight to where they belong."""
        if not is_carrying(head.header):
            rest = map(frame_bytes, receive_rest(socket, head.more)) if head.more else ()
            message = self._decode((*head[:4], *rest))
            return None if message is None else (message, None)
        message = self._decode(head[:4])
        pool = None if message is None else self._room_for(message)
        if socket.closed:  # by somebody who was handed something
            return None
        if message is None or message.manifest is None or pool is None:
            receive_rest(socket, head.more)
            return None if message is None else (message, None)
        return message, self._carrier.read_carried(message.manifest, pool, socket, head.more)

    def _decode(self, frames: Sequence[Buffer]) -> Message | None:
        try:
            return decode_message(frames)
        except DecodeError as error:
            log.warning("%s: message from %.80r dropped: %s", self._address, frames[1], error)
            return None

    def _room_for(self, message: Message) -> SlabPool | None:
        room = self._rooms.get((message.channel, message.topic))
        if room is None or message.manifest is None:
            return None
        self._hand_over()
        return room(message.manifest.nbytes)
