"""Run client.py on simulated sites and measure the model that comes out."""

import argparse
from pathlib import Path

import keras
from client import load_data
from net import make_net

from flarebus.recipe import SimEnv
from flarebus.recipe.tf import FedAvgRecipe


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-clients", type=int, default=2)
    parser.add_argument("--num-rounds", type=int, default=5)
    parser.add_argument("--external", action="store_true", help="train in a process of its own for each site")
    args = parser.parse_args()

    keras.utils.set_random_seed(0)
    model = make_net()
    recipe = FedAvgRecipe(
        name="hello-tensorflow",
        model=model,
        min_clients=args.n_clients,
        num_rounds=args.num_rounds,
        train_script="client.py",
        train_args=f"--n-sites {args.n_clients}",
        launch_external_process=args.external,
    )
    run = recipe.execute(SimEnv(num_clients=args.n_clients))
    result = Path(run.get_result())
    print("status:", run.get_status())
    print("result:", result)

    model.load_weights(result / "server" / "models" / "FL_global_model.weights.h5")
    _, (test_x, test_y) = load_data("site-1", args.n_clients)
    _, accuracy = model.evaluate(test_x, test_y, verbose=0)
    print(f"accuracy: {accuracy:.3f}")


if __name__ == "__main__":
    main()
