"""Run client.py on simulated sites, in processes of its own that are reached through a pipe that was plugged in."""

import argparse

import numpy as np

from flarebus.recipe import FedAvgRecipe, FrameworkType, SimEnv


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pipe", default="tcp", help="name of an installed pipe, or path of a class")
    parser.add_argument("--n-clients", type=int, default=2)
    parser.add_argument("--num-rounds", type=int, default=3)
    args = parser.parse_args()

    recipe = FedAvgRecipe(
        name="custom-pipe",
        model={"weights": np.zeros((256, 1024), np.float32)},
        framework=FrameworkType.NUMPY,
        min_clients=args.n_clients,
        num_rounds=args.num_rounds,
        train_script="client.py",
        launch_external_process=True,
        key_metric="",
    )
    recipe.add_client_config({"pipe": args.pipe})
    run = recipe.execute(SimEnv(num_clients=args.n_clients))
    print("status:", run.get_status())
    print("result:", run.get_result())


if __name__ == "__main__":
    main()
