"""A site that clusters its share of the iris flowers."""

import argparse

import numpy as np
from sklearn.cluster import KMeans
from sklearn.datasets import load_iris
from sklearn.metrics import homogeneity_score, pairwise_distances_argmin

import flarebus.client as flare


def load_data(site, n_sites):
    """This site's share of the flowers; their species only say how good the clusters are."""
    x, y = load_iris(return_X_y=True)
    mine = slice(int(site.rpartition("-")[2]) - 1, None, n_sites)
    return x[mine], y[mine]


def means(x, labels, center):
    """The mean of the points of each cluster, and how many they are; where there is none, the centre it had."""
    count = np.bincount(labels, minlength=len(center))
    moved = [x[labels == index].mean(axis=0) if n else center[index] for index, n in enumerate(count)]
    return np.array(moved), count


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-sites", type=int, required=True)
    args = parser.parse_args()

    flare.init()
    site = flare.get_site_name()
    x, y = load_data(site, args.n_sites)

    while flare.is_running():
        received = flare.receive()
        center = received.params.get("center")
        if center is None:  # the first round: clusters of this site alone are where the others begin
            model = KMeans(received.params["n_clusters"], n_init=10, random_state=0).fit(x)
            flare.send(flare.FLModel(params={"center": model.cluster_centers_, "count": None}))
            continue

        labels = pairwise_distances_argmin(x, center)
        homogeneity = float(homogeneity_score(y, labels))
        print(f"{site}, round {received.current_round}: homogeneity {homogeneity:.3f}")
        moved, count = means(x, labels, center)
        flare.send(
            flare.FLModel(
                params={"center": moved, "count": count},
                metrics={"homogeneity": homogeneity},
                meta={"NUM_STEPS_CURRENT_ROUND": len(x)},
            )
        )


if __name__ == "__main__":
    main()
