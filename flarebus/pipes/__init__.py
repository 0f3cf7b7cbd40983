"""Pipes: the pluggable link between a client job and its trainer, and the handler above it."""

from __future__ import annotations

from flarebus.pipes.message import Message, MessageType, Topic
from flarebus.pipes.pipe import ExportMode, Mode, Pipe

__all__ = ["ExportMode", "Message", "MessageType", "Mode", "Pipe", "Topic"]
