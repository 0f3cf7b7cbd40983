"""The data of the sites, made from a seed: points about one line, seen at each site through its own window."""

import numpy as np
from flarebus_tournament import Scorer


def points(site):
    """x and y of a site."""
    number = int(site.rpartition("-")[2])
    random = np.random.default_rng(number)
    x = random.uniform(number - 1, number + 1, 200)
    return x, 3 * x + 1 + random.normal(0, 0.1, 200)


def loss(params, x, y):
    """The mean squared error of a line."""
    return float(np.mean((params["slope"] * x + params["offset"] - y) ** 2))


class SquaredError(Scorer):
    """Judges lines by the points of the site."""

    def loss(self, params, site):
        return loss(params, *points(site))
