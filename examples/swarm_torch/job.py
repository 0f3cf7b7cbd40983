"""Run client.py on simulated sites, as a swarm or with a server that averages, and measure the model that comes out."""

import argparse
from pathlib import Path

import torch
from client import Net, evaluate, load_data

from flarebus.recipe import FedAvgRecipe, SimEnv, SwarmRecipe


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-clients", type=int, default=3)
    parser.add_argument("--num-rounds", type=int, default=6)
    parser.add_argument("--fedavg", action="store_true", help="let the server average")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = Net()
    recipe_class = FedAvgRecipe if args.fedavg else SwarmRecipe
    recipe = recipe_class(
        name="fedavg-torch" if args.fedavg else "swarm-torch",
        model=model,
        min_clients=args.n_clients,
        num_rounds=args.num_rounds,
        train_script="client.py",
        train_args=f"--n-sites {args.n_clients}",
    )
    run = recipe.execute(SimEnv(num_clients=args.n_clients))
    result = Path(run.get_result())
    print("status:", run.get_status())
    print("result:", result)

    holder = "server" if args.fedavg else "site-1"
    trained = torch.load(result / holder / "models" / "FL_global_model.pt", weights_only=True)
    model.load_state_dict(trained)
    _, test_data = load_data(0, args.n_clients)
    print(f"accuracy: {evaluate(model, *test_data):.3f}")


if __name__ == "__main__":
    main()
