"""Admission: asks for each new connection whether its key is on the list (the ZAP protocol of ZeroMQ). Fails closed.

Without a handler ZeroMQ admits any key, and with a handler that died it would too, unless the socket enforces its
domain: `sockets.router` sets that before binding.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import zmq
from zmq.utils import z85

from flarebus.loop import Loop

__all__ = ["DOMAIN", "Admission"]

log = logging.getLogger(__name__)

DOMAIN = b"flarebus"
_ENDPOINT = "inproc://zeromq.zap.01"


class Admission:
    """The list of admitted public keys of one context, answered from the loop's own thread.

    Args:
        admitted: public keys as Z85 text.
    """

    def __init__(self, loop: Loop, admitted: Collection[bytes]) -> None:
        self._admitted = {z85.decode(key): key for key in admitted}
        self.refused = 0
        """Connections turned away so far."""
        self._socket = loop.context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(_ENDPOINT)
        loop.add_reader(self._socket, self._read)
        self._loop = loop

    def close(self) -> None:
        """Answer nobody any more. On the loop's thread; idempotent."""
        self._loop.close_socket(self._socket)

    def _read(self) -> None:
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        version, request, domain, _address, _identity, mechanism = frames[:6]
        known = (
            version == b"1.0"
            and domain == DOMAIN
            and mechanism == b"CURVE"
            and len(frames) == 7
            and self._admitted.get(frames[6])
        )
        if not known:
            self.refused += 1
            log.warning("connection refused: its key is not admitted")
        status = (b"200", b"OK", known) if known else (b"400", b"refused", b"")
        self._socket.send_multipart([b"1.0", request, *status, b""])
