"""A site that adds a fixed step to every weight: the smallest script that takes part in federated averaging.

It ran on another framework before; moving it over changed one line, the import of the Client API.
"""

import argparse

import numpy as np

import flarebus.client as flare


def train(weights, step):
    return weights + step


def evaluate(weights):
    return float(np.mean(weights))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--step", type=float, default=1.0)
    args = parser.parse_args()

    flare.init()
    site = flare.get_site_name()
    print(f"{site} takes part in {flare.system_info()['job_id']}")

    while flare.is_running():
        received = flare.receive()
        weights = received.params["weights"]
        print(f"{site}, round {received.current_round}: mean weight {np.mean(weights):.2f}")

        # What a metric says is about the model that came in, so it is measured before training.
        metrics = {"mean_weight": evaluate(weights)}
        trained = train(weights, args.step)

        flare.send(flare.FLModel(params={"weights": trained}, metrics=metrics, current_round=received.current_round))


if __name__ == "__main__":
    main()
