"""The training script of the demo: what a site runs. An ordinary Client API script.

Each round it measures the model it received, on the held-out digits and on the site's own, trains it on the site's own,
and sends it back. What FedProx and SCAFFOLD want of a site, it does where the server says so. For cross-site evaluation
it submits the model it trained that knows the held-out digits best, and measures those of others.
"""

from __future__ import annotations

import argparse

import numpy as np

import flarebus.client as flare
from flarebus.client.algorithms import Scaffold
from workflows._digits import ALPHA, accuracy, initial_model, load_digits, partition, train

__all__ = ["main"]


def main() -> None:
    """Take part until the job ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sites", required=True, help="names of all sites, comma between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alpha", type=float, default=ALPHA)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    args = parser.parse_args()

    flare.init()
    sites = args.sites.split(",")
    number = sites.index(flare.get_site_name())
    digits = load_digits(args.seed)
    mine = partition(digits.train_y, len(sites), args.alpha, args.seed)[number]
    x, y = digits.train_x[mine], digits.train_y[mine]
    print(f"{len(y)} examples, by class: {np.bincount(y, minlength=10).tolist()}")

    best, best_accuracy = initial_model(args.seed), -1.0
    scaffold = Scaffold()
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        if flare.is_submit_model():
            flare.send(flare.FLModel(params=best))
            continue
        params = model.params or {}
        metrics = {
            "accuracy": accuracy(params, digits.test_x, digits.test_y),
            "local_accuracy": accuracy(params, x, y),
        }
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics=metrics))
            continue
        # Seeded by site and round: the same numbers whichever worker trains the site, and whenever.
        random = np.random.default_rng((args.seed, number, model.current_round or 0))
        scaffold.begin(model)
        n_steps = train(
            params,
            x,
            y,
            random,
            epochs=args.epochs,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            mu=model.meta.get("fedprox_mu", 0.0),
            correct=scaffold.correct,
        )
        print(f"round {model.current_round}: {metrics}, {n_steps} steps")
        trained_accuracy = accuracy(params, digits.test_x, digits.test_y)
        if trained_accuracy > best_accuracy:
            best, best_accuracy = {name: array.copy() for name, array in params.items()}, trained_accuracy
        meta = {"NUM_STEPS_CURRENT_ROUND": n_steps}
        flare.send(flare.FLModel(params=params, optimizer_params=scaffold.finish(), metrics=metrics, meta=meta))


if __name__ == "__main__":
    main()
