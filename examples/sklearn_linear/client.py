"""A site that trains a linear model on its share of the breast cancer data."""

import argparse

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import flarebus.client as flare


def load_data(site, n_sites):
    """This site's share for training, and a quarter of all patients for testing."""
    x, y = load_breast_cancer(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    scaler = StandardScaler().fit(x_train)  # a scale that all sites have agreed on
    mine = slice(int(site.rpartition("-")[2]) - 1, None, n_sites)
    return scaler.transform(x_train[mine]), y_train[mine], scaler.transform(x_test), y_test


def make_model(params, epochs, seed):
    """The estimator that the recipe describes."""
    return SGDClassifier(
        loss=params["loss"],
        penalty=params["penalty"],
        alpha=params["alpha"],
        learning_rate=params["learning_rate"],
        eta0=params["eta0"],
        max_iter=epochs,
        tol=None,
        random_state=seed,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-sites", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()

    flare.init()
    site = flare.get_site_name()
    x_train, y_train, x_test, y_test = load_data(site, args.n_sites)

    while flare.is_running():
        received = flare.receive()
        # What model_params of the recipe says comes in every round; the weights are beside it, except in the first.
        coef, intercept = received.params.get("coef"), received.params.get("intercept")
        metrics = {}
        if coef is not None:
            decisions = x_test @ coef.ravel() + intercept
            metrics["accuracy"] = float(np.mean((decisions > 0) == y_test))

        model = make_model(received.params, args.epochs, received.current_round)
        model.fit(x_train, y_train, coef_init=coef, intercept_init=intercept)
        print(f"{site}, round {received.current_round}: {metrics or 'no model yet'}")

        flare.send(
            flare.FLModel(
                params={"coef": model.coef_, "intercept": model.intercept_},
                metrics=metrics,
                meta={"NUM_STEPS_CURRENT_ROUND": len(y_train)},
            )
        )


if __name__ == "__main__":
    main()
