"""Run client.py on simulated sites."""

import argparse

import numpy as np

from flarebus.recipe import SimEnv
from flarebus.recipe.numpy import FedAvgRecipe


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-clients", type=int, default=2)
    parser.add_argument("--num-rounds", type=int, default=3)
    parser.add_argument("--step", type=float, default=1.0)
    args = parser.parse_args()

    recipe = FedAvgRecipe(
        name="hello-numpy",
        model={"weights": np.arange(9, dtype=np.float32).reshape(3, 3)},
        min_clients=args.n_clients,
        num_rounds=args.num_rounds,
        train_script="client.py",
        train_args=f"--step {args.step}",
        key_metric="mean_weight",
    )
    run = recipe.execute(SimEnv(num_clients=args.n_clients))
    print("status:", run.get_status())
    print("result:", run.get_result())


if __name__ == "__main__":
    main()
