"""Run client.py on simulated sites and measure the model that comes out."""

import argparse
from pathlib import Path

import torch
from client import evaluate, load_data
from net import Net

from flarebus.recipe import FedAvgRecipe, SimEnv


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-clients", type=int, default=2)
    parser.add_argument("--num-rounds", type=int, default=5)
    parser.add_argument("--external", action="store_true", help="train in a process of its own for each site")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = Net()
    recipe = FedAvgRecipe(
        name="hello-torch",
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

    trained = torch.load(result / "server" / "models" / "FL_global_model.pt", weights_only=True)
    model.load_state_dict(trained)
    _, test_loader = load_data("site-1", args.n_clients, batch_size=32)
    print(f"accuracy: {evaluate(model, test_loader, 'cpu'):.3f}")


if __name__ == "__main__":
    main()
