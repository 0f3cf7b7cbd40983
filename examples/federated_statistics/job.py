"""Describe the tables of three gardens without bringing them together."""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_iris
from tables import Flowers

from flarebus.recipe import FedStatsRecipe, SimEnv
from workflows.statistics import draw

SITES = ["north", "south", "west"]
NAMES = ["sepal_length", "sepal_width", "petal_length", "petal_width"]


def make_tables(folder):
    """A CSV file for each garden, each with irises of all kinds and a few lengths that nobody measured."""
    random = np.random.default_rng(7)
    rows = random.permutation(load_iris().data)
    rows[random.random(rows.shape) < 0.02] = np.nan
    for site, part in zip(SITES, np.array_split(rows, len(SITES)), strict=True):
        np.savetxt(folder / f"{site}.csv", part, "%g", ",", header=",".join(NAMES), comments="")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--min-count", type=int, default=10)
    parser.add_argument("--bins", type=int, default=4)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        make_tables(Path(folder))
        recipe = FedStatsRecipe(
            name="federated-statistics",
            stats_output_path="statistics/irises.json",
            sites=SITES,
            statistic_configs={
                "count": {},
                "failure_count": {},
                "mean": {},
                "stddev": {},
                "histogram": {"*": {"bins": args.bins}, "petal_width": {"bins": args.bins, "range": [0, 3]}},
            },
            stats_generator=Flowers(folder),
            min_count=args.min_count,
        )
        run = recipe.execute(SimEnv(clients=SITES))

    report_file = Path(run.get_result()) / "server" / "statistics" / "irises.json"
    report = json.loads(report_file.read_text())
    for feature, statistics in report.items():
        print(f"{feature}: mean {statistics['mean']['Global']['garden']}, by site", end="")
        print("".join(f" {site} {statistics['mean'][site]['garden']}" for site in SITES if site in statistics["mean"]))
    print("status:", run.get_status())
    print("result:", run.get_result())
    print("report:", report_file)
    print("picture:", draw(report, report_file.with_suffix(".png")))


if __name__ == "__main__":
    main()
