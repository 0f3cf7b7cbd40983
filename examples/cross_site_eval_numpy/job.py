"""Train a model over hospitals, then evaluate it, and that of each hospital, in all of them."""

import argparse
import json
from pathlib import Path

import numpy as np
from client import N_FEATURES

from flarebus.recipe import SimEnv, add_cross_site_evaluation
from flarebus.recipe.numpy import FedAvgRecipe
from workflows.cross_site_eval import draw


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-clients", type=int, default=3)
    parser.add_argument("--num-rounds", type=int, default=5)
    parser.add_argument("--participants", nargs="+", metavar="SITE", help="who evaluates; all without it")
    args = parser.parse_args()

    recipe = FedAvgRecipe(
        name="cross-site-eval-numpy",
        model={"weights": np.zeros(N_FEATURES), "bias": np.zeros(())},
        min_clients=args.n_clients,
        num_rounds=args.num_rounds,
        train_script="client.py",
        train_args=f"--n-sites {args.n_clients}",
    )
    add_cross_site_evaluation(recipe, validation_timeout=60, participating_clients=args.participants)
    run = recipe.execute(SimEnv(num_clients=args.n_clients))
    folder = Path(run.get_result()) / "server" / "cross_site_val"

    for data_site, row in json.loads((folder / "cross_val_results.json").read_text()).items():
        for owner, metrics in row.items():
            print(f"{owner} on {data_site}: accuracy {metrics['accuracy']:.2f}, loss {metrics['loss']:.3f}")
    print("picture:", draw(run.get_result(), "loss"))
    print("status:", run.get_status())
    print("result:", run.get_result())


if __name__ == "__main__":
    main()
