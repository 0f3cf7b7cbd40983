"""A workflow in which the best model of each round wins, and what its sites implement."""

from __future__ import annotations

from flarebus_tournament.scorer import Scorer
from flarebus_tournament.tournament import Tournament

__all__ = ["Scorer", "Tournament"]
