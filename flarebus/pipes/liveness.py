"""Liveness: when a sign of life is due, and since when the peer has given none. Pure: the time is an argument."""

from __future__ import annotations

from flarebus.errors import ConfigError

__all__ = ["Liveness"]


class Liveness:
    """What one end knows about the life of the other.

    Args:
        interval: seconds of own quiet after which a heartbeat is due.
        timeout: seconds of the peer's silence that mean it is gone; 0 is never.
        awaits_peer: count its silence from its first sign of life, and wait for that for ever.

    Raises:
        ConfigError: the interval is not above 0 and below the timeout.
    """

    def __init__(self, interval: float, timeout: float, awaits_peer: bool = False) -> None:
        if timeout < 0:
            raise ConfigError("heartbeat_timeout", timeout, "seconds, or 0 to let the peer be silent for ever")
        if interval <= 0 or 0 < timeout <= interval:
            raise ConfigError(
                "heartbeat_interval", interval, f"seconds, above 0 and below heartbeat_timeout ({timeout:g})"
            )
        self.interval = interval
        self.timeout = timeout
        self._awaits_peer = awaits_peer
        self._heartbeat_at = self._life_at = 0.0
        self._moved = 0

    def begin(self, now: float, moved: int) -> None:
        """Count silence from here, unless the peer is awaited: one that never comes is gone in time too.

        Args:
            moved: a count that grows while bytes are moving, as it stands.
        """
        self._heartbeat_at = self._life_at = now
        self._moved = moved

    def sent(self, now: float) -> None:
        """Something went out."""
        self._heartbeat_at = now + self.interval

    def heartbeat_in(self, now: float) -> float:
        """Seconds until a heartbeat is due; 0 if it is."""
        return max(self._heartbeat_at - now, 0.0)

    def heard(self, now: float) -> None:
        """Something came in, or this end only now listens again."""
        self._awaits_peer = False
        self._life_at = max(self._life_at, now)

    def notice(self, now: float, last_active: float, moved: int) -> None:
        """Take note of what the pipe itself knows: when the peer was last active, and the count of moved bytes."""
        if last_active > self._life_at:
            self.heard(min(last_active, now))
        if moved != self._moved:
            self._moved = moved
            # Before the peer has come these are not its own.
            if not self._awaits_peer:
                self.heard(now)

    def patience(self, now: float) -> float | None:
        """Seconds of silence left to the peer; 0 if it has none left, None if it may be silent for ever."""
        if not self.timeout or self._awaits_peer:
            return None
        return max(self._life_at + self.timeout - now, 0.0)
