"""A pipe for flarebus over TCP on one machine. Short on purpose: a model for pipes of your own."""

from __future__ import annotations

from flarebus_tcp_pipe.pipe import TcpPipe

__all__ = ["TcpPipe"]
