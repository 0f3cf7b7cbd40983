"""Whether a server can be reached at all: a quick look, for libraries that would try for minutes and say little."""

from __future__ import annotations

import socket
import urllib.request
from urllib.parse import urlsplit

__all__ = ["check_reachable"]

TIMEOUT_S = 5.0
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def check_reachable(url: str) -> None:
    """Connect to the host of `url`, and leave again. A URL of another kind, or behind a proxy, is not looked at.

    Raises:
        OSError: it cannot be reached; says why, without user and password.
    """
    parts = urlsplit(url)
    scheme = parts.scheme.partition("+")[0]
    host, port = parts.hostname, parts.port or _PORTS.get(scheme)
    if host is None or port is None or scheme not in _PORTS:
        return
    if scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return
    try:
        socket.create_connection((host, port), TIMEOUT_S).close()
    except OSError as error:
        raise OSError(f"{host}:{port} cannot be reached: {error.strerror or error}") from None
