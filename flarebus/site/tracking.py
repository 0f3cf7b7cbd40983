"""SiteTracking: lets every site of a host track what its own script logs, before it goes to the server.

All metric records leave a host as batches at one place, whether their script runs here or in a trainer: that is where
they are looked into.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flarebus.client.metric_batch import decode_batch
from flarebus.errors import DecodeError
from flarebus.tracking.group import Tracking, TrackingPlan

__all__ = ["SiteTracking"]


class SiteTracking:
    """The trackers of the sites of one host. Any thread may call; no call blocks except `end`.

    Args:
        plan: which, and of what.
        folders: site -> its folder, absolute.
    """

    def __init__(self, plan: TrackingPlan, folders: Mapping[str, Path]) -> None:
        self._sites = {site: Tracking(plan, folder, site) for site, folder in folders.items()} if plan.refs else {}

    def records(self, fields: Mapping[str, Any]) -> None:
        """A batch that is on its way to the server."""
        if not self._sites:
            return
        try:
            records, _ = decode_batch(fields)
        except DecodeError:  # the server refuses it, and its sender hears why
            return
        for site, its in itertools.groupby(records, lambda record: record["site"]):
            tracking = self._sites.get(site)
            if tracking is not None:
                tracking.records(site, list(its))

    def end(self, state: str) -> None:
        """No more records: give the trackers of all sites some time.

        Args:
            state: `completed`, `failed` or `aborted`.
        """
        Tracking.end_all(list(self._sites.values()), state)
