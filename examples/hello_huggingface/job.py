"""Run client.py on simulated sites and measure the model that comes out."""

import argparse
from pathlib import Path

import torch
from vit import load_data, make_model

from flarebus.recipe import FedAvgRecipe, SimEnv


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n-clients", type=int, default=2)
    parser.add_argument("--num-rounds", type=int, default=3)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = make_model()
    recipe = FedAvgRecipe(
        name="hello-huggingface",
        model=model,
        min_clients=args.n_clients,
        num_rounds=args.num_rounds,
        train_script="client.py",
        train_args=f"--n-sites {args.n_clients}",
        key_metric="eval_accuracy",  # as the Trainer calls it
    )
    run = recipe.execute(SimEnv(num_clients=args.n_clients))
    result = Path(run.get_result())
    print("status:", run.get_status())
    print("result:", result)

    trained = torch.load(result / "server" / "models" / "FL_global_model.pt", weights_only=True)
    model.load_state_dict(trained)
    _, test_set = load_data()
    model.eval()
    with torch.no_grad():
        predicted = model(pixel_values=test_set.images).logits.argmax(dim=1)
    print(f"accuracy: {(predicted == test_set.labels).float().mean():.3f}")


if __name__ == "__main__":
    main()
