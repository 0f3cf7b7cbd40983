"""The statistics of a site: where its table is. All else comes with ColumnStatistics."""

import numpy as np

from flarebus.statistics import ColumnStatistics


class Flowers(ColumnStatistics):
    """The irises of one garden, in a CSV file called after the site.

    Args:
        folder: where the files of all sites are; at a real site, where its own is.
    """

    def __init__(self, folder):
        self.folder = folder

    def load(self, site_name):
        table = np.genfromtxt(f"{self.folder}/{site_name}.csv", delimiter=",", names=True)
        return {"garden": {name: table[name] for name in table.dtype.names}}
