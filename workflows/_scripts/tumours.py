"""The data of the statistics demo: measurements of tumours that come with scikit-learn, split over clinics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flarebus.statistics import ColumnStatistics

__all__ = ["FEATURES", "Tumours", "columns_of_all"]

FEATURES = ("mean radius", "mean texture", "mean smoothness", "mean concavity", "mean symmetry", "worst area")
# How far clinics differ in the size of the tumours that they see: standard deviations of noise on it before it sorts.
_MIX = 1.0


class Tumours(ColumnStatistics):
    """The table of one clinic.

    Args:
        sites: names of all clinics.
        seed: of the split.
    """

    def __init__(self, sites: Sequence[str], seed: int = 0) -> None:
        self.sites = list(sites)
        self.seed = seed

    def load(self, site_name: str) -> Mapping[str, Mapping[str, Any]]:
        """The rows of `site_name`: some see larger tumours than others."""
        table = columns_of_all()
        radius = table["mean radius"]
        noise = np.random.default_rng(self.seed).normal(0, _MIX * radius.std(), len(radius))
        mine = np.array_split(np.argsort(radius + noise), len(self.sites))[self.sites.index(site_name)]
        return {"tumours": {name: values[mine] for name, values in table.items()}}


def columns_of_all() -> dict[str, NDArray[np.float64]]:
    """The columns of all clinics together: 569 tumours.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    names = data.feature_names.tolist()
    return {name: data.data[:, names.index(name)] for name in FEATURES}
