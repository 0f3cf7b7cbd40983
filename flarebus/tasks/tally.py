"""Tally: who has answered a broadcast, who can still, and when it is over. Pure: `now` comes in.

One vocabulary for every workflow: `min_responses` usable results are needed; once they are there, the others still have
`wait_time_after_min_received` seconds; all of it takes at most `timeout` seconds.
"""

from __future__ import annotations

from collections.abc import Iterable

from flarebus.errors import QuorumNotReached

__all__ = ["Tally"]


class Tally:
    """The state of one broadcast.

    Args:
        sites: who was asked.
        needed: usable results that it takes; 0 means one from each.
        grace_s: seconds for the others once `needed` are there; None waits for all that are alive.
        timeout_s: seconds for everything; None is no limit.
        now: monotonic seconds.
        newcomers: more sites may be asked later, so that it is never over for want of sites.
    """

    def __init__(
        self,
        sites: Iterable[str],
        needed: int,
        grace_s: float | None,
        timeout_s: float | None,
        now: float,
        newcomers: bool = False,
    ) -> None:
        self.open = set(sites)
        self.needed = needed or (0 if newcomers else len(self.open))
        self.newcomers = newcomers
        self.usable: set[str] = set()
        self.failed: dict[str, str] = {}
        """site -> why it does not count."""
        self._grace_s = grace_s
        self._timeout_s = timeout_s
        self._timeout_at = None if timeout_s is None else now + timeout_s
        self._grace_at: float | None = None

    def use(self, site: str, now: float) -> None:
        """A usable result of `site` is there."""
        self.open.discard(site)
        self.usable.add(site)
        if self._grace_s is not None and self._grace_at is None and len(self.usable) >= self.needed:
            self._grace_at = now + self._grace_s

    def fail(self, site: str, reason: str) -> None:
        """Nothing usable will come from `site`, or what came must not count after all."""
        self.open.discard(site)
        self.usable.discard(site)
        self.failed[site] = reason
        if len(self.usable) < self.needed:
            self._grace_at = None

    def is_over(self, now: float) -> bool:
        """Whether there is nothing more to wait for."""
        if not self.newcomers and (not self.open or len(self.usable) + len(self.open) < self.needed):
            return True
        deadline = self.deadline()
        return deadline is not None and now >= deadline

    def deadline(self) -> float | None:
        """When it is over at the latest, as far as is known now."""
        return min((when for when in (self._timeout_at, self._grace_at) if when is not None), default=None)

    def close(self) -> None:
        """No more results count. Whoever has not answered is late.

        Raises:
            QuorumNotReached: fewer usable results than needed.
        """
        late = "no answer in time" if self._grace_at is not None or self._timeout_at is not None else "no answer"
        if self._timeout_s is not None and self._grace_at is None:
            late = f"no answer within {self._timeout_s:g} s"
        for site in sorted(self.open):
            self.failed.setdefault(site, late)
        self.open.clear()
        if len(self.usable) < self.needed:
            raise QuorumNotReached(self.needed, len(self.usable), self.failed)
