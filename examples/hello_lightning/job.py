"""Run client.py on simulated sites and measure the model that comes out."""

import argparse
from pathlib import Path

import torch
from module import DigitsData, DigitsModule

from flarebus.recipe import FedAvgRecipe, SimEnv


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-clients", type=int, default=2)
    parser.add_argument("--num-rounds", type=int, default=3)
    args = parser.parse_args()

    torch.manual_seed(0)
    module = DigitsModule()
    recipe = FedAvgRecipe(
        name="hello-lightning",
        model=module,
        min_clients=args.n_clients,
        num_rounds=args.num_rounds,
        train_script="client.py",
        train_args=f"--n-sites {args.n_clients}",
    )
    run = recipe.execute(SimEnv(num_clients=args.n_clients))
    result = Path(run.get_result())
    print("status:", run.get_status())
    print("result:", result)

    trained = torch.load(result / "server" / "models" / "FL_global_model.pt", weights_only=True)
    module.load_state_dict(trained)
    images, labels = DigitsData().test_set.tensors
    with torch.no_grad():
        accuracy = (module(images).argmax(dim=1) == labels).float().mean()
    print(f"accuracy: {accuracy:.3f}")


if __name__ == "__main__":
    main()
