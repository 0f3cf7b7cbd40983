"""The one script of a trainer process: its seat, from the first `flare.init()` to the end of the process."""

from __future__ import annotations

import atexit
import os
import threading

from flarebus.client.config import from_file
from flarebus.client.engine import Seat, set_process_seat
from flarebus.client.ex_process.engine import TrainerEngine
from flarebus.client.ex_process.logs import configure_logging
from flarebus.errors import ClientApiError, ConfigError

__all__ = ["open_process_seat"]

_lock = threading.Lock()
_has_left = False
_open: tuple[Seat, TrainerEngine] | None = None


def open_process_seat(config_file: str, rank: str) -> Seat:
    """Connect this process to its client job; the same seat again if it is connected.

    Raises:
        ConfigError: the rank is no number, or the configuration cannot be used.
        LinkError: the client job is not there.
        ClientApiError: it refuses this process, or this process has left it before.
    """
    global _open
    if not (rank.isascii() and rank.isdigit() and int(rank) < 1 << 16):
        raise ConfigError("rank", rank, "a whole number from 0")
    with _lock:
        if _open is None:
            if _has_left:
                allowed = "a trainer does so once, when it needs no more tasks"
                raise ClientApiError(f"flare.init(): this process has said goodbye with flare.shutdown(); {allowed}")
            config = from_file(config_file)
            configure_logging(config.get_log_config())
            engine = TrainerEngine.connect(config, int(rank))
            seat = Seat(engine, on_shutdown=_close_process_seat)
            _open = seat, engine
            set_process_seat(seat)
            # After the script's own hooks, which were registered later: those may still log. Not in a process that the
            # script forked: its end is not the end of this one.
            atexit.register(_close_at_exit, os.getpid())
        return _open[0]


def _close_at_exit(pid: int) -> None:
    if os.getpid() == pid:
        _close_process_seat()


def _close_process_seat() -> None:
    """Say goodbye to the client job. Idempotent; also called when the process ends."""
    global _open, _has_left
    with _lock:
        if _open is not None:
            seat, engine = _open
            _open, _has_left = None, True
            seat.closed = True  # it stays where it is, so that later calls hear of the shutdown
            engine.close()
